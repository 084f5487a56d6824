"""`Weight`: a quantized matrix as a value.

A format is one frozen pytree whose leaves are the checkpoint's own bits. Each format states one fact about sharding,
`axes`: for each axis of each leaf, the dimension of the matrix that it runs along, and how many positions of that
dimension one index covers. Shapes, PartitionSpecs, padding and the slices that a loader reads are all derived from that
fact, so a format cannot be sharded correctly in one place and wrongly in another. (The alternative is a `shard` method
per format. With it, other engines broke tensor parallelism for GPTQ, AWQ and bitsandbytes one after the other.)

Every format keeps this invariant: if all bytes of its leaves are zero, the matrix is zero. Padding relies on it.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxllm.errors import InputError


class Cut(NamedTuple):
    """An axis of a leaf that runs along `dim` ("out" or "in") of the matrix; one index covers `unit` positions."""

    dim: str
    unit: int = 1


Axes = tuple[Cut | None, ...]

# A leaf of a weight. In computations it is a `jax.Array`. The same classes also describe weights in files (numpy
# arrays, or lazy arrays of `jaxllm.placing`), their shapes (`ShapeDtypeStruct`) and their sharding (`PartitionSpec`,
# `NamedSharding`). A union of all these would need a check at every use.
Leaf = Any


def static_field(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that is part of the type of a weight (known at trace time), not a leaf."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Weight(ABC):
    """A matrix `[*batch, out, in]` in some format. Subclasses are final, frozen, registered dataclasses.

    Leaves may be arrays or stand for them (`ShapeDtypeStruct`, `PartitionSpec`), so nothing is validated when it is
    constructed.
    """

    @property
    @abstractmethod
    def format(self) -> str:
        """The format's name as its users write it, for example "Q4_1" or "bfloat16"."""

    @property
    @abstractmethod
    def axes(self) -> dict[str, Axes]:
        """For each leaf, what its trailing axes run along; the axes before those are the batch.

        A leaf inside a field is named with a dot, as for `leaf`. A weight may hold another weight, for example a
        quantized matrix to which an adapter adds something. It then lists the axes of the inner weight too, see
        `inner_axes`. The first leaf runs along all dimensions of the matrix.
        """

    @abstractmethod
    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The matrix `[*batch, out, in]`: dequantized exactly in float32, then rounded once to `dtype`."""

    def leaf(self, name: str) -> Leaf:
        """The leaf with this name in `axes`."""
        return attrgetter(name)(self)

    def with_leaves(self, leaves: Mapping[str, object]) -> Self:
        """The same weight with some leaves replaced, by their names in `axes`."""
        fields: dict[str, object] = {}
        for name, leaf in leaves.items():
            field, _, inner = name.partition(".")
            held: Any = fields.get(field, getattr(self, field))
            fields[field] = Weight.with_leaves(held, {inner: leaf}) if inner else leaf
        return dataclasses.replace(self, **fields)

    @property
    def inner(self) -> "dict[str, Weight]":
        """The weights that this one holds, by field name."""
        leaves = (field.name for field in dataclasses.fields(self) if not field.metadata.get("static"))
        return {name: value for name in leaves if isinstance(value := getattr(self, name), Weight)}

    def inner_axes(self) -> dict[str, Axes]:
        """The axes of the weights that this one holds, by their names in its own `axes`."""
        return {f"{field}.{name}": axes for field, weight in self.inner.items() for name, axes in weight.axes.items()}

    def own_axes(self) -> dict[str, Axes]:
        """The axes of its own leaves, without those of weights that it holds."""
        return {name: axes for name, axes in self.axes.items() if name.partition(".")[0] not in self.inner}

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape `(*batch, out, in)`."""
        name, axes = next(iter(self.axes.items()))
        leaf = self.leaf(name).shape
        sizes = dict.fromkeys(("out", "in"))
        for size, cut in zip(leaf[len(leaf) - len(axes) :], axes, strict=True):
            if cut:
                sizes[cut.dim] = size * cut.unit
        return (*leaf[: len(leaf) - len(axes)], *(n for n in sizes.values() if n is not None))

    def unit(self, dim: str) -> int:
        """The block size along `dim`: how many neighbouring positions stay together when it is sharded."""
        return _common_unit(self.axes, dim)

    def granularity(self, dim: str) -> int:
        """The smallest block size along `dim` that `refined` can reach; the current one if the format lacks that."""
        return math.lcm(_common_unit(self.own_axes(), dim), *(w.granularity(dim) for w in self.inner.values()))

    def refined(self, out: int, in_: int) -> Self:
        """The same matrix with block sizes `out` and `in_`, which divide the current ones. Formats whose scales can be
        repeated implement it; others are returned unchanged and cannot be split there."""
        units = {name: (math.gcd(w.unit("out"), out), math.gcd(w.unit("in"), in_)) for name, w in self.inner.items()}
        return dataclasses.replace(self, **{name: w.refined(*units[name]) for name, w in self.inner.items()})

    @property
    def nbytes(self) -> int:
        """The bytes of all leaves, on all devices together."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """The bits of all leaves for each number of the matrix."""
        return 8 * self.nbytes / math.prod(self.shape)

    def shard_specs(self, spec: PartitionSpec, mesh: Mesh | AbstractMesh, name: str = "weight") -> Self:
        """The same weight with a PartitionSpec for every leaf, from one over the logical `[*batch, out, in]`.

        Args:
            spec: how the matrix is sharded.
            mesh: the mesh that has the axes of `spec`.
            name: what the matrix is called in messages.

        Raises:
            InputError: some device would not hold complete blocks; the message names the sizes that work.
        """
        entries = tuple(spec) + (None,) * (len(self.shape) - len(spec))
        along = dict(zip(("out", "in"), entries[-2:], strict=False))  # a vector has no "in"
        specs = {}
        for leaf_name, axes in self.axes.items():
            shape = self.leaf(leaf_name).shape
            batch = len(shape) - len(axes)
            leaf_spec = [*entries[:batch], *(along[cut.dim] if cut else None for cut in axes)]
            for i, (size, entry) in enumerate(zip(shape, leaf_spec, strict=True)):
                if size % shards(entry, mesh):
                    cut = (axes[i - batch] if i >= batch else None) or Cut(f"batch axis {i}")
                    works = [n for n in range(1, size + 1) if size % n == 0]
                    raise InputError(
                        f"{name}: dimension '{cut.dim}' of {size * cut.unit} is {size} blocks of {cut.unit}, which do "
                        f"not divide over {shards(entry, mesh)} devices; {entry} = {_short(works)} works, or pad_to()"
                    )
            specs[leaf_name] = PartitionSpec(*leaf_spec)
        return self.with_leaves(specs)

    def not_finite(self, name: str, part: np.ndarray) -> int:
        """How many numbers are infinite or no numbers, of those that many products meet: scales and the like, vectors.

        Args:
            name: of a leaf, as in `axes`.
            part: a part of its values.
        """
        if not jnp.issubdtype(part.dtype, jnp.floating) or (name == "values" and part.ndim > 1):
            return 0
        return part.size - int(np.isfinite(part).sum())

    def like(self, w: jax.Array) -> Self:
        """The floats `w`, of this weight's shape, encoded in its format.

        Raises:
            InputError: the format has no encoder.
        """
        raise InputError(f"{self.format} cannot be encoded")

    def add_delta(self, delta: jax.Array) -> Self:
        """The matrix plus a delta `[*batch, out, in]`, in the same format. Raises InputError as `like` does."""
        return self.like(_sum(self, delta))

    def pad_to(self, mesh: Mesh, spec: PartitionSpec) -> Self:
        """The same matrix with zero blocks appended so that `spec`, on this mesh, divides every leaf."""
        entries = (tuple(spec) + (None,) * len(self.shape))[: len(self.shape)]
        *_, rows, cols = self.shape
        return self.arrange(
            rows=padded_index(rows, self.unit("out") * shards(entries[-2], mesh)),
            cols=padded_index(cols, self.unit("in") * shards(entries[-1], mesh)),
        )

    def arrange(
        self,
        rows: np.ndarray | None = None,
        cols: np.ndarray | None = None,
        taking: Callable[[Leaf, np.ndarray, int], Leaf] | None = None,
    ) -> Self:
        """The matrix whose row i is this one's row `rows[i]`, and the same for columns; an index of -1 gives zeros.

        Blocks move unchanged: nothing is dequantized. Raises InputError if an index would split a block.

        Args:
            rows, cols: int `[new out]` and `[new in]`; None: all of them, in their order.
            taking: gives the positions along an axis of a leaf; by default `take`.
        """
        leaves = {}
        for name, axes in self.axes.items():
            leaf = self.leaf(name)
            for i, index in enumerate(block_index(axes, rows, cols)):
                if index is not None:
                    leaf = (taking or take)(leaf, index, leaf.ndim - len(axes) + i)
            leaves[name] = leaf
        return self.with_leaves(leaves)

    def take(self, ids: jax.Array) -> Self:
        """Rows `ids` of an unbatched matrix, as a weight of shape `[*ids.shape, in]`: an embedding lookup."""
        cut = {name: axes for name, axes in self.own_axes().items() if any(c and c.dim == "out" for c in axes)}
        assert all(axes[0] == Cut("out") for axes in cut.values()), f"{self.format} cannot look up single rows"
        taken = self.with_leaves({name: self.leaf(name)[ids] for name in cut})
        return dataclasses.replace(taken, **{name: weight.take(ids) for name, weight in self.inner.items()})


@jax.jit
def _sum(weight: Weight, delta: jax.Array) -> jax.Array:
    return weight.dequantize() + delta


def _common_unit(axes: Mapping[str, Axes], dim: str) -> int:
    return math.lcm(*(cut.unit for along in axes.values() for cut in along if cut and cut.dim == dim))


def repeated(leaf: Leaf, times: int, axis: int, size: int) -> Leaf:
    """Each entry along an axis repeated `times` times, cut to the first `size`. Works on shapes and on arrays."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = list(leaf.shape)
        shape[axis] = size
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
    return np.repeat(leaf, times, axis=axis).take(range(size), axis=axis)


def padded_index(size: int, multiple: int) -> np.ndarray:
    """`0 .. size-1`, then -1 up to the next multiple: the identity with zeros appended."""
    index = np.arange(math.ceil(size / multiple) * multiple)
    return np.where(index < size, index, -1)


def block_index(axes: Axes, rows: np.ndarray | None, cols: np.ndarray | None) -> list[np.ndarray | None]:
    """Translate an index over positions of the matrix into one over each of a leaf's trailing axes.

    Raises:
        InputError: the positions of one block do not stay together.
    """
    moved = [None if cut is None else {"out": rows, "in": cols}[cut.dim] for cut in axes]
    return [i if i is None or cut is None else _whole_blocks(i, cut) for i, cut in zip(moved, axes, strict=True)]


def finest(unit: int, size: int, shards: int, index: np.ndarray | None) -> int:
    """The largest divisor of `unit` that divides the size of each shard and of every run that `index` moves."""
    size = len(index) if index is not None else size
    if shards > 1:
        unit = math.gcd(unit, size // shards)
    while index is not None and not _is_whole(index, unit):
        unit = max(n for n in range(1, unit) if unit % n == 0)
    return unit


def _is_whole(index: np.ndarray, unit: int) -> bool:
    if index.size % unit:
        return False
    grid = index.reshape(-1, unit)
    first = grid[:, :1]
    together = np.where(first < 0, -1, first + np.arange(unit))
    return bool(((first < 0) | (first % unit == 0)).all() and (grid == together).all())


def _whole_blocks(index: np.ndarray, cut: Cut) -> np.ndarray:
    if not _is_whole(index, cut.unit):
        raise InputError(f"dimension '{cut.dim}' can only be rearranged in whole blocks of {cut.unit}")
    first = index[:: cut.unit]
    return np.where(first < 0, -1, first // cut.unit)


def take(leaf: Leaf, index: np.ndarray, axis: int) -> Leaf:
    """The positions `index` along an axis, zeros for -1."""
    taken = leaf.take(np.maximum(index, 0), axis=axis)
    if (index >= 0).all():
        return taken
    keep = np.expand_dims(index >= 0, tuple(i for i in range(leaf.ndim) if i != axis))
    numpy: Any = np if isinstance(taken, np.ndarray) else jnp
    return numpy.where(keep, taken, np.zeros((), taken.dtype))


def shards(entry: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    """How many shards an entry of a PartitionSpec splits a dimension into."""
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh.shape[name] for name in names)


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers if len(numbers) <= 8 else [*numbers[:7], "..."]))
