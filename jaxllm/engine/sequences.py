"""The device's side of an engine: the cache, where each answer stands, and what its request wants."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxllm.decoding import CHUNK
from jaxllm.drawing import MOST_BIASES, Asked, Drawn, Progress, seed_words
from jaxllm.engine.answer import Request
from jaxllm.layers.cache import KVCache
from jaxllm.programs import Batch, Programs
from jaxllm.sampling import OFF, PENALTIES, Sampler


@dataclass(frozen=True)
class Row:
    """One sequence's part of a call, see `Batch`.

    tokens: what is added; a negative one stands for the newest token.
    start: where they stand in the sequence; negative: at its end.
    drafted: how many of the tokens are guesses.
    """

    sequence: int
    tokens: Sequence[int] = (-1,)
    start: int = -1
    drafted: int = 0
    draws: bool = True


class Sequences:
    """`count` sequences of up to `capacity` positions. After an interrupted call it cannot be used any more."""

    def __init__(self, programs: Programs, count: int, capacity: int) -> None:
        vocab, self._programs = programs.vocab_size, programs
        # Where all rows are written together, also those that have nothing new, what they get has to fit somewhere.
        self.capacity = capacity + (CHUNK if programs.whole_batches else 0)
        self._cache: KVCache = programs.empty_cache(count, self.capacity)
        self._limits = np.zeros(count, np.int32)
        # On the host, by the names of Asked's fields; and what has been sent to the devices since it changed.
        self._asked = {
            "sampler": np.tile(np.float32(list(OFF.values())), (count, 1)),
            "seeds": np.zeros((count, 3), np.uint32),
            "allowed": np.zeros((count, -(-vocab // 32)), np.uint32),
            "constrained": np.zeros(count, bool),
            "biased": np.full((count, MOST_BIASES), vocab, np.int32),
            "biases": np.zeros((count, MOST_BIASES), np.float32),
            "reports": np.zeros(count, bool),
        }
        self._sent: dict[str, jax.Array] = {}
        number, flag = np.zeros(count, np.int32), np.zeros((count, vocab), bool)
        begun = Progress(number, number, flag, flag.astype(np.int32))
        self._progress: Progress = jax.tree.map(programs.replicate, begun)
        self._nothing = programs.replicate(np.zeros(vocab, bool))
        self._latest: tuple[tuple[list[Row], int], Batch] | None = None

    def can_rewind(self, length: int, to: int) -> bool:
        """See `KVCache.can_rewind`."""
        return self._cache.can_rewind(length, to)

    def copy(self, source: int, target: int) -> None:
        """Let `target` hold what `source` holds."""
        self._cache = self._programs.copy(self._cache, source, target)

    def begin(self, sequence: int, request: Request) -> None:
        """An answer is about to begin."""
        values, vocab = request.sampling.values(), self._programs.vocab_size
        ids, added = np.full(MOST_BIASES, vocab, np.int32), np.zeros(MOST_BIASES, np.float32)
        ids[: len(request.bias)], added[: len(request.bias)] = list(request.bias), list(request.bias.values())
        self._set("sampler", sequence, np.float32(values))
        self._set("seeds", sequence, np.array(seed_words(request.seed, request.stream), np.uint32))
        self._set("constrained", sequence, np.array(request.guide is not None))
        self._set("biased", sequence, ids)
        self._set("biases", sequence, added)
        self._set("reports", sequence, np.array(request.logprobs is not None))
        self.allow(sequence, request)
        prompted = self._nothing
        if any(value != OFF[name] for name, value in zip(OFF, values, strict=True) if name in PENALTIES):
            occurs = np.zeros(vocab, bool)
            occurs[request.ids] = True
            prompted = self._programs.replicate(occurs)
        self._progress = self._programs.begin(self._progress, sequence, prompted)
        self._limits[sequence] = len(request.ids) + request.limit
        self._cache = replace(self._cache, limits=self._programs.replicate(self._limits.copy()))

    def allow(self, sequence: int, request: Request) -> None:
        """Tell which tokens may come next, if the request has a guide."""
        if request.guide is not None:
            mask = np.zeros_like(self._asked["allowed"][sequence])
            request.guide.mask(mask)
            self._set("allowed", sequence, mask)

    def advance(self, rows: list[Row], time: int, window: int) -> Drawn:
        """Add tokens to some sequences, padded to `time`, and draw what comes next. Where there are drafts, `time` is
        one more than the most that there can be."""
        most = time if any(row.drafted for row in rows) else 1
        if self._latest is None or self._latest[0] != (rows, time):  # most steps have the rows of the step before
            self._latest = (rows, time), self._batch(rows, time)
        for name, value in self._asked.items():
            if name not in self._sent:
                self._sent[name] = self._programs.replicate(value.copy())
        asked = Asked(**self._sent | {"sampler": Sampler(self._sent["sampler"])})  # type: ignore[arg-type]
        self._cache, self._progress, drawn = self._programs.advance(
            self._cache, self._progress, asked, self._latest[1], window, most
        )
        return drawn

    def _batch(self, rows: list[Row], time: int) -> Batch:
        tokens = np.zeros((len(rows), time), np.int32)
        for line, row in zip(tokens, rows, strict=True):
            line[: len(row.tokens)] = row.tokens
        columns = ([row.sequence for row in rows], tokens, [len(row.tokens) for row in rows])
        columns += ([row.start for row in rows], [row.drafted for row in rows])
        numbers = [self._programs.replicate(np.asarray(column, np.int32)) for column in columns]
        return Batch(*numbers, self._programs.replicate(np.array([row.draws for row in rows])))

    def _set(self, name: str, sequence: int, value: np.ndarray) -> None:
        if not np.array_equal(self._asked[name][sequence], value):
            self._asked[name][sequence] = value
            self._sent.pop(name, None)
