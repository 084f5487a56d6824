"""Decoders of llama.cpp's IQ types: codebook entries (of 8 or 4 weights), signs and scales. IQ4's have a table instead.

As in `ggml_blocks.py`, every product is exact in float32, in any order: a float16 has 11 significant bits, a scale at
most 5 (6 in IQ4_XS), and a codebook value at most 6 (7 in IQ4). The sum is at most 24.

Source of the layouts: ggml's `ggml-common.h`; the formulas are those of `dequantize_row_*` in `ggml-quants.c`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats.ggml_bits import f16, f32, fields, flat, lookup, scaled, split, stream, u16, words
from jaxllm.formats.ggml_grids import grid

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
IQ1_DELTA = 0.125


def _entries(name: str, index: jax.Array) -> jax.Array:
    """The weights that codebook entries `[..., n]` stand for, `[..., n * width]`."""
    return flat(lookup(grid(name), index), 2)


def _signed(q: jax.Array, signs: jax.Array) -> jax.Array:
    """`q` `[..., 8n]`, negative where the bit of `signs` `[..., n]` is set."""
    return jnp.where(stream(signs, 1) == 1, -q, q)


def _even_signs(seven: jax.Array) -> jax.Array:
    """8 sign bits from the 7 that are stored: the number of minus signs is even."""
    seven = seven.astype(jnp.uint8)
    return seven | lax.population_count(seven) << 7


def _signs_and_scales(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Words of 4 x 7 sign bits and a 4-bit scale: sign bytes `[..., 32]` and scales + 0.5 `[..., 8]`."""
    word = words(packed, jnp.uint32)
    return flat(_even_signs(fields(word, 7, 4)), 2), f32(word >> 28) + 0.5


def iq2_xxs(b: jax.Array) -> jax.Array:
    d, rest = split(b, 2, 64)
    index, packed = split(rest.reshape(*rest.shape[:-1], 8, 8), 4, 4)  # [..., 8, 4]: for every 32 weights
    signs, scale = _signs_and_scales(flat(packed, 2))
    return scaled(f16(d) * scale * 0.25, _signed(_entries("IQ2_XXS", flat(index, 2)), signs))


def iq2_xs(b: jax.Array) -> jax.Array:
    d, qs, scales = split(b, 2, 64, 8)
    word = words(qs, jnp.uint16)  # [..., 32]: 9 bits of index, 7 of sign
    scale = f16(d) * (f32(stream(scales, 4)) + 0.5) * 0.25  # [..., 16]
    return scaled(scale, _signed(_entries("IQ2_XS", word & 511), _even_signs(word >> 9)))


def iq2_s(b: jax.Array) -> jax.Array:
    d, qs, signs, qh, scales = split(b, 2, 32, 32, 8, 8)
    index = u16(qs) | u16(stream(qh, 2)) << 8
    scale = f16(d) * (f32(stream(scales, 4)) + 0.5) * 0.25  # [..., 16]
    return scaled(scale, _signed(_entries("IQ2_S", index), signs))


def iq3_xxs(b: jax.Array) -> jax.Array:
    d, index, packed = split(b, 2, 64, 32)
    signs, scale = _signs_and_scales(packed)
    return scaled(f16(d) * scale * 0.5, _signed(_entries("IQ3_XXS", index), signs))


def iq3_s(b: jax.Array) -> jax.Array:
    d, qs, qh, signs, scales = split(b, 2, 64, 8, 32, 4)
    index = u16(qs) | u16(stream(qh, 1)) << 8
    scale = f16(d) * (2 * f32(stream(scales, 4)) + 1)  # [..., 8]
    return scaled(scale, _signed(_entries("IQ3_S", index), signs))


def _iq1(scale: jax.Array, index: jax.Array, minus: jax.Array) -> jax.Array:
    """Entries of -1, 0 and 1. All 8 are shifted by 1/8: down where `minus` is set, otherwise up."""
    delta = jnp.where(minus == 1, -IQ1_DELTA, IQ1_DELTA)
    return scaled(scale, flat(f32(lookup(grid("IQ1_S"), index)) + delta[..., None], 2))


def iq1_s(b: jax.Array) -> jax.Array:
    d, qs, qh = split(b, 2, 32, 16)
    word = words(qh, jnp.uint16)  # [..., 8]: 4 x 3 high bits of index, 3 bits of scale, the shift
    index = u16(qs) | flat(fields(word, 3, 4), 2) << 8
    scale = f16(d) * (2 * f32(word >> 12 & 7) + 1)
    return _iq1(scale, index, jnp.repeat(word >> 15, 4, axis=-1))


def iq1_m(b: jax.Array) -> jax.Array:
    qs, qh, scales = split(b, 32, 16, 8)
    high = stream(qh, 4)  # [..., 32]: 3 high bits of index, the shift
    index = u16(qs) | u16(high & 7) << 8
    word = words(scales, jnp.uint16)  # [..., 4]: 4 x 3 bits of scale, 4 bits of d
    quarters = scales[..., 1::2] >> 4
    d = f16(quarters[..., 0::2] | quarters[..., 1::2] << 4)
    scale = d * (2 * f32(flat(fields(word, 3, 4), 2)) + 1)  # [..., 16]
    return _iq1(scale, index, high >> 3)
