"""Parameters that a model declares before a checkpoint fills them."""

import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.declaration import Declaration


def declare(
    shape: tuple[int, ...],
    spec: PartitionSpec,
    rows: np.ndarray | None = None,
    cols: np.ndarray | None = None,
    keep: bool = False,
    stack: np.ndarray | None = None,
) -> nnx.Param:
    """A parameter that holds its Declaration until a `Weight` (or, for a vector, a float32 array) replaces it. Its
    attribute `declared` keeps the Declaration."""
    declaration = Declaration(shape, spec, rows, cols, keep, stack)
    return nnx.Param(declaration, declared=declaration)


def parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """The parameters of a model by dotted path."""
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
