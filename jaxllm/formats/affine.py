"""Integers of 1 to 8 bits with a scale and an offset per group: GPTQ, AWQ, MLX, HQQ and similar formats.

These checkpoints differ in the order of bits, in the direction of packing, and in what they call an offset. Here all of
them are read into one layout, so they share one decoder and one way to be sharded. Most need no work: GPTQ's words are
MLX's transposed. AWQ and HQQ order codes in their own ways; these are reordered while they are read
(`checkpoint/repack.py`).
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats.base import Axes, Cut, Leaf, Weight, repeated, static_field
from jaxllm.formats.scaled import quotient

WORD = 32
SHARES = np.linspace(1.05, 0.6, 19, dtype=np.float32)  # of the scale that clips nothing, in `Affine.symmetric`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine(Weight):
    """`W = (code - zero) * scale`, or `code * scale + bias`, where zero, scale and bias belong to a group.

    A group is `group` neighbours along `in`. Two kinds of file group differently: there `in_groups` gives the group of
    each column, or `out_groups` that of each row, counted from 1. Group 0 is for padding and has scale 0.

    Attributes:
        codes: uint32 `[*batch, out, in / values, words]`: each `words` words hold `values` codes, the first in the
            lowest bits. Some codes span two words if `bits` does not divide 32.
        scales: any floating dtype `[*batch, out, groups]`; with `out_groups` `[*batch, groups, in]`.
        name: the kind of checkpoint.
        zeros: shaped like scales, integers or floats; None if all are `zero`.
        biases: shaped like scales, or None.
        in_groups: int32 `[*batch, in]` or None.
        out_groups: int32 `[*batch, out]` or None.
        even: whether `in_groups`, as read, has `group` columns in every group but 0 (act-order).
    """

    codes: Leaf
    scales: Leaf
    bits: int = static_field()
    group: int = static_field()
    name: str = static_field()
    zero: int = static_field(0)
    zeros: Leaf | None = None
    biases: Leaf | None = None
    in_groups: Leaf | None = None
    out_groups: Leaf | None = None
    even: bool = static_field(False)

    @property
    def format(self) -> str:
        return f"{self.name} {self.bits}-bit"

    @property
    def axes(self) -> dict[str, Axes]:
        scales: Axes = (Cut("out"), Cut("in", self.group))
        if self.in_groups is not None:
            scales = Cut("out"), None
        if self.out_groups is not None:
            scales = None, Cut("in")
        known = {
            "codes": (Cut("out"), Cut("in", word_values(self.bits)), None),
            "scales": scales,
            "zeros": scales,
            "biases": scales,
            "in_groups": (Cut("in"),),
            "out_groups": (Cut("out"),),
        }
        return {name: axes for name, axes in known.items() if getattr(self, name) is not None}

    def granularity(self, dim: str) -> int:
        return word_values(self.bits) if dim == "in" else 1

    def refined(self, out: int, in_: int) -> Self:
        """The same matrix with smaller groups: scale and offset are repeated for the parts of a group."""
        group = math.gcd(self.group, in_)
        if self.in_groups is not None or self.out_groups is not None or group == self.group:
            return self
        count = math.ceil(self.shape[-1] / group)
        spread = {
            name: repeated(leaf, self.group // group, -1, count)
            for name in ("scales", "zeros", "biases")
            if (leaf := getattr(self, name)) is not None
        }
        return replace(self, **spread, group=group)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        codes = unpack(self.codes, self.bits).astype(jnp.float32)
        scales = self._spread(self.scales, codes.shape)
        if self.biases is not None:
            products = codes * scales
            if self.scales.dtype == jnp.float32:  # otherwise exact, so fusing it into the sum changes nothing
                products = lax.optimization_barrier(products)
            return (products + self._spread(self.biases, codes.shape)).astype(dtype)
        zeros = jnp.float32(self.zero) if self.zeros is None else self._spread(self.zeros, codes.shape)
        return ((codes - zeros) * scales).astype(dtype)

    def _spread(self, values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The values of groups, float32, spread to every element of the matrix."""
        values = values.astype(jnp.float32)
        if self.in_groups is not None:
            index = self.in_groups if self.in_groups.ndim == 1 else self.in_groups[..., None, :]
            return jnp.take_along_axis(values, jnp.broadcast_to(index, shape), axis=-1)
        if self.out_groups is not None:
            if values.ndim == 2:  # a matrix, or rows of one that were looked up
                return values[self.out_groups]
            return jnp.take_along_axis(values, jnp.broadcast_to(self.out_groups[..., None], shape), axis=-2)
        return jnp.repeat(values, self.group, axis=-1)[..., : shape[-1]]

    @classmethod
    def from_dense(cls, w: jax.Array, bits: int, group: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Self:
        """Encode floats `[*batch, out, in]` as `mlx.core.quantize` does: of a group's minimum and maximum, the one with
        the larger magnitude is exact. The scale is negative if that is the maximum.

        Args:
            dtype: of scales and biases. They are rounded to it before the codes are chosen (in MLX, afterwards).
        """
        *lead, in_ = w.shape
        grid = jnp.asarray(w, jnp.float32).reshape(*lead, in_ // group, group)
        low, high = grid.min(-1), grid.max(-1)
        scale = jnp.maximum(quotient(high - low, jnp.float32(2**bits - 1)), jnp.float32(1e-7))
        lower = jnp.abs(low) > jnp.abs(high)
        scale, edge = jnp.where(lower, scale, -scale), jnp.where(lower, low, high)
        steps = jnp.round(quotient(edge, scale))
        scale = jnp.where(steps == 0, scale, quotient(edge, steps)).astype(dtype)
        bias = jnp.where(steps == 0, jnp.float32(0), edge).astype(dtype)
        wide = scale.astype(jnp.float32)[..., None]
        codes = jnp.clip(jnp.round(quotient(grid - bias.astype(jnp.float32)[..., None], wide)), 0, 2**bits - 1)
        return cls(pack(codes.reshape(w.shape).astype(jnp.uint32), bits), scale, bits, group, "MLX", biases=bias)

    @classmethod
    def symmetric(cls, w: jax.Array, bits: int, group: int, importance: jax.Array | None = None) -> Self:
        """Encode floats `[*batch, out, in]` as signed integers with a float16 scale per group (compressed-tensors).

        Mapping the largest magnitude to the largest code clips nothing, yet is seldom best. So each group takes the one
        of `SHARES` of that scale that gives the least squared error, where `importance`, `[in]` or `[*batch, in]`,
        weights the columns; columns of a row of zeros count the same.
        """
        half = 2 ** (bits - 1)
        grid = jnp.asarray(w, jnp.float32).reshape(*w.shape[:-1], -1, group)
        peak = jnp.max(jnp.abs(grid), axis=-1, keepdims=True)
        weights = jnp.float32(1)
        if importance is not None:
            known = jnp.any(importance > 0, axis=-1, keepdims=True)
            weights = jnp.where(known, importance, jnp.float32(1))
            weights = weights.reshape(*weights.shape[:-1], 1, -1, group)

        def rounded(share: jax.Array) -> tuple[jax.Array, jax.Array]:
            scale = (peak * (share / jnp.float32(half - 0.5))).astype(jnp.float16)
            codes = jnp.round(quotient(grid, scale.astype(jnp.float32)))
            return scale, jnp.clip(codes, jnp.float32(-half), jnp.float32(half - 1))

        def attempt(k: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            least, chosen = best
            share = jnp.asarray(SHARES)[k]
            scale, codes = rounded(share)
            off = codes * scale.astype(jnp.float32) - grid
            error = jnp.sum(weights * off * off, axis=-1, keepdims=True)
            return jnp.minimum(error, least), jnp.where(error < least, share, chosen)

        _, share = lax.fori_loop(0, len(SHARES), attempt, (jnp.full_like(peak, jnp.inf), jnp.ones_like(peak)))
        scale, codes = rounded(share)
        words = pack((codes + jnp.float32(half)).astype(jnp.uint32).reshape(w.shape), bits)
        return cls(words, scale[..., 0], bits, group, "INT", zero=half)

    def like(self, w: jax.Array) -> Self:
        if self.biases is None:  # rounding does not find what GPTQ and similar methods search for
            return super().like(w)
        made = self.from_dense(w, self.bits, self.group)
        return replace(
            made,
            scales=made.scales.astype(self.scales.dtype),
            biases=made.leaf("biases").astype(self.leaf("biases").dtype),
        )


def word_values(bits: int) -> int:
    """How many codes the smallest number of completely filled words holds."""
    return WORD // math.gcd(bits, WORD)


def unpack(words: jax.Array, bits: int) -> jax.Array:
    """Codes of `[..., n, words]`: uint32 `[..., n * values]`."""
    start = np.arange(word_values(bits)) * bits
    first, shift = start // WORD, (start % WORD).astype(np.uint32)
    low = words[..., first] >> shift
    across = shift + bits > WORD
    if across.any():
        second = np.where(across, first + 1, first)
        high = words[..., second] << np.where(across, WORD - shift, 0).astype(np.uint32)
        low = low | jnp.where(across, high, jnp.uint32(0))
    codes = low & jnp.uint32(2**bits - 1)
    return codes.reshape(*codes.shape[:-2], -1)


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """The inverse of `unpack`."""
    values = word_values(bits)
    grid = codes.reshape(*codes.shape[:-1], -1, values)
    words = [jnp.zeros(grid.shape[:-1], jnp.uint32)] * (values * bits // WORD)
    for k in range(values):
        word, shift = divmod(k * bits, WORD)
        words[word] = words[word] | grid[..., k] << shift
        if shift + bits > WORD:
            words[word + 1] = words[word + 1] | grid[..., k] >> (WORD - shift)
    return jnp.stack(words, axis=-1)
