"""Layers that hold a matrix, or a stack of them, in any format, sharded over a mesh; and the router of experts."""

from jaxllm.layers.experts import Experts, TopKRouter
from jaxllm.layers.linear import Embedding, Linear, Merged
from jaxllm.parallel import COLUMN, REPLICATED, ROW

__all__ = ["COLUMN", "REPLICATED", "ROW", "Embedding", "Experts", "Linear", "Merged", "TopKRouter"]
