"""Several short examples in one row, so that little of a batch is padding. They do not see each other (`Context`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.finetuning.data import Example
from jaxllm.finetuning.step import Batch

OPEN = 64  # rows that may still be added to; more would pack little better and take longer
MULTIPLE = 64  # of row lengths


def row_length(examples: Sequence[Example], most: int) -> int:
    """The length of rows that every example fits into: that of the longest, rounded up, but `most` at most."""
    longest = max(map(len, examples))
    return min(most, -(-longest // MULTIPLE) * MULTIPLE)


@dataclass(frozen=True)
class Rows:
    """All rows of a training.

    filled: int `[rows]`, how many tokens of each are not padding.
    """

    batch: Batch
    filled: np.ndarray

    def __len__(self) -> int:
        return len(self.filled)

    def take(self, chosen: np.ndarray, size: int) -> Batch:
        """These rows, and as many without targets as a batch of `size` lacks."""
        missing = ((0, size - len(chosen)), (0, 0))
        tokens, segments, targets = (
            np.pad(leaf[chosen], missing, constant_values=fill)
            for leaf, fill in zip((self.batch.tokens, self.batch.segments, self.batch.targets), (0, 0, -1), strict=True)
        )
        return Batch(tokens, segments, targets)


def packed(examples: Sequence[Example], length: int, order: np.ndarray) -> Rows:
    """Rows of examples, taken in this order: each goes into the first open row that has room for it.

    Args:
        length: of the rows; no example is longer.
    """
    rows: list[list[Example]] = []
    room: dict[int, int] = {}  # of the open rows, oldest first
    for number in order:
        example = examples[number]
        row = next((i for i, free in room.items() if free >= len(example)), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room[row] = length
            if len(room) > OPEN:
                del room[next(iter(room))]
        rows[row].append(example)
        room[row] -= len(example)
    filled = [_row(row, length) for row in rows]
    batch = Batch(*(np.stack(leaf) for leaf in zip(*filled, strict=True)))
    return Rows(batch, np.array([sum(map(len, row)) for row in rows]))


def _row(examples: Sequence[Example], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments and targets of a row; padding is a text of its own, without targets."""
    tokens, targets = np.zeros(length, np.int32), np.full(length, -1, np.int32)
    segments, end = np.full(length, len(examples), np.int32), 0
    for number, example in enumerate(examples):
        begin, end = end, end + len(example)
        tokens[begin:end], segments[begin:end] = example.tokens, number
        targets[begin : end - 1] = np.where(example.learned[1:], example.tokens[1:], -1)
    return tokens, segments, targets
