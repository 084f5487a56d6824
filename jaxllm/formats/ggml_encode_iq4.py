"""Encoders of IQ4_NL and IQ4_XS: a scale, and a table of 16 values that are denser around zero.

Source: `quantize_row_iq4_nl_impl` in llama.cpp's `ggml-quants.c`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.formats.ggml_encode_bits import F32, U8, f16, flat, halves, join, pack, shaped, stream
from jaxllm.formats.ggml_iq import IQ4_VALUES
from jaxllm.formats.ggml_search import divide, fit_scale, fit_unit, total, weigh

MIDPOINTS = (IQ4_VALUES[1:].astype(np.float32) + IQ4_VALUES[:-1]) / 2
TARGETS = np.array([127, *range(-134, -119)])  # what the largest weight may become


def _code(v: jax.Array) -> jax.Array:
    """The index of the value nearest to `v`; ties go to the greater: float32 `[...]` -> uint8 `[...]`."""
    return sum((v >= F32(t)).astype(U8) for t in MIDPOINTS)


def _value(v: jax.Array) -> jax.Array:
    """The value nearest to `v`."""
    rises = np.diff(IQ4_VALUES.astype(np.float32))
    steps = zip(MIDPOINTS, rises, strict=True)
    return sum((jnp.where(v >= F32(t), F32(rise), F32(0)) for t, rise in steps), F32(IQ4_VALUES[0]))


def iq4_nl(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    weights = x * x if importance is None else weigh(x, importance, 2)
    d_bytes, d = f16(fit_scale(x, weights, TARGETS, _value))
    return join(d_bytes, halves(_code(divide(F32(1), d) * x)))


def iq4_xs(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    groups = shaped(x, 8, 32)
    weights = groups * groups if importance is None else shaped(weigh(x, importance, 2), 8, 32)
    scales = fit_scale(groups, weights, TARGETS, _value)[..., 0]
    d_bytes, d, scale = fit_unit(scales, total(weights)[..., 0], -32, 31)
    codes = _code(divide(F32(1), (d * scale)[..., None]) * groups)
    six = (scale + F32(32)).astype(U8)
    return join(d_bytes, stream(six >> 4, 2), stream(six & U8(15), 4), flat(pack(shaped(codes, 2, 16), 4)))
