"""Codes of 1 to 8 bits as the kernels of accelerators want them, whatever format they were read in.

Files pack codes in many ways; hardware likes one. In a chunk of a row, the codes' bits are split into planes, of as
many bits as the binary digits of their number: 6 bits are a plane of four and one of two. A plane is 32-bit words in
groups of eight. The codes of one group are `[fields, words, halves]`, in this order: field f of half h of word r holds
column `16 f + 2 r + h` of the group, in bits `16 h + width * f` and up. So one shift and one mask of eight words give
the codes of 16 neighbouring columns, two in each word: as a TPU packs two rows of bfloat16 in a word of a register,
and, added to the bits of 128, as bfloat16 numbers.

For TPUs the matrix is transposed, so that columns of the words lie along lanes; for GPUs each row is contiguous.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats.base import Axes, Cut, Leaf, Weight, static_field
from jaxllm.formats.parts import Levels, numbers

WORD = 32
GROUP = 8  # words
SLAB = 2 * GROUP  # neighbouring columns of one field
LANES = 128  # of a TPU's register
FEW = 64  # rows that are looked up one by one where they lie along lanes; for more, XLA turns the entire matrix first


def widths(bits: int) -> tuple[int, ...]:
    """The planes of a code: how many bits each has, the high ones first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def chunk(bits: int) -> int:
    """How many columns the smallest complete groups of all planes cover."""
    return GROUP * WORD // widths(bits)[-1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Planes(Weight):
    """`W = value * scale * factor + offset` in float32, in this order, where a value is `code - zero` or `table[code]`,
    and zero, scale and offset belong to a group of `group` neighbours along `in`.

    Shapes below are `[*batch, out, ...]`; if `transposed`, `out` comes last instead.

    Attributes:
        codes: uint32 `[*batch, out, in / chunk(bits), bits * chunk(bits) / 32]`, see above; transposed
            `[*batch, in / chunk(bits), bits * chunk(bits) / 32, out]`.
        scales: fine ones `[*batch, out, in / group]`; coarse ones `[*batch, out, in / coarse_group]`, or one for the
            matrix, `[*batch, 1]`, if `coarse_group` is 0.
        offsets: likewise, or None.
        zeros: like the fine scales, of any dtype; None: all are `zero`.
        table: float32 `[*batch, 16]`, or None.
        order: int32 `[*batch, in]`, which column of the matrix each of the codes' columns is; None: they are in order.
        origin: the weight that this was made of, its leaves replaced by scalars of their dtypes.
    """

    codes: Leaf
    scales: Levels
    bits: int = static_field()
    group: int = static_field()
    coarse_group: int = static_field()
    transposed: bool = static_field()
    origin: Weight = static_field()
    zero: float = static_field(0)
    factor: float = static_field(1.0)
    zeros: Leaf | None = None
    offsets: Levels | None = None
    table: Leaf | None = None
    order: Leaf | None = None

    @property
    def format(self) -> str:
        return self.origin.format

    @property
    def axes(self) -> dict[str, Axes]:
        fine: Axes = self._along(Cut("in", self.group))
        coarse: Axes = self._along(Cut("in", self.coarse_group)) if self.coarse_group else (None,)
        known: dict[str, Axes] = {"codes": self._along(Cut("in", chunk(self.bits)), None), "scales.fine": fine}
        if self.scales.coarse is not None:
            known["scales.coarse"] = coarse
        if self.offsets is not None:
            known["offsets.fine"] = fine
            if self.offsets.coarse is not None:
                known["offsets.coarse"] = coarse
        rest: dict[str, Axes] = {"zeros": fine, "table": (None,), "order": (Cut("in"),)}
        return known | {name: axes for name, axes in rest.items() if getattr(self, name) is not None}

    def _along(self, *cuts: Cut | None) -> Axes:
        """The axes of a leaf that runs along the rows of the matrix too."""
        return (*cuts, Cut("out")) if self.transposed else (Cut("out"), *cuts)

    @property
    def shape(self) -> tuple[int, ...]:
        *batch, first, second, third = self.codes.shape
        out, chunks = (third, first) if self.transposed else (first, second)
        return *batch, out, chunks * chunk(self.bits)

    def turned(self) -> Self:
        """The same matrix, stored the other way around."""
        first, last = (-1, 0) if self.transposed else (0, -1)
        moved = {
            name: jnp.moveaxis(self.leaf(name), *(i % len(axes) - len(axes) for i in (first, last)))
            for name, axes in self.axes.items()
            if axes[first] == Cut("out")
        }
        return replace(self.with_leaves(moved), transposed=not self.transposed)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        if self.transposed:
            return self.turned().dequantize(dtype)
        codes = unpack(self.codes, self.bits)
        if self.table is None:
            zeros = jnp.float32(self.zero) if self.zeros is None else self._spread(numbers(self.zeros))
            values = codes.astype(jnp.float32) - zeros
        else:
            table = self.table if self.table.ndim == 1 else self.table[..., None, :]
            table = jnp.broadcast_to(table, (*codes.shape[:-1], 16))
            values = jnp.take_along_axis(table, codes.astype(jnp.int32), axis=-1)
        w = values * self._spread(self._shared(self.scales).values())
        w = w if self.factor == 1 else w * jnp.float32(self.factor)
        if self.offsets is not None:
            if self.scales.fine.dtype == jnp.float32:  # otherwise exact, so fusing it into the sum changes nothing
                w = lax.optimization_barrier(w)
            w = w + self._spread(self._shared(self.offsets).values())
        if self.order is not None:
            back = jnp.broadcast_to(jnp.argsort(self.order, axis=-1)[..., None, :], w.shape)
            w = jnp.take_along_axis(w, back, axis=-1)
        return w.astype(dtype)

    def _shared(self, levels: Levels) -> Levels:
        """The levels, where a coarse number of the entire matrix gets the axes of the fine ones."""
        if levels.coarse is None or self.coarse_group:
            return levels
        return replace(levels, coarse=levels.coarse if levels.coarse.ndim == 1 else levels.coarse[..., None])

    def _spread(self, values: jax.Array) -> jax.Array:
        return jnp.repeat(values, self.group, axis=-1)[..., : self.shape[-1]]

    def take(self, ids: jax.Array) -> Self:
        if not self.transposed:
            return super().take(ids)

        def rows(leaf: jax.Array) -> jax.Array:
            if ids.size > FEW:
                return jnp.moveaxis(leaf[..., ids], range(-ids.ndim, 0), range(ids.ndim))
            return lax.map(partial(_column, leaf), ids.reshape(-1)).reshape(*ids.shape, *leaf.shape[:-1])

        found = {name: rows(self.leaf(name)) for name, axes in self.axes.items() if axes[-1] == Cut("out")}
        return replace(self.with_leaves(found), transposed=False)

    def like(self, w: jax.Array) -> Self:
        from jaxllm.formats.planes_of import planes_of

        made: Any = planes_of(self.origin.like(w), self.transposed)
        return made


def _column(leaf: jax.Array, i: jax.Array) -> jax.Array:
    """`leaf[..., i]`, of the register's width of columns around it, so that XLA has no reason to turn the leaf."""
    width = min(leaf.shape[-1], LANES)
    start = jnp.minimum(i // width * width, leaf.shape[-1] - width)
    near = lax.dynamic_slice_in_dim(leaf, start, width, axis=-1)
    return jnp.sum(
        jnp.where(jnp.arange(width) == i - start, near, jnp.zeros((), near.dtype)), axis=-1, dtype=near.dtype
    )


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Codes `[..., in]` of whole chunks as words, uint32 `[..., in / chunk, bits * chunk / 32]`."""
    grid = codes.astype(jnp.uint32).reshape(*codes.shape[:-1], -1, chunk(bits))
    done, planes = bits, []
    for width in widths(bits):
        done -= width
        field = (grid >> done & 2**width - 1).reshape(*grid.shape[:-1], -1, WORD // width // 2, GROUP, 2)
        shifts = width * np.arange(WORD // width // 2)[:, None, None] + 16 * np.arange(2)
        words = jnp.sum(field << shifts.astype(np.uint32), axis=(-3, -1), dtype=jnp.uint32)
        planes.append(words.reshape(*grid.shape[:-1], -1))
    return jnp.concatenate(planes, axis=-1)


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`: uint32 `[..., in]`."""
    *lead, chunks, _ = words.shape
    codes, begin = jnp.zeros((*lead, chunks * chunk(bits)), jnp.uint32), 0
    for width in widths(bits):
        end = begin + chunk(bits) * width // WORD
        groups = words[..., begin:end].reshape(*lead, chunks, -1, 1, GROUP, 1)
        shifts = width * np.arange(WORD // width // 2)[:, None, None] + 16 * np.arange(2)
        codes = codes << width | (groups >> shifts.astype(np.uint32) & 2**width - 1).reshape(codes.shape)
        begin = end
    return codes
