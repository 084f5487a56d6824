"""The layouts of llama.cpp's block types: `BLOCK_TYPES` by name.

Most types are integers, or indices of a table, with a scale and an offset for each group of them. Of those, a type has
one function that takes a block apart (`Parts`), from which its values follow, and the layouts of accelerators' kernels
too (`planes_of.py`). The others have decoders.

Both take blocks as uint8 `[..., block_bytes]`; values are float32 `[..., block_size]`. Every product in these
formulas (an 11-bit float16 significand times small integers) is exact in float32, so the result does not depend on
the order of operations or on fused multiply-adds, and equals gguf-py's bit for bit. Two types differ:

- Q8_K has a float32 scale, but its only operation is one product, which rounds once. (One exception: XLA may flush
  float32 subnormals to zero, so a scale below 2^-126 may decode to zeros.)
- MXFP4 has scales down to 2^-128, which XLA would flush to zero. So its values are looked up, not multiplied.

Source of the layouts: ggml's `ggml-common.h`; the formulas are those of `dequantize_row_*` in `ggml-quants.c`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats import ggml_iq
from jaxllm.formats.ggml_bits import f16, f32, flat, lookup, nibbles, planes, split, stream, u16, words
from jaxllm.formats.parts import Levels, Parts

Decoder = Callable[[jax.Array], jax.Array]


class BlockType(NamedTuple):
    """A block type: `size` weights in `nbytes` bytes."""

    size: int
    nbytes: int
    decode: Decoder
    parts: Callable[[jax.Array], Parts] | None = None


def _made_of(size: int, nbytes: int, parts: Callable[[jax.Array], Parts]) -> BlockType:
    return BlockType(size, nbytes, lambda blocks: parts(blocks).values(), parts)


def _half(pair: jax.Array) -> jax.Array:
    """The bits of a float16, `[..., 1]`, of two bytes."""
    return words(pair, jnp.uint16)


def _negated(half: jax.Array) -> jax.Array:
    return half ^ jnp.uint16(0x8000)


def _signed(byte: jax.Array) -> jax.Array:
    """The codes of bytes that are signed integers: 128 is zero."""
    return byte ^ jnp.uint8(128)


def _int8(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int8)


def _q1_0(b: jax.Array) -> Parts:
    d, qs = split(b, 2, 16)
    return Parts(stream(qs, 1), Levels(2 * f16(d)), 1, 0.5)


def _q4_0(b: jax.Array) -> Parts:
    d, qs = split(b, 2, 16)
    return Parts(nibbles(qs), Levels(_half(d)), 4, 8)


def _q4_1(b: jax.Array) -> Parts:
    d, m, qs = split(b, 2, 2, 16)
    return Parts(nibbles(qs), Levels(_half(d)), 4, offsets=Levels(_half(m)))


def _q5_0(b: jax.Array) -> Parts:
    d, qh, qs = split(b, 2, 4, 16)
    return Parts(nibbles(qs) | stream(qh, 1) << 4, Levels(_half(d)), 5, 16)


def _q5_1(b: jax.Array) -> Parts:
    d, m, qh, qs = split(b, 2, 2, 4, 16)
    return Parts(nibbles(qs) | stream(qh, 1) << 4, Levels(_half(d)), 5, offsets=Levels(_half(m)))


def _q8_0(b: jax.Array) -> Parts:
    d, qs = split(b, 2, 32)
    return Parts(_signed(qs), Levels(_half(d)), 8, 128)


def _q8_1(b: jax.Array) -> Parts:
    d, _sum, qs = split(b, 2, 2, 32)
    return Parts(_signed(qs), Levels(_half(d)), 8, 128)


def _q8_k(b: jax.Array) -> Parts:
    d, qs, _sums = split(b, 4, 256, 32)
    return Parts(_signed(qs), Levels(words(d, jnp.float32)), 8, 128)


def _crumbs(qs: jax.Array) -> jax.Array:
    """The 2-bit values of 64 bytes, in the order of Q2_K, Q3_K and TQ2_0: two halves of 4 x 32."""
    return flat(planes(qs.reshape(*qs.shape[:-1], 2, 32), 2), 3)


def _q2_k(b: jax.Array) -> Parts:
    scales, qs, d, dmin = split(b, 16, 64, 2, 2)  # scales: one for 16 weights
    offsets = Levels(scales >> 4, _negated(_half(dmin)))
    return Parts(_crumbs(qs), Levels(scales & 15, _half(d)), 2, offsets=offsets)


def _q3_k(b: jax.Array) -> Parts:
    hmask, qs, scales, d = split(b, 32, 64, 12, 2)
    low, high = nibbles(scales[..., :8]), flat(planes(scales[..., 8:], 2), 2)
    fine = _int8((low | high << 4) - jnp.uint8(32))  # [..., 16]
    return Parts(_crumbs(qs) | flat(planes(hmask, 1), 2) << 2, Levels(fine, _half(d)), 3, 4)


def _scales_and_mins(s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 8 scales and 8 minima of 6 bits each that Q4_K and Q5_K pack into 12 bytes."""
    first, second, third = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scale = jnp.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    minimum = jnp.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return scale, minimum


def _k_parts(d: jax.Array, dmin: jax.Array, scales: jax.Array, codes: jax.Array, bits: int) -> Parts:
    """d * scale * code - dmin * minimum, for codes `[..., 8, 32]`."""
    scale, minimum = _scales_and_mins(scales)
    return Parts(flat(codes, 2), Levels(scale, _half(d)), bits, offsets=Levels(minimum, _negated(_half(dmin))))


def _q4_k_codes(qs: jax.Array) -> jax.Array:
    """128 bytes as `[..., 8, 32]`: for every 32 bytes, first the low nibbles, then the high ones."""
    pairs = planes(qs.reshape(*qs.shape[:-1], 4, 32), 4)
    return pairs.reshape(*qs.shape[:-1], 8, 32)


def _q4_k(b: jax.Array) -> Parts:
    d, dmin, scales, qs = split(b, 2, 2, 12, 128)
    return _k_parts(d, dmin, scales, _q4_k_codes(qs), 4)


def _q5_k(b: jax.Array) -> Parts:
    d, dmin, scales, qh, qs = split(b, 2, 2, 12, 32, 128)
    return _k_parts(d, dmin, scales, _q4_k_codes(qs) | planes(qh, 1) << 4, 5)


def _q6_k(b: jax.Array) -> Parts:
    ql, qh, scales, d = split(b, 128, 64, 16, 2)
    low = flat(planes(ql.reshape(*ql.shape[:-1], 2, 64), 4), 3)
    return Parts(low | _crumbs(qh) << 4, Levels(_int8(scales), _half(d)), 6, 32)


def _iq4_nl(b: jax.Array) -> Parts:
    d, qs = split(b, 2, 16)
    return Parts(nibbles(qs), Levels(_half(d)), 4, table=ggml_iq.IQ4_VALUES)


def _iq4_xs(b: jax.Array) -> Parts:
    d, scales_h, scales_l, qs = split(b, 2, 2, 4, 128)
    fine = _int8((stream(scales_l, 4) | stream(scales_h, 2) << 4) - jnp.uint8(32))  # [..., 8]
    codes = nibbles(qs.reshape(*qs.shape[:-1], 8, 16))  # [..., 8, 32]
    return Parts(flat(codes, 2), Levels(fine, _half(d)), 4, table=ggml_iq.IQ4_VALUES)


def _trits(x: jax.Array, count: int) -> jax.Array:
    """The first `count` base-3 digits of the fractions `x / 256`: `[..., n]` bytes -> `[..., count * n]`."""
    powers = jnp.array([1, 3, 9, 27, 81], jnp.uint8)[:count, None]
    return flat(u16(x[..., None, :] * powers) * 3 >> 8, 2)  # the product drops the digits before


def _tq1_0(b: jax.Array) -> jax.Array:
    first, second, last, d = split(b, 32, 16, 4, 2)
    q = jnp.concatenate([_trits(first, 5), _trits(second, 5), _trits(last, 4)], axis=-1)
    return f16(d) * (f32(q) - 1)


def _tq2_0(b: jax.Array) -> Parts:
    qs, d = split(b, 64, 2)
    return Parts(_crumbs(qs), Levels(_half(d)), 2, 1)


E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _e8m0_halves() -> np.ndarray:
    """Half of the power of two that a byte stands for. 255, a NaN in the standard, is simply the next power here."""
    return np.ldexp(np.float32(1), np.arange(256) - 128)


def _ue4m3_halves() -> np.ndarray:
    """Half of the float8_e4m3 that a byte stands for, ignoring its sign; 127, a NaN, is 0 here (but 255 is 240)."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    values = np.ldexp(np.where(exponent == 0, mantissa, mantissa + 8), np.maximum(exponent, 1) - 11)
    return np.where(byte == 127, 0, values).astype(np.float32)


def _products(scales: np.ndarray) -> np.ndarray:
    """Every scale times every E2M1 value, float32 `[256 * 16]`."""
    with np.errstate(over="ignore"):
        return np.outer(scales, E2M1_DOUBLED).reshape(-1)


MXFP4_VALUES = _products(_e8m0_halves())
NVFP4_VALUES = _products(_ue4m3_halves())


def _mxfp4(b: jax.Array) -> jax.Array:
    e, qs = split(b, 1, 16)
    return lookup(MXFP4_VALUES, u16(e) << 4 | u16(nibbles(qs)))


def _nvfp4(b: jax.Array) -> jax.Array:
    d, qs = split(b, 4, 32)
    codes = nibbles(qs.reshape(*qs.shape[:-1], 4, 8))  # [..., 4, 16]
    return flat(lookup(NVFP4_VALUES, u16(d)[..., None] << 4 | u16(codes)), 2)


BLOCK_TYPES = {
    "Q1_0": _made_of(128, 18, _q1_0),
    "Q4_0": _made_of(32, 18, _q4_0),
    "Q4_1": _made_of(32, 20, _q4_1),
    "Q5_0": _made_of(32, 22, _q5_0),
    "Q5_1": _made_of(32, 24, _q5_1),
    "Q8_0": _made_of(32, 34, _q8_0),
    "Q8_1": _made_of(32, 36, _q8_1),  # 40 in gguf-py's table: an older layout, float32 d and sum
    "Q2_K": _made_of(256, 84, _q2_k),
    "Q3_K": _made_of(256, 110, _q3_k),
    "Q4_K": _made_of(256, 144, _q4_k),
    "Q5_K": _made_of(256, 176, _q5_k),
    "Q6_K": _made_of(256, 210, _q6_k),
    "Q8_K": _made_of(256, 292, _q8_k),
    "TQ1_0": BlockType(256, 54, _tq1_0),
    "TQ2_0": _made_of(256, 66, _tq2_0),
    "MXFP4": BlockType(32, 17, _mxfp4),
    "NVFP4": BlockType(64, 36, _nvfp4),
    "IQ1_S": BlockType(256, 50, ggml_iq.iq1_s),
    "IQ1_M": BlockType(256, 56, ggml_iq.iq1_m),
    "IQ2_XXS": BlockType(256, 66, ggml_iq.iq2_xxs),
    "IQ2_XS": BlockType(256, 74, ggml_iq.iq2_xs),
    "IQ2_S": BlockType(256, 82, ggml_iq.iq2_s),
    "IQ3_XXS": BlockType(256, 98, ggml_iq.iq3_xxs),
    "IQ3_S": BlockType(256, 110, ggml_iq.iq3_s),
    "IQ4_NL": _made_of(32, 18, _iq4_nl),
    "IQ4_XS": _made_of(256, 136, _iq4_xs),
}

# The exponents of float16 scales that begin at these bytes, and likewise of other types: numbers of bytes in a block,
# with masks. If all bits of an exponent are set, the scale is infinite or no number. (MXFP4 and NVFP4 have no such.)
_HALVES = {
    (0,): "Q1_0 Q4_0 Q5_0 Q8_0 Q8_1 IQ1_S IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS",
    (0, 2): "Q4_1 Q5_1 Q4_K Q5_K",
    (80, 82): "Q2_K",
    (108,): "Q3_K",
    (208,): "Q6_K",
    (52,): "TQ1_0",
    (64,): "TQ2_0",
}
EXPONENTS: dict[str, tuple[tuple[tuple[int, int], ...], ...]] = {
    name: tuple(((offset + 1, 0x7C),) for offset in offsets)
    for offsets, names in _HALVES.items()
    for name in names.split()
}
EXPONENTS |= {"Q8_K": (((3, 0x7F), (2, 0x80)),), "IQ1_M": (((55, 0x70), (53, 0xC0)),)}
