"""Places host tensors on a mesh: each device's part is read separately, straight from the file."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import layout as layouts
from jax.sharding import Mesh, NamedSharding

from jaxllm import memory
from jaxllm.declaration import Declaration
from jaxllm.errors import InputError
from jaxllm.files import Stamp, read_runs
from jaxllm.formats.base import Weight, block_index, finest, shards
from jaxllm.kernels.registry import row_major

BAND = 1 << 26  # bytes of a rearranged part that are put together at a time
Part = tuple[slice, ...]  # along each axis, or the first few, without steps


@dataclass(frozen=True)
class FileArray:
    """An array in a file, of which only what is asked for is read.

    stamp: that of the file when its header was read; None: any is good.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    transposed: bool = False  # whether the last two axes are swapped compared to the file
    stamp: Stamp | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, part: Part = ()) -> np.ndarray:
        """A part of the array. Raises InputError if the file is not what it was when its header was read."""
        out = np.empty([len(range(n)[s]) for n, s in zip(self.shape, _full(part, self.ndim), strict=True)], self.dtype)
        self.read_into(out, part)
        return out

    def read_into(self, out: np.ndarray, part: Part = ()) -> None:
        """The same, into an array of the part's shape."""
        part = _full(part, self.ndim)
        if self.transposed:
            self.swapaxes().read_into(out.swapaxes(-1, -2), (*part[:-2], *part[:-3:-1]))
            return
        if not out.flags.c_contiguous:
            out[...] = self.read(part)
            return
        if out.size == 0:
            return
        # What is contiguous in the file are the entries of the last axis that is not read completely.
        ranges = [range(n)[s] for n, s in zip(self.shape, part, strict=True)]
        last = max((i for i, (r, n) in enumerate(zip(ranges, self.shape, strict=True)) if len(r) < n), default=0)
        strides = np.cumprod([self.dtype.itemsize, *self.shape[:0:-1]])[::-1].tolist()
        begins = np.full((), self.offset + sum(r.start * n for r, n in zip(ranges, strides, strict=False)), np.int64)
        for r, stride in zip(ranges[:last], strides, strict=False):
            begins = begins[..., None] + np.arange(len(r)) * stride
        size, buffer = out.nbytes // begins.size, memoryview(out.reshape(-1).view(np.uint8))
        runs = ((begin, buffer[i * size : (i + 1) * size]) for i, begin in enumerate(begins.reshape(-1).tolist()))
        read_runs(self.path, runs, self.stamp)

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
        return self.read().astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class DerivedArray:
    """An array that is computed from others in the file, each time a part of it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    compute: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def read(self, part: Part = ()) -> np.ndarray:
        array = self.compute()
        assert (array.shape, array.dtype) == (self.shape, self.dtype)
        return array[part]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(), dtype=dtype)


@dataclass(frozen=True)
class JoinedArray:
    """Arrays concatenated along `axis`, each a `HostArray`."""

    parts: tuple["HostArray", ...]
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

    def read(self, part: Part = ()) -> np.ndarray:
        """A part of the whole; of arrays that have nothing of it, nothing is read."""
        part, read = _full(part, self.ndim), list[np.ndarray]()
        start, stop, _ = part[self.axis].indices(self.shape[self.axis])
        for each in self.parts:
            size = each.shape[self.axis]
            here = slice(min(max(start, 0), size), min(max(stop, 0), size))
            if here.start < here.stop or (each is self.parts[-1] and not read):
                read.append(read_part(each, (*part[: self.axis], here, *part[self.axis + 1 :])))
            start, stop = start - size, stop - size
        return read[0] if len(read) == 1 else np.concatenate(read, self.axis)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(), dtype=dtype)


LazyArray = FileArray | DerivedArray | JoinedArray
HostArray = Any  # a numpy array or one of these; code uses what they share, and `schemes.Part` checks more


def read_part(leaf: HostArray, part: Part = ()) -> np.ndarray:
    """A part of an array, whatever it is; of numpy's, a view."""
    return leaf.read(part) if isinstance(leaf, LazyArray) else leaf[part]


def _full(part: Part, ndim: int) -> Part:
    return (*part, *[slice(None)] * (ndim - len(part)))


def taken(leaf: HostArray, positions: np.ndarray, axis: int) -> LazyArray:
    """The positions along an axis; nothing is read. Each run of neighbours is one slice of the file."""
    runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)

    def part(run: np.ndarray) -> DerivedArray:
        index = (slice(None),) * axis + (slice(run[0], run[-1] + 1),)
        shape = (*leaf.shape[:axis], len(run), *leaf.shape[axis + 1 :])
        return DerivedArray(shape, leaf.dtype, lambda: read_part(leaf, index))

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
        InputError: as `layout`; or numbers that all tokens meet, such as scales and norms, are not finite. Of experts,
            which may never be chosen, that is a warning.
    """
    plan = layout(source, declaration, mesh)

    def read(name: str) -> jax.Array:
        leaf, parts = plan.weight.leaf(name), [part.leaf(name) for part in plan.source.parts]
        # A derived array is computed once for all the devices that hold a part of it.
        parts = [dataclasses.replace(p, compute=cache(p.compute)) if isinstance(p, DerivedArray) else p for p in parts]
        part = partial(_read, parts, source.stacked, plan.index[name], leaf.shape)
        wrong: dict[str, int] = {}

        def checked(section: Part | None) -> np.ndarray:
            assert section is not None
            values = part(section)
            wrong[str(section)] = plan.weight.not_finite(name, values)
            return values

        placed = jax.make_array_from_callback(leaf.shape, leaf.format, checked)
        if count := sum(wrong.values()):
            said = f"tensor '{source.name}': {count} of the numbers in its {name} are infinite or no numbers"
            if len(declaration.shape) < 3:
                raise InputError(f"{said}, so every answer would be nonsense; is the file damaged?")
            warnings.warn(f"{said}, so answers may be nonsense; is the file damaged?", stacklevel=2)
        return placed

    return plan.weight.with_leaves({name: read(name) for name in plan.weight.axes})


def _read(
    leaves: list[HostArray],
    stacked: bool,
    index: list[np.ndarray | None],
    shape: tuple[int, ...],
    part: Part,
) -> np.ndarray:
    """The `part` of a rearranged leaf of this `shape`, in memory of its own."""
    out = memory.zeros([len(range(n)[section]) for n, section in zip(shape, part, strict=True)], leaves[0].dtype)
    if not stacked:
        _fill(leaves[0], index, part, out)
        return out
    numbers = np.arange(len(leaves)) if index[0] is None else index[0]
    for i, number in enumerate(numbers[part[0]]):
        if number >= 0:
            _fill(leaves[number], index[1:], part[1:], out[i])
    return out


def _fill(leaf: HostArray, index: Sequence[np.ndarray | None], part: Part, out: np.ndarray) -> None:
    """Copy the `part` of a rearranged leaf into `out`, which is zero where there is padding."""
    source: list[slice] = []  # along each axis, what has to be read, and what of that, in which order, goes where
    picked: dict[int, np.ndarray] = {}
    places: list[np.ndarray] = []
    for axis, (positions, section) in enumerate(zip(index, part, strict=True)):
        if positions is None:
            source.append(section)
            places.append(np.arange(out.shape[axis]))
            continue
        positions = positions[section]
        places.append(np.flatnonzero(positions >= 0))
        real = positions[places[axis]]
        first, end = (int(real.min()), int(real.max()) + 1) if len(real) else (0, 0)
        source.append(slice(first, end))
        if not np.array_equal(real, np.arange(first, end)):
            picked[axis] = real - first
    padded = any(len(filled) < size for filled, size in zip(places, out.shape, strict=True))
    if not padded and not picked and isinstance(leaf, FileArray):
        leaf.read_into(out, tuple(source))
    elif not padded and not picked:
        out[...] = read_part(leaf, tuple(source))
    elif out.nbytes > BAND and len(out) > 1:
        whole, half = range(leaf.shape[0] if index[0] is None else len(index[0]))[part[0]], len(out) // 2
        for few, there in ((whole[:half], out[:half]), (whole[half:], out[half:])):
            _fill(leaf, index, (slice(few.start, few.stop), *part[1:]), there)
    else:
        values = read_part(leaf, tuple(source))
        for axis, positions in picked.items():
            values = values.take(positions, axis)
        out[np.ix_(*places)] = values
