"""How the names of a checkpoint become the parameters of a model.

Each model lists rules; `fill` matches them against the names present, reports everything that does not fit in one
error, and only then reads: each device's part of each tensor, rearranged as the model declared it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxllm.checkpoint.placing import place
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.layers.parameter import Declaration


@dataclass(frozen=True)
class Rule:
    """Tensors whose whole name matches `pattern` become the parameter `target` (a template for `re.Match.expand`).

    `rows`, given the model's config, says which row of the tensor is each row of the parameter (None: in order).
    """

    pattern: str
    target: str
    rows: Callable[[Any], np.ndarray] | None = None


@dataclass(frozen=True)
class Placed:
    """One parameter as it was loaded.

    source: what the checkpoint holds (shapes only).
    encoded: what was made of that before it was placed (shapes only); the same unless it was quantized anew.
    weight: what lies on the devices.
    """

    name: str
    declaration: Declaration
    source: Weight
    encoded: Weight
    weight: Weight | jax.Array


Encode = Callable[[str, Weight], Weight]
Convert = Callable[[Weight, NamedSharding], Weight]


@dataclass(frozen=True)
class _Match:
    source: str
    rule: Rule


def parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """The parameters of a model by dotted path, in the order of its layers."""
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def match(names: Iterable[str], rules: Iterable[Rule]) -> tuple[dict[str, _Match], list[str]]:
    """Targets with the tensor that each comes from, and a complaint for every name that has no or no single place."""
    matches, complaints = {}, []
    for name in names:
        found = [(rule, m) for rule in rules if (m := re.fullmatch(rule.pattern, name))]
        if not found:
            complaints.append(f"unknown tensor '{name}'")
            continue
        rule, m = found[0]
        target = m.expand(rule.target)
        if target in matches:
            complaints.append(f"tensors '{matches[target].source}' and '{name}' both stand for {target}")
        matches[target] = _Match(name, rule)
    return matches, complaints


def row_block(model: nnx.Module, tensors: Mapping[str, Weight], rules: Iterable[Rule], planned: Encode) -> int:
    """The largest block, along its columns, of a matrix whose columns the model cuts, once it is encoded."""
    matches, _ = match(tensors, rules)
    cut = [
        planned(name, tensors[matches[name].source]).unit("in")
        for name, param in parameters(model).items()
        if name in matches and len(spec := param.get_value().spec) == 2 and spec[1] is not None
    ]
    return max(cut, default=1)


def fill(
    model: nnx.Module,
    tensors: Mapping[str, Weight],
    rules: Iterable[Rule],
    mesh: Mesh,
    encode: Encode,
    convert: Convert,
    track: Callable[[list], Iterable],
) -> list[Placed]:
    """Replace every Declaration in `model` by its weight, placed on the mesh.

    Args:
        tensors: the checkpoint's tensors by name; their leaves are host arrays, usually memory-mapped.
        encode: applied to each matrix, with the parameter's name, before it is placed.
        convert: applied to each placed matrix before the next one is read, with the sharding of the whole matrix.
        track: wraps the list of work to show progress.

    Raises:
        InputError: lists every unknown, missing, doubly given and mis-shaped tensor.
    """
    declared = parameters(model)
    matches, complaints = match(tensors, rules)
    complaints += [f"missing tensor for {name}" for name in declared if name not in matches]
    complaints += [f"tensor '{m.source}' has no place ({name})" for name, m in matches.items() if name not in declared]
    for name, param in declared.items():
        want = param.get_value().shape
        if name in matches and (got := tensors[matches[name].source].shape) != want:
            complaints.append(f"tensor '{matches[name].source}' has shape {list(got)}, expected {list(want)}")
    if complaints:
        more = f"; and {len(complaints) - 8} more" if len(complaints) > 8 else ""
        raise InputError("; ".join(complaints[:8]) + more)

    placed = []
    for name, param in track(list(declared.items())):
        declaration, found = param.get_value(), matches[name]
        source, rows = tensors[found.source], declaration.rows
        if found.rule.rows is not None:
            order = found.rule.rows(model.config)
            rows = order if rows is None else np.where(rows < 0, -1, order[rows])
        vector = len(declaration.shape) == 1
        encoded = source if vector else encode(name, source)
        weight = place(encoded, declaration.spec, mesh, rows, declaration.cols, name=found.source)
        value = weight.dequantize() if vector else convert(weight, NamedSharding(mesh, declaration.spec))
        param.set_value(value)
        placed.append(Placed(name, declaration, _shapes(source), _shapes(encoded), value))
    return placed


def _shapes(weight: Weight) -> Weight:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weight)


def keep(name: str, weight: Weight) -> Weight:
    """The `encode` of `fill` that leaves matrices in the checkpoint's format."""
    return weight


def as_packed(weight: Weight, sharding: NamedSharding) -> Weight:
    """The `convert` of `fill` that holds matrices as they were placed."""
    return weight


def as_dense(dtype: jax.typing.DTypeLike) -> Convert:
    """A `convert` of `fill`: decode each matrix where it lies, rounding once to `dtype`."""

    @cache  # like matrices share a program
    def decoder(sharding: NamedSharding) -> Callable[[Weight], Weight]:
        return jax.jit(lambda weight: Dense(weight.dequantize(dtype)), out_shardings=sharding)

    return lambda weight, sharding: decoder(sharding)(weight)
