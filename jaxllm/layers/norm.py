"""Normalisation, computed in float32 whatever the dtype of the activations."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.layers.heads import HeadLayout
from jaxllm.layers.parameter import declare
from jaxllm.parallel import TP, rms_norm, sums_of_squares


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over the last axis (Zhang and Sennrich, 2019).

    Checkpoints that store `weight - 1` need an `offset` of 1. A norm that is not `learned` has no weight. One with
    `rows` is sharded over tp, by the checkpoint's element at each place; it cannot be called, only `scaled`.
    """

    def __init__(
        self, size: int, eps: float, offset: float = 0.0, learned: bool = True, rows: np.ndarray | None = None
    ) -> None:
        self.eps, self.offset = eps, offset
        spec = PartitionSpec(None if rows is None else TP)
        self.weight = declare((size,), spec, rows) if learned else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self._weight(), self.eps)

    def scaled(self, x: jax.Array, mean_square: jax.Array) -> jax.Array:
        """`x[..., size]`, given the mean of its squares, float32 `[..., 1]`."""
        wide, scale, weight = x.astype(jnp.float32), jax.lax.rsqrt(mean_square + self.eps), self._weight()
        return (wide * scale * (1.0 if weight is None else weight)).astype(x.dtype)

    def _weight(self) -> jax.Array | None:
        if self.weight is None:
            return None
        value = self.weight.get_value()
        return self.offset + value if self.offset else value


class QKNorm(nnx.Module):
    """An RMSNorm over all queries of a token together, and another over all its keys (OLMo 2), for heads on a mesh.

    Both means take one sum over devices. Where a key head has copies, each of them counts in the sum and in the size;
    heads of zeros count in neither.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, heads: HeadLayout, eps: float) -> None:
        self.sizes = tuple(head_dim * int((placed >= 0).sum()) for placed in (heads.query, heads.kv))
        self.q_norm, self.k_norm = (
            RMSNorm(count * head_dim, eps, rows=heads.rows(placed, head_dim))
            for count, placed in ((num_heads, heads.query), (num_kv_heads, heads.kv))
        )

    def __call__(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys `[batch, time, heads * head_dim]`, sharded over tp, normalised."""
        means = sums_of_squares(q, k) / jnp.asarray(self.sizes, jnp.float32)
        return self.q_norm.scaled(q, means[..., :1]), self.k_norm.scaled(k, means[..., 1:])
