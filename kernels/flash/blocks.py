"""What both attention kernels are given: queries as rows, and which blocks of keys these have to see.

All queries that share a key head are the rows of one matrix, those of a token next to each other. So a decode step of
several heads is one tile, and a tile of a prompt has tokens that are close together, which see nearly the same keys.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.kernels.attention import Cached, Scoring
from jaxllm.kernels.coded import Buffer, Coded


class Rows(NamedTuple):
    """Queries by key head, and the positions that decide what they see.

    q: `[batch, kv_heads, rows, dim]`, row `t * group + g` is the token t's query of the head g of a group.
    rope: the rest of q, `[batch, kv_heads, rows, rope_dim]`; None: there is none.
    positions: int32 `[batch, rows]`.
    key_positions: int32 `[batch or 1, length]`, negative where no key is.
    sinks: float32 `[kv_heads, rows]`, or None.
    """

    q: jax.Array
    rope: jax.Array | None
    positions: jax.Array
    key_positions: jax.Array
    sinks: jax.Array | None

    @classmethod
    def of(cls, given: Cached, scoring: Scoring) -> "Rows":
        batch, time, heads, _ = given.q.shape
        kv_heads, length, dim = given.keys.shape[1:]
        group = heads // kv_heads
        q = given.q.reshape(batch, time, kv_heads, group, -1).transpose(0, 2, 1, 3, 4)
        q = q.reshape(batch, kv_heads, time * group, -1)
        key_positions = given.key_positions
        if key_positions is None:
            key_positions = jnp.arange(min(scoring.window, length), dtype=jnp.int32)[None]
        sinks = given.sinks
        if sinks is not None:
            sinks = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, group), (1, time))
        rope = None if given.rope is None else q[..., dim:]
        return cls(q[..., :dim], rope, jnp.repeat(given.positions, group, axis=1), key_positions, sinks)

    def spans(self, tile: int, block: int, sliding_window: int | None) -> tuple[jax.Array, jax.Array]:
        """For each tile of rows the first block of keys that any of them sees, and the one after the last: int32
        `[batch, tiles]` both. Blocks in between may have keys that no row sees."""
        rows, keys = _divided(self.positions, tile, "edge"), _divided(self.key_positions, block, "constant")
        low, high = (f(rows, axis=-1)[:, :, None, None] for f in (jnp.min, jnp.max))
        seen = (keys[:, None] >= 0) & (keys[:, None] <= high)
        if sliding_window is not None:
            seen &= keys[:, None] > low - sliding_window
        seen = jnp.any(seen, axis=-1)  # [batch, tiles, blocks]
        first, last = jnp.argmax(seen, axis=-1), seen.shape[-1] - jnp.argmax(seen[..., ::-1], axis=-1)
        return first.astype(jnp.int32), jnp.where(jnp.any(seen, axis=-1), last, 0).astype(jnp.int32)

    def result(self, y: jax.Array, given: Cached) -> jax.Array:
        """`y[batch, kv_heads, rows, dim]` as `[batch, time, heads, dim]`."""
        batch, kv_heads, _, dim = y.shape
        time, heads = given.q.shape[1:3]
        y = y.reshape(batch, kv_heads, time, heads // kv_heads, dim).transpose(0, 2, 1, 3, 4)
        return y.reshape(batch, time, heads, dim)


def _divided(x: jax.Array, size: int, padding: str) -> jax.Array:
    """`x[batch, n]` as `[batch, ceil(n / size), size]`, padded with its last number or with -1."""
    options = {"constant_values": -1} if padding == "constant" else {}
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), padding, **options)
    return x.reshape(len(x), -1, size)


def cache_refused(given: Cached) -> str | None:
    """Why neither kernel reads such a cache, or None. (float16 is what some CPUs' caches have.)"""
    held, q = given.keys.dtype, given.q.dtype
    if isinstance(given.keys, Coded) or held == q:
        return None
    return f"a cache of {held.name} for queries of {q.name}: both have to be the same, or the cache in 8 bits"


def parts(given: Cached) -> Iterator[tuple[str, jax.Array, jax.Array | None]]:
    """What the cache holds, under the names "keys", "rope" and "values": numbers; or codes, as `Coded` has them, and
    their scales, float32 `[sequences, heads, 1, length]`."""
    for name in ("keys", "rope", "values"):
        buffer: Buffer | None = getattr(given, name)
        if isinstance(buffer, Coded):
            yield name, buffer.codes, buffer.scales.astype(jnp.float32).swapaxes(2, 3)
        elif buffer is not None:
            yield name, buffer, None
