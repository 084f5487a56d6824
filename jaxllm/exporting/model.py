"""A model that is to be written as another checkpoint, and the values of its tensors there.

The rules by which a family's files are read, inverted, say which tensors a file has to hold (`models.describe`). Values
are read and decoded matrix by matrix when they are asked for.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint import matching
from jaxllm.checkpoint.adapter_files import AdapterFile
from jaxllm.checkpoint.adapting import adapter, changes_tied_ends, merged
from jaxllm.checkpoint.opening import Checkpoint
from jaxllm.declaration import Declaration
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.ggml import GGML
from jaxllm.layers.parameter import parameters
from jaxllm.models.rule import Written
from jaxllm.parallel import make_mesh
from jaxllm.placing import Source
from jaxllm.requantize import floats, on_host, one_matrix

FLOAT16_MAX = float(np.finfo(np.float16).max)


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


def read_model(
    checkpoint: Checkpoint,
    path: Path,
    adapters: Sequence[tuple[AdapterFile, float]] = (),
    recoded: Callable[[str, Source], bool] = lambda name, source: True,
) -> Model:
    """The model of an opened checkpoint.

    Args:
        adapters: are added to its matrices, each times its scale.
        recoded: whether a matrix is encoded anew when it is written, see `merged`.

    Raises:
        InputError: its tensors do not fit, or an adapter's.
    """
    sketch = checkpoint.family.model(checkpoint.config, make_mesh(), 1)
    sources = matching.match(sketch, checkpoint.tensors, checkpoint.rules, checkpoint.ignored)
    declared = {name: param.declared for name, param in parameters(sketch).items()}
    for file, _ in adapters:
        if changes_tied_ends(file, checkpoint.config):
            raise InputError(
                f"{file.where}: changes the embedding table or the head, but {checkpoint.name} has one table for both, "
                "and cannot be written with two"
            )
    read = [(adapter(file, checkpoint.config, declared), scale) for file, scale in adapters]
    for one, _ in read:
        sources |= one.replaced
    return Model(checkpoint, path, merged(sources, read, recoded), declared)


def as_in_the_source(checkpoint: Checkpoint) -> list[Written]:
    """The tensors that the source itself has for the model's parameters."""
    found = []
    for name, weight in checkpoint.tensors.items():
        if any(re.fullmatch(pattern, name) for pattern in checkpoint.ignored):
            continue
        hits = [(rule, m) for rule in checkpoint.rules if (m := re.fullmatch(rule.pattern, name))]
        shown = [weight if rule.present is None else rule.present(weight, m) for rule, m in hits]
        rows = [
            np.arange(part.shape[-2:][0]) if rule.rows is None else rule.rows(checkpoint.config, m)
            for (rule, m), part in zip(hits, shown, strict=True)
        ]
        experts = (m.groupdict().get("expert") for _, m in hits)
        paths = (m.expand(rule.target) for rule, m in hits)
        parts = tuple((path, None if e is None else int(e)) for path, e in zip(paths, experts, strict=True))
        order = np.argsort(np.concatenate(rows))
        in_order = np.array_equal(order, np.arange(len(order)))
        column = len(shown[0].shape) > len(weight.shape)
        transposed = shown[0] is not weight and not column
        found.append(Written(name, parts, None if in_order else order, transposed, column))
    return found


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
        # What a new stack is cut from, which would otherwise be read for each of its matrices.
        self._joined: jax.Array | None = None
        self._left, self._lock = self.count, Lock()

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
        with self._lock:
            joined = self._whole(0) if self._joined is None else self._joined
            self._left -= 1
            self._joined = joined if self._left else None
        rows = len(joined) // self.count
        with on_host():
            part = joined[i * rows : (i + 1) * rows]
            return part.T if self.written.transposed else part

    def _whole(self, i: int) -> jax.Array:
        parts = [floats(source, i if number is None else number) for source, number in self.sources]
        with on_host():
            if self.written.turned:
                parts = [part.T if turn else part for part, turn in zip(parts, self.written.turned, strict=True)]
            joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
            joined = joined if self.written.rows is None else joined[self.written.rows]
            return joined + self.written.shift if self.written.shift else joined  # -0 + 0 is not -0

    def is_in(self, type: str) -> bool:
        """Whether these are blocks of this GGML type already, so that nothing has to be decoded."""
        held = self.sources[0][0].parts[0]
        return isinstance(held, GGML) and held.type == type and len(self.sources) == 1 and not self.regrouped

    def blocks(self, i: int) -> np.ndarray:
        """The blocks of a matrix as they are, rows in the order of the file. Only if it `is_in` some type."""
        [(source, number)] = self.sources
        part = source.parts[(i if number is None else number) if source.stacked else 0]
        blocks = one_matrix(part, i if number is None else number).leaf("blocks")
        blocks = blocks if source.rows is None else blocks[source.rows]
        return blocks if self.written.rows is None else blocks[self.written.rows]

    def plain(self, i: int, dtype: np.dtype) -> np.ndarray:
        """The same as plain numbers, as they are stored.

        Raises:
            InputError: a value is beyond the dtype.
        """
        values = np.asarray(self.matrix(i))
        if self.written.column:
            values = values[..., 0]
        if dtype == np.float16 and np.abs(values).max(initial=0) > FLOAT16_MAX:
            raise InputError(f"{self.written.name}: values over {FLOAT16_MAX:.0f} are beyond float16; use bfloat16")
        return (values.T if self._stored_transposed else values).astype(dtype)
