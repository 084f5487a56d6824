"""Grouped-query attention over a cache, heads sharded over tp."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from jaxllm.kernels.attention import Cached, Scoring, apart
from jaxllm.kernels.dispatch import attention
from jaxllm.layers.cache import CacheShape, LayerCache, ring_positions, write, write_ring
from jaxllm.layers.context import Context
from jaxllm.layers.heads import HeadLayout
from jaxllm.layers.linear import Linear, together
from jaxllm.layers.parameter import declare
from jaxllm.layers.rope import rotate
from jaxllm.parallel import CACHE, COLUMN, HEADS, ROW, ROWS, TP, local, of_batch

Operand = Any  # an array or a pytree of arrays; or their PartitionSpecs


class _Operands(NamedTuple):
    """The inputs of attention on one device: its own heads, and all positions."""

    q: Operand
    k: Operand
    v: Operand
    keys: Operand
    values: Operand
    positions: Operand
    counts: Operand
    sinks: Operand
    segments: Operand


class Attention(nnx.Module):
    """Causal self-attention with fewer key/value heads than query heads (Ainslie et al., 2023).

    Args:
        hidden_size, num_heads, num_kv_heads: as in the checkpoint.
        head_dim, value_dim: size of a query/key head and of a value head.
        heads: how the heads are placed on the mesh.
        scale: what scores are multiplied by; by default `head_dim ** -0.5`.
        score_cap: c in `c tanh(scores / c)`, which keeps scores within c; None: no cap.
        qkv_bias, o_bias: whether the projections have biases.
        q_norm, k_norm, v_norm: norms over each query, key and value head.
        qk_norm: a function of all queries and all keys of a token together, see `QKNorm`.
        sliding_window: how many positions a token attends to, its own included; None: all of them.
        sinks: whether each head has a learned score for attending to nothing.
        own_keys: whether the layer computes keys and values; otherwise it reads another layer's cache.
        shared: whether other layers read this layer's cache, which then holds every position.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        heads: HeadLayout,
        *,
        scale: float | None = None,
        score_cap: float | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        q_norm: nnx.Module | None = None,
        k_norm: nnx.Module | None = None,
        v_norm: nnx.Module | None = None,
        qk_norm: nnx.Module | None = None,
        sliding_window: int | None = None,
        sinks: bool = False,
        own_keys: bool = True,
        shared: bool = False,
    ) -> None:
        self.head_dim, self.value_dim = head_dim, value_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.score_cap, self.sliding_window = score_cap, sliding_window
        self.cache_shape = CacheShape(len(heads.kv), head_dim, value_dim, None if shared else sliding_window)
        q_rows, k_rows = heads.rows(heads.query, head_dim), heads.rows(heads.kv, head_dim)
        v_rows, o_cols = heads.rows(heads.kv, value_dim), heads.rows(heads.query, value_dim)
        k_shape, v_shape = (num_kv_heads * head_dim, hidden_size), (num_kv_heads * value_dim, hidden_size)
        self.q_proj = Linear((num_heads * head_dim, hidden_size), COLUMN, rows=q_rows, bias=qkv_bias)
        self.k_proj = Linear(k_shape, COLUMN, rows=k_rows, bias=qkv_bias) if own_keys else None
        self.v_proj = Linear(v_shape, COLUMN, rows=v_rows, bias=qkv_bias) if own_keys else None
        self.o_proj = Linear((hidden_size, num_heads * value_dim), ROW, cols=o_cols, bias=o_bias)
        self.q_norm, self.k_norm, self.v_norm, self.qk_norm = q_norm, k_norm, v_norm, qk_norm
        self.sinks = declare((num_heads,), PartitionSpec(TP), rows=heads.query) if sinks else None

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        """New tokens attend to the cache and to one another.

        Args:
            x: `[batch, time, hidden]`.
            cache: keys and values `[batch, kv_heads, length, dim]`, which the caller should donate.

        Returns:
            The output `[batch, time, hidden]` and the cache with the new keys and values added.
        """
        k = v = None
        if self.k_proj is None or self.v_proj is None:
            q = self.q_proj(x)
        else:
            q, k, v = together(x, self.q_proj, self.k_proj, self.v_proj)
            q, k = (q, k) if self.qk_norm is None else self.qk_norm(q, k)
            k, v = self._placed(k, self.k_norm, context), _heads(v, self.value_dim)
            v = v if self.v_norm is None else self.v_norm(v)
        q = self._placed(q, self.q_norm, context)
        sinks = None if self.sinks is None else self.sinks.get_value()
        operands = _Operands(q * self.scale, k, v, *cache, context.positions, context.counts, sinks, context.segments)
        attend = partial(self._attend, window=context.window)
        heads, kept, rows = (of_batch(spec, len(x)) for spec in (HEADS, CACHE, ROWS))
        specs = _Operands(heads, heads, heads, kept, kept, rows, rows, PartitionSpec(TP), rows)
        y, keys, values = local(attend, (specs,), (heads, kept, kept))(operands)
        return self.o_proj(y.reshape(*y.shape[:2], -1)), (keys, values)

    def _placed(self, x: jax.Array, norm: nnx.Module | None, context: Context) -> jax.Array:
        """Queries or keys `[batch, time, heads, dim]`, normalised and rotated if the layer does that."""
        heads = _heads(x, self.head_dim)
        heads = heads if norm is None else norm(heads)
        return heads if context.angles is None else rotate(heads, *context.angles)

    def _attend(self, given: _Operands, window: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        if given.segments is not None:
            return self._attend_whole(given)
        keys, values = given.keys, given.values
        seen, at = (keys, values), None
        if given.k is not None:
            (keys, values), seen, at = _updated((keys, values), (given.k, given.v), given, window)
        cached = Cached(given.q, *seen, given.positions, at, given.sinks)
        y = attention(cached, Scoring(window, self.sliding_window, self.score_cap))
        return y, keys, values

    def _attend_whole(self, given: _Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rows that are complete: the keys and values are those that the layer computes, or takes from another."""
        keys, values = given.keys, given.values
        if given.k is not None:
            keys, values = given.k.swapaxes(1, 2), given.v.swapaxes(1, 2)
        at, time = apart(given.positions, given.segments), given.q.shape[1]
        scoring = Scoring(time, min(self.sliding_window or time, time), self.score_cap)
        return attention(Cached(given.q, keys, values, at, at, given.sinks), scoring), keys, values


def _updated(
    cache: LayerCache, new: LayerCache, given: _Operands, window: int
) -> tuple[LayerCache, LayerCache, jax.Array | None]:
    """The updated cache, the keys and values to attend to, and their positions `[batch or 1, length]` (None: each has
    its slot's)."""
    start, length = given.positions[:, 0], cache[0].shape[2]
    if window <= length:  # no ring has wrapped around yet
        # The barrier keeps XLA from fusing the update into its reader too, which would cost copies of the cache.
        keys, values = lax.optimization_barrier((write(cache[0], new[0], start), write(cache[1], new[1], start)))
        return (keys, values), (keys, values), None
    if given.positions.shape[1] == 1:  # the position that it overwrites is outside the window
        slot = start % length
        cache = lax.optimization_barrier((write(cache[0], new[0], slot), write(cache[1], new[1], slot)))
        return cache, cache, ring_positions(length, start)

    def joined(old: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.concatenate([old, x.swapaxes(1, 2).astype(old.dtype)], axis=2)

    def written(old: jax.Array, x: jax.Array) -> jax.Array:
        return write_ring(old, x, start, given.counts)

    at = jnp.concatenate([ring_positions(length, start - 1), given.positions], axis=1)
    looked_at = joined(cache[0], new[0]), joined(cache[1], new[1])
    return (written(cache[0], new[0]), written(cache[1], new[1])), looked_at, at


def _heads(x: jax.Array, head_dim: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, head_dim)
