"""Matmuls of MXFP4 weights with activations as they are (W4A16): what they mean.

The weight is decoded to the activations' dtype, which bfloat16 can hold exactly, so nothing is lost but in the sum.
"""

from jaxllm.kernels.dense import grouped_matmul, matmul

__all__ = ["grouped_matmul", "matmul"]
