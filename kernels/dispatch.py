"""Which implementation multiplies by a weight. One device's shards only: see `jaxllm.parallel` for the rest."""

import jax
from jaxllm.kernels import dense
from jaxllm.kernels.block_fp8 import reference as block_fp8

from jaxllm.formats.base import Weight
from jaxllm.formats.fp8 import BlockFP8


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`."""
    return (block_fp8 if isinstance(weight, BlockFP8) else dense).matmul(x, weight)


def grouped_matmul(x: jax.Array, stack: Weight, expert: jax.Array) -> jax.Array:
    """Tiles of rows, each times a matrix of its own, see `dense.grouped_matmul`."""
    return (block_fp8 if isinstance(stack, BlockFP8) else dense).grouped_matmul(x, stack, expert)
