"""NVFP4: four-bit floats with a float8 scale for every 16 of them, and one float32 scale for the matrix."""

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.formats import e2m1
from jaxllm.formats.base import Axes, Cut, Leaf, Weight, static_field
from jaxllm.formats.ggml_bits import lookup

BLOCK = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NVFP4(Weight):
    """`W[o, i] = E2M1(code of o, i) * (scales[o, i // 16] * global_scale)`.

    Attributes:
        blocks: uint8 `[*batch, out, in / 2]`, the even column in the low nibble.
        scales: float8_e4m3fn `[*batch, out, in / 16]`.
        global_scale: the scale of the entire matrix, float32 `[*batch, 1]`; None means 1.
        divides: whether scales are divided by `global_scale` instead (compressed-tensors).
    """

    blocks: Leaf
    scales: Leaf
    global_scale: Leaf | None
    divides: bool = static_field(False)

    @property
    def format(self) -> str:
        return "NVFP4"

    @property
    def axes(self) -> dict[str, Axes]:
        axes: dict[str, Axes] = {"blocks": (Cut("out"), Cut("in", 2)), "scales": (Cut("out"), Cut("in", BLOCK))}
        return axes if self.global_scale is None else axes | {"global_scale": (None,)}

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        scales = self.scales.astype(jnp.float32)
        if self.global_scale is not None:
            overall = self.global_scale if self.global_scale.ndim == 1 else self.global_scale[..., None]
            # XLA would multiply by the reciprocal of a single number; this selection hides that it is one.
            many = jnp.where(jnp.isnan(scales), scales, overall)
            scales = scales / many if self.divides else scales * overall
        values = lookup(e2m1.VALUES, e2m1.unpack(self.blocks))
        return (values * jnp.repeat(scales, BLOCK, axis=-1)).astype(dtype)

    @classmethod
    def from_dense(cls, w: jax.Array, overall: bool = True) -> Self:
        """Encode floats `[*batch, out, in]`: the matrix's largest value becomes 6 * 448, each group's becomes 6.

        Args:
            overall: whether there is a scale of the entire matrix, which MLX's layers do not know.
        """
        w = jnp.asarray(w, jnp.float32)
        grid = w.reshape(*w.shape[:-1], -1, BLOCK)
        peaks = jnp.max(jnp.abs(grid), axis=-1)
        if not overall:
            scales = (peaks / 6).astype(jnp.float8_e4m3fn)
            steps = scales.astype(jnp.float32)[..., None]
            codes = e2m1.rounded(grid / jnp.where(steps == 0, 1, steps))
            return cls(e2m1.pack(codes.reshape(w.shape)), scales, None)
        whole = jnp.max(peaks, axis=(-2, -1), keepdims=True)[..., 0] / np.float32(6 * 448)
        whole = jnp.where(whole == 0, 1.0, whole)
        scales = (peaks / 6 / whole[..., None]).astype(jnp.float8_e4m3fn)
        steps = scales.astype(jnp.float32) * whole[..., None]
        codes = e2m1.rounded(grid / jnp.where(steps == 0, 1, steps)[..., None])
        return cls(e2m1.pack(codes.reshape(w.shape)), scales, whole)

    def like(self, w: jax.Array) -> Self:
        return self.from_dense(w, self.global_scale is not None)
