"""Low-rank adapters written as PEFT does: adapter_config.json and adapter_model.safetensors.

Names and the order of rows are those of a model's Hugging Face checkpoint, whatever file the model was loaded from.

The inverse of `adapter_peft`, which describes the files.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxllm.checkpoint.adapter_files import CONFIG
from jaxllm.checkpoint.adapter_peft import TENSORS
from jaxllm.errors import InputError
from jaxllm.formats.adapted import LowRank
from jaxllm.models.describe import tensors_of
from jaxllm.models.families import FAMILIES
from jaxllm.models.family import HUGGING_FACE
from jaxllm.models.rule import Rule, Written, inverted, tensor_name

STACKS = ("gate_up_proj", "down_proj")  # of experts, as transformers' modules have them


def write_peft(
    folder: Path, changes: Mapping[str, LowRank], shapes: Mapping[str, tuple[int, ...]], config: Any, base: str
) -> None:
    """Write an adapter into an existing folder.

    Args:
        changes: what is added to each parameter, on the host, in the parameters' own order.
        shapes: those of all parameters that could be changed: of a tensor that joins several, all are needed.
        config: the model's configuration.
        base: what the adapter says it was trained on.

    Raises:
        InputError: Hugging Face checkpoints have no tensor for a parameter.
    """
    named = {
        written.name: _joined([changes.get(path) or _nothing(shapes[path]) for path, _ in written.parts], written.rows)
        for written in written_tensors(config, shapes)
        if any(path in changes for path, _ in written.parts)
    }
    linear = {name.removesuffix(".weight"): change for name, change in named.items() if change.a.ndim == 2}
    stacks = {name: change for name, change in named.items() if change.a.ndim == 3}
    tensors = {}
    for module, change in linear.items():
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = change.a, change.b
    for name, change in stacks.items():
        module, _, parameter = name.rpartition(".")
        # Of a module's adapted parameters, all but the last have their pair one level deeper.
        deeper = parameter != STACKS[-1] and f"{module}.{STACKS[-1]}" in stacks
        key = f"{module}.base_layer" if deeper else module
        experts, rank, in_ = change.a.shape
        tensors[f"{key}.lora_A.weight"] = change.a.reshape(experts * rank, in_)
        tensors[f"{key}.lora_B.weight"] = change.b.transpose(1, 2, 0).reshape(-1, rank * experts)
    packed = {f"base_model.model.{name}": np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    write_tensors(folder / TENSORS, packed, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(linear, stacks, base), indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. Raises OSError where the library has an exception of its own for a full disk."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def written_tensors(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Written]:
    """The tensors of a Hugging Face checkpoint that hold these parameters; stacks of experts as transformers has them.

    Raises:
        InputError: there are parameters without any.
    """
    family = next(family for family in FAMILIES if isinstance(config, family.config))
    dialect = family.dialects.get(HUGGING_FACE)
    if dialect is None:
        raise InputError(f"models like {family.name} have no names in {HUGGING_FACE} files, which PEFT needs")
    stacks = {path: shape for path, shape in shapes.items() if len(shape) == 3}
    matrices = {path: shape for path, shape in shapes.items() if path not in stacks}
    adapted = dialect.adapted(config)
    return tensors_of(dialect, config, matrices) + inverted(dialect.rules(adapted, {}), stacks, adapted, _stack_name)


def _stack_name(rule: Rule, path: str) -> str | None:
    name = tensor_name(rule, path)
    return name if name is not None and name.rpartition(".")[2] in STACKS else None


def _nothing(shape: tuple[int, ...]) -> LowRank:
    *batch, out, in_ = shape
    return LowRank(np.zeros((*batch, 0, in_)), np.zeros((*batch, out, 0)), np.zeros((*batch, 0)))


def _joined(parts: Sequence[LowRank], rows: np.ndarray | None) -> LowRank:
    """The change of a tensor that several parameters are parts of, in its own order of rows. Their ranks add up: each
    part has its own."""
    a = np.concatenate([part.a for part in parts], axis=-2)
    ends = np.cumsum([part.rank for part in parts])
    blocks = [
        np.pad(part.b, [(0, 0)] * (part.b.ndim - 1) + [(end - part.rank, ends[-1] - end)])
        for part, end in zip(parts, ends, strict=True)
    ]
    b = np.concatenate(blocks, axis=-2)
    return LowRank(a, b if rows is None else b[..., rows, :], np.concatenate([part.scale for part in parts], axis=-1))


def _config(linear: Mapping[str, LowRank], stacks: Mapping[str, LowRank], base: str) -> dict[str, Any]:
    kinds = {name: _rank_and_alpha(change) for name, change in {**linear, **stacks}.items()}
    rank, alpha = Counter(kinds.values()).most_common(1)[0][0]
    unlike = {re.escape(name): kind for name, kind in kinds.items() if kind != (rank, alpha)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(linear),
        "target_parameters": sorted(stacks) or None,
        "rank_pattern": {name: kind[0] for name, kind in unlike.items()},
        "alpha_pattern": {name: kind[1] for name, kind in unlike.items()},
    }


def _rank_and_alpha(change: LowRank) -> tuple[int, float]:
    alpha = float(change.scale.flat[0]) * change.rank
    return change.rank, round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-6) else alpha
