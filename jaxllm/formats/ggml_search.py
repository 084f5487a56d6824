"""The searches for a scale (and a minimum) with which llama.cpp's encoders beat plain rounding.

Each works on groups of weights along the last axis, float32 `[..., n]`, and returns float32 `[..., 1]`. `weights`, of
the same shape, say how much an error in each costs. A search does not return the codes that it tried: the formats round
the scales to their own few bits and then encode the weights again with the rounded scales, which are what a decoder
will see.

The searches try fewer scales than llama.cpp's, at two to four times the distance: that costs 0.5 % of the error, which
`fit_unit` more than earns back, and less than half of the time.

Where llama.cpp compares errors, we compare gains: for the best scale of given codes, sum w (x - scale q)^2 is
sum w x^2 - scale sum w x q, so one pass over the weights is enough where the error would take a second one.

Source: `make_qkx2_quants`, `make_qkx3_quants`, `make_qx_quants`, `make_qp_quants` and `quantize_row_iq4_nl_impl` in
llama.cpp's `ggml-quants.c`. A group of zeros gets a scale of zero.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats.ggml_encode_bits import F32, f16

TINY = 1e-15  # a group whose largest magnitude is below this counts as zeros


def total(x: jax.Array) -> jax.Array:
    """The sum over the last axis, which is kept with size 1."""
    return jnp.sum(x, axis=-1, keepdims=True)


def largest(x: jax.Array) -> jax.Array:
    """The element of largest magnitude along the last axis, with its sign; the first of equals. `[..., 1]`"""
    return jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), axis=-1, keepdims=True), axis=-1)


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 wherever b is 0.

    The selection inside also keeps XLA from turning 1 / (a / n) into n / a, which rounds differently.
    """
    zero = b == 0
    return jnp.where(zero, F32(0), a / jnp.where(zero, F32(1), b))


def weigh(x: jax.Array, importance: jax.Array, squares: float) -> jax.Array:
    """What an error costs in a block x `[..., n]`: its importance, more for large weights.

    That is importance * sqrt(squares * mean(x^2) + x^2). For blocks of 32, llama.cpp takes the mean over the row; we
    take the block's, so that a block's encoding does not depend on how a matrix is sharded.
    """
    square = x * x
    return importance * jnp.sqrt(F32(squares / x.shape[-1]) * total(square) + square)


def fit_affine(x: jax.Array, weights: jax.Array, levels: int, start: float, steps: int) -> tuple[jax.Array, jax.Array]:
    """`scale >= 0` and `minimum >= 0` such that `scale * q - minimum`, q in `0 .. levels`, is near `x`.

    Tries the codes that result from stretching the range to `levels + start + k / 5` for k in `0 .. steps`. Each time
    it fits a line by least squares. It keeps the smallest weighted error.
    """
    low = jnp.minimum(jnp.min(x, axis=-1, keepdims=True), F32(0))
    high = jnp.max(x, axis=-1, keepdims=True)
    wx = weights * x
    sum_w, sum_x = total(weights), total(wx)

    def code(stretch: jax.Array, low: jax.Array) -> jax.Array:
        return jnp.round(jnp.clip(divide(stretch, high - low) * (x - low), F32(0), F32(levels)))

    def attempt(k: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        best_gain, best_scale, best_low = best
        q = code(F32(levels + start) + F32(0.2) * k.astype(F32), best_low)  # starting at the best minimum so far
        wq = weights * q
        sum_q, sum_q2, sum_xq = total(wq), total(wq * q), total(wx * q)
        det = sum_w * sum_q2 - sum_q * sum_q
        scale = divide(sum_w * sum_xq - sum_x * sum_q, det)
        line = divide(sum_q2 * sum_x - sum_q * sum_xq, det)
        scale = jnp.where(line > 0, divide(sum_xq, sum_q2), scale)  # a minimum above 0 has no code: fit through 0
        line = jnp.minimum(line, F32(0))
        now = scale * sum_xq + line * sum_x
        better = (det > 0) & (now > best_gain)
        return (
            jnp.where(better, now, best_gain),
            jnp.where(better, scale, best_scale),
            jnp.where(better, line, best_low),
        )

    scale = (high - low) * F32(1 / levels)
    off = scale * code(F32(levels), low) + low - x
    first = total(wx * x) - total(weights * off * off)
    _, scale, low = lax.fori_loop(0, steps + 1, attempt, (first, scale, low))
    return scale, -low


def fit_scale(
    x: jax.Array, weights: jax.Array, targets: np.ndarray, snap: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`scale` such that `scale * q` is near `x`, where `snap` rounds to the values that q can have.

    Tries the codes that result from mapping the largest weight to each of `targets` in turn, each with its
    least-squares scale. The first target wins unless another is strictly better.
    """
    shape = (*x.shape[:-1], 1)
    # A group's weights stand below each other meanwhile, so that sums are taken of many groups at once.
    x, weights = lax.optimization_barrier((_upright(x), _upright(weights)))
    high, low = jnp.max(x, axis=0), jnp.min(x, axis=0)
    top, wx = jnp.where(high >= -low, high, low), weights * x
    choices = jnp.asarray(targets, F32)

    def attempt(k: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        best_gain, best_scale = best
        q = snap(divide(choices[k], top) * x)
        sum_xq, sum_q2 = jnp.sum(wx * q, axis=0), jnp.sum(weights * q * q, axis=0)
        scale = divide(sum_xq, sum_q2)
        better = sum_xq * sum_xq > best_gain * sum_q2
        return jnp.where(better, scale * sum_xq, best_gain), jnp.where(better, scale, best_scale)

    zero = jnp.zeros_like(top)
    _, scale = lax.fori_loop(0, len(targets), attempt, (zero, zero))
    return jnp.where(jnp.abs(top) < TINY, F32(0), scale).reshape(shape)


def _upright(x: jax.Array) -> jax.Array:
    """`[..., n]` as `[n, groups]`."""
    return x.reshape(-1, x.shape[-1]).T


def fit_integers(x: jax.Array, weights: jax.Array, half: int, step: float = 0.3, steps: int = 3) -> jax.Array:
    """`fit_scale` for q in `-half .. half - 1`: the largest weight becomes -half, or some steps more or less."""
    tries = np.array([0, *range(-steps, 0), *range(1, steps + 1)])
    return fit_scale(x, weights, -(half + step * tries), snap(-half, half - 1))


def fit_unit(scales: jax.Array, weights: jax.Array, low: int, high: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales `[..., n]` as integers `low .. high` times a float16: its bytes, its value `[..., 1]`, and the integers.

    The largest scale becomes the largest integer, or up to 1 more or 2 less. (llama.cpp makes it the largest. Being
    free by 2 of 15 to 63 is worth 2 to 10 % of the error.)
    """
    end = high if low == 0 else low
    tries = np.copysign(abs(end) + 0.2 * np.arange(-10, 6), end)
    unit_bytes, unit = f16(fit_scale(scales, weights, tries, snap(low, high)))
    return unit_bytes, unit, snap(low, high)(divide(scales, unit))


def snap(low: int, high: int) -> Callable[[jax.Array], jax.Array]:
    """Rounds to the nearest of `low .. high`."""
    return lambda v: jnp.round(jnp.clip(v, F32(low), F32(high)))
