"""What is known about a parameter before it is read: its shape, and how it is placed on a mesh."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jax.sharding import PartitionSpec

from jaxllm.errors import InputError
from jaxllm.formats.base import Leaf, take


@dataclass(frozen=True, eq=False)  # arrays compare elementwise
class Declaration:
    """A parameter to be loaded: its logical shape in the checkpoint, its sharding, and where its rows and columns go.

    `rows` and `cols` give the checkpoint's row or column at each position, where -1 means zeros (`Weight.arrange`);
    `stack` does the same for the matrices of a stack. None means all of them in order. This is how heads are spread
    over devices and odd sizes padded. A parameter with `keep` (a router) stays in the checkpoint's format, whatever the
    others are quantized or dequantized to.
    """

    shape: tuple[int, ...]
    spec: PartitionSpec
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    keep: bool = False
    stack: np.ndarray | None = None

    @cached_property
    def _key(self) -> tuple:
        places = (None if index is None else index.tobytes() for index in (self.rows, self.cols, self.stack))
        return self.shape, self.spec, self.keep, *places

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Declaration) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def index(self) -> tuple[np.ndarray | None, ...]:
        """For each axis of `shape`, the checkpoint's index at each position; -1 means zeros."""
        return (self.stack, self.rows, self.cols)[-len(self.shape) :] if len(self.shape) > 1 else (self.rows,)

    def arrange(self, values: Leaf) -> Leaf:
        """From the checkpoint's order and size to those on the mesh: `shape` -> the placed shape.

        Raises:
            InputError: the values have another shape.
        """
        if values.shape != self.shape:
            raise InputError(f"values of shape {[*values.shape]}, but the parameter has {[*self.shape]}")
        for axis, index in enumerate(self.index):
            if index is not None:
                values = take(values, index, axis)
        return values

    def restore(self, values: Leaf) -> Leaf:
        """The inverse of `arrange`. If something is held several times, the first copy is used."""
        for axis, (index, size) in enumerate(zip(self.index, self.shape, strict=True)):
            if index is not None:
                places = np.flatnonzero(index >= 0)[::-1]
                inverse = np.zeros(size, int)
                inverse[index[places]] = places  # the last of several assignments wins
                values = take(values, inverse, axis)
        return values
