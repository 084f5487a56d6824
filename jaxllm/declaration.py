"""What is known of a parameter before it is read: its shape, and where its parts belong on a mesh."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jax.sharding import PartitionSpec

from jaxllm.errors import InputError
from jaxllm.formats.base import Leaf, take


@dataclass(frozen=True, eq=False)  # arrays compare place by place
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
        """For each axis of `shape`, which position of the checkpoint stands at each place, -1 being zeros."""
        return (self.stack, self.rows, self.cols)[-len(self.shape) :] if len(self.shape) > 1 else (self.rows,)

    def arrange(self, values: Leaf) -> Leaf:
        """From the checkpoint's order and size to those on the mesh: `shape` -> the placed shape.

        Raises:
            InputError: values of another shape.
        """
        if values.shape != self.shape:
            raise InputError(f"values of shape {[*values.shape]}, but the parameter has {[*self.shape]}")
        for axis, index in enumerate(self.index):
            if index is not None:
                values = take(values, index, axis)
        return values

    def restore(self, values: Leaf) -> Leaf:
        """The inverse of `arrange`. Of what is held several times, the first is taken."""
        for axis, (index, size) in enumerate(zip(self.index, self.shape, strict=True)):
            if index is not None:
                places = np.flatnonzero(index >= 0)[::-1]
                inverse = np.zeros(size, int)
                inverse[index[places]] = places  # of several assignments the last stays
                values = take(values, inverse, axis)
        return values
