"""Encoders of IQ1: groups of weights share a scale; 8 at a time are a codebook's entry of -1, 0 and 1, shifted by 1/8.

The shift is up or down: for 32 weights together in IQ1_S, for each 8 in IQ1_M. As in `ggml_encode_iq`, all entries are
scored, here with both shifts. (llama.cpp finds the best split of the sorted weights into three, and then the neighbour
of these codes; it corrects the unit with factors.)

Source of the weights: `quantize_row_iq1_s_impl` and `quantize_row_iq1_m_impl` in llama.cpp's `ggml-quants.c`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats.ggml_encode_bits import F32, U8, f16, flat, join, shaped, stream, words
from jaxllm.formats.ggml_encode_iq import at, choose, fit_block, scores, weights_of
from jaxllm.formats.ggml_grids import grid
from jaxllm.formats.ggml_iq import IQ1_DELTA
from jaxllm.formats.ggml_search import fit_scale

U16 = jnp.uint16
TARGETS = np.arange(0.9, 3.3, 0.15)  # of the largest weight, in scales: what is above 1 becomes 1


def _encode(
    x: jax.Array, importance: jax.Array | None, groups: int, together: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """d, float32 `[..., 1]`; entries int32 and shifts (1 is down) `[..., groups, vectors]`; levels `[..., groups]`.

    If the shifts of a group are not free but `together`, they are all the same.
    """
    weights = shaped(weights_of(x, importance, 2), groups, 256 // groups)
    x = shaped(x, groups, 256 // groups)
    start = fit_scale(x, weights, TARGETS, lambda v: jnp.round(jnp.clip(v, F32(-1), F32(1))))[..., 0]
    entries = jnp.asarray(grid("IQ1_S"), F32)
    vectors = shaped(x, 32 // groups, 8), shaped(weights, 32 // groups, 8)
    both = [scores(*vectors, entries + F32(shift)) for shift in (IQ1_DELTA, -IQ1_DELTA)]
    gain, cost = (jnp.stack(parts, axis=-2) for parts in zip(*both, strict=True))  # [..., groups, vectors, 2, m]

    def fit(scale: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
        scale = scale[..., None, None]
        index = choose(scale, gain, cost)
        xq, q2 = at(gain, index), at(cost, index)
        error = scale * (scale * q2 - F32(2) * xq)
        down = jnp.argmin(jnp.sum(error, axis=-2, keepdims=True) if together else error, axis=-1)
        down = jnp.broadcast_to(down, index.shape[:-1])
        return (at(index, down), down), jnp.sum(at(xq, down), axis=-1), jnp.sum(at(q2, down), axis=-1)

    d, multiples, (index, down) = fit_block(fit, jnp.abs(start), 15)
    return d, index, down, (multiples * F32(0.5)).astype(U16)


def iq1_s(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    d, index, down, levels = _encode(x, importance, 8, together=True)
    high = jnp.bitwise_or.reduce((index >> 8).astype(U16) << jnp.arange(0, 12, 3, dtype=U16), axis=-1)
    word = high | levels << 12 | down[..., 0].astype(U16) << 15
    return join(f16(d)[0], flat(index).astype(U8), words(word))


def iq1_m(x: jax.Array, importance: jax.Array | None) -> jax.Array:
    d, index, down, levels = _encode(x, importance, 16, together=False)
    high = (index >> 8 | down << 3).astype(U8)
    half = lax.bitcast_convert_type(d.astype(jnp.float16), U16)
    nibbles = half >> jnp.arange(0, 16, 4, dtype=U16) & U16(15)
    word = jnp.bitwise_or.reduce(shaped(levels, 4, 4) << jnp.arange(0, 12, 3, dtype=U16), axis=-1) | nibbles << 12
    return join(flat(index).astype(U8), stream(flat(high), 4), words(word))
