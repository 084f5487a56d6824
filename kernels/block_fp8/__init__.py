"""Matmuls of blockwise FP8 weights, as DeepSeek-V3 was trained."""
