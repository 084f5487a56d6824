"""Importance matrices of a model: from the names in files to the model's parameters, and back.

llama.cpp names tensors as GGUF does, mistral.rs names modules as Hugging Face does, and formerly numbered them. The
rules by which a family's checkpoints are read know the first two.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxllm.checkpoint.opening import Checkpoint
from jaxllm.errors import InputError, located
from jaxllm.importance import read_importance
from jaxllm.layers.parameter import parameters
from jaxllm.models.describe import tensors_of
from jaxllm.models.family import Dialect
from jaxllm.parallel import make_mesh
from jaxllm.tracking import Statistics

Shapes = Mapping[str, tuple[int, ...]]

# The order of mistral.rs's old files, after the head.
_IN_ORDER = [f"self_attn.{each}_proj" for each in "qkvo"] + [f"mlp.{each}_proj" for each in ("gate", "up", "down")]


def importance_for(
    given: str | os.PathLike | Mapping[str, Statistics] | None, checkpoint: Checkpoint
) -> Mapping[str, Statistics] | None:
    """Statistics by the parameters of a checkpoint's model, from a file or as they are.

    Raises:
        InputError: the file cannot be read, or is of another model; every mismatch is named.
    """
    if given is None:
        return None
    shapes = parameter_shapes(checkpoint)
    if isinstance(given, Mapping):
        return _checked(dict(given), shapes)
    path = Path(given)
    with located(path):
        entries = read_importance(path)
        if all(name.isdecimal() for name in entries):
            return _checked(_by_position(entries, shapes), shapes)
        return _checked(_by_name(entries, shapes, checkpoint), shapes)


def parameter_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The matrices and vectors of a checkpoint's model, by dotted path."""
    model = checkpoint.family.model(checkpoint.config, make_mesh(), 1)
    return {name: param.declared.shape for name, param in parameters(model).items()}


def _by_name(entries: Mapping[str, Statistics], shapes: Shapes, checkpoint: Checkpoint) -> dict[str, Statistics]:
    known = [
        (re.compile(rule.pattern), rule.target)
        for dialect in checkpoint.family.dialects.values()
        for rule in dialect.rules(checkpoint.config, {})
    ]
    found: dict[str, Statistics] = {}
    of_experts: dict[str, dict[int, Statistics]] = {}
    complaints = []
    for name, statistics in entries.items():
        full = name if name.endswith(".weight") else f"{name}.weight"
        hits = [
            (m.expand(target), m)
            for pattern, target in known
            for each in (full, name)
            if (m := pattern.fullmatch(each))
        ]
        targets = {target: m for target, m in hits if target in shapes}
        if not targets and not any(_same_layer(target, shapes) for target, _ in hits):
            complaints.append(f"'{name}' has no place in the model")
        for target, m in targets.items():
            if (expert := m.groupdict().get("expert")) is None:
                found[target] = statistics
            else:
                of_experts.setdefault(target, {})[int(expert)] = statistics
    if complaints:
        raise InputError("; ".join(complaints[:8]) + (f"; and {len(complaints) - 8} more" if complaints[8:] else ""))
    return found | {target: _stack(target, each, shapes[target]) for target, each in of_experts.items()}


def _same_layer(target: str, shapes: Shapes) -> bool:
    """Whether the model has this layer, so that it only holds the matrix in another form."""
    layer = re.match(r"layers\.\d+\.", target)
    return layer is not None and any(name.startswith(layer[0]) for name in shapes)


def _stack(name: str, experts: Mapping[int, Statistics], shape: tuple[int, ...]) -> Statistics:
    """One entry from those of single experts. An expert without one met no token."""
    squares, counts = np.zeros((shape[0], shape[-1]), np.float32), np.zeros(shape[0], np.int64)
    for i, statistics in experts.items():
        if i >= shape[0] or statistics.squares.size != shape[-1]:
            size = statistics.squares.size
            raise InputError(f"of another model: expert {i} of {name} has {size} values, but the stack is {[*shape]}")
        squares[i], counts[i] = statistics.squares, statistics.counts
    return Statistics(squares, counts)


def _by_position(entries: Mapping[str, Statistics], shapes: Shapes) -> dict[str, Statistics]:
    if any(len(shape) == 3 for shape in shapes.values()):
        raise InputError("it numbers its layers, which is supported for models without experts only")
    count = len({name.split(".")[1] for name in shapes if name.startswith("layers.")})
    order = ["lm_head", *(f"layers.{i}.{name}" for i in range(count) for name in _IN_ORDER)]
    if (last := max(map(int, entries))) >= len(order):
        raise InputError(f"it has a layer number {last}, but the model has {len(order)} such layers")
    named = {f"{order[int(number)]}.weight": statistics for number, statistics in entries.items()}
    return {name: statistics for name, statistics in named.items() if name in shapes}


def _checked(found: dict[str, Statistics], shapes: Shapes) -> dict[str, Statistics]:
    """The same, shaped like the matrices. Raises InputError naming all that do not fit."""
    complaints, fitted = [], {}
    for name, statistics in found.items():
        shape = shapes.get(name)
        if shape is None:
            complaints.append(f"'{name}' is no parameter of the model")
            continue
        *lead, _, width = shape
        if statistics.squares.size == width or not lead:
            wanted: tuple[int, ...] = (width,)
        else:
            wanted = (*lead, width)
        if statistics.squares.size != np.prod(wanted):
            complaints.append(f"{name} is {[*shape]}, but the importance has {statistics.squares.size} values")
            continue
        fitted[name] = replace(statistics, squares=statistics.squares.reshape(wanted))
    if complaints:
        more = f"; and {len(complaints) - 8} more" if complaints[8:] else ""
        raise InputError(f"of another model: {'; '.join(complaints[:8])}{more}")
    return fitted


def named(statistics: Mapping[str, Statistics], checkpoint: Checkpoint, dialect: str) -> dict[str, Statistics]:
    """Statistics by the names of tensors in one kind of file (GGUF or HUGGING_FACE)."""
    written = tensors_of(_dialect(checkpoint, dialect), checkpoint.config, parameter_shapes(checkpoint))
    out = {}
    for tensor in written:
        path, expert = tensor.parts[0]
        if path in statistics and not (tensor.stack or tensor.turned):  # those are other matrices, with other inputs
            entry = statistics[path]
            out[tensor.name] = entry if expert is None else Statistics(entry.squares[expert], entry.counts[expert])
    return out


def _dialect(checkpoint: Checkpoint, name: str) -> Dialect:
    if name not in checkpoint.family.dialects:
        raise InputError(f"there are no {name} files of models like {checkpoint.family.name}")
    return checkpoint.family.dialects[name]
