"""The device's side of an engine: the cache, where each answer stands, and what its request wants."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxllm.decoding import CHUNK
from jaxllm.drawing import MOST_BIASES, Asked, Drawn, Lines, Progress, seed_words
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
            "sampler": np.tile(np.array(list(OFF.values()), np.float32), (count, 1)),
            "seeds": np.zeros((count, 2), np.uint32),
            "allowed": np.zeros((count, -(-vocab // 32)), np.uint32),
            "constrained": np.zeros(count, bool),
            "biased": np.full((count, MOST_BIASES), vocab, np.int32),
            "biases": np.zeros((count, MOST_BIASES), np.float32),
            "reports": np.zeros(count, bool),
        }
        self._sent: dict[str, jax.Array] = {}
        kinds = ((count,), np.int32), ((count,), np.int32), ((count, vocab), np.bool_), ((count, vocab), np.int32)
        self._progress = Progress(*(programs.replicate(np.zeros(shape, dtype)) for shape, dtype in kinds))
        self._nothing = programs.replicate(np.zeros(vocab, bool))
        self._latest: tuple[tuple[list[Row], int], Batch, Lines] | None = None

    def can_rewind(self, length: int, to: int) -> bool:
        """See `KVCache.can_rewind`."""
        return self._cache.can_rewind(length, to)

    def copy(self, source: int, target: int) -> None:
        """Let `target` hold what `source` holds."""
        self._cache = self._programs.copy(self._cache, source, target)

    def begin(self, sequence: int, request: Request, drawn: int = 0) -> None:
        """An answer is about to begin, or to go on after `drawn` tokens (of which penalties then do not know)."""
        values, vocab = request.sampling.values(), self._programs.vocab_size
        ids, added = np.full(MOST_BIASES, vocab, np.int32), np.zeros(MOST_BIASES, np.float32)
        ids[: len(request.bias)], added[: len(request.bias)] = list(request.bias), list(request.bias.values())
        self._set("sampler", sequence, np.array(values, np.float32))
        self._set("seeds", sequence, seed_words(request.seed, request.stream))
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
        self._progress = self._programs.begin(self._progress, sequence, drawn, prompted)
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
            self._latest = (rows, time), *self._sent_rows(rows, time, most)
        for name, value in self._asked.items():
            if name not in self._sent:
                self._sent[name] = self._programs.replicate(value.copy())
        asked = Asked(**self._sent | {"sampler": Sampler(self._sent["sampler"])})  # type: ignore[arg-type]
        _, batch, lines = self._latest
        self._cache, logits = self._programs.advance(self._cache, self._progress.newest, batch, window, most)
        self._progress, drawn = self._programs.draw(logits, lines, asked, self._progress)
        return drawn

    def _sent_rows(self, rows: list[Row], time: int, most: int) -> tuple[Batch, Lines]:
        tokens, drafts = np.zeros((len(rows), time), np.int32), np.zeros((len(rows), most - 1), np.int32)
        for line, guesses, row in zip(tokens, drafts, rows, strict=True):
            line[: len(row.tokens)] = row.tokens
            guesses[: row.drafted] = row.tokens[1 : 1 + row.drafted]

        def sent(column: Iterable[int]) -> jax.Array:
            return self._programs.replicate(np.array(list(column), np.int32))

        index, drafted = sent(row.sequence for row in rows), sent(row.drafted for row in rows)
        counts, starts = sent(len(row.tokens) for row in rows), sent(row.start for row in rows)
        draws = self._programs.replicate(np.array([row.draws for row in rows]))
        batch = Batch(index, self._programs.replicate(tokens), counts, starts, drafted)
        return batch, Lines(index, self._programs.replicate(drafts), drafted, draws)

    def _set(self, name: str, sequence: int, value: np.ndarray) -> None:
        if not np.array_equal(self._asked[name][sequence], value):
            self._asked[name][sequence] = value
            self._sent.pop(name, None)
