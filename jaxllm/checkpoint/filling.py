"""Fill a model with weights: each device's part of a tensor is read, encoded, placed, and perhaps dequantized."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from threading import Event, Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxllm.declaration import Declaration
from jaxllm.encodings import Encoding
from jaxllm.files import give_up_reading
from jaxllm.formats.adapted import Adapted
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.kernels import dispatch
from jaxllm.layers.held import encoded_anew
from jaxllm.layers.parameter import parameters
from jaxllm.placing import DerivedArray, Source, place, place_of
from jaxllm.requantize import planned

READERS = 4  # threads, each reading one parameter at a time

Encode = Callable[[str, Source], Source]
Convert = Callable[[Weight, NamedSharding], Weight]


@dataclass(frozen=True)
class Placed:
    """One loaded parameter.

    source: what the checkpoint holds (shapes only).
    encoded: what it was encoded to before placing (shapes only); the same as `source` unless requantized.
    weight: what the devices hold.
    """

    name: str
    declaration: Declaration
    source: Weight
    encoded: Weight
    weight: Weight | jax.Array


def fill(
    declared: Mapping[str, nnx.Param],
    sources: Mapping[str, Source],
    mesh: Mesh,
    encode: Encode,
    convert: Convert,
    dtype: jax.typing.DTypeLike,
    track: Callable[[Iterable, int], Iterable],
) -> list[Placed]:
    """Replace every Declaration by its weight, placed on the mesh.

    Args:
        declared: the model's `parameters`.
        sources: from `match`.
        encode: applied to the source of each matrix, with the parameter's name, before it is placed.
        convert: applied to each placed matrix, with the sharding of the matrix. Afterwards the result is repacked if
            its kernel needs another layout.
        dtype: the dtype of the activations.
        track: wraps the results, given their number, to show progress.
    """

    # If two threads start multi-device programs at once, each can wait for a device that the other holds.
    starting = Lock()

    def load(item: tuple[str, nnx.Param]) -> Placed:
        name, declaration, source = item[0], item[1].get_value(), sources[item[0]]
        vector = len(declaration.shape) == 1
        kept = vector or declaration.keep
        encoded = source if kept else encode(name, source)
        weight: Any = place(_in_float32(encoded) if vector else encoded, declaration, mesh)
        if vector:
            weight = weight.dequantize()
        elif not kept:
            with starting:
                sharding = NamedSharding(mesh, declaration.spec)
                weight = _repacked(convert(weight, sharding), sharding, dtype)
        return Placed(name, declaration, shapes(source), shapes(encoded), weight)

    given_up = Event()
    with ThreadPoolExecutor(READERS, initializer=give_up_reading, initargs=(given_up,)) as pool:
        try:
            placed = list(track(pool.map(load, declared.items()), len(declared)))
        except BaseException:  # an interruption too need not wait for a slow disk
            given_up.set()
            raise
    for p in placed:
        declared[p.name].set_value(p.weight)
    return placed


def _in_float32(source: Source) -> Source:
    """A vector of floats, converted as it is read: on devices, that would take a program for each length."""

    def converted(part: Weight) -> Weight:
        if not isinstance(part, Dense) or part.values.dtype == np.float32:
            return part
        values: Any = part.values
        return Dense(DerivedArray(values.shape, np.dtype(np.float32), lambda: np.array(values, np.float32)))

    return replace(source, parts=tuple(map(converted, source.parts)))


def shapes(source: Source) -> Weight:
    """The source as one weight, of shapes only."""
    lead = (len(source.parts),) if source.stacked else ()
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), source.parts[0])


def keep(name: str, source: Source) -> Source:
    """The `encode` of `fill` that leaves matrices in the checkpoint's format."""
    return source


def keep_planned(name: str, source: Source) -> Weight:
    """The shapes of one of a parameter's matrices in the checkpoint's format."""
    return source.parts[0]


def as_packed(weight: Weight, sharding: NamedSharding) -> Weight:
    """The `convert` of `fill` that keeps matrices as they were placed."""
    return weight


def refill(
    model: nnx.Module,
    placed: list[Placed],
    choose: Callable[[str, Declaration], tuple[Encoding, np.ndarray | None] | None],
    dtype: jax.typing.DTypeLike,
    track: Callable[[Iterable, int], Iterable],
) -> None:
    """Encode the matrices of a filled model anew, one after the other, where they lie.

    Args:
        placed: from `fill`; entries are replaced as their matrices are.
        choose: given a parameter's name and declaration, its new type and importance; None: it stays as it is.
        dtype, track: see `fill`.
    """
    held = parameters(model)

    for i in track(range(len(placed)), len(placed)):
        old = placed[i]
        chosen = None if old.declaration.keep or len(old.declaration.shape) == 1 else choose(old.name, old.declaration)
        if chosen is None:
            continue
        weight = encoded_anew(held[old.name], *chosen)
        sharding = NamedSharding(jax.tree.leaves(weight)[0].sharding.mesh, old.declaration.spec)
        new = replace(old, encoded=planned(old.declaration.shape, chosen[0]), weight=_repacked(weight, sharding, dtype))
        held[old.name].set_value(new.weight)
        placed[i] = new


def _repacked(weight: Weight, sharding: NamedSharding, dtype: jax.typing.DTypeLike) -> Weight:
    """The weight in the layout that its kernel needs."""
    if isinstance(weight, Adapted):
        return replace(weight, base=_repacked(weight.base, sharding, dtype))
    if (repack := _repacking(weight, sharding, dtype)) is None:
        return weight
    made = in_kernels_layout(weight, sharding, dtype)
    return jax.jit(repack, out_shardings=jax.tree.map(lambda leaf: leaf.format, made))(weight)


def _repacking(
    weight: Weight, sharding: NamedSharding, dtype: jax.typing.DTypeLike
) -> Callable[[Weight], Weight] | None:
    platform = sharding.mesh.devices.flat[0].platform
    return dispatch.choose_for(weight, dtype, platform).kernel.layout.repack


def in_kernels_layout(weight: Weight, sharding: NamedSharding, dtype: jax.typing.DTypeLike) -> Weight:
    """The shapes, with shardings, of a placed weight in the layout that its kernel needs.

    Args:
        weight: arrays or shapes, with shardings.
        sharding: of the matrix.
        dtype: of the activations.
    """
    if (repack := _repacking(weight, sharding, dtype)) is None:
        return weight
    made = jax.eval_shape(repack, weight)
    specs = made.shard_specs(sharding.spec, sharding.mesh)

    def placed(name: str) -> jax.ShapeDtypeStruct:
        leaf, place = made.leaf(name), place_of(made, name, NamedSharding(sharding.mesh, specs.leaf(name)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return made.with_leaves({name: placed(name) for name in made.axes})


def as_dense(dtype: jax.typing.DTypeLike) -> Convert:
    """A `convert` of `fill`: dequantize each matrix in place, rounding once to `dtype`. One of that type stays."""
    dtype = jnp.dtype(dtype)

    def convert(weight: Weight, sharding: NamedSharding) -> Weight:
        if isinstance(weight, Dense) and weight.values.dtype == dtype:
            return weight
        return _decoder(dtype, sharding)(weight)

    return convert


@cache  # like matrices share a program, also those of models that are loaded one after the other
def _decoder(dtype: np.dtype, sharding: NamedSharding) -> Callable[[Weight], Weight]:
    return jax.jit(lambda weight: Dense(weight.dequantize(dtype)), out_shardings=sharding)
