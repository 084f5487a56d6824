"""Encoders of the types without a hierarchy of scales: rounding, which importance turns into a search.

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0 and MXFP4 equal `gguf.quants.quantize` bit for bit on the CPU (except for the
sign of a minimum that is zero), and Q1_0, Q8_1, Q8_K and NVFP4 llama.cpp. That needs care: XLA fuses a product into the
sum that follows, and divides by a constant through its reciprocal (see `_apart`, `_over` and `divide`).

Source: `quantize_row_*_ref` and `_impl` in llama.cpp's `ggml-quants.c`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.formats.ggml_encode_bits import (
    F32,
    U8,
    crumbs,
    f16,
    flat,
    halves,
    join,
    pack,
    shaped,
    signed,
    stream,
    words,
)
from jaxllm.formats.ggml_search import divide, fit_affine, fit_integers, largest, total, weigh


def _apart(product: jax.Array, bound: int) -> jax.Array:
    """The product, unchanged if its magnitude is below `bound`. Keeps XLA from fusing it into a following sum."""
    return jnp.clip(product, F32(-bound), F32(bound))


def _over(x: jax.Array, n: int) -> jax.Array:
    """x / n, rounded correctly. XLA would multiply by a constant's reciprocal, so this hides that n is constant."""
    return x / jnp.where(jnp.isnan(x), x, F32(n))


def _peak(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=-1, keepdims=True)


def _nearest(v: jax.Array) -> jax.Array:
    """The nearest whole number; halves go away from zero."""
    whole = jnp.trunc(v)
    return whole + jnp.trunc(F32(2) * (v - whole))


def _around_zero(x: jax.Array, importance: jax.Array | None, half: int) -> tuple[jax.Array, jax.Array]:
    """The bytes of d, and codes q in `0 .. 2 * half - 1`, for d * (q - half)."""
    if importance is None:  # the largest weight gets code 0
        d = largest(x) * F32(-1 / half)
        q = jnp.trunc(_apart(x * divide(F32(1), d), 64) + F32(half + 0.5))
        return f16(d)[0], jnp.minimum(q, F32(2 * half - 1)).astype(U8)
    d_bytes, d = f16(fit_integers(x, weigh(x, importance, 1), half))
    q = jnp.round(jnp.clip(divide(x, d), F32(-half), F32(half - 1)))
    return d_bytes, (q + F32(half)).astype(U8)


def _from_minimum(x: jax.Array, importance: jax.Array | None, levels: int) -> tuple[jax.Array, jax.Array]:
    """The bytes of d and m, and codes q in `0 .. levels`, for d * q + m."""
    if importance is None:
        low = jnp.min(x, axis=-1, keepdims=True)
        d = _over(jnp.max(x, axis=-1, keepdims=True) - low, levels)
        q = jnp.trunc(_apart((x - low) * divide(F32(1), d), 64) + F32(0.5))
        return join(f16(d)[0], f16(low)[0]), jnp.minimum(q, F32(levels)).astype(U8)
    scale, minimum = fit_affine(x, weigh(x, importance, 1), levels, start=-0.9, steps=9)
    (d_bytes, d), (m_bytes, m) = f16(scale), f16(-minimum)
    q = jnp.round(jnp.clip(divide(x - m, d), F32(0), F32(levels)))
    return join(d_bytes, m_bytes), q.astype(U8)


def q4_0(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    d, q = _around_zero(x, importance, 8)
    return join(d, halves(q))


def q4_1(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    dm, q = _from_minimum(x, importance, 15)
    return join(dm, halves(q))


def q5_0(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    d, q = _around_zero(x, importance, 16)
    return join(d, stream(q >> 4, 1), halves(q & U8(15)))


def q5_1(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    dm, q = _from_minimum(x, importance, 31)
    return join(dm, stream(q >> 4, 1), halves(q & U8(15)))


def _eight_bits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """d, and whole numbers in `-127 .. 127`, for d * q."""
    d = _over(_peak(x), 127)
    return d, _nearest(_apart(x * divide(F32(1), d), 256))


def q8_0(x: jax.Array, _: jax.Array | None) -> jax.Array:
    d, q = _eight_bits(x)
    return join(f16(d)[0], signed(q))


def q8_1(x: jax.Array, _: jax.Array | None) -> jax.Array:
    """Q8_0 with the sum of the block."""
    d, q = _eight_bits(x)
    return join(f16(d)[0], f16(total(q) * d)[0], signed(q))


def q8_k(x: jax.Array, _: jax.Array | None) -> jax.Array:
    """The largest weight gets -127 (and d its sign). Sums of 16 codes follow."""
    inverse = divide(F32(-127), largest(x))
    q = jnp.minimum(jnp.round(_apart(inverse * x, 256)), F32(127))
    sums = total(shaped(q, 16, 16))[..., 0].astype(jnp.int16)
    return join(words(divide(F32(1), inverse)), signed(q), words(sums))


def q1_0(x: jax.Array, _: jax.Array | None) -> jax.Array:
    """Signs, and the mean magnitude."""
    mean = total(jnp.abs(x)) * F32(1 / x.shape[-1])
    return join(f16(mean)[0], stream((x >= 0).astype(U8), 1))


def _ternary(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bytes of d, the largest magnitude, and codes 0, 1, 2 for -d, 0, d."""
    d = _peak(x)
    return f16(d)[0], (_nearest(_apart(x * divide(F32(1), d), 2)) + F32(1)).astype(U8)


def _trits(codes: jax.Array, powers: tuple[int, ...]) -> jax.Array:
    """Base-3 digits `[..., count, n]` as fractions of 3^5 in bytes `[..., n]`, rounded up."""
    number = jnp.sum(codes.astype(jnp.uint16) * jnp.array(powers, jnp.uint16)[:, None], axis=-2, dtype=jnp.uint16)
    return ((number * jnp.uint16(256) + jnp.uint16(242)) // jnp.uint16(243)).astype(U8)


def tq1_0(x: jax.Array, _: jax.Array | None) -> jax.Array:
    d, q = _ternary(x)
    first, second, last = shaped(q[..., :160], 5, 32), shaped(q[..., 160:240], 5, 16), shaped(q[..., 240:], 4, 4)
    powers = (81, 27, 9, 3, 1)
    return join(_trits(first, powers), _trits(second, powers), _trits(last, powers[:4]), d)


def tq2_0(x: jax.Array, _: jax.Array | None) -> jax.Array:
    d, q = _ternary(x)
    return join(crumbs(q), d)


def _e2m1(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The code of the nearest scale * {0, 1, 2, 3, 4, 6, 8, 12}, with its sign. Ties go to the smaller magnitude.

    There is no code for -0.
    """
    magnitude = jnp.abs(x) / scale
    code = sum((magnitude > F32(t)).astype(U8) for t in (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0))
    return jnp.where((x < 0) & (code > 0), code + U8(8), code)


def mxfp4(x: jax.Array, _: jax.Array | None) -> jax.Array:
    """The OCP rule: the scale is the power of two that brings the largest weight to 4 .. 8; codes end at 6.

    As in gguf-py and llama.cpp, the exponent comes from a float32 logarithm, which rounds up just below a power of two
    (so such a weight becomes 4 times the larger scale, not 6 times the smaller one). Ties go to the smaller magnitude,
    where OCP takes the even code. A block below 2^-123 becomes zeros (theirs overflow).
    """
    amax = _peak(x)
    mantissa, exponent = jnp.frexp(amax)
    log = jnp.floor(exponent.astype(F32) + jnp.log2(mantissa))
    small = amax < F32(2.0**-123)
    e = jnp.where(small, F32(2), jnp.minimum(log - F32(2 - 127), F32(254))).astype(jnp.int32)
    scale = lax.bitcast_convert_type((e - 1) << 23, F32)  # 2^(e - 128): the table is in halves
    code = jnp.where(small, U8(0), _e2m1(x, scale))
    return join(jnp.where(small, 0, e).astype(U8), halves(code))


def _ue4m3(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The code of the nearest float8_e4m3 to x >= 0 (halves go up; codes end at 240), and half of its value."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    normal = ((bits + jnp.uint32(1 << 19)) >> 20).astype(jnp.int32) - 120 * 8
    tiny = jnp.minimum(jnp.trunc(x * F32(512) + F32(0.5)), F32(7)).astype(jnp.int32)
    code = jnp.where(x < F32(2**-6), tiny, jnp.where(normal >= 15 * 8, 126, normal))
    exponent, mantissa = code >> 3, (code & 7).astype(F32)
    power = lax.bitcast_convert_type((jnp.maximum(exponent, 1) + (127 - 11)) << 23, F32)
    return code.astype(U8), jnp.where(exponent == 0, mantissa, mantissa + F32(8)) * power


def nvfp4(x: jax.Array, _: jax.Array | None) -> jax.Array:
    """Four groups of 16, each with a scale that brings its largest weight to 6."""
    x = shaped(x, 4, 16)
    scales, halved = _ue4m3(_over(_peak(x), 6))
    zero = halved == 0
    code = jnp.where(zero, U8(0), _e2m1(x, jnp.where(zero, F32(1), halved)))
    return join(scales[..., 0], flat(pack(shaped(code, 2, 8), 4)))
