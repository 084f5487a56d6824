"""The programs of a model made of shapes, and the collectives in their compiled text."""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.kernels.activations import rounding
from jaxllm.layers.cache import KVCache
from jaxllm.layers.decoder import Decoder

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
_COLLECTIVE = re.compile(rf"= (?P<shapes>\(.*?\)|\S+) (?P<kind>{'|'.join(COLLECTIVES)})(?P<start>-start)?\(")


def lower_decode(
    model: Decoder, mesh: Mesh, batch: int, capacity: int, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> jax.stages.Lowered:
    """The decode step of a model whose parameters are shapes, to be compiled for the devices of the mesh.

    Args:
        batch: sequences that each get a token.
        capacity: positions of the cache, all of which are attended to.
        dtype: of the activations and the cache.
    """
    return lower_step(model, mesh, batch, 1, capacity, dtype)


def lower_step(
    model: Decoder,
    mesh: Mesh,
    batch: int,
    time: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
    int8_blocks: bool = False,
    cache_dtype: jax.typing.DTypeLike | None = None,
) -> jax.stages.Lowered:
    """A step of a model whose parameters are shapes, which adds `time` tokens to the end of each of `batch` sequences.

    Args:
        capacity: positions of the cache, all of which are attended to.
        dtype: the dtype of activations.
        int8_blocks: what matmuls may do with activations, see `activations.rounding`.
        cache_dtype: of keys and values; by default that of activations.
    """
    graph, state = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((batch, time), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    cache = model.cache(batch, capacity, cache_dtype or dtype, mesh)

    def step(state: nnx.State, cache: KVCache, tokens: jax.Array) -> tuple[jax.Array, KVCache]:
        model = nnx.merge(graph, state)
        hidden, cache = model(tokens, cache, jnp.full_like(cache.lengths, time), capacity, dtype)
        return model.logits(hidden[:, -1]), cache

    with jax.set_mesh(mesh), rounding(int8_blocks):
        return jax.jit(step, donate_argnames="cache").lower(state, cache, tokens)


def collectives_of(layer: nnx.Module, *args: object) -> Counter[str]:
    """How often each kind of collective runs when `layer(*args)` is compiled for the mesh that `jax.set_mesh` has set.

    The layer's matrices must be placed on that mesh; nothing is run.
    """
    graph, state = nnx.split(layer)

    def call(state: nnx.State, *args: object) -> object:
        return nnx.merge(graph, state)(*args)

    return collectives(jax.jit(call).lower(state, *args).compile().as_text() or "")


def collectives(program: str) -> Counter[str]:
    """How often each kind of collective occurs in a compiled program's text."""
    return Counter(found["kind"] for found in _COLLECTIVE.finditer(program))


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
        kind: one of COLLECTIVES.
        axes: the axes of the mesh that it runs along.
        devices: how many devices take part.
        nbytes: bytes of its result on one device.
        layer: the number of the layer that it belongs to; None: what comes before and after them.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    nbytes: int
    layer: int | None

    @property
    def sent(self) -> float:
        """The fewest bytes that each device must send: every algorithm moves the parts that others lack.

        Of n devices, each lacks (n - 1) / n of a gathered result; a sum has to be scattered before it is gathered, so
        it takes twice that (Patarasuk and Yuan, 2009).
        """
        share = (self.devices - 1) / self.devices
        if self.kind == "collective-permute":
            return self.nbytes
        if self.kind == "reduce-scatter":
            return self.nbytes * (self.devices - 1)
        return self.nbytes * share * (2 if self.kind == "all-reduce" else 1)


def collectives_between(program: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a compiled program for the mesh that run between several devices."""
    groups = _groups_by_axes(mesh)
    found = []
    for line in program.splitlines():
        if (match := _COLLECTIVE.search(line)) is None:
            continue
        axes = _axes(line, mesh, groups)
        devices = math.prod(mesh.shape[axis] for axis in axes)
        layer = re.search(r'op_name="[^"]*\blayers\.(\d+)/', line)
        if devices > 1:
            nbytes = _result_bytes(match)
            found.append(Collective(match["kind"], axes, devices, nbytes, int(layer[1]) if layer else None))
    return found


def _result_bytes(match: re.Match) -> int:
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * _bits(dtype) // 8
        for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", match["shapes"])
    ]
    # What starts a gather or permutation has its operands too, and the result behind them.
    return sizes[-1] if match["start"] and match["kind"] != "all-reduce" else sum(sizes)


def _bits(dtype: str) -> int:
    """Of XLA's name for a dtype, such as bf16, f8e4m3fn or pred."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8


def _groups_by_axes(mesh: Mesh) -> dict[frozenset[int], tuple[str, ...]]:
    """For each choice of the mesh's axes, the group of the first device along them, by numbers in the mesh's order."""
    numbers = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    chosen = {}
    for count in range(len(mesh.axis_names), -1, -1):  # axes of size 1 change no group, so that the fewest are named
        for axes in itertools.combinations(mesh.axis_names, count):
            index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
            chosen[frozenset(np.ravel(numbers[index]).tolist())] = axes
    return chosen


def _axes(line: str, mesh: Mesh, groups: dict[frozenset[int], tuple[str, ...]]) -> tuple[str, ...]:
    """The axes that an instruction's `replica_groups` run along, in any of the ways that XLA writes them."""
    if named := re.search(r"replica_groups=mesh\[[^\]]*\] ?\{([^}]*)\}", line):
        names = re.findall(r"'(\w+)'", named[1])
        return tuple(name for name in mesh.axis_names if name in names and mesh.shape[name] > 1)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims = ([int(n) for n in text.split(",")] for text in iota.groups()[:2])
        numbers = np.arange(math.prod(dims)).reshape(dims)
        order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(dims))
        first = numbers.transpose(order).reshape(shape)[0].tolist()
    elif listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        first = [int(n) for n in listed[1].split(",") if n]
    else:  # all devices, or the pairs of a permutation
        first = list(range(mesh.devices.size))
    return groups.get(frozenset(first), mesh.axis_names)
