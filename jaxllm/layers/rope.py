"""Rotary position embeddings in a single order: element i of the first half is paired with element i of the second.

If a checkpoint pairs neighbours (2i, 2i + 1), the rows of its q and k matrices are reordered while they are read
(`half_split_rows`). That does not change q . k, works on packed rows, and saves a strided shuffle at every step.

Methods that extend a model beyond its training context only change the frequencies, once, before anything runs:
`llama3`, `yarn` and `divided` (by factors from the checkpoint) map frequencies to frequencies, as in transformers'
`modeling_rope_utils.py`.
"""

import math
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies, float32 `[rotary_dim / 2]`, and the `scale` that multiplies cosine and sine.

    A sequence that may grow beyond `short_context` positions uses `long` from its first token on.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0
    long: Self | None = None
    short_context: int = 0

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)

    def angles(self, positions: jax.Array, limits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine, float32 `[batch, time, 1, rotary_dim / 2]`.

        Args:
            positions: int32 `[batch, time]`.
            limits: int32 `[batch]`, the length that each sequence may grow to.
        """
        inv_freq, scale = jnp.asarray(self.inv_freq, jnp.float32), jnp.float32(self.scale)
        if self.long is not None:
            grows = (limits > self.short_context)[:, None, None, None]
            inv_freq = jnp.where(grows, jnp.asarray(self.long.inv_freq, jnp.float32), inv_freq)
            scale = jnp.where(grows, jnp.float32(self.long.scale), scale)
        angle = positions[..., None, None].astype(jnp.float32) * inv_freq
        return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`x[batch, time, heads, head_dim]` with its first rotary_dim elements rotated; computed in float32."""
    half = cos.shape[-1]
    a, b, rest = jnp.split(x, (half, 2 * half), axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def half_split_rows(heads: int, head_dim: int, rotary_dim: int) -> np.ndarray:
    """For each row in half-split order, its index in a q or k matrix that pairs neighbours."""
    within = np.concatenate([np.arange(0, rotary_dim, 2), np.arange(1, rotary_dim, 2), np.arange(rotary_dim, head_dim)])
    return (np.arange(heads)[:, None] * head_dim + within).reshape(-1)


def frequencies(rotary_dim: int, theta: float) -> np.ndarray:
    """`theta ** (-2i / rotary_dim)`, float64 `[rotary_dim / 2]` (Su et al., 2021)."""
    return theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim)


def divided(inv_freq: np.ndarray, factors: np.typing.ArrayLike) -> np.ndarray:
    """Frequencies divided by one factor each (`rope_freqs` of GGUF files, LongRoPE), or all by one (linear scaling)."""
    return inv_freq / np.asarray(factors, np.float64)


def llama3(inv_freq: np.ndarray, factor: float, low: float, high: float, original_context: int) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated.

    Args:
        low, high: at most `low` turns over the original context make a wavelength long, at least `high` short.
    """
    turns = original_context * inv_freq / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


def yarn(
    inv_freq: np.ndarray,
    factor: float,
    theta: float,
    original_context: int,
    beta_fast: float = 32,
    beta_slow: float = 1,
    truncate: bool = True,
) -> np.ndarray:
    """YaRN (Peng et al., 2023): high frequencies are kept, low ones divided by `factor`, with a ramp between.

    Args:
        beta_fast, beta_slow: turns over the original context at which the ramp begins and ends.
        truncate: whether the ends of the ramp are rounded to integer dimensions.
    """
    dim = 2 * len(inv_freq)

    def dimension(turns: float) -> float:
        return dim * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return inv_freq * (1 - ramp) + inv_freq / factor * ramp


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature: `0.1 * mscale * ln(factor) + 1` for factors above 1."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_scale(factor: float, original_context: int) -> float:
    """LongRoPE's temperature (Ding et al., 2024), for a context longer by `factor` than the original."""
    return math.sqrt(1 + math.log(factor) / math.log(original_context)) if factor > 1 else 1.0
