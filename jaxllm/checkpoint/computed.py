"""Tensors whose values are computed while a file is written, in threads and a few ahead."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxllm.checkpoint.writing import Tensor


class Together:
    """Tensors that are computed in one go, for example the codes and scales of a matrix.

    Begins when the first of them is asked for, or earlier (`begin`); forgotten when all have been read.
    """

    def __init__(self, pool: ThreadPoolExecutor, compute: Callable[[], Mapping[str, np.ndarray]], names: Sequence[str]):
        self._pool, self._compute, self._left = pool, compute, set(names)
        self._result: Future | None = None

    def begin(self) -> None:
        if self._result is None and self._left:
            self._result = self._pool.submit(self._compute)

    def values(self, name: str) -> Iterator[np.ndarray]:
        self.begin()
        assert self._result is not None
        array = self._result.result()[name]
        self._left.discard(name)
        if not self._left:
            self._result = None
        yield array


def together(
    pool: ThreadPoolExecutor, planned: Mapping[str, Any], compute: Callable[[], Mapping[str, np.ndarray]]
) -> list[Tensor]:
    """Tensors of these shapes and dtypes, computed in one go."""
    job = Together(pool, compute, list(planned))
    return [Tensor(n, np.dtype(p.dtype), tuple(p.shape), job.values(n), job.begin) for n, p in planned.items()]


class Sequential:
    """A tensor that is computed in parts, one after the other."""

    def __init__(self, pool: ThreadPoolExecutor, compute: Callable[[int], np.ndarray], count: int, ahead: int) -> None:
        self._pool, self._compute, self._count, self._ahead = pool, compute, count, ahead
        self._begun: deque[Future] = deque()
        self._next = 0

    def begin(self, parts: int = 1) -> None:
        while self._next < self._count and len(self._begun) < parts:
            self._begun.append(self._pool.submit(self._compute, self._next))
            self._next += 1

    def values(self) -> Iterator[np.ndarray]:
        for _ in range(self._count):
            self.begin(self._ahead)
            yield self._begun.popleft().result()


def in_parts(
    pool: ThreadPoolExecutor,
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    compute: Callable[[int], np.ndarray],
    count: int,
    ahead: int,
) -> Tensor:
    """A tensor that `compute` makes in `count` parts, of which at most `ahead` are in memory."""
    job = Sequential(pool, compute, count, ahead)
    return Tensor(name, dtype, shape, job.values(), job.begin)
