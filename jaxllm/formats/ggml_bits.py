"""Helpers that the decoders of llama.cpp's blocks share, to read a block's fields.

All work on the last axis, which runs over the bytes of one block (or a part of it); the axes before it are the batch.
Words are little-endian, as in the file.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def split(blocks: jax.Array, *widths: int) -> list[jax.Array]:
    """The fields of a block, which are adjacent and `widths` bytes wide."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    assert ends[-1] == blocks.shape[-1]
    return jnp.split(blocks, ends[:-1], axis=-1)


def words(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Bytes `[..., n * itemsize]` as words `[..., n]` of `dtype`."""
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, jnp.dtype(dtype).itemsize), dtype)


def f16(pair: jax.Array) -> jax.Array:
    """float16 of `[..., 2]` bytes, as float32 `[..., 1]`."""
    return f32(words(pair, jnp.float16))


def f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def u16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.uint16)


def i8(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int8)


def flat(x: jax.Array, axes: int) -> jax.Array:
    """The last `axes` axes as one."""
    return x.reshape(*x.shape[:-axes], -1)


def fields(x: jax.Array, width: int, count: int) -> jax.Array:
    """`[..., n]` words as `[..., n, count]`: the fields of `width` bits of each word, lowest bits first."""
    shifts = jnp.arange(0, count * width, width, dtype=x.dtype)
    return (x[..., None] >> shifts) & (2**width - 1)


def planes(x: jax.Array, width: int) -> jax.Array:
    """`[..., n]` bytes as `[..., 8 / width, n]`: field k of every byte, lowest bits first."""
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8)[:, None]
    return (x[..., None, :] >> shifts) & (2**width - 1)


def stream(x: jax.Array, width: int) -> jax.Array:
    """`[..., n]` bytes as `[..., n * 8 / width]`: values of `width` bits one after the other, lowest bits first."""
    return flat(fields(x, width, 8 // width), 2)


def nibbles(qs: jax.Array) -> jax.Array:
    """Low nibbles, then high nibbles: `[..., n]` -> `[..., 2n]`."""
    return flat(planes(qs, 4), 2)


def lookup(table: np.ndarray, index: jax.Array) -> jax.Array:
    """`table[index]`, the table being a constant of the program."""
    return jnp.asarray(table)[index]


def scaled(scale: jax.Array, q: jax.Array) -> jax.Array:
    """`scale[..., g]` times `q[..., n]`: each scale applies to n / g consecutive weights."""
    return flat(scale[..., None] * f32(q).reshape(*scale.shape, -1), 2)
