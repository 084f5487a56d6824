"""Layers that hold a matrix, or a stack of them, in any format, sharded over a mesh."""

from jaxllm.layers.experts import Experts
from jaxllm.layers.linear import Embedding, Linear, Merged
from jaxllm.parallel import COLUMN, REPLICATED, ROW

__all__ = ["COLUMN", "REPLICATED", "ROW", "Embedding", "Experts", "Linear", "Merged"]
