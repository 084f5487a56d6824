"""How llama.cpp's block types are laid out: FORMATS by name, and a decoder for each.

A decoder takes blocks as uint8 `[..., block_bytes]` and returns float32 `[..., block_size]`. Every product in these
formulas (an 11-bit float16 significand times small integers) is exact in float32, so the result does not depend on
the order of operations or on fused multiply-adds, and equals gguf-py's to the bit.

Source of the layouts: ggml's `ggml-common.h`; the formulas are those of `dequantize_row_*` in `ggml-quants.c`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Decoder = Callable[[jax.Array], jax.Array]


class BlockType(NamedTuple):
    """A block type: `size` weights in `nbytes` bytes."""

    size: int
    nbytes: int
    decode: Decoder


def _split(blocks: jax.Array, *widths: int) -> list[jax.Array]:
    """The fields of a block, which follow one another in `widths` bytes."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    assert ends[-1] == blocks.shape[-1]
    return jnp.split(blocks, ends[:-1], axis=-1)


def _f16(pair: jax.Array) -> jax.Array:
    """float16 of `[..., 2]` bytes, as float32 `[..., 1]`."""
    return lax.bitcast_convert_type(pair, jnp.float16).astype(jnp.float32)[..., None]


def _f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _i8(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int8)


def _flat(x: jax.Array, axes: int) -> jax.Array:
    """The last `axes` axes as one."""
    return x.reshape(*x.shape[:-axes], -1)


def _fields(x: jax.Array, bits: int) -> jax.Array:
    """`[..., n]` bytes as `[..., 8 / bits, n]`: field k of every byte, lowest bits first."""
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    return (x[..., None, :] >> shifts) & jnp.uint8(2**bits - 1)


def _nibbles(qs: jax.Array) -> jax.Array:
    """Low nibbles, then high nibbles: `[..., n]` -> `[..., 2n]`."""
    return _flat(_fields(qs, 4), 2)


def _bits(qh: jax.Array) -> jax.Array:
    """Single bits in order, least significant first: `[..., n]` -> `[..., 8n]`."""
    return _flat(jnp.swapaxes(_fields(qh, 1), -1, -2), 2)


def _q4_0(b: jax.Array) -> jax.Array:
    d, qs = _split(b, 2, 16)
    return _f16(d) * (_f32(_nibbles(qs)) - 8)


def _q4_1(b: jax.Array) -> jax.Array:
    d, m, qs = _split(b, 2, 2, 16)
    return _f16(d) * _f32(_nibbles(qs)) + _f16(m)


def _q5_0(b: jax.Array) -> jax.Array:
    d, qh, qs = _split(b, 2, 4, 16)
    return _f16(d) * (_f32(_nibbles(qs) | _bits(qh) << 4) - 16)


def _q5_1(b: jax.Array) -> jax.Array:
    d, m, qh, qs = _split(b, 2, 2, 4, 16)
    return _f16(d) * _f32(_nibbles(qs) | _bits(qh) << 4) + _f16(m)


def _q8_0(b: jax.Array) -> jax.Array:
    d, qs = _split(b, 2, 32)
    return _f16(d) * _f32(_i8(qs))


def _crumbs(qs: jax.Array) -> jax.Array:
    """The 2-bit values of 64 bytes, in the order of Q2_K and Q3_K: two halves of 4 x 32."""
    return _flat(_fields(qs.reshape(*qs.shape[:-1], 2, 32), 2), 3)


def _q2_k(b: jax.Array) -> jax.Array:
    scales, qs, d, dmin = _split(b, 16, 64, 2, 2)
    scale = _f16(d) * _f32(scales & 15)  # [..., 16]: one for 16 weights
    minimum = _f16(dmin) * _f32(scales >> 4)
    q = _f32(_crumbs(qs)).reshape(*qs.shape[:-1], 16, 16)
    return _flat(scale[..., None] * q - minimum[..., None], 2)


def _q3_k(b: jax.Array) -> jax.Array:
    hmask, qs, scales, d = _split(b, 32, 64, 12, 2)
    low, high = _nibbles(scales[..., :8]), _flat(_fields(scales[..., 8:], 2), 2)
    scale = _f16(d) * (_f32(low | high << 4) - 32)  # [..., 16]
    q = _f32(_crumbs(qs) | _flat(_fields(hmask, 1), 2) << 2) - 4
    return _flat(scale[..., None] * q.reshape(*qs.shape[:-1], 16, 16), 2)


def _scales_and_mins(s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 8 scales and 8 minima of 6 bits each that Q4_K and Q5_K pack into 12 bytes."""
    first, second, third = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scale = jnp.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    minimum = jnp.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return scale, minimum


def _k_scaled(d: jax.Array, dmin: jax.Array, scales: jax.Array, q: jax.Array) -> jax.Array:
    """d * scale * q - dmin * minimum, for q `[..., 8, 32]`."""
    scale, minimum = _scales_and_mins(scales)
    return _flat((_f16(d) * _f32(scale))[..., None] * _f32(q) - (_f16(dmin) * _f32(minimum))[..., None], 2)


def _q4_k_codes(qs: jax.Array) -> jax.Array:
    """128 bytes as `[..., 8, 32]`: of every 32 bytes first the low nibbles, then the high ones."""
    pairs = _fields(qs.reshape(*qs.shape[:-1], 4, 32), 4)
    return pairs.reshape(*qs.shape[:-1], 8, 32)


def _q4_k(b: jax.Array) -> jax.Array:
    d, dmin, scales, qs = _split(b, 2, 2, 12, 128)
    return _k_scaled(d, dmin, scales, _q4_k_codes(qs))


def _q5_k(b: jax.Array) -> jax.Array:
    d, dmin, scales, qh, qs = _split(b, 2, 2, 12, 32, 128)
    return _k_scaled(d, dmin, scales, _q4_k_codes(qs) | _fields(qh, 1) << 4)


def _q6_k(b: jax.Array) -> jax.Array:
    ql, qh, scales, d = _split(b, 128, 64, 16, 2)
    low = _flat(_fields(ql.reshape(*ql.shape[:-1], 2, 64), 4), 3)
    q = _f32(low | _crumbs(qh) << 4) - 32
    scale = _f16(d) * _f32(_i8(scales))  # [..., 16]
    return _flat(scale[..., None] * q.reshape(*q.shape[:-1], 16, 16), 2)


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q2_K": BlockType(256, 84, _q2_k),
    "Q3_K": BlockType(256, 110, _q3_k),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
}
