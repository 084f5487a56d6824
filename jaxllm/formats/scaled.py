"""Small floats or integers with a scale for each rectangle of the matrix: blockwise FP8 as in DeepSeek-V3, FP8 with one
scale per row or per matrix, MXFP8, and INT8."""

import math
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.formats.base import Axes, Cut, Leaf, Weight, repeated, static_field

E4M3_MAX = 448.0
NAMES = {"float8_e4m3fn": "FP8", "float8_e5m2": "FP8 E5M2", "int8": "INT8"}


def quotient(a: jax.Array, b: jax.Array | float) -> jax.Array:
    """`a / b` in float32, rounded once; zeros give 0.

    If a divisor is constant, broadcast or itself a quotient, XLA multiplies by its reciprocal, which gives a different
    float half of the time. It cannot do so if the divisor is selected separately for each number.
    """
    return a / jnp.where(a == 0, jnp.float32(1), b)


def scale_for(peak: jax.Array, limit: float, power_of_two: bool = False) -> jax.Array:
    """The scale that maps magnitudes up to `peak`, float32, to magnitudes up to `limit`: `peak / limit`, rounded once.

    It is 1 where the peak is 0. With `power_of_two`, it is rounded up to a power of two ("ue8m0").
    """
    scale = jnp.where(peak == 0, jnp.float32(1), quotient(peak, jnp.float32(limit)))
    if not power_of_two:
        return scale
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    return lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


def _groups(w: jax.Array, size: int) -> jax.Array:
    """`[..., n]` as float32 `[..., n / size, size]`."""
    return jnp.asarray(w, jnp.float32).reshape(*w.shape[:-1], -1, size)


def _up_to_e4m3(x: jax.Array) -> jax.Array:
    """Numbers of 0 to 448 rounded up to the next E4M3."""
    near = x.astype(jnp.float8_e4m3fn)
    short = near.astype(jnp.float32) < x
    bits = lax.bitcast_convert_type(near, jnp.uint8) + short.astype(jnp.uint8)
    return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Activations:
    """How a matmul's activations are rounded to the dtype of the weight's values (W8A8).

    Attributes:
        group: how many neighbours in a row share a scale; None: the entire row.
        power_of_two: whether scales are rounded up to powers of two, which configs call "ue8m0".
        threshold: columns with magnitudes of this or more are not rounded (LLM.int8); 0: all are. Only without groups.
        scale: float32 `[*batch, 1]`, one scale from the checkpoint for all rows; None: each row has its own.
    """

    group: int | None = static_field(None)
    power_of_two: bool = static_field(False)
    threshold: float = static_field(0.0)
    scale: Leaf | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled(Weight):
    """`W[o, i] = values[o, i] * scales[o // block[0], i // block[1]] * factor`, in this order.

    Attributes:
        values: float8_e4m3fn, float8_e5m2 or int8 `[*batch, out, in]`.
        scales: float32, bfloat16, float16 or a float8 dtype `[*batch, ceil(out / block[0]), ceil(in / block[1])]`.
            Some checkpoints call them `weight_scale_inv`, yet they are multiplied by.
        block: rows and columns that share a scale; None means all of them.
        activations: how a matmul's activations are rounded; None: they are not, and this matrix is only dequantized.
    """

    values: Leaf
    scales: Leaf
    block: tuple[int | None, int | None] = static_field()
    activations: Activations | None = None
    factor: float = static_field(1.0)

    @property
    def format(self) -> str:
        name = NAMES.get(self.values.dtype.name, self.values.dtype.name)
        rows, cols = self.block
        if cols is None:
            return name if rows is None else f"{name} per row"
        return f"{name} {rows or self.shape[-2]}x{cols}"

    @property
    def axes(self) -> dict[str, Axes]:
        out, in_ = (Cut(d, n) if n else None for d, n in zip(("out", "in"), self.block, strict=True))
        axes: dict[str, Axes] = {"values": (Cut("out"), Cut("in")), "scales": (out, in_)}
        given = self.activations is not None and self.activations.scale is not None
        return axes | {"activations.scale": (None,)} if given else axes

    def granularity(self, dim: str) -> int:
        return 1

    def refined(self, out: int, in_: int) -> Self:
        """The same matrix with smaller blocks: each scale is repeated for the parts of its block."""
        scales, block = self.scales, dict(zip((-2, -1), self.block, strict=True))
        for axis, new in ((-2, out), (-1, in_)):
            if (old := block[axis]) is not None and old != new:
                scales = repeated(scales, old // new, axis, math.ceil(self.values.shape[axis] / new))
                block[axis] = new
        return replace(self, scales=scales, block=(block[-2], block[-1]))

    def swapped(self) -> Self:
        """The transpose."""
        values, scales = (leaf.swapaxes(-1, -2) for leaf in (self.values, self.scales))
        return replace(self, values=values, scales=scales, block=self.block[::-1])

    def take(self, ids: jax.Array) -> Self:
        """See `Weight.take`; each row gets its own scale."""
        rows, cols = self.block
        scales = self.scales if rows is None else self.scales[ids // rows]
        return replace(self, values=self.values[ids], scales=scales, block=(rows and 1, cols))

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        scales = jnp.asarray(self.scales).astype(jnp.float32)
        for axis, block in ((-2, self.block[0]), (-1, self.block[1])):
            if block is not None:
                scales = jax.lax.slice_in_dim(
                    jnp.repeat(scales, block, axis=axis), 0, self.values.shape[axis], axis=axis % scales.ndim
                )
        w = jnp.asarray(self.values).astype(jnp.float32) * scales
        return (w if self.factor == 1 else w * jnp.float32(self.factor)).astype(dtype)

    @classmethod
    def from_dense(cls, w: jax.Array, block: tuple[int | None, int | None] = (128, 128)) -> Self:
        """FP8 with scales that bring each block's largest value to 448 (1 where it is zero), rounded to nearest."""
        *batch, out, in_ = w.shape
        w = jnp.asarray(w, jnp.float32)
        high, wide = block[0] or out, block[1] or in_
        rows, cols = math.ceil(out / high), math.ceil(in_ / wide)
        pad = [(0, 0)] * len(batch) + [(0, rows * high - out), (0, cols * wide - in_)]
        grid = jnp.pad(jnp.abs(w), pad).reshape(*batch, rows, high, cols, wide)
        peak = jnp.max(grid, axis=(-3, -1))
        scales = scale_for(peak, E4M3_MAX)
        spread = jnp.repeat(jnp.repeat(scales, high, -2)[..., :out, :], wide, -1)[..., :in_]
        values = jnp.clip(quotient(w, spread), -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
        return cls(values, scales, block)

    @classmethod
    def mxfp8(cls, w: jax.Array) -> Self:
        """FP8 with a power of two for every 32 columns, the least that brings them to 448 or below (as MLX does).

        OCP's rule takes the power below if the largest value then exceeds 448, and clips it.
        """
        grid = _groups(w, 32)
        peak = jnp.max(jnp.abs(grid), axis=-1)
        scales = jnp.maximum(scale_for(peak, E4M3_MAX, power_of_two=True), jnp.float32(2**-126))
        values = quotient(grid, scales[..., None]).astype(jnp.float8_e4m3fn)
        return cls(values.reshape(w.shape), scales.astype(jnp.float8_e8m0fnu), (1, 32))

    @classmethod
    def int8(cls, w: jax.Array) -> Self:
        """INT8 with a scale per row, as LLM.int8 stores it: the row's largest magnitude, for which 127 stands."""
        peak = jnp.max(jnp.abs(w), axis=-1, keepdims=True)
        values = jnp.round(w * jnp.where(peak == 0, jnp.float32(0), 127 / peak))
        return cls(values.astype(jnp.int8), peak, (1, None), factor=1 / 127)

    @classmethod
    def f8q8(cls, w: jax.Array) -> Self:
        """INT8 with an E4M3 scale for every 32 columns, 448 times too large: mistral.rs's F8Q8.

        Scales are rounded up, so that no value is clipped, and values are divided by the rounded ones. (mistral.rs
        divides before it rounds, which changes the size of a whole block.) Magnitudes are 127 at most.
        """
        grid = _groups(w, 32)
        peak = jnp.max(jnp.abs(grid), axis=-1)
        scales = _up_to_e4m3(jnp.minimum(peak * jnp.float32(E4M3_MAX / 127), jnp.float32(E4M3_MAX)))
        steps = scales.astype(jnp.float32) * jnp.float32(1 / E4M3_MAX)
        values = jnp.clip(jnp.round(quotient(grid, steps[..., None])), jnp.float32(-127), jnp.float32(127))
        return cls(values.astype(jnp.int8).reshape(w.shape), scales, (1, 32), factor=1 / E4M3_MAX)

    def like(self, w: jax.Array) -> Self:
        if self.values.dtype != jnp.float8_e4m3fn or self.scales.dtype == jnp.float8_e8m0fnu:
            return super().like(w)
        made = self.from_dense(w, self.block)
        return replace(self, values=made.values, scales=made.scales)
