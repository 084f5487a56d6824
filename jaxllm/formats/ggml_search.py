"""The searches for a scale (and a minimum) with which llama.cpp's encoders beat plain rounding.

Each works on groups of weights along the last axis, float32 `[..., n]`, and returns float32 `[...]`. A search does not
return the codes that it tried: the formats round the scales to their own few bits and then encode the weights again
with the rounded scales, which are what a decoder will see.

Source: `make_qkx2_quants`, `make_q3_quants`, `make_qx_quants` and `quantize_row_iq4_nl_impl` in llama.cpp's
`ggml-quants.c`, each as called without an importance matrix. A group of zeros gets a scale of zero.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

F32 = jnp.float32
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


def fit_affine(
    x: jax.Array, weights: jax.Array, levels: int, start: float, steps: int, absolute: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`scale >= 0` and `minimum >= 0` such that `scale * q - minimum`, q in `0 .. levels`, is near `x`.

    Tries the codes that result from stretching the range to `levels + start + k / 10` for k in `0 .. steps`. Each time
    it fits a line by least squares. It keeps the smallest weighted error, squared or `absolute`.
    """
    low = jnp.minimum(jnp.min(x, axis=-1, keepdims=True), F32(0))
    high = jnp.max(x, axis=-1, keepdims=True)
    sum_w, sum_x = total(weights), total(weights * x)

    def code(stretch: jax.Array, low: jax.Array) -> jax.Array:
        return jnp.round(jnp.clip(divide(stretch, high - low) * (x - low), F32(0), F32(levels)))

    def error(scale: jax.Array, low: jax.Array, q: jax.Array) -> jax.Array:
        off = scale * q + low - x
        return total(weights * (jnp.abs(off) if absolute else off * off))

    def attempt(k: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        best_error, best_scale, best_low = best
        q = code(F32(levels + start) + F32(0.1) * k.astype(F32), best_low)  # starting at the best minimum so far
        wq = weights * q
        sum_q, sum_q2, sum_xq = total(wq), total(wq * q), total(wq * x)
        det = sum_w * sum_q2 - sum_q * sum_q
        scale = divide(sum_w * sum_xq - sum_x * sum_q, det)
        line = divide(sum_q2 * sum_x - sum_q * sum_xq, det)
        scale = jnp.where(line > 0, divide(sum_xq, sum_q2), scale)  # a minimum above 0 has no code: fit through 0
        line = jnp.minimum(line, F32(0))
        now = error(scale, line, q)
        better = (det > 0) & (now < best_error)
        return (
            jnp.where(better, now, best_error),
            jnp.where(better, scale, best_scale),
            jnp.where(better, line, best_low),
        )

    scale = (high - low) * F32(1 / levels)
    first = error(scale, low, code(F32(levels), low))
    _, scale, low = lax.fori_loop(0, steps + 1, attempt, (first, scale, low))
    return scale[..., 0], -low[..., 0]


def fit_scale(x: jax.Array, targets: np.ndarray, snap: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`scale` such that `scale * q` is near `x`, where `snap` rounds to the values that q can have.

    Tries the codes that result from mapping the largest weight to each of `targets` in turn, each with its
    least-squares scale, weighted by x^2. The first target wins unless another is strictly better.
    """
    top = largest(x)
    weights = x * x
    choices = jnp.asarray(targets, F32)

    def attempt(k: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        best_gain, best_scale = best
        q = snap(divide(choices[k], top) * x)
        sum_xq, sum_q2 = total(weights * x * q), total(weights * q * q)
        scale = divide(sum_xq, sum_q2)
        better = sum_xq * sum_xq > best_gain * sum_q2
        return jnp.where(better, scale * sum_xq, best_gain), jnp.where(better, scale, best_scale)

    zero = jnp.zeros_like(top)
    _, scale = lax.fori_loop(0, len(targets), attempt, (zero, zero))
    return jnp.where(jnp.abs(top) < TINY, F32(0), scale)[..., 0]


def fit_scale_by_coordinates(x: jax.Array, levels: int, passes: int = 5) -> jax.Array:
    """`scale` such that `scale * q`, q in `-levels .. levels - 1`, is near `x`, weighted by x^2.

    Starts from the rounding that maps the largest weight to -levels. Then moves one weight after the other to the code
    that is best given all the others, if that reduces the error.
    """

    def snap(v: jax.Array) -> jax.Array:
        return jnp.round(jnp.clip(v, F32(-levels), F32(levels - 1)))

    n = x.shape[-1]
    top = largest(x)
    q = snap(divide(F32(-levels), top) * x)
    weights = x * x
    sum_xq, sum_q2 = total(weights * x * q)[..., 0], total(weights * q * q)[..., 0]
    x, q = jnp.moveaxis(x, -1, 0), jnp.moveaxis(q, -1, 0)  # [n, ...]: a step takes one row

    def move(k: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q, sum_xq, sum_q2 = state
        xi, old = x[k % n], q[k % n]
        wi = xi * xi
        rest_xq, rest_q2 = sum_xq - wi * xi * old, sum_q2 - wi * old * old
        new = snap(divide(xi * rest_q2, rest_xq))
        new_xq, new_q2 = rest_xq + wi * xi * new, rest_q2 + wi * new * new
        gains = new_xq * new_xq * sum_q2 > sum_xq * sum_xq * new_q2
        better = (rest_xq > 0) & (new != old) & (new_q2 > 0) & gains
        q = q.at[k % n].set(jnp.where(better, new, old))
        return q, jnp.where(better, new_xq, sum_xq), jnp.where(better, new_q2, sum_q2)

    _, sum_xq, sum_q2 = lax.fori_loop(0, passes * n, move, (q, sum_xq, sum_q2))
    return jnp.where(jnp.abs(top[..., 0]) < TINY, F32(0), divide(sum_xq, sum_q2))
