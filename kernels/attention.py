"""The definition of attention over a cache. `dispatch.attention` prefers a kernel if the platform has one."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.kernels.coded import Buffer, Coded, read


class Cached(NamedTuple):
    """Queries and the cache that they attend to.

    q: `[batch, time, heads, head_dim]`, scaled; queries that share a key/value head are adjacent.
    keys, values: `[sequences, kv_heads, length, dim]`, both numbers or both `Coded`. No values: the keys serve as
        values too, as latents do.
    positions: `[batch, time]`, the position of each query.
    key_positions: `[batch or 1, length]`, the positions of the keys, negative where there is none; None: their indices.
    sinks: `[heads]`, the score of an extra position that every query attends to and whose value is zero (GPT-OSS, after
        Xiao et al., 2023); None: there is none.
    rows: `[batch]`, which of the sequences each row of q belongs to; None: each to its own.
    rope: `[sequences, kv_heads or 1, length, rope_dim]`, what all keys go on with, of all heads or of each; the last
        numbers of every query are for these. None: nothing.
    """

    q: jax.Array
    keys: Buffer
    values: Buffer | None
    positions: jax.Array
    key_positions: jax.Array | None = None
    sinks: jax.Array | None = None
    rows: jax.Array | None = None
    rope: Buffer | None = None

    @property
    def weighted(self) -> Buffer:
        """What attention sums up: the values, or the keys that serve as such."""
        return self.keys if self.values is None else self.values


@dataclass(frozen=True)
class Scoring:
    """Which keys a query sees, and how it scores them.

    window: without `key_positions`, how many keys from the first on include all that are visible.
    sliding_window: how many positions a query sees, its own included; None: all up to its own.
    score_cap: c in `c tanh(scores / c)`; None: no cap.
    """

    window: int
    sliding_window: int | None = None
    score_cap: float | None = None


def apart(positions: jax.Array, segments: jax.Array) -> jax.Array:
    """Positions of tokens `[batch, time]`, changed so that those of different texts in a row are further apart than a
    window of `time` reaches: so texts do not see each other, and kernels need not know.

    Args:
        segments: int32 `[batch, time]`, which of the texts in its row each token belongs to, in ascending order.
    """
    return positions + 2 * positions.shape[1] * segments


def joined(given: Cached, scoring: Scoring) -> Cached:
    """The same with whole keys, in q's dtype, and values: copies of what is read, where the cache holds parts."""
    if given.rope is None and given.values is not None:
        return given
    rows = slice(None) if given.rows is None else given.rows
    seen = slice(scoring.window if given.key_positions is None else None)

    def numbers(buffer: Buffer) -> jax.Array:
        return read(jax.tree.map(lambda leaf: leaf[rows, :, seen], buffer), given.q.dtype)

    keys = numbers(given.keys)
    values = keys if given.values is None else numbers(given.values)
    if given.rope is not None:
        rope = numbers(given.rope)
        keys = jnp.concatenate([keys, jnp.broadcast_to(rope, (*keys.shape[:3], rope.shape[3]))], axis=-1)
    return given._replace(keys=keys, values=values, rows=None, rope=None)


def attend(given: Cached, scoring: Scoring) -> jax.Array:
    """Softmax attention, each query over the cached positions up to its own; softmax in float32.

    Returns:
        `[batch, time, heads, value_dim]` in q's dtype.
    """
    given = joined(given, scoring)
    q, keys, _, positions, key_positions, sinks, rows, _ = given
    values = given.weighted
    sliding_window, score_cap = scoring.sliding_window, scoring.score_cap
    if key_positions is None:
        keys, values = jax.tree.map(lambda leaf: leaf[:, :, : scoring.window], (keys, values))
        key_positions = jnp.arange(scoring.window, dtype=jnp.int32)[None]
    if rows is not None:
        keys, values = jax.tree.map(lambda leaf: leaf[rows], (keys, values))
    (keys, key_scales), (values, value_scales) = _parts(keys), _parts(values)
    batch, time, heads, head_dim = q.shape
    kv_heads, length = keys.shape[1:3]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    # Queries that share a key head become the rows of one matrix: [batch, kv_heads, group * time, head_dim].
    q = q.reshape(batch, time, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, head_dim)
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk", q, keys.astype(q.dtype), precision=precision, preferred_element_type=jnp.float32
    )
    if key_scales is not None:
        scores = scores * key_scales
    if score_cap is not None:
        scores = score_cap * jnp.tanh(scores / score_cap)
    back = positions[:, None, None, :, None] - key_positions[:, None, None, None]  # [batch, 1, 1, time, length]
    visible = back >= 0
    if sliding_window is not None:
        visible &= (back < sliding_window) & (key_positions >= 0)[:, None, None, None]
    scores = scores.reshape(batch, kv_heads, -1, time, length)
    scores = jnp.where(visible, scores, -jnp.inf)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks.reshape(kv_heads, -1, 1, 1)
        peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
        weights = jnp.exp(scores - peak)
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - peak))
    weights = weights.reshape(batch, kv_heads, -1, length)
    if value_scales is not None:
        weights = weights * value_scales
    weights, values = weights.astype(q.dtype), values.astype(q.dtype)
    y = jnp.einsum("bhqk,bhkd->bhqd", weights, values, precision=precision, preferred_element_type=jnp.float32)
    y = y.reshape(batch, kv_heads, heads // kv_heads, time, -1).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, time, heads, -1).astype(q.dtype)


def _parts(buffer: Buffer) -> tuple[jax.Array, jax.Array | None]:
    """Numbers or codes, and float32 `[sequences, kv_heads, 1, length]`, what products with each are multiplied by."""
    if isinstance(buffer, Coded):
        return buffer.unscaled, buffer.scales.astype(jnp.float32).swapaxes(2, 3)
    return buffer, None
