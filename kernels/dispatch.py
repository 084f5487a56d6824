"""Which implementation multiplies by a weight. One device's shards only: see `jaxllm.parallel` for the rest."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxllm.kernels.block_fp8 import rounded

from jaxllm.formats.base import Weight
from jaxllm.formats.fp8 import BlockFP8


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`: the weight decoded to x's dtype, summed in float32.

    A blockwise FP8 weight may ask for activations in FP8 as well: then both are multiplied as the floats they stand
    for, which is what block-scaled FP8 products sum up to.
    """
    if isinstance(weight, BlockFP8) and weight.activation_group is not None:
        x = rounded(x, weight)
    return dense_matmul(x, weight.dequantize(x.dtype))


def dense_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x[..., in] @ w[out, in].T` -> float32 `[..., out]`."""
    rows = x.reshape(-1, x.shape[-1])
    # XLA:CPU multiplies a single 2-byte row in scalar code, 30 times slower than two rows.
    alone = rows.shape[0] == 1 and x.dtype.itemsize == 2
    if alone:
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    # float32 means float32: TPUs would otherwise round its operands to bfloat16.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = lax.dot_general(rows, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
    return y[: 1 if alone else None].reshape(*x.shape[:-1], w.shape[0])
