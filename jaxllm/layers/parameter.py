"""What a model says about a parameter before a checkpoint fills it in."""

from dataclasses import dataclass

import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec


@dataclass(frozen=True)
class Declaration:
    """A parameter to be loaded: its logical shape in the checkpoint, its cut, and where its rows and columns go.

    `rows` and `cols` say which row or column of the checkpoint stands at each place, -1 being zeros (`Weight.arrange`),
    and `stack` which matrix of a stack; None is all of them in order. That is how heads are spread over devices and odd
    sizes padded. A parameter that is kept (a router) stays in the checkpoint's format, whatever the others are
    quantized or decoded to.
    """

    shape: tuple[int, ...]
    spec: PartitionSpec
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    keep: bool = False
    stack: np.ndarray | None = None


def declare(
    shape: tuple[int, ...],
    spec: PartitionSpec,
    rows: np.ndarray | None = None,
    cols: np.ndarray | None = None,
    keep: bool = False,
    stack: np.ndarray | None = None,
) -> nnx.Param:
    """A parameter that holds its Declaration until a `Weight` (or, for a vector, a float32 array) replaces it."""
    return nnx.Param(Declaration(shape, spec, rows, cols, keep, stack))


def parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """The parameters of a model by dotted path."""
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
