"""Cached keys and values in 8 bits: the numbers of a head at a position are codes that share a scale.

A scale multiplies whatever the codes were multiplied by: a key's scale its scores, a value's scale its weights. So
attention reads the codes, and no other copy of the cache is made. Finer groups (llama.cpp's Q8_0 has 32 neighbours)
would need the scale inside of the products.
"""

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.formats.scaled import quotient, scale_for
from jaxllm.kernels.activations import LIMITS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coded:
    """`x[..., i] = codes[..., i] * scales[..., 0]`.

    Because both leaves have the same axes, whatever slices, writes or shards all axes but the last does so to both.

    Attributes:
        codes: `[..., dim]`, int8; or uint8, the bits of float8_e4m3fn (XLA on CPUs would widen all of a buffer of these
            to write to it).
        scales: bfloat16 `[..., 1]`: the range of float32 in two bytes.
    """

    codes: jax.Array
    scales: jax.Array

    @classmethod
    def of(cls, x: jax.Array, dtype: jax.typing.DTypeLike) -> Self:
        """`x[..., dim]` in codes of this dtype, int8 or float8_e4m3fn. What is not finite stays so."""
        x, dtype = x.astype(jnp.float32), jnp.dtype(dtype)
        # A scale is rounded by 2^-8 at most: then no quotient exceeds 127.5, or 464, which the largest codes end at.
        peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        scales = scale_for(peak, LIMITS[dtype.name]).astype(jnp.bfloat16)
        wide = scales.astype(jnp.float32)
        codes = quotient(jnp.where(wide > 0, x, 0), wide)  # of numbers near 1e-38, the scale is 0
        codes = jnp.round(codes) if dtype == jnp.int8 else codes
        codes = codes.astype(dtype)
        return cls(codes if dtype == jnp.int8 else lax.bitcast_convert_type(codes, jnp.uint8), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.int8 if self.codes.dtype == jnp.int8 else jnp.float8_e4m3fn)

    @property
    def unscaled(self) -> jax.Array:
        """Codes as int8 or float8_e4m3fn."""
        return self.codes if self.dtype == jnp.int8 else lax.bitcast_convert_type(self.codes, self.dtype)

    def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The numbers that the codes stand for, `[..., dim]`."""
        return (self.unscaled.astype(jnp.float32) * self.scales.astype(jnp.float32)).astype(dtype)


Buffer = jax.Array | Coded  # keys or values, as they are cached


def stored(x: jax.Array, dtype: jax.typing.DTypeLike) -> Buffer:
    """`x[..., dim]` as a cache of this dtype holds it."""
    return Coded.of(x, dtype) if jnp.dtype(dtype).name in LIMITS else x.astype(dtype)


def read(buffer: Buffer, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What a cache holds, as numbers of this dtype."""
    return buffer.dequantize(dtype) if isinstance(buffer, Coded) else buffer.astype(dtype)
