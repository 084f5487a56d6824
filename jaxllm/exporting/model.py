"""A model that is to be written as another checkpoint, and the values of its tensors there.

The rules by which a family's files are read, inverted, say which tensors a file has to hold (`models.describe`). Values
are read and decoded matrix by matrix when they are asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint import matching
from jaxllm.checkpoint.opening import Checkpoint
from jaxllm.declaration import Declaration
from jaxllm.formats.base import Weight
from jaxllm.layers.parameter import parameters
from jaxllm.models.rule import Written
from jaxllm.parallel import make_mesh
from jaxllm.placing import Source
from jaxllm.requantize import floats, on_host


@dataclass(frozen=True)
class Model:
    """A model that is to be written.

    Attributes:
        checkpoint: where it comes from; its folder or file is `path`.
        sources: where each parameter comes from.
        declared: each parameter's declaration.
        made: weights that are encoded already, by parameter (GPTQ and AWQ, which need calibration).
    """

    checkpoint: Checkpoint
    path: Path
    sources: Mapping[str, Source]
    declared: Mapping[str, Declaration]
    made: Mapping[str, Weight] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: declared.shape for name, declared in self.declared.items()}

    def is_matrix(self, name: str) -> bool:
        """Whether a parameter may be quantized."""
        return len(self.declared[name].shape) > 1 and not self.declared[name].keep


def read_model(checkpoint: Checkpoint, path: Path) -> Model:
    """The model of an opened checkpoint. Raises InputError if its tensors do not fit."""
    sketch = checkpoint.family.model(checkpoint.config, make_mesh(), 1)
    sources = matching.match(sketch, checkpoint.tensors, checkpoint.rules, checkpoint.ignored)
    declared = {name: param.declared for name, param in parameters(sketch).items()}
    return Model(checkpoint, path, sources, declared)


class Values:
    """The values of a tensor that is to be written, as floats: matrices one by one.

    Attributes:
        shape: the tensor's shape as it is encoded, `[out]`, `[out, in]` or `[count, out, in]`.
        count: how many matrices there are; 1 for a vector.
    """

    def __init__(self, model: Model, written: Written) -> None:
        self.written = written
        self.sources = [(model.sources[path], number) for path, number in written.parts]
        shapes = [model.declared[path].shape for path, _ in written.parts]
        turned = written.turned or (False,) * len(shapes)
        sizes = [shape[-2:] if len(shape) > 1 else shape for shape in shapes]
        sizes = [size[::-1] if turn else size for size, turn in zip(sizes, turned, strict=True)]
        rows = sum(size[0] for size in sizes) if written.rows is None else len(written.rows)
        matrix = (rows, *sizes[0][1:])
        whole_stack = len(shapes[0]) == 3 and written.parts[0][1] is None
        self.count = written.stack or (shapes[0][0] if whole_stack else 1)
        if written.stack:
            matrix = (rows // written.stack, matrix[1])
            matrix = matrix[::-1] if written.transposed else matrix
        self.shape: tuple[int, ...] = (self.count, *matrix) if written.stack or whole_stack else matrix
        self._joined: jax.Array | None = None  # what a new stack is cut from, which would otherwise be read for each

    @property
    def regrouped(self) -> bool:
        """Whether these are other matrices than the parameters', with other inputs."""
        return bool(self.written.stack or self.written.turned)

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in the file, if it is stored as plain numbers."""
        if self.written.column:
            return self.shape[:-1]
        return (*self.shape[:-2], *self.shape[:-3:-1]) if self._stored_transposed else self.shape

    @property
    def _stored_transposed(self) -> bool:
        return self.written.transposed and not self.written.stack

    def matrix(self, i: int) -> jax.Array:
        """Matrix i of a stack, or the only one, or the vector: float32, in the order of the file."""
        if not self.written.stack:
            return self._whole(i)
        if self._joined is None:
            self._joined = self._whole(0)
        rows = len(self._joined) // self.count
        with on_host():
            part = self._joined[i * rows : (i + 1) * rows]
            return part.T if self.written.transposed else part

    def _whole(self, i: int) -> jax.Array:
        parts = [floats(source, i if number is None else number) for source, number in self.sources]
        with on_host():
            if self.written.turned:
                parts = [part.T if turn else part for part, turn in zip(parts, self.written.turned, strict=True)]
            joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
            return joined if self.written.rows is None else joined[self.written.rows]

    def plain(self, i: int, dtype: np.dtype) -> np.ndarray:
        """The same as plain numbers, as they are stored."""
        values = np.asarray(self.matrix(i))
        if self.written.column:
            values = values[..., 0]
        return (values.T if self._stored_transposed else values).astype(dtype)
