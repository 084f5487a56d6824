"""How encoders of block types put codes into bytes: the mirror of `ggml_bits`."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

F32 = jnp.float32
U8 = jnp.uint8


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """uint8 codes `[..., 8 / bits, n]` into `[..., n]` bytes: row k is field k of every byte, lowest bits first."""
    return functools.reduce(jnp.bitwise_or, (codes[..., k, :] << U8(bits * k) for k in range(8 // bits)))


def stream(codes: jax.Array, bits: int) -> jax.Array:
    """Codes in order, lowest bits first: uint8 `[..., 8 / bits * n]` -> bytes `[..., n]`."""
    per_byte = 8 // bits
    return pack(jnp.swapaxes(shaped(codes, codes.shape[-1] // per_byte, per_byte), -1, -2), bits)


def shaped(x: jax.Array, *shape: int) -> jax.Array:
    """The last axis as `shape`."""
    return x.reshape(*x.shape[:-1], *shape)


def flat(x: jax.Array) -> jax.Array:
    """The last two axes as one."""
    return x.reshape(*x.shape[:-2], -1)


def halves(codes: jax.Array) -> jax.Array:
    """Low nibbles from the first half of the last axis, high nibbles from the second."""
    return pack(shaped(codes, 2, codes.shape[-1] // 2), 4)


def crumbs(codes: jax.Array) -> jax.Array:
    """256 2-bit codes in the order of Q2_K, Q3_K, Q6_K and TQ2_0: two halves of 4 x 32."""
    return flat(pack(shaped(codes, 2, 4, 32), 2))


def words(x: jax.Array) -> jax.Array:
    """Integers or floats of 16 or 32 bits `[..., n]` as their bytes, uint8 `[..., n * size]`."""
    return flat(lax.bitcast_convert_type(x, U8))


def signed(x: jax.Array) -> jax.Array:
    """Whole floats `-128 .. 127` as bytes."""
    return lax.bitcast_convert_type(x.astype(jnp.int8), U8)


def f16(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 `[..., 1]` rounded to float16: its bytes `[..., 2]`, and its value as float32 `[..., 1]`."""
    half = x.astype(jnp.float16)
    return words(half), half.astype(F32)


def join(*fields: jax.Array) -> jax.Array:
    """Bytes one after the other."""
    return jnp.concatenate(fields, axis=-1)
