"""Encoders of the K-quants: 256 weights in groups, whose scales are themselves quantized.

Each group's scale is found by one of llama.cpp's searches, with weights that depend on the importance if there is one.
(For Q3_K, llama.cpp moves codes one by one where there is no importance; a search for the scale is as good.)

Source: `quantize_row_q*_K_ref` and `_impl` in llama.cpp's `ggml-quants.c`.
"""

import jax
import jax.numpy as jnp

from jaxllm.formats.ggml_encode_bits import F32, U8, crumbs, f16, flat, halves, join, pack, shaped, signed
from jaxllm.formats.ggml_search import divide, fit_affine, fit_integers, fit_unit, largest, snap, total, weigh


def _codes(x: jax.Array, scale: jax.Array, low: int, high: int) -> jax.Array:
    """x `[..., groups, n]` / scale `[..., groups]` to the nearest of `low .. high`, as uint8 from 0."""
    q = jnp.round(jnp.clip(x * divide(F32(1), scale[..., None]), F32(low), F32(high)))
    return (q - F32(low)).astype(U8)


def _spread(x: jax.Array) -> jax.Array:
    """The root of the mean square."""
    return jnp.sqrt(total(x * x) * F32(1 / x.shape[-1]))


def q2_k(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    groups = shaped(x, 16, 16)
    if importance is None:
        weights, start, steps = jnp.abs(groups) + F32(0.25) * _spread(groups), -0.5, 8
    else:
        weights, start, steps = shaped(weigh(x, importance, 1), 16, 16), -0.9, 9
    scales, minima = fit_affine(groups, weights, 3, start, steps)
    sums = total(weights)[..., 0]
    d_bytes, d, scale = fit_unit(scales[..., 0], sums, 0, 15)
    m_bytes, dm, minimum = fit_unit(minima[..., 0], sums, 0, 15)
    q = _codes(groups + (dm * minimum)[..., None], d * scale, 0, 3)
    return join(scale.astype(U8) | minimum.astype(U8) << 4, crumbs(flat(q)), d_bytes, m_bytes)


def q3_k(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    groups = shaped(x, 16, 16)
    if importance is None:  # llama.cpp's x^2 would be enough for its way of searching
        weights = groups * groups + total(groups * groups) * F32(1 / 64)
        scales = fit_integers(groups, weights, 4, 0.5, 1)[..., 0]
    else:
        weights = shaped(weigh(x, importance, 2), 16, 16)
        scales = fit_integers(groups, weights, 4)[..., 0]
    d_bytes, d, scale = fit_unit(scales, total(weights)[..., 0], -32, 31)
    q = flat(_codes(groups, d * scale, -4, 3))
    six = (scale + F32(32)).astype(U8)
    high_bits = pack(shaped(q >> 2, 8, 32), 1)
    return join(high_bits, crumbs(q & U8(3)), halves(six & U8(15)), pack(shaped(six >> 4, 4, 4), 2), d_bytes)


def _k_affine(
    x: jax.Array, importance: jax.Array | None, levels: int, start: float, steps: int
) -> tuple[jax.Array, jax.Array]:
    """The first 16 bytes of Q4_K and Q5_K, and codes `[..., 8, 32]`."""
    groups = shaped(x, 8, 32)
    if importance is None:
        weights = jnp.abs(groups) + _spread(groups)
    else:
        weights, start, steps = shaped(weigh(x, importance, 2), 8, 32), -0.9, 9
    scales, minima = fit_affine(groups, weights, levels, start, steps)
    sums = total(weights)[..., 0]
    d_bytes, d, scale = fit_unit(scales[..., 0], sums, 0, 63)
    m_bytes, dm, minimum = fit_unit(minima[..., 0], sums, 0, 63)
    q = _codes(groups + (dm * minimum)[..., None], d * scale, 0, levels)
    s, m = scale.astype(U8), minimum.astype(U8)
    first, last = slice(0, 4), slice(4, 8)  # 6 bits each: the upper 2 of the last four lie above the first four
    packed = join(
        s[..., first] | s[..., last] >> 4 << 6,
        m[..., first] | m[..., last] >> 4 << 6,
        (s[..., last] & U8(15)) | m[..., last] << 4,
    )
    return join(d_bytes, m_bytes, packed), q


def _k_nibbles(q: jax.Array) -> jax.Array:
    """4-bit codes `[..., 8, 32]`: every 32 bytes hold two groups, in their low and high nibbles."""
    return flat(pack(q.reshape(*q.shape[:-2], 4, 2, 32), 4))


def q4_k(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    head, q = _k_affine(x, importance, 15, start=-1.0, steps=10)
    return join(head, _k_nibbles(q))


def q5_k(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    head, q = _k_affine(x, importance, 31, start=-0.5, steps=7)
    return join(head, pack(q >> 4, 1), _k_nibbles(q & U8(15)))


def q6_k(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    groups = shaped(x, 16, 16)
    weights = groups * groups if importance is None else shaped(importance, 16, 16)
    scales = fit_integers(groups, weights, 32)[..., 0]
    inverse = divide(F32(-128), largest(scales))
    (d_bytes, d), scale = f16(divide(F32(1), inverse)), snap(-128, 127)(inverse * scales)
    q = flat(_codes(groups, d * scale, -32, 31))
    low = flat(pack(shaped(q & U8(15), 2, 2, 64), 4))
    return join(low, crumbs(q >> 4), signed(scale), d_bytes)
