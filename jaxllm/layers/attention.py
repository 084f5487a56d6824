"""Grouped-query attention over a cache, heads cut over tp."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from jaxllm.layers.cache import write
from jaxllm.layers.heads import HeadLayout
from jaxllm.layers.linear import Linear
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.parameter import declare
from jaxllm.layers.rope import rotate
from jaxllm.parallel import CACHE, COLUMN, HEADS, ROW, TP, local


class Attention(nnx.Module):
    """Causal self-attention with fewer key/value heads than query heads (Ainslie et al., 2023).

    Args:
        hidden_size, num_heads, num_kv_heads: as in the checkpoint.
        head_dim, value_dim: size of a query/key head and of a value head.
        heads: where the heads stand on the mesh.
        qkv_bias, o_bias: whether the projections have biases.
        norm_eps: of an RMSNorm over each query and key head; None: there is none.
        sliding_window: how many positions back, its own included, a token sees; None: all of them.
        sinks: whether each head has a score of its own for attending to nothing.
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
        qkv_bias: bool = False,
        o_bias: bool = False,
        norm_eps: float | None = None,
        sliding_window: int | None = None,
        sinks: bool = False,
    ) -> None:
        self.head_dim, self.value_dim = head_dim, value_dim
        self.scale, self.sliding_window = head_dim**-0.5, sliding_window
        self.cache_shape = len(heads.kv), head_dim, value_dim
        q_rows, k_rows = heads.rows(heads.query, head_dim), heads.rows(heads.kv, head_dim)
        v_rows, o_cols = heads.rows(heads.kv, value_dim), heads.rows(heads.query, value_dim)
        self.q_proj = Linear((num_heads * head_dim, hidden_size), COLUMN, rows=q_rows, bias=qkv_bias)
        self.k_proj = Linear((num_kv_heads * head_dim, hidden_size), COLUMN, rows=k_rows, bias=qkv_bias)
        self.v_proj = Linear((num_kv_heads * value_dim, hidden_size), COLUMN, rows=v_rows, bias=qkv_bias)
        self.o_proj = Linear((hidden_size, num_heads * value_dim), ROW, cols=o_cols, bias=o_bias)
        self.q_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps)
        self.k_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps)
        self.sinks = declare((num_heads,), PartitionSpec(TP), rows=heads.query) if sinks else None

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        cache: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        window: int,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """New tokens attend to the cache and to one another.

        Args:
            x: `[batch, time, hidden]`.
            rope: cosine and sine of the positions.
            cache: keys and values `[batch, kv_heads, capacity, dim]`, to be donated.
            positions: `[batch, time]`, consecutive in time.
            window: how many positions of the cache are looked at; all of `positions` lie below it.

        Returns:
            The output `[batch, time, hidden]` and the cache with the new keys and values in it.
        """
        q, k = _heads(self.q_proj(x), self.head_dim), _heads(self.k_proj(x), self.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, *rope), rotate(k, *rope), _heads(self.v_proj(x), self.value_dim)

        def attend(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            keys: jax.Array,
            values: jax.Array,
            positions: jax.Array,
            sinks: jax.Array | None,
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            # The barrier keeps XLA from fusing the update into its reader as well, which costs copies of the cache.
            keys, values = lax.optimization_barrier(
                (write(keys, k, positions[:, 0]), write(values, v, positions[:, 0]))
            )
            seen = keys[:, :, :window], values[:, :, :window]
            y = dot_product_attention(q * self.scale, *seen, positions, self.sliding_window, sinks)
            return y, keys, values

        sinks = None if self.sinks is None else self.sinks.get_value()
        specs = (HEADS, HEADS, HEADS, CACHE, CACHE, PartitionSpec(), PartitionSpec(TP))
        y, *cache = local(attend, specs, (HEADS, CACHE, CACHE))(q, k, v, *cache, positions, sinks)
        return self.o_proj(y.reshape(*y.shape[:2], -1)), tuple(cache)


def _heads(x: jax.Array, head_dim: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, head_dim)


def dot_product_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    sliding_window: int | None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of scaled queries, each over the cached positions up to its own; softmax in float32.

    Args:
        q: `[batch, time, heads, head_dim]`, the queries of one key/value head together.
        keys, values: `[batch, kv_heads, positions, dim]`.
        positions: `[batch, time]`, that of each query.
        sliding_window: see `Attention`.
        sinks: `[heads]`, the score of a position that every query sees and whose value is zero (GPT-OSS, which follows
            Xiao et al., 2023).

    Returns:
        `[batch, time, heads, value_dim]` in q's dtype.
    """
    batch, time, heads, head_dim = q.shape
    kv_heads, length = keys.shape[1:3]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    # Queries that share a key head become the rows of one matrix: [batch, kv_heads, group * time, head_dim].
    q = q.reshape(batch, time, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, head_dim)
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk", q, keys.astype(q.dtype), precision=precision, preferred_element_type=jnp.float32
    )
    back = positions[:, None, None, :, None] - jnp.arange(length)  # [batch, 1, 1, time, length]
    visible = back >= 0 if sliding_window is None else (back >= 0) & (back < sliding_window)
    scores = scores.reshape(batch, kv_heads, -1, time, length)
    scores = jnp.where(visible, scores, -jnp.inf)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks.reshape(kv_heads, -1, 1, 1)
        peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
        weights = jnp.exp(scores - peak)
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - peak))
    weights = weights.reshape(batch, kv_heads, -1, length).astype(q.dtype)
    y = jnp.einsum(
        "bhqk,bhkd->bhqd", weights, values.astype(q.dtype), precision=precision, preferred_element_type=jnp.float32
    )
    y = y.reshape(batch, kv_heads, heads // kv_heads, time, -1).transpose(0, 3, 1, 2, 4)
    return y.reshape(batch, time, heads, -1).astype(q.dtype)
