"""Blockwise FP8, as DeepSeek-V3 and its kin store it: one scale for each rectangle of a float8 matrix."""

import math
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.formats.base import Axes, Cut, Weight, static_field

E4M3_MAX = 448.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockFP8(Weight):
    """`W[o, i] = values[o, i] * scales[o // block[0], i // block[1]]`.

    Attributes:
        values: float8_e4m3fn `[*batch, out, in]`.
        scales: float32, bfloat16 or float8_e8m0fnu `[*batch, ceil(out / block[0]), ceil(in / block[1])]`. Checkpoints
            call them `weight_scale_inv`, yet they are multiplied by.
        activation_group: how many neighbours of the other operand of a matmul are rounded to FP8 with one scale (W8A8);
            None: they are not, and this matrix is only decoded.
    """

    values: jax.Array
    scales: jax.Array
    block: tuple[int, int] = static_field()
    activation_group: int | None = static_field()

    @property
    def format(self) -> str:
        return f"FP8 {self.block[0]}x{self.block[1]}"

    @property
    def axes(self) -> dict[str, Axes]:
        return {
            "values": (Cut("out"), Cut("in")),
            "scales": (Cut("out", self.block[0]), Cut("in", self.block[1])),
        }

    def granularity(self, dim: str) -> int:
        return 1

    def refined(self, out: int, in_: int) -> Self:
        """The same matrix with smaller blocks: each scale repeated for the parts of its block."""
        scales, abstract = self.scales, isinstance(self.scales, jax.ShapeDtypeStruct)
        for axis, old, new in ((-2, self.block[0], out), (-1, self.block[1], in_)):
            size = math.ceil(self.values.shape[axis] / new)
            if abstract:
                shape = list(scales.shape)
                shape[axis] = size
                scales = jax.ShapeDtypeStruct(tuple(shape), scales.dtype)
            else:
                scales = np.repeat(scales, old // new, axis=axis).take(range(size), axis=axis)
        return replace(self, scales=scales, block=(out, in_))

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        scales = jnp.asarray(self.scales).astype(jnp.float32)
        for axis, block in ((-2, self.block[0]), (-1, self.block[1])):
            scales = jax.lax.slice_in_dim(
                jnp.repeat(scales, block, axis=axis), 0, self.values.shape[axis], axis=axis % scales.ndim
            )
        return (jnp.asarray(self.values).astype(jnp.float32) * scales).astype(dtype)

    @classmethod
    def from_dense(cls, w: jax.Array, block: tuple[int, int] = (128, 128)) -> Self:
        """Scales that bring each block's largest value to 448 (1 where a block is zero), values rounded to nearest."""
        *batch, out, in_ = w.shape
        w = jnp.asarray(w, jnp.float32)
        rows, cols = math.ceil(out / block[0]), math.ceil(in_ / block[1])
        pad = [(0, 0)] * len(batch) + [(0, rows * block[0] - out), (0, cols * block[1] - in_)]
        grid = jnp.pad(jnp.abs(w), pad).reshape(*batch, rows, block[0], cols, block[1])
        peak = jnp.max(grid, axis=(-3, -1))
        scales = jnp.where(peak == 0, jnp.float32(1), peak / jnp.float32(E4M3_MAX))
        spread = jnp.repeat(jnp.repeat(scales, block[0], -2)[..., :out, :], block[1], -1)[..., :in_]
        values = jnp.clip(w / spread, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
        return cls(values, scales, block, None)
