"""Rotary position embeddings, in one order: element i of the first half is paired with element i of the second.

Checkpoints that pair neighbours (2i, 2i + 1) have the rows of their q and k matrices reordered while they are read
(`half_split_rows`). That changes nothing in q . k, works on packed rows, and spares every step a strided shuffle.
"""

import jax
import jax.numpy as jnp
import numpy as np


def inverse_frequencies(rotary_dim: int, theta: float) -> np.ndarray:
    """`theta ** (-2i / rotary_dim)` as float32 `[rotary_dim / 2]` (Su et al., 2021)."""
    return (theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)


def angles(positions: jax.Array, inv_freq: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 `[batch, time, 1, rotary_dim / 2]`, of `positions[batch, time]`."""
    angle = positions[..., None, None].astype(jnp.float32) * inv_freq
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`x[batch, time, heads, head_dim]` with its first rotary_dim elements turned; computed in float32."""
    half = cos.shape[-1]
    a, b, rest = jnp.split(x, (half, 2 * half), axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def half_split_rows(heads: int, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Where, in a q or k matrix with neighbours paired, each row of the half-split order is found."""
    within = np.concatenate([np.arange(0, rotary_dim, 2), np.arange(1, rotary_dim, 2), np.arange(rotary_dim, head_dim)])
    return (np.arange(heads)[:, None] * head_dim + within).reshape(-1)
