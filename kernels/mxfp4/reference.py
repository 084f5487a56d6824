"""The definition of matmuls of MXFP4 weights with unrounded activations (W4A16).

The weight is dequantized to the activations' dtype. Even bfloat16 holds its values exactly, so only the sum rounds.
"""

from jaxllm.kernels.dense import grouped_matmul, matmul

__all__ = ["grouped_matmul", "matmul"]
