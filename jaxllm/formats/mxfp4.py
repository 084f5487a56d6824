"""MXFP4, the format of GPT-OSS: four-bit floats with a power-of-two scale for every 32 of them.

Checkpoints agree on the bytes but differ in their shape: GPT-OSS gives the 16 bytes of a block their own axis, MLX puts
eight codes into a word. Their readers convert them all to one shape. Only GGUF orders the codes of a block differently
(`from_ggml`).
"""

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.errors import InputError
from jaxllm.formats import e2m1
from jaxllm.formats.base import Axes, Cut, Leaf, Weight
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_bits import nibbles

BLOCK = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MXFP4(Weight):
    """`W[o, i] = E2M1(code i of row o) * 2^(scales[o, i // 32] - 127)`; a scale of 255 makes a block NaN.

    Attributes:
        blocks: uint8 `[*batch, out, in / 2]`, code 2k in the low nibble of byte k and 2k + 1 in the high one.
        scales: uint8 `[*batch, out, in / 32]`, the bits of float8_e8m0fnu.
    """

    blocks: Leaf
    scales: Leaf

    @property
    def format(self) -> str:
        return "MXFP4"

    @property
    def axes(self) -> dict[str, Axes]:
        return {"blocks": (Cut("out"), Cut("in", 2)), "scales": (Cut("out"), Cut("in", BLOCK))}

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        codes, scales = e2m1.unpack(self.blocks), self.scales[..., None]
        grid = codes.reshape(*self.scales.shape, BLOCK)
        values = jnp.where(scales == 255, jnp.float32(jnp.nan), e2m1.times_power(grid, scales))
        return values.reshape(codes.shape).astype(dtype)

    @classmethod
    def from_dense(cls, w: jax.Array) -> Self:
        """Encode floats `[*batch, out, in]` by the rule of the OCP specification (6.3): the largest magnitude of a
        block gets the largest exponent; values are rounded to nearest, ties to even, and saturate.

        Raises:
            InputError: rows are not whole blocks, or some values are not finite.
        """
        w = jnp.asarray(w, jnp.float32)
        if w.shape[-1] % BLOCK:
            raise InputError(f"rows of {w.shape[-1]} are not whole blocks of {BLOCK}, which MXFP4 needs")
        if not jnp.isfinite(w).all():
            raise InputError("MXFP4 cannot hold values that are not finite")
        return cls.encoded(w)

    @classmethod
    def encoded(cls, w: jax.Array) -> Self:
        """Like `from_dense`, but without checking anything: for use under `jit`."""
        grid = w.reshape(*w.shape[:-1], -1, BLOCK)
        largest = lax.bitcast_convert_type(jnp.max(jnp.abs(grid), axis=-1), jnp.int32)
        scales = jnp.clip((largest >> 23) - 2, 0, 254)  # the exponent of 4, E2M1's largest power of two, is 2
        # 2^(127 - scale) as two factors, because the product may exceed float32.
        halves = (127 - scales) // 2, (127 - scales) - (127 - scales) // 2
        first, second = (lax.bitcast_convert_type((half + 127) << 23, jnp.float32)[..., None] for half in halves)
        codes = e2m1.rounded(grid * first * second).reshape(w.shape)
        return cls(e2m1.pack(codes), scales.astype(jnp.uint8))

    def like(self, w: jax.Array) -> Self:
        return self.from_dense(w)

    @classmethod
    def from_ggml(cls, weight: GGML) -> Self:
        """A GGUF file's MXFP4 blocks with their codes in order; nothing is dequantized.

        The two disagree about one scale, 255, which no encoder writes: a power of two in ggml, a NaN here.
        """
        scale, packed = weight.blocks[..., 0], weight.blocks[..., 1:]
        codes = nibbles(packed)  # low nibbles hold the first half of a block, high ones the second
        return cls(e2m1.pack(codes.reshape(*codes.shape[:-2], -1)), scale)
