"""Normalisation, computed in float32 whatever the dtype of the activations."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.layers.parameter import declare


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
