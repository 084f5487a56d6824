"""The definition of the root-mean-square norm. `dispatch.rms_norm` prefers a kernel if the platform has one."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis (Zhang and Sennrich, 2019), in float32.

    Returns:
        `[..., size]` in x's dtype.
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * (1.0 if weight is None else weight)).astype(x.dtype)
