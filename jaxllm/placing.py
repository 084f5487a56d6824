"""Places host tensors on a mesh: each device's part is read separately, straight from the file."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import layout as layouts
from jax.sharding import Mesh, NamedSharding

from jaxllm import memory
from jaxllm.declaration import Declaration
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight, block_index, finest, shards
from jaxllm.kernels.registry import row_major


@dataclass(frozen=True)
class FileArray:
    """An array in a file, memory-mapped only while a part of it is read, so that no pages stay with the process."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    transposed: bool = False  # whether the last two axes are swapped compared to the file

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """The array, mapped. Raises InputError if the file was cut since its header was read."""
        stored = (*self.shape[:-2], *self.shape[:-3:-1]) if self.transposed else self.shape
        try:
            array = np.memmap(self.path, self.dtype, "r", self.offset, stored)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: changed while it was read: {error}") from error
        return array.swapaxes(-1, -2) if self.transposed else array

    def swapaxes(self, *_: int) -> "FileArray":
        """The last two axes swapped; nothing is read."""
        shape = (*self.shape[:-2], *self.shape[:-3:-1])
        return dataclasses.replace(self, shape=shape, transposed=not self.transposed)

    def reshape(self, *shape: int) -> "FileArray":
        """Like numpy's; nothing is read."""
        reshaped = dataclasses.replace(self, shape=shape)
        assert reshaped.nbytes == self.nbytes and not self.transposed
        return reshaped

    def view(self, dtype: jax.typing.DTypeLike) -> "FileArray":
        """Like numpy's: the same bytes as another dtype, which changes the last axis; nothing is read."""
        dtype = np.dtype(dtype)
        shape = (*self.shape[:-1], self.shape[-1] * self.dtype.itemsize // dtype.itemsize)
        return dataclasses.replace(self, shape=shape, dtype=dtype)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.map(), dtype=dtype)


@dataclass(frozen=True)
class DerivedArray:
    """An array that is computed from others in the file, each time a part of it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    compute: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def map(self) -> np.ndarray:
        array = self.compute()
        assert (array.shape, array.dtype) == (self.shape, self.dtype)
        return array

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.map(), dtype=dtype)


@dataclass(frozen=True)
class JoinedArray:
    """Arrays concatenated along `axis`; each is a `FileArray` or the result of its `map`."""

    parts: tuple[Any, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.parts[0].ndim

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def map(self) -> "JoinedArray":
        return JoinedArray(tuple(part.map() for part in self.parts), self.axis)

    def __getitem__(self, index: tuple[slice, ...]) -> "JoinedArray":
        """Slices, contiguous along `axis`; nothing is read."""
        index = (*index, *[slice(None)] * (self.ndim - len(index)))
        start, stop, _ = index[self.axis].indices(self.shape[self.axis])
        parts = []
        for part in self.parts:
            here = slice(max(start, 0), max(stop, 0))
            parts.append(part[(*index[: self.axis], here, *index[self.axis + 1 :])])
            start, stop = start - part.shape[self.axis], stop - part.shape[self.axis]
        return JoinedArray(tuple(parts), self.axis)

    def take(self, positions: np.ndarray, axis: int) -> "np.ndarray | JoinedArray":
        if axis != self.axis:
            return JoinedArray(tuple(part[(slice(None),) * axis + (positions,)] for part in self.parts), self.axis)
        shape = (*self.shape[:axis], len(positions), *self.shape[axis + 1 :])
        out, start = np.empty(shape, self.dtype), 0
        for part in self.parts:
            (here,) = np.nonzero((start <= positions) & (positions < start + part.shape[axis]))
            out[(slice(None),) * axis + (here,)] = part[(slice(None),) * axis + (positions[here] - start,)]
            start += part.shape[axis]
        return out

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(part) for part in self.parts], self.axis).astype(dtype or self.dtype)


LazyArray = FileArray | DerivedArray | JoinedArray
HostArray = Any  # a numpy array or one of these; code uses what they share, and `schemes.Part` checks more


def taken(leaf: HostArray, positions: np.ndarray, axis: int) -> LazyArray:
    """The positions along an axis; nothing is read. Each run of neighbours is one slice of the file."""
    runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)

    def part(run: np.ndarray) -> DerivedArray:
        index = (slice(None),) * axis + (slice(run[0], run[-1] + 1),)
        shape = (*leaf.shape[:axis], len(run), *leaf.shape[axis + 1 :])

        def read() -> Any:
            return (leaf.map() if isinstance(leaf, LazyArray) else leaf)[index]

        return DerivedArray(shape, leaf.dtype, read)

    parts = tuple(map(part, runs))
    return parts[0] if len(parts) == 1 else JoinedArray(parts, axis)


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: rows of one tensor, or, if `stacked`, of one tensor per expert.

    Leaves of the parts are `HostArray`s. `rows` are the tensor's rows that the parameter consists of, in the
    parameter's order; None means all of them.
    """

    name: str
    parts: tuple[Weight, ...]
    stacked: bool = False
    rows: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        if self.rows is not None:
            shape[max(len(shape) - 2, 0)] = len(self.rows)
        return (len(self.parts), *shape) if self.stacked else tuple(shape)


@dataclass(frozen=True)
class Layout:
    """How a parameter lies on a mesh: its weight with a `ShapeDtypeStruct`, sharding included, for every leaf.

    source: the source, with blocks refined where the shards need smaller ones.
    index: for each axis of each leaf, the source index at each position (None: in order), see `Weight.arrange`.
    """

    source: Source
    index: dict[str, list[np.ndarray | None]]
    weight: Weight


def layout(source: Source, declaration: Declaration, mesh: Mesh) -> Layout:
    """The layout of a parameter, arranged and sharded as declared; nothing is read.

    Raises:
        InputError: a shard would not consist of complete blocks, or experts have different formats.
    """
    first, rows, spec = source.parts[0], declaration.rows, declaration.spec
    if source.rows is not None:
        rows = source.rows if rows is None else np.where(rows < 0, -1, source.rows[rows])
    if len(first.shape) > 1 and (first.unit("out"), first.unit("in")) != (1, 1):
        n_out, n_in = shards(spec[-2], mesh), shards(spec[-1], mesh)
        out = finest(first.unit("out"), first.shape[-2], n_out, rows)
        in_ = finest(first.unit("in"), first.shape[-1], n_in, declaration.cols)
        source = dataclasses.replace(source, parts=tuple(part.refined(out, in_) for part in source.parts))
        first = source.parts[0]
    for i, part in enumerate(source.parts):
        if _kind(part) != _kind(first):
            said = ", expert ".join(f"{n} is {p.format} {[*p.shape]}" for n, p in ((0, first), (i, part)))
            raise InputError(f"{source.name}: experts of one layer differ in format or shape: expert {said}")

    index, shapes = {}, {}
    for name, axes in first.axes.items():
        leaf = first.leaf(name)
        batch = [declaration.stack] * (leaf.ndim - len(axes) + source.stacked)
        index[name] = batch + block_index(axes, rows, declaration.cols)
        shape = (len(source.parts), *leaf.shape) if source.stacked else leaf.shape
        shape = tuple(n if i is None else len(i) for n, i in zip(shape, index[name], strict=True))
        shapes[name] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    arranged = first.with_leaves(shapes)
    specs = arranged.shard_specs(spec, mesh, source.name)
    placed = {
        name: jax.ShapeDtypeStruct(
            s.shape, s.dtype, sharding=place_of(arranged, name, NamedSharding(mesh, specs.leaf(name)))
        )
        for name, s in shapes.items()
    }
    return Layout(source, index, arranged.with_leaves(placed))


def _kind(weight: Weight) -> tuple:
    return jax.tree.structure(weight), *((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(weight))


def place_of(weight: Weight, name: str, sharding: NamedSharding) -> NamedSharding | layouts.Format:
    """The sharding of a leaf, with row-major order if kernels for such a weight need that."""
    field, _, inner = name.partition(".")
    if field in weight.inner:
        return place_of(weight.inner[field], inner, sharding)
    if not row_major(weight, sharding.mesh.devices.flat[0].platform):
        return sharding
    return layouts.Format(layouts.Layout(tuple(range(len(weight.leaf(name).shape)))), sharding)


def place(source: Source, declaration: Declaration, mesh: Mesh) -> Weight:
    """The parameter, placed as `layout` says; for each device, only its part of the tensors is read.

    Raises:
        InputError: as `layout`; or scales, or what else floats say about quantized values, are not finite.
    """
    plan = layout(source, declaration, mesh)

    def read(name: str) -> jax.Array:
        leaf, parts = plan.weight.leaf(name), [part.leaf(name) for part in plan.source.parts]
        # A derived array is computed once for all the devices that hold a part of it.
        parts = [dataclasses.replace(p, compute=cache(p.compute)) if isinstance(p, DerivedArray) else p for p in parts]
        part = partial(_read, parts, source.stacked, plan.index[name], leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and name != "values":  # few of them, with a wide effect
            part = partial(_finite, f"tensor '{source.name}': its {name}", part)
        return jax.make_array_from_callback(leaf.shape, leaf.format, part)

    return plan.weight.with_leaves({name: read(name) for name in plan.weight.axes})


def _finite(what: str, read: Callable[..., np.ndarray], part: tuple[slice, ...]) -> np.ndarray:
    values = read(part)
    if not np.isfinite(values).all():
        raise InputError(f"{what} are not all finite numbers, so every answer would be nonsense; is the file damaged?")
    return values


def _read(
    leaves: list[HostArray],
    stacked: bool,
    index: list[np.ndarray | None],
    shape: tuple[int, ...],
    part: tuple[slice, ...],
) -> np.ndarray:
    """The `part` of a rearranged leaf of this `shape`, copied (never a view of a memory-mapped file)."""
    if not stacked:
        return memory.copied(_arranged(leaves[0], index, part))
    out = memory.zeros([len(range(n)[section]) for n, section in zip(shape, part, strict=True)], leaves[0].dtype)
    numbers = np.arange(len(leaves)) if index[0] is None else index[0]
    for i, number in enumerate(numbers[part[0]]):
        if number >= 0:
            out[i] = _arranged(leaves[number], index[1:], part[1:])
    return out


def _arranged(leaf: HostArray, index: list[np.ndarray | None], part: tuple[slice, ...]) -> HostArray:
    """The `part` of a rearranged leaf, perhaps a view of a memory-mapped file."""
    leaf = leaf.map() if isinstance(leaf, LazyArray) else leaf
    filled: list[Any] = []  # for each axis, the positions that are not padding
    for axis, (positions, section) in enumerate(zip(index, part, strict=True)):
        if positions is None:
            leaf = leaf[(slice(None),) * axis + (section,)]
            filled.append(None)
            continue
        positions = positions[section]
        real = positions[positions >= 0]
        first = real[0] if len(real) else 0
        if np.array_equal(real, np.arange(first, first + len(real))):
            leaf = leaf[(slice(None),) * axis + (slice(first, first + len(real)),)]
        else:
            leaf = leaf.take(real, axis=axis)
        filled.append(None if len(real) == len(positions) else positions >= 0)
    for axis, places in enumerate(filled):
        if places is not None:
            leaf = np.asarray(leaf)
            padded = np.zeros((*leaf.shape[:axis], len(places), *leaf.shape[axis + 1 :]), leaf.dtype)
            padded[(slice(None),) * axis + (places,)] = leaf
            leaf = padded
    return leaf
