"""Encoders for llama.cpp's block types: float32 weights to the bytes that `ggml_blocks` decodes.

An encoder takes blocks as float32 `[..., block_size]` and returns uint8 `[..., block_bytes]`, the mirror of a decoder;
`encode` applies one to a complete matrix. A block of zeros decodes to zeros. The encoders are plain jnp over many
blocks: XLA's loops encode some 30 million weights a second to K-quants on two cores, so numpy versions are not needed.

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4 equal `gguf.quants.quantize` bit for bit on the CPU (except for the sign of a
minimum that is zero). That needs care: XLA fuses a product into the sum that follows, and divides by a constant
through its reciprocal (see `_apart`, `_over` and `divide`). The K-quants and IQ4_NL run llama.cpp's searches without an
importance matrix (see `ggml_search`). Most blocks come out the same, the others equally good. Which ones differ can
vary, because XLA chooses the order of summation for each shape.

Source: `ggml-quants.c` of llama.cpp; the table of fallbacks is `tensor_type_fallback` in its `llama-quant.cpp`.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.errors import InputError
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.ggml_iq import IQ4_VALUES
from jaxllm.formats.ggml_search import F32, divide, fit_affine, fit_scale, fit_scale_by_coordinates, largest

Encoder = Callable[[jax.Array], jax.Array]
U8 = jnp.uint8
IQ4_MIDPOINTS = (IQ4_VALUES[1:].astype(np.float32) + IQ4_VALUES[:-1]) / 2


def _pack(codes: jax.Array, bits: int) -> jax.Array:
    """uint8 codes `[..., 8 / bits, n]` into `[..., n]` bytes: row k is field k of every byte, lowest bits first."""
    shifts = jnp.arange(0, 8, bits, dtype=U8)[:, None]
    return jnp.bitwise_or.reduce(codes << shifts, axis=-2)


def _grid(x: jax.Array, *shape: int) -> jax.Array:
    """The last axis as `shape`."""
    return x.reshape(*x.shape[:-1], *shape)


def _flat(x: jax.Array) -> jax.Array:
    """The last two axes as one."""
    return x.reshape(*x.shape[:-2], -1)


def _halves(codes: jax.Array) -> jax.Array:
    """Low nibbles from the first half of the last axis, high nibbles from the second."""
    return _pack(_grid(codes, 2, codes.shape[-1] // 2), 4)


def _bits(bits: jax.Array) -> jax.Array:
    """Single bits in order, least significant first: `[..., 8n]` -> `[..., n]`."""
    return _pack(jnp.swapaxes(_grid(bits, bits.shape[-1] // 8, 8), -1, -2), 1)


def _crumbs(codes: jax.Array) -> jax.Array:
    """256 2-bit codes in the order of Q2_K, Q3_K and Q6_K: two halves of 4 x 32."""
    return _flat(_pack(_grid(codes, 2, 4, 32), 2))


def _f16(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 `[...]` rounded to float16: its bytes `[..., 2]`, and its value as float32 `[..., 1]`."""
    half = x.astype(jnp.float16)
    return lax.bitcast_convert_type(half, U8), half.astype(F32)[..., None]


def _apart(product: jax.Array, bound: int) -> jax.Array:
    """The product, unchanged if its magnitude is below `bound`. Keeps XLA from fusing it into a following sum."""
    return jnp.clip(product, F32(-bound), F32(bound))


def _over(x: jax.Array, n: int) -> jax.Array:
    """x / n, rounded correctly. XLA would multiply by a constant's reciprocal, so this hides that n is constant."""
    return x / jnp.where(jnp.isnan(x), x, F32(n))


def _join(*fields: jax.Array) -> jax.Array:
    return jnp.concatenate(fields, axis=-1)


# Blocks of 32: plain rounding.


def _around_zero(x: jax.Array, half: int) -> tuple[jax.Array, jax.Array]:
    """The bytes of d, and codes q in `0 .. 2 * half - 1`, for d * (q - half): the largest weight gets code 0."""
    d = largest(x) * F32(-1 / half)
    q = jnp.trunc(_apart(x * divide(F32(1), d), 64) + F32(half + 0.5))
    return _f16(d[..., 0])[0], jnp.minimum(q, F32(2 * half - 1)).astype(U8)


def _from_minimum(x: jax.Array, levels: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The bytes of d and m, and codes q in `0 .. levels`, for d * q + m."""
    low = jnp.min(x, axis=-1, keepdims=True)
    d = _over(jnp.max(x, axis=-1, keepdims=True) - low, levels)
    q = jnp.trunc(_apart((x - low) * divide(F32(1), d), 64) + F32(0.5))
    return _f16(d[..., 0])[0], _f16(low[..., 0])[0], jnp.minimum(q, F32(levels)).astype(U8)


def _q4_0(x: jax.Array) -> jax.Array:
    d, q = _around_zero(x, 8)
    return _join(d, _halves(q))


def _q4_1(x: jax.Array) -> jax.Array:
    d, m, q = _from_minimum(x, 15)
    return _join(d, m, _halves(q))


def _q5_0(x: jax.Array) -> jax.Array:
    d, q = _around_zero(x, 16)
    return _join(d, _bits(q >> 4), _halves(q & U8(15)))


def _q5_1(x: jax.Array) -> jax.Array:
    d, m, q = _from_minimum(x, 31)
    return _join(d, m, _bits(q >> 4), _halves(q & U8(15)))


def _q8_0(x: jax.Array) -> jax.Array:
    d = _over(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 127)
    v = _apart(x * divide(F32(1), d), 256)
    whole = jnp.trunc(v)
    q = whole + jnp.trunc(F32(2) * (v - whole))  # half away from zero
    return _join(_f16(d[..., 0])[0], lax.bitcast_convert_type(q.astype(jnp.int8), U8))


def _mxfp4(x: jax.Array) -> jax.Array:
    """The OCP rule: the scale is the power of two that brings the largest weight to 4 .. 8; codes end at 6.

    As in gguf-py and llama.cpp, the exponent comes from a float32 logarithm, which rounds up just below a power of two
    (so such a weight becomes 4 times the larger scale, not 6 times the smaller one). Ties go to the smaller magnitude,
    where OCP takes the even code, and there is no code for -0. A block below 2^-123 becomes zeros (theirs overflow).
    """
    amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    mantissa, exponent = jnp.frexp(amax)
    log = jnp.floor(exponent.astype(F32) + jnp.log2(mantissa))
    small = amax < F32(2.0**-123)
    e = jnp.where(small, F32(2), jnp.minimum(log - F32(2 - 127), F32(254))).astype(jnp.int32)
    scale = lax.bitcast_convert_type((e - 1) << 23, F32)  # 2^(e - 128): the table is in halves
    magnitude = jnp.abs(x) / scale
    code = sum((magnitude > F32(t)).astype(U8) for t in (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0))
    code = jnp.where(small, U8(0), code)
    code = jnp.where((x < 0) & (code > 0), code + U8(8), code)
    return _join(jnp.where(small, 0, e).astype(U8), _halves(code))


# IQ4_NL: a scale, and a table of 16 values that are denser around zero.


def _iq4_nl_code(v: jax.Array) -> jax.Array:
    """The index of the value nearest to `v`; ties go to the greater: float32 `[...]` -> uint8 `[...]`."""
    return sum((v >= F32(t)).astype(U8) for t in IQ4_MIDPOINTS)


def _iq4_nl_value(v: jax.Array) -> jax.Array:
    """The value nearest to `v`."""
    rises = np.diff(IQ4_VALUES.astype(np.float32))
    steps = zip(IQ4_MIDPOINTS, rises, strict=True)
    return sum((jnp.where(v >= F32(t), F32(rise), F32(0)) for t, rise in steps), F32(IQ4_VALUES[0]))


def _iq4_nl(x: jax.Array) -> jax.Array:
    scale = fit_scale(x, np.array([127, *range(-134, -119)]), _iq4_nl_value)
    return _join(_f16(scale)[0], _halves(_iq4_nl_code(divide(F32(1), scale[..., None]) * x)))


# K-quants: 256 weights in groups. Each group's scale is found by a search; the scales are then quantized themselves.


def _levels(tops: jax.Array, levels: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Non-negative scales `[..., n]` as integers `0 .. levels`: the bytes and the value of their unit, and uint8."""
    top = jnp.max(tops, axis=-1, keepdims=True)
    q = jnp.round(jnp.clip(divide(F32(levels), top) * tops, F32(0), F32(levels)))
    return *_f16(top[..., 0] * F32(1 / levels)), q.astype(U8)


def _signed_levels(scales: jax.Array, half: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales `[..., n]` as integers `-half .. half - 1`: the bytes and the value of their unit, and float32."""
    inverse = divide(F32(-half), largest(scales))
    q = jnp.round(jnp.clip(inverse * scales, F32(-half), F32(half - 1)))
    return *_f16(divide(F32(1), inverse)[..., 0]), q


def _codes(x: jax.Array, scale: jax.Array, low: int, high: int) -> jax.Array:
    """x `[..., groups, n]` / scale `[..., groups]` to the nearest of `low .. high`, as uint8 from 0."""
    q = jnp.round(jnp.clip(divide(x, scale[..., None]), F32(low), F32(high)))
    return (q - F32(low)).astype(U8)


def _q2_k(x: jax.Array) -> jax.Array:
    x = _grid(x, 16, 16)
    scales, minima = fit_affine(x, jnp.abs(x), 3, start=-0.5, steps=15, absolute=True)
    d_bytes, d, scale = _levels(scales, 15)
    m_bytes, m, minimum = _levels(minima, 15)
    q = _codes(x + (m * minimum.astype(F32))[..., None], d * scale.astype(F32), 0, 3)
    return _join(scale | minimum << 4, _crumbs(_flat(q)), d_bytes, m_bytes)


def _q3_k(x: jax.Array) -> jax.Array:
    x = _grid(x, 16, 16)
    d_bytes, d, scale = _signed_levels(fit_scale_by_coordinates(x, 4), 32)
    q = _flat(_codes(x, d * scale, -4, 3))
    six = (scale + F32(32)).astype(U8)
    high_bits = _pack(_grid(q >> 2, 8, 32), 1)
    return _join(high_bits, _crumbs(q & U8(3)), _halves(six & U8(15)), _pack(_grid(six >> 4, 4, 4), 2), d_bytes)


def _k_affine(x: jax.Array, levels: int, start: float, steps: int) -> tuple[jax.Array, jax.Array]:
    """The first 16 bytes of Q4_K and Q5_K, and codes `[..., 8, 32]`."""
    x = _grid(x, 8, 32)
    spread = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))
    scales, minima = fit_affine(x, spread + jnp.abs(x), levels, start, steps)
    d_bytes, d, s = _levels(scales, 63)
    m_bytes, dm, m = _levels(minima, 63)
    q = _codes(x + (dm * m.astype(F32))[..., None], d * s.astype(F32), 0, levels)
    first, last = slice(0, 4), slice(4, 8)  # 6 bits each: the upper 2 of the last four lie above the first four
    packed = _join(
        s[..., first] | s[..., last] >> 4 << 6,
        m[..., first] | m[..., last] >> 4 << 6,
        (s[..., last] & U8(15)) | m[..., last] << 4,
    )
    return _join(d_bytes, m_bytes, packed), q


def _k_nibbles(q: jax.Array) -> jax.Array:
    """4-bit codes `[..., 8, 32]`: every 32 bytes hold two groups, in their low and high nibbles."""
    return _flat(_pack(q.reshape(*q.shape[:-2], 4, 2, 32), 4))


def _q4_k(x: jax.Array) -> jax.Array:
    head, q = _k_affine(x, 15, start=-1.0, steps=20)
    return _join(head, _k_nibbles(q))


def _q5_k(x: jax.Array) -> jax.Array:
    head, q = _k_affine(x, 31, start=-0.5, steps=15)
    return _join(head, _pack(q >> 4, 1), _k_nibbles(q & U8(15)))


def _q6_k(x: jax.Array) -> jax.Array:
    x = _grid(x, 16, 16)
    tries = -(32 + 0.1 * np.array([0, *range(-9, 0), *range(1, 10)]))
    scales = fit_scale(x, tries, lambda v: jnp.round(jnp.clip(v, F32(-32), F32(31))))
    d_bytes, d, scale = _signed_levels(scales, 128)
    q = _flat(_codes(x, d * scale, -32, 31))
    low = _flat(_pack(_grid(q & U8(15), 2, 2, 64), 4))
    return _join(low, _crumbs(q >> 4), lax.bitcast_convert_type(scale.astype(jnp.int8), U8), d_bytes)


ENCODERS: dict[str, Encoder] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
}

# The 32-block type that llama.cpp uses for rows that are not a whole number of 256-blocks.
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

LIMIT = float(np.finfo(np.float16).max)
CHUNK = 2**20  # weights encoded at a time, so that a search's data stays in the processor's cache


def fitting_type(type: str, in_features: int) -> str:
    """`type`, or llama.cpp's fallback when rows of `in_features` are not a whole number of its blocks.

    The fallback is `FALLBACK[type]` for 256-blocks, and "F16" if 32-blocks do not fit either. (There llama.cpp stops if
    the original type had 32-blocks.)

    Raises:
        InputError: `type` has no encoder.
    """
    if type not in ENCODERS:
        raise InputError(f"cannot quantize to {type}; known are {', '.join(ENCODERS)}")
    for name in (type, FALLBACK.get(type)):
        if name and in_features % BLOCK_TYPES[name].size == 0:
            return name
    return "F16"


def encode(w: jax.Array, type: str) -> jax.Array:
    """Weights of any floating dtype `[..., n]` as blocks of `type`, uint8 `[..., n / block_size, block_bytes]`.

    Converts to float32 first. Encodes `CHUNK` weights at a time, so that peak memory is the matrix, its blocks and some
    20 MB. It checks the values, so it cannot run under `jit`; `encode_blocks` can.

    Raises:
        InputError: `type` has no encoder; rows are not whole blocks; or a weight is NaN, infinite or over 65504, the
            largest float16 (undefined behaviour in llama.cpp).
    """
    n = w.shape[-1]
    if (fitting := fitting_type(type, n)) != type:
        size = BLOCK_TYPES[type].size
        raise InputError(f"rows of {n} weights are not whole {type} blocks of {size}; {fitting} fits")
    check_finite(w, type)
    return encode_blocks(w, type)


def check_finite(w: jax.Array, type: str) -> None:
    """Raises InputError if a weight is NaN, infinite or over 65504."""
    if not _peak(w) <= LIMIT:
        raise InputError(f"weights that are NaN, infinite or over {LIMIT:.0f} have no {type} blocks")


@jax.jit
def _peak(w: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(w)).astype(F32)


@partial(jax.jit, static_argnums=1)
def encode_blocks(w: jax.Array, type: str) -> jax.Array:
    """Like `encode`, but without checking the values: for use under `jit`."""
    size, nbytes = BLOCK_TYPES[type].size, BLOCK_TYPES[type].nbytes
    blocks = w.reshape(-1, size)
    step = min(len(blocks), CHUNK // size)

    def chunk(i: jax.Array, out: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(blocks, i * step, step)  # the last starts earlier, to end with the matrix
        return lax.dynamic_update_slice_in_dim(out, ENCODERS[type](part.astype(F32)), i * step, axis=0)

    out = lax.fori_loop(0, math.ceil(len(blocks) / step), chunk, jnp.zeros((len(blocks), nbytes), U8))
    return out.reshape(*w.shape[:-1], w.shape[-1] // size, nbytes)
