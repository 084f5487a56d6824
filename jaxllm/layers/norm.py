"""Normalisation, computed in float32 whatever the dtype of the activations."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.layers.heads import HeadLayout
from jaxllm.layers.parameter import declare
from jaxllm.parallel import TP, sums_of_squares


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over the last axis (Zhang and Sennrich, 2019).

    Checkpoints that store `weight - 1` need an `offset` of 1. A norm that is not `learned` has no weight.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0, learned: bool = True) -> None:
        self.eps, self.offset = eps, offset
        self.weight = declare((size,), PartitionSpec(None)) if learned else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = 1.0 if self.weight is None else self.offset + self.weight.get_value()
        return (wide * scale * weight).astype(x.dtype)


class QKNorm(nnx.Module):
    """An RMSNorm over all queries of a token together, and another over all its keys (OLMo 2), for heads on a mesh.

    Both means take one sum over devices. Where a key head has copies, each of them counts in the sum and in the size;
    heads of zeros count in neither.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, heads: HeadLayout, eps: float) -> None:
        self.head_dim, self.eps = head_dim, eps
        self.sizes = tuple(head_dim * int((placed >= 0).sum()) for placed in (heads.query, heads.kv))
        spec = PartitionSpec(TP)
        self.q_weight = declare((num_heads * head_dim,), spec, rows=heads.rows(heads.query, head_dim))
        self.k_weight = declare((num_kv_heads * head_dim,), spec, rows=heads.rows(heads.kv, head_dim))

    def __call__(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys `[batch, time, heads, head_dim]`, sharded by HEADS, normalised."""
        means = sums_of_squares(q, k) / jnp.asarray(self.sizes, jnp.float32)
        scales = jax.lax.rsqrt(means + self.eps)[..., None, None]
        weights = (w.get_value().reshape(-1, self.head_dim) for w in (self.q_weight, self.k_weight))
        q, k = (
            (x.astype(jnp.float32) * scales[:, :, i] * weight).astype(x.dtype)
            for i, (x, weight) in enumerate(zip((q, k), weights, strict=True))
        )
        return q, k
