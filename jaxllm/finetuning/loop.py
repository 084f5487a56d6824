"""`finetune`: from lines of text to a trained adapter."""

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import jax
import numpy as np
from tqdm import tqdm

from jaxllm.checkpoint.adapter_writing import written_tensors
from jaxllm.checkpoint.unfinished import Kept, unfinished
from jaxllm.errors import InputError
from jaxllm.finetuning.checkpoints import Checkpoints, Log
from jaxllm.finetuning.data import Data, Example, fitted, read_examples
from jaxllm.finetuning.factors import as_adapter, begun, changes, continued, trainable
from jaxllm.finetuning.packing import Rows, packed, row_length
from jaxllm.finetuning.settings import Settings, SettingsOptions
from jaxllm.finetuning.step import Progress, Steps
from jaxllm.language_model import LanguageModel

UNNAMED = "finetuned"


@dataclass(frozen=True)
class Finetuned:
    """What a training came to.

    Attributes:
        name: the adapter's in `model.adapters`, to which it is attached.
        losses: the mean cross-entropy of each step, by answer token.
        evaluations: pairs of how many steps were done and the same on the examples that were held out: before the first
            step, as often as asked for, and at the end.
        tokens_per_second: trained on, without padding, compiling and evaluations.
        cut, skipped: how many examples were longer than a row.
        path: where the adapter is; None: nowhere.
    """

    name: str
    losses: Sequence[float]
    evaluations: Sequence[tuple[int, float]]
    tokens_per_second: float
    cut: int
    skipped: int
    path: Path | None


def finetune(
    model: LanguageModel,
    data: Data,
    out: str | os.PathLike | None = None,
    *,
    evaluation: Data | None = None,
    start: str | os.PathLike | None = None,
    progress: bool = True,
    **settings: Unpack[SettingsOptions],
) -> Finetuned:
    """Train a low-rank adapter (LoRA: Hu et al., 2021) for a model, whose weights stay as they are, in any format.

    Activations are in the model's dtype, factors and optimizer in float32. The trained adapter is attached to the
    model. The same arguments on the same kind of machine give the same adapter.

        model = jaxllm.load("demo")
        jaxllm.finetune(model, "answers.jsonl", "adapter", epochs=3, held_out=20)

    Args:
        data: a JSONL file, or records like its lines, see `jaxllm.finetuning.data`: conversations ("messages"), pairs
            ("prompt", "completion") or texts ("text"). Losses are of answers alone.
        out: a directory for the adapter, as PEFT writes it. While training, checkpoints are kept beside it; if it is
            interrupted, the same call goes on from the newest. None: nothing is written.
        evaluation: more data, which is not trained on but evaluated.
        start: an adapter to go on from, instead of one that changes nothing; `rank`, `alpha` and `targets` are its own.
        progress: whether to show progress on stderr, if that is a terminal.
        **settings: fields of `Settings`.

    Raises:
        InputError: an argument or a line of data cannot be used; or the loss is not finite any more, in which case the
            message says where the newest checkpoint is.
    """
    asked = Settings(**settings)
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer, which training on texts needs")
    if model.mesh.is_multi_process:
        raise InputError("training runs in one process: choose a mesh of the devices of one")
    if model.adapters:
        raise InputError(f"adapters are attached ({', '.join(model.adapters)}): take them off, or merge them")
    most = asked.length or model.max_seq_len
    if most > model.max_seq_len:
        raise InputError(f"length {most}: the context holds {model.max_seq_len} tokens")
    texts = fitted(read_examples(data, model.tokenizer), most, asked.too_long)
    train, held = _divided(texts.examples, asked)
    held += [] if evaluation is None else fitted(read_examples(evaluation, model.tokenizer), most, "cut").examples
    length = asked.length or row_length([*train, *held], most)
    order = np.random.default_rng(asked.seed).permutation(len(train))
    rows, tests = packed(train, length, order), packed(held, length, np.arange(len(held))) if held else None
    places, factors = (
        begun(model, asked.rank, asked.scale, asked.targets, asked.seed)
        if start is None
        else continued(model, os.fspath(start))
    )
    path = None if out is None else Path(out)
    if path is not None:  # what has no name there is noticed before training
        written_tensors(model.config, {name: placed.declaration.shape for name, placed in trainable(model).items()})
    training = Training(model, asked, rows, tests, places, progress and sys.stderr.isatty())
    with _writing(path, model, training, factors) as checkpoints:
        trained, log, rate = training.run(factors, checkpoints)
        if checkpoints is not None:
            told = {"settings": asdict(asked), "cut": texts.cut, "skipped": texts.skipped}
            checkpoints.finish(changes(places, trained), log, told)
    name = UNNAMED if path is None else path.resolve().name
    name = model.adapters.attach(as_adapter(name, places, trained), 1.0)
    return Finetuned(name, log.losses, log.evaluations, rate, texts.cut, texts.skipped, path)


def _divided(examples: list[Example], asked: Settings) -> tuple[list[Example], list[Example]]:
    """Those to train on and those that are held out."""
    if asked.held_out >= len(examples):
        raise InputError(f"held_out {asked.held_out}: there are {len(examples)} examples, and none would be left")
    drawn = set(np.random.default_rng(asked.seed).permutation(len(examples))[: asked.held_out].tolist())
    train = [example for i, example in enumerate(examples) if i not in drawn]
    return train, [example for i, example in enumerate(examples) if i in drawn]


class Training:
    """One training: data, programs, and the loop over them."""

    def __init__(
        self,
        model: LanguageModel,
        asked: Settings,
        rows: Rows,
        tests: Rows | None,
        places: Mapping[str, Any],
        shown: bool,
    ) -> None:
        self.model, self.asked, self.rows, self.tests = model, asked, rows, tests
        self.places, self.shown = places, shown
        self.size = min(asked.batch, len(rows))
        self.per_step = self.size * asked.accumulate
        self.per_epoch = -(-len(rows) // self.per_step)
        self.total = asked.steps or asked.epochs * self.per_epoch
        self.optimizer = asked.optimizer(self.total)
        self.steps = Steps(model, places, self.optimizer, asked.remat)

    def fingerprint(self, factors: Mapping[str, Any]) -> str:
        """What the result depends on."""
        held = [(p.name, p.weight.shape, getattr(p.weight, "format", "")) for p in self.model.placed]
        found = hashlib.sha256(repr((self.asked, self.model.name, self.model.dtype, held)).encode())
        for leaf in jax.tree.leaves((self.rows.batch, self.tests and self.tests.batch, factors)):
            found.update(np.ascontiguousarray(leaf))
        return found.hexdigest()

    def run(self, factors: Mapping[str, Any], checkpoints: Checkpoints | None) -> tuple[Any, Log, float]:
        """Train from the newest checkpoint, or from these factors, to the end: the trained factors, what happened, and
        tokens per second."""
        places, steps, mesh = self.places, self.steps, self.model.mesh
        shardings = {name: places[name].shardings(each, mesh) for name, each in factors.items()}
        now = steps.begin(jax.tree.map(jax.device_put, dict(factors), shardings))
        self.sums = steps.zeros(now.trained)
        log, tokens, seconds = Log(), 0, 0.0
        if checkpoints is not None:
            now, log = checkpoints.load(now)
        if not log.losses:
            self._evaluate(now, log)
        done = len(log.losses)
        with tqdm(
            total=self.total, initial=done, desc="training", unit=" steps", disable=not self.shown, file=sys.stderr
        ) as bar:
            for number in range(done, self.total):
                clock = self._clock()
                now, count = self._step(now, number, log, checkpoints)
                tokens, seconds = tokens + count, seconds + self._clock() - clock
                bar.set_postfix_str(f"loss {log.losses[-1]:.3f}, {tokens / seconds:.0f} tokens/s", refresh=False)
                bar.update()
                last = number + 1 == self.total
                if last or (number + 1) % (self.asked.evaluate_every or self.per_epoch) == 0:
                    self._evaluate(now, log)
                if checkpoints is not None and not last and (number + 1) % self.asked.save_every == 0:
                    checkpoints.save(now, changes(places, now.trained), log)
        return now.trained, log, tokens / seconds if seconds else 0.0

    def _clock(self) -> float:
        """Seconds, without those of compiling."""
        return time.perf_counter() - self.steps.compile_seconds

    def _step(self, now: Progress, number: int, log: Log, checkpoints: Checkpoints | None) -> tuple[Progress, int]:
        """One step of the optimizer, and how many tokens it was for."""
        epoch, step = divmod(number, self.per_epoch)
        order = np.random.default_rng([self.asked.seed, epoch]).permutation(len(self.rows))
        chosen = order[step * self.per_step :][: self.per_step]
        for begin in range(0, len(chosen), self.size):
            batch = self.rows.take(chosen[begin : begin + self.size], self.size)
            self.sums = self.steps.add(self.sums, now.trained, batch)
        now, self.sums, loss, norm = self.steps.update(now, self.sums)
        if not np.isfinite(float(loss) + float(norm)):
            newest = None if checkpoints is None else checkpoints.newest
            kept = "nothing was saved before" if newest is None else f"the newest checkpoint is {newest}"
            raise Kept(f"step {number + 1}: the loss is {float(loss)}; {kept}; try a smaller learning_rate")
        log.losses.append(float(loss))
        return now, int(self.rows.filled[chosen].sum())

    def _evaluate(self, now: Progress, log: Log) -> None:
        if self.tests is None:
            return
        total = 0.0
        for begin in range(0, len(self.tests), self.size):
            chosen = np.arange(begin, min(begin + self.size, len(self.tests)))
            total += float(self.steps.evaluate(now.trained, self.tests.take(chosen, self.size)))
        log.evaluations.append((len(log.losses), total / self.tests.batch.answers))


@contextmanager
def _writing(
    path: Path | None, model: LanguageModel, training: Training, factors: Mapping[str, Any]
) -> Iterator[Checkpoints | None]:
    """Where a training writes, if it does."""
    if path is None:
        yield None
        return
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(factors))
    with unfinished(path, 7 * size, training.fingerprint(factors)) as begun:  # 2 checkpoints of 3 sizes, and the result
        yield Checkpoints(begun.folder, model)
