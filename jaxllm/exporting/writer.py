"""What the kinds of files share: which type each tensor gets, why, and how tensors of plain numbers are made."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.computed import in_parts
from jaxllm.checkpoint.writing import Advance, Tensor
from jaxllm.encodings import Encoding
from jaxllm.exporting.model import Model, Values
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.models.rule import Written
from jaxllm.recipe import Plan, Recipe, Row

WORKERS = 2  # matrices that are encoded at the same time; each uses several cores in part
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Output:
    """A checkpoint that can be written.

    Attributes:
        plan: what becomes of each matrix.
        tensors: everything that will be written.
        write: writes it, calling its argument with numbers of bytes; and, if the second says so, checksums.
    """

    plan: Plan
    tensors: Sequence[Tensor]
    write: Callable[[Advance, bool], None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class Writer:
    """What the containers share: which type each tensor gets, and how plain tensors are made."""

    def __init__(self, model: Model, recipe: Recipe | None, pool: ThreadPoolExecutor) -> None:
        self.model, self.recipe, self.pool = model, recipe, pool
        self.rows: list[Row] = []
        if recipe is not None:
            recipe.check(model.sources)

    def choice(self, written: Written, values: Values) -> tuple[Encoding | None, str]:
        path = written.parts[0][0]
        if self.recipe is None or not self.model.is_matrix(path):
            return None, "as it is"
        return self.recipe.choose(path, self.model.sources[path].name, values.shape)

    def importance(self, written: Written, values: Values) -> np.ndarray | None:
        path, number = written.parts[0]
        if values.regrouped:
            return None
        known = None if self.recipe is None else self.recipe.importance_of(path, self.model.declared[path].shape)
        return known if known is None or number is None or known.ndim == 1 else known[number]

    def source_of(self, written: Written) -> Weight:
        return self.model.sources[written.parts[0][0]].parts[0]

    def plain(self, name: str, values: Values, dtype: np.dtype) -> Tensor:
        def compute(i: int) -> np.ndarray:
            return values.plain(i, dtype)

        return in_parts(self.pool, name, dtype, values.stored, compute, values.count, WORKERS)

    def note(self, written: Written, result: Weight, why: str) -> None:
        path, number = written.parts[0]
        if len(self.model.declared[path].shape) > 1 and not number:  # one row for all experts of a layer
            self.rows.append(Row(written.name, self.source_of(written), result, why))


def dense_shapes(values: Values, dtype: np.dtype) -> Dense:
    return Dense(np.broadcast_to(np.zeros((), dtype), values.stored))
