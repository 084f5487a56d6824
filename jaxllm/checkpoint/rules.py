"""How the names of a checkpoint become the parameters of a model.

Each model lists rules; `match` reports everything that does not fit in one error, and `fill` only then reads: each
device's part of each tensor, rearranged as the model declared it.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxllm.checkpoint.placing import Source, place
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.scaled import Scaled
from jaxllm.layers.parameter import Declaration

READERS = 4  # threads: parameters that are read at the same time


@dataclass(frozen=True)
class Rule:
    """Tensors whose whole name matches `pattern` become the parameter `target` (a template for `re.Match.expand`).

    A group named `expert` in the pattern makes each tensor one of a stack. Several rules may match one tensor, which
    then becomes several parameters, each made of some of its rows.

    rows: given the model's config and the match, which row of the tensor each row of the parameter is (None: in order).
    present: given a tensor and the shape of the parameter, the tensor as `[..., out, in]`, if it is stored otherwise.
    """

    pattern: str
    target: str
    rows: Callable[[Any, re.Match], np.ndarray] | None = None
    present: Callable[[Weight, tuple[int, ...]], Weight] | None = None


def either_way(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """For `Rule.present`: some store it as `[out, in]`, others as `[in, out]`; the first if both fit."""
    return weight.swapped() if weight.shape[-1] != shape[-1] == weight.shape[-2] else weight


def plain_transposed(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """For `Rule.present`: stored as `[in, out]`, unless it is packed."""
    return weight.swapped() if isinstance(weight, Dense | Scaled) else weight


def column(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """For `Rule.present`: a vector, or a stack of them, as a matrix of one column."""
    return Dense(weight.values.reshape(*weight.shape, 1)) if isinstance(weight, Dense) else weight


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


def parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """The parameters of a model by dotted path."""
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def match(
    model: nnx.Module, tensors: Mapping[str, Weight], rules: Sequence[Rule], ignored: Sequence[str] = ()
) -> dict[str, Source]:
    """For each parameter of the model, what it is read from.

    Args:
        tensors: the checkpoint's tensors by name.
        ignored: patterns of names that checkpoints of this kind may have and that mean nothing here.

    Raises:
        InputError: lists every unknown, missing, doubly given and mis-shaped tensor.
    """
    found: dict[str, dict[int | None, tuple[str, Rule, re.Match]]] = {}
    complaints = []
    for name in tensors:
        if any(re.fullmatch(pattern, name) for pattern in ignored):
            continue
        hits = [(rule, m) for rule in rules if (m := re.fullmatch(rule.pattern, name))]
        if not hits:
            complaints.append(f"unknown tensor '{name}'")
        for rule, m in hits:
            target, expert = m.expand(rule.target), m.groupdict().get("expert")
            slots = found.setdefault(target, {})
            slot = None if expert is None else int(expert)
            if slot in slots:
                complaints.append(f"tensors '{slots[slot][0]}' and '{name}' both stand for {target}")
            slots[slot] = name, rule, m

    declared = parameters(model)
    sources = {}
    for target, param in declared.items():
        if target not in found:
            complaints.append(f"missing tensor for {target}")
            continue
        slots, shape = found.pop(target), param.get_value().shape
        stacked = None not in slots
        if stacked and sorted(slots) != list(range(shape[0])):
            complaints.append(f"{target} needs experts 0 to {shape[0] - 1}, found {_listed(sorted(slots))}")
            continue
        ordered = [slots[i] for i in sorted(slots, key=lambda i: i or 0)]
        source = _source(model.config, tensors, ordered, stacked, shape)
        if source.shape != shape:
            complaints.append(f"tensor '{source.name}' has shape {list(source.shape)}, expected {list(shape)}")
        for part in source.parts:
            if isinstance(part, Dense) and not jax.dtypes.issubdtype(part.values.dtype, np.floating):
                complaints.append(f"tensor '{source.name}' is of {part.format}, not of floating-point numbers")
        sources[target] = source
    for target, slots in found.items():
        complaints += [f"tensor '{name}' has no place ({target})" for name, _, _ in slots.values()]
    complaints += _unused_rows(sources.values())
    if complaints:
        more = f"; and {len(complaints) - 8} more" if len(complaints) > 8 else ""
        raise InputError("; ".join(complaints[:8]) + more)
    return sources


def _source(
    config: object,
    tensors: Mapping[str, Weight],
    found: list[tuple[str, Rule, re.Match]],
    stacked: bool,
    shape: tuple[int, ...],
) -> Source:
    name, rule, m = found[0]
    parts = [tensors[part] for part, _, _ in found]
    if rule.present is not None:
        parts = [rule.present(part, shape) for part in parts]
    return Source(name, tuple(parts), stacked, None if rule.rows is None else rule.rows(config, m))


def _unused_rows(sources: Iterable[Source]) -> list[str]:
    """A complaint for each tensor of which the parameters made of its rows do not take every row once."""
    have, want = {}, Counter()
    for source in sources:
        if source.rows is not None:
            have[source.name] = source.parts[0].shape[-2:][0]
            want[source.name] += len(source.rows)
    return [f"tensor '{name}' has {n} rows, expected {want[name]}" for name, n in have.items() if n != want[name]]


def _listed(numbers: list) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def row_block(model: nnx.Module, sources: Mapping[str, Source], planned: Encode) -> int:
    """The largest block, along its columns, of a matrix whose columns the model cuts, once it is encoded."""
    cut = [
        planned(name, sources[name].parts[0]).granularity("in")
        for name, param in parameters(model).items()
        if len(spec := param.get_value().spec) >= 2 and spec[-1] is not None
    ]
    return max(cut, default=1)


def fill(
    model: nnx.Module,
    sources: Mapping[str, Source],
    mesh: Mesh,
    encode: Encode,
    convert: Convert,
    track: Callable[[Iterable, int], Iterable],
) -> list[Placed]:
    """Replace every Declaration in `model` by its weight, placed on the mesh.

    Args:
        sources: from `match`.
        encode: applied to each matrix, with the parameter's name, before it is placed.
        convert: applied to each placed matrix, with the sharding of the whole matrix.
        track: wraps the results, of which there will be so many, to show progress.
    """

    # Two programs of several devices, started by two threads at once, can each wait for a device that the other has.
    starting = Lock()

    def load(item: tuple[str, nnx.Param]) -> Placed:
        name, declaration, source = item[0], item[1].get_value(), sources[item[0]]
        vector = len(declaration.shape) == 1
        kept = vector or declaration.keep
        encoded = source if kept else dataclasses.replace(source, parts=tuple(encode(name, p) for p in source.parts))
        weight = place(encoded, declaration, mesh)
        if vector:
            weight = weight.dequantize()
        elif not kept:
            with starting:
                weight = convert(weight, NamedSharding(mesh, declaration.spec))
        return Placed(name, declaration, _shapes(source), _shapes(encoded), weight)

    declared = parameters(model)
    with ThreadPoolExecutor(READERS) as pool:
        placed = list(track(pool.map(load, declared.items()), len(declared)))
    for p in placed:
        declared[p.name].set_value(p.weight)
    return placed


def _shapes(source: Source) -> Weight:
    """The source as one weight, of shapes only."""
    lead = (len(source.parts),) if source.stacked else ()
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), source.parts[0])


def keep(name: str, weight: Weight) -> Weight:
    """The `encode` of `fill` that leaves matrices in the checkpoint's format."""
    return weight


def as_packed(weight: Weight, sharding: NamedSharding) -> Weight:
    """The `convert` of `fill` that holds matrices as they were placed, but for the order of bits that kernels want."""
    if not isinstance(weight, GGML) or weight.type != "MXFP4":
        return weight
    return _ordered(weight, sharding)


@partial(jax.jit, static_argnums=1)
def _ordered(weight: GGML, sharding: NamedSharding) -> MXFP4:
    ordered = MXFP4.from_ggml(weight)
    specs = ordered.shard_specs(sharding.spec, sharding.mesh)
    shardings = jax.tree.map(lambda spec: NamedSharding(sharding.mesh, spec), specs)
    return jax.lax.with_sharding_constraint(ordered, shardings)


def as_dense(dtype: jax.typing.DTypeLike) -> Convert:
    """A `convert` of `fill`: decode each matrix where it lies, rounding once to `dtype`."""

    @cache  # like matrices share a program
    def decoder(sharding: NamedSharding) -> Callable[[Weight], Weight]:
        return jax.jit(lambda weight: Dense(weight.dequantize(dtype)), out_shardings=sharding)

    return lambda weight, sharding: decoder(sharding)(weight)
