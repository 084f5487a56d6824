"""Checkpoints of a training: from any of them, it goes on as if it had never stopped."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from jaxllm.checkpoint.adapter_writing import write_peft, write_tensors
from jaxllm.checkpoint.unfinished import sync_path
from jaxllm.finetuning.factors import trainable
from jaxllm.finetuning.step import Progress
from jaxllm.formats.adapted import LowRank
from jaxllm.language_model import LanguageModel

STATE, LOG, NAME = "state.safetensors", "training.json", "checkpoint-"


@dataclass
class Log:
    """What has happened so far.

    losses: the mean loss of each step, by answer token.
    evaluations: pairs of how many steps were done and the mean loss on examples that were held out.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)


class Checkpoints:
    """The checkpoints in a folder, of which the newest is kept.

    A checkpoint is an adapter of PEFT's and, beside it, the state of the optimizer. It is written under another name
    and renamed when the disk has it. Its number is how many steps were done: the order of the data follows from that
    and the seed.
    """

    def __init__(self, folder: Path, model: LanguageModel) -> None:
        self.folder, self._model = folder, model

    @property
    def newest(self) -> Path | None:
        found = sorted(self.folder.glob(f"{NAME}*"))
        return found[-1] if found else None

    def load(self, fresh: Progress) -> tuple[Progress, Log]:
        """The newest state, placed as `fresh` is; or `fresh` itself, if there is none."""
        if (path := self.newest) is None:
            return fresh, Log()
        stored = load_file(path / STATE)
        leaves, tree = jax.tree.flatten(fresh)
        placed = [jax.device_put(stored[str(i)], leaf.sharding) for i, leaf in enumerate(leaves)]
        log = json.loads((path / LOG).read_text())
        return jax.tree.unflatten(tree, placed), Log(log["losses"], [tuple(pair) for pair in log["evaluations"]])

    def save(self, now: Progress, changes: Mapping[str, LowRank], log: Log) -> None:
        """Write a checkpoint, and remove those before it."""
        before, writing = sorted(self.folder.glob(f"{NAME}*")), self.folder / "writing"
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
        self.write(writing, changes, log, {})
        write_tensors(writing / STATE, {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(now))})
        for path in (*writing.iterdir(), writing):
            sync_path(path)
        writing.rename(self.folder / f"{NAME}{len(log.losses):08}")
        sync_path(self.folder)
        for path in before:
            shutil.rmtree(path)

    def write(self, folder: Path, changes: Mapping[str, LowRank], log: Log, settings: Mapping[str, Any]) -> None:
        """The adapter, and what happened."""
        shapes = {name: placed.declaration.shape for name, placed in trainable(self._model).items()}
        write_peft(folder, changes, shapes, self._model.config, self._model.name)
        (folder / LOG).write_text(json.dumps(dict(settings) | asdict(log), indent=2) + "\n")

    def finish(self, changes: Mapping[str, LowRank], log: Log, settings: Mapping[str, Any]) -> None:
        """Leave nothing in the folder but the trained adapter."""
        self.write(self.folder, changes, log, settings)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
