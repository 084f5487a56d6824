"""Matmuls of MXFP4 weights, the format of GPT-OSS, as functions over the bytes of its checkpoints.

They run on one device, on the kernels of its platform (`dispatch.choose`).
"""

import jax
import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.formats.mxfp4 import BLOCK, MXFP4
from jaxllm.kernels import dispatch

__all__ = ["dequantize", "matmul"]


def dequantize(blocks: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
    """Dequantize packed codes and their scales to a matrix `[*batch, out, in]`.

    Args:
        blocks: uint8 `[*batch, out, in / 32, 16]` as checkpoints have them, or `[*batch, out, in / 2]`: two codes per
            byte, the first one in its low bits.
        scales: uint8 `[*batch, out, in / 32]`, exponents of two plus 127.

    Raises:
        InputError: sizes or dtypes do not match.
    """
    weight = _weight(blocks, scales)
    return dispatch.choose("weight_dequant", None, weight).kernel.function(weight, dtype)


def matmul(x: jax.Array, blocks: jax.Array, scales: jax.Array, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
    """`x[..., in]` times the transposed matrix of `dequantize`: `[..., out]`, summed in float32, rounded to `dtype`.

    Raises:
        InputError: sizes or dtypes do not match.
    """
    weight = _weight(blocks, scales)
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[-1]:
        raise InputError(
            f"x {[*x.shape]} and a weight {[*weight.shape]}: that has to be a matrix of {x.shape[-1]} columns"
        )
    return dispatch.matmul(x, weight).astype(dtype)


def _weight(blocks: jax.Array, scales: jax.Array) -> MXFP4:
    if blocks.dtype != jnp.uint8 or scales.dtype != jnp.uint8:
        raise InputError(f"blocks of {blocks.dtype.name} and scales of {scales.dtype.name}: both have to be uint8")
    if blocks.shape == (*scales.shape, BLOCK // 2):
        blocks = blocks.reshape(*scales.shape[:-1], -1)
    if blocks.shape != (*scales.shape[:-1], scales.shape[-1] * BLOCK // 2):
        raise InputError(f"blocks {[*blocks.shape]} and scales {[*scales.shape]}: there is a scale for each 16 bytes")
    return MXFP4(blocks, scales)
