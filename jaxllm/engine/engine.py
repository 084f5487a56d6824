"""`Engine`: answers to many requests at a time, with one cache and one decode loop.

Each sequence of the cache is a slot. A round either processes a piece of some prompts or draws the next token of every
answer; where both are to be done, rounds alternate, so that long prompts do not silence the others. Where programs run
ahead, the next step is started before the newest token is read, so that the device never waits for Python (mlx-lm's
`async_eval`); an answer that ends unforeseen wastes one step of its row.
"""

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Unpack

import numpy as np

from jaxllm.decoding import CHUNK, SMALLEST, SMALLEST_CACHE, bucket
from jaxllm.drawing import MOST_BIASES, Drawn
from jaxllm.engine.answer import Answer, Completion, Prompt, Request, TokenLogprob
from jaxllm.engine.drafting import Drafter
from jaxllm.engine.requests import Requests
from jaxllm.engine.slots import WORTH_COPYING, Slot, in_common
from jaxllm.errors import InputError
from jaxllm.layers.cache import KVCache
from jaxllm.programs import Batch, Programs
from jaxllm.sampling import Sampling, SamplingOptions
from jaxllm.structured import Constraint, Guide
from jaxllm.tokenizer import Tokenizer

LONGEST = 4096  # the most positions of a slot by default
PIECE_BESIDE_ANSWERS = 128  # tokens of prompts in a round while answers wait for their next token


class Model(Protocol):
    """What an engine needs of a `LanguageModel`."""

    programs: Programs
    tokenizer: Tokenizer | None
    max_seq_len: int
    eos_ids: frozenset[int]
    sampling: Sampling

    def encode(self, prompt: Prompt) -> list[int]: ...


@dataclass
class Stats:
    """What an engine has done so far, in tokens.

    Attributes:
        prompt_tokens: of prompts that were begun; cached_tokens: those of them that were found in the cache.
        generated_tokens: of answers; drafted: guessed before they were computed; accepted: the right ones of them.
        steps: how often all answers were given their next tokens.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Started:
    """A call whose result has not been read yet: which answer each of its rows belongs to."""

    rows: list[tuple[int, Slot, Answer, int]]  # row, slot, answer, drafts
    drawn: Drawn


class Engine:
    """Answers many requests, which may come at any time. One thread at a time may use it.

        engine = jaxllm.Engine(model, slots=8)
        answers = [engine.add(prompt, 100) for prompt in prompts]
        while engine.busy:
            for answer in engine.step():
                print(answer.take().text)

    An answer does not depend on its neighbours, but for rounding: the order of sums in a matrix product may depend on
    how many rows it has.

    Args:
        slots: how many requests are answered at a time; others wait.
        capacity: the most positions of prompt and answer together, rounded up to a power of two; by default the
            model's context, at most 4096.
        drafter: guesses tokens, several of which are then checked at a time (`jaxllm.PromptLookup`); None: no guesses.

    Attributes:
        model, slots, capacity, drafter: see above.
        waiting, running: how many requests wait, and how many are being answered.
        stats: what it has done so far.

    Raises:
        InputError: numbers below 1, or a capacity above the model's context.
    """

    def __init__(
        self, model: Model, slots: int = 8, capacity: int | None = None, drafter: Drafter | None = None
    ) -> None:
        capacity = min(model.max_seq_len, LONGEST) if capacity is None else capacity
        if slots < 1 or not 1 <= capacity <= model.max_seq_len:
            raise InputError(
                f"slots={slots}, capacity={capacity}: must be 1 or above, and a capacity at most {model.max_seq_len}"
            )
        self.model, self.drafter = model, drafter
        self.slots, self.capacity = slots, bucket(capacity, SMALLEST_CACHE)
        self.stats = Stats()
        self._slots = [Slot(i) for i in range(slots)]
        self._waiting: deque[Answer] = deque()
        self._started: deque[Started] = deque()
        self._cache: KVCache | None = None
        self._limits = np.zeros(slots, np.int32)
        self._version: object = None
        self._count, self._prefilled = 0, False
        self._batch: tuple[list[int], Batch] | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return sum(slot.answer is not None for slot in self._slots)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting) or self.running > 0

    @property
    def _programs(self) -> Programs:
        return self.model.programs

    def add(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        seed: int = 0,
        stream: int = 0,
        eos_ids: Collection[int] | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        constraint: Constraint | None = None,
        completion: Completion | None = None,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """Ask for an answer; `step` works on it.

        Args:
            stream: number of the random stream: several answers to one prompt and seed differ by it.
            stop: texts that end the answer; they are no part of it.
            logprobs: report log-probabilities of the answer's tokens, and of as many of the most likely ones (0 to 20).
            logit_bias: what is added to the logits of tokens.
            constraint: what the answer has to be, such as `Constraint.json_schema(...)`.
            completion: filled in while the answer is generated; by default a new one.
            Others are those of `LanguageModel.generate`.

        Raises:
            InputError: the prompt does not fit into a slot, or a parameter is outside its range.
        """
        ids, bias, vocab = self.model.encode(prompt), logit_bias or {}, self._programs.vocab_size
        if len(ids) > self.capacity:
            raise InputError(f"the prompt has {len(ids)} tokens, but a slot holds {self.capacity} positions")
        longest = min(self.model.max_seq_len, self.capacity)
        if len(bias) > MOST_BIASES or not all(0 <= token < vocab for token in bias):
            raise InputError(f"logit_bias: at most {MOST_BIASES} tokens, with ids 0 to {vocab - 1}")
        chosen = Sampling(**options).with_defaults(sampling or Sampling()).with_defaults(self.model.sampling)
        request = Request(
            ids=ids,
            limit=min(max_new_tokens, longest - len(ids) + 1),  # the last token need not be held
            sampling=chosen,
            seed=seed,
            stream=stream,
            eos=self.model.eos_ids if eos_ids is None else eos_ids,
            stop=stop,
            logprobs=logprobs,
            bias=bias,
            guide=None if constraint is None else self._guide(constraint),
        )
        answer = Answer(request, completion or Completion(prompt), self.model.tokenizer)
        self._waiting.append(answer)
        return answer

    def _guide(self, constraint: Constraint) -> Guide:
        if self.model.tokenizer is None:
            raise InputError("a constraint on the text needs a tokenizer, which this checkpoint lacks")
        return Guide(constraint, self.model.tokenizer)

    def cancel(self, answer: Answer) -> None:
        """Stop working on an answer. Nothing happens if it has ended."""
        if answer in self._waiting:
            self._waiting.remove(answer)
        for slot in self._slots:
            if slot.answer is answer:
                slot.leave()
        if not answer.done:
            answer.finish("cancelled")

    def step(self) -> list[Answer]:
        """Do one round. Returns the answers that got something new, or ended."""
        try:
            self._admit()
            prompts = [slot for slot in self._slots if slot.prompt_left > 0]
            if prompts and not (self._prefilled and self._decoding()):
                self._prefilled = True
                self._prefill(prompts)
                return [answer for _ in range(len(self._started)) for answer in self._read()]
            self._prefilled = False
            ahead = self._programs.runs_ahead and self.drafter is None and not self._guided()
            while len(self._started) < (2 if ahead else 1) and (slots := self._decoding()):
                self._decode(slots)
            return self._read() if self._started else []
        except BaseException:
            self._lose()
            raise

    # Admission.

    def _admit(self) -> None:
        """Give free slots to those who wait, in their order."""
        if self._version is not self._programs.version:  # the parameters are others: nothing that is held is right
            for slot in self._slots:
                slot.forget()
            self._version = self._programs.version
        if self._waiting and self._cache is None:
            self._allocate()
        for answer in list(self._waiting):
            free = [slot for slot in self._slots if slot.answer is None]
            if not free:
                return
            if not self._comes_soon(answer):
                self._waiting.remove(answer)
                self._begin(answer, free)

    def _allocate(self) -> None:
        programs = self._programs
        # Where all rows are written together, also those that have nothing new, what they get has to fit somewhere.
        room = CHUNK if programs.whole_batches else 0
        self._cache = programs.empty_cache(self.slots, self.capacity + room)
        self._requests = Requests(programs, self.slots)

    def _reusable(self, slot: Slot, ids: list[int], frequencies: object) -> int:
        """How many positions of a slot hold the beginning of a prompt (but never its last token)."""
        assert self._cache is not None
        same = in_common(slot.known(), ids[:-1]) if slot.frequencies == frequencies else 0
        return same if self._cache.can_rewind(slot.length, same) else 0

    def _comes_soon(self, answer: Answer) -> bool:
        """Whether another prompt is being processed that has much in common with this one."""
        assert self._cache is not None
        ids, frequencies = answer.request.ids, self._frequencies(answer)
        if self._programs.whole_batches:
            return False
        best = max(self._reusable(slot, ids, frequencies) for slot in self._slots)
        for slot in self._slots:
            if slot.answer is not None and slot.prompt_left > 0 and slot.frequencies == frequencies:
                coming = in_common(slot.answer.request.ids, ids[:-1])
                if coming >= best + WORTH_COPYING and self._cache.can_rewind(len(slot.answer.request.ids), coming):
                    return True
        return False

    def _frequencies(self, answer: Answer) -> object:
        return self._programs.frequencies(len(answer.request.ids) + answer.request.limit)

    def _begin(self, answer: Answer, free: list[Slot]) -> None:
        assert self._cache is not None
        request, frequencies = answer.request, self._frequencies(answer)
        found = {slot.index: self._reusable(slot, request.ids, frequencies) for slot in self._slots}
        slot = max(free, key=lambda slot: (found[slot.index], -slot.used))
        source = max(self._slots, key=lambda slot: found[slot.index])
        if found[source.index] >= found[slot.index] + WORTH_COPYING and not self._programs.whole_batches:
            slot = min(free, key=lambda slot: slot.used)
            self._cache = self._programs.copy(self._cache, source.index, slot.index)
            found[slot.index] = found[source.index]
        self._count += 1
        slot.take(answer, found[slot.index], frequencies, self._count)
        self._limits[slot.index] = len(request.ids) + request.limit
        self._cache = replace(self._cache, limits=self._programs.replicate(self._limits))
        self._requests.begin(slot.index, request)
        self._batch = None
        self.stats.prompt_tokens += len(request.ids)
        self.stats.cached_tokens += found[slot.index]
        answer.times.append(self._clock())

    # Rounds.

    def _prefill(self, waiting: list[Slot]) -> None:
        """Process a piece of the prompts that came first."""
        assert self._cache is not None
        waiting.sort(key=lambda slot: slot.used)
        budget = PIECE_BESIDE_ANSWERS if self._decoding() else CHUNK
        first = waiting[0]
        time = min(bucket(first.prompt_left, SMALLEST), budget)
        if first.length + time > self._cache.capacity:  # XLA would shift a write that extends past the end
            time = first.prompt_left
        group = [slot for slot in waiting if slot.length + time <= self._cache.capacity][: max(1, budget // time)]
        group = group[: 1 << (len(group).bit_length() - 1)]  # few sizes, few programs
        rows = self._slots if self._programs.whole_batches else group
        counts = [min(slot.prompt_left, time) if slot in group else 0 for slot in rows]
        tokens = np.zeros((len(rows), time), np.int32)
        for row, slot, count in zip(tokens, rows, counts, strict=True):
            row[:count] = slot.answer.request.ids[slot.length : slot.length + count] if slot.answer and count else []
        draws = [count > 0 and slot.prompt_left == count for slot, count in zip(rows, counts, strict=True)]
        starts = [slot.length for slot in rows]
        window = min(bucket(max(starts) + time, SMALLEST), self._cache.capacity)
        for slot, count, drawing in zip(rows, counts, draws, strict=True):
            slot.length += count
            slot.drawn += drawing
        self._start(self._batch_of(rows, tokens, counts, starts, [0] * len(rows), draws), window, 1, rows, draws)

    def _decoding(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.decodes]

    def _guided(self) -> bool:
        return any(slot.answer is not None and slot.answer.request.guide is not None for slot in self._slots)

    def _decode(self, slots: list[Slot]) -> None:
        """Start the next step of these answers."""
        assert self._cache is not None
        self.stats.steps += 1
        drafts = self._drafts(slots)
        rows = self._slots if self._programs.whole_batches else _filled(slots)
        most = 1 + max(map(len, drafts.values()), default=0)
        if most > 1:
            most = 1 + self.drafter.most if self.drafter else 1
            if max(slot.length for slot in rows) + most > self._cache.capacity:
                most, drafts = 1, {}
        draws = [slot in slots and slot not in rows[:i] for i, slot in enumerate(rows)]
        drafted = [len(drafts.get(slot.index, ())) for slot in rows]
        for slot in slots:
            slot.length += 1
            slot.drawn += 1
        if most > 1 or self._batch is None or self._batch[0] != [slot.index for slot in rows]:
            tokens = np.zeros((len(rows), most), np.int32)
            for row, slot, count in zip(tokens, rows, drafted, strict=True):
                row[0], row[1 : 1 + count] = -1, drafts.get(slot.index, ())
            counts = [(slot in slots) + count for slot, count in zip(rows, drafted, strict=True)]
            batch = self._batch_of(rows, tokens, counts, [-1] * len(rows), drafted, draws)
            self._batch = None if most > 1 else ([slot.index for slot in rows], batch)
        else:
            batch = self._batch[1]
        self._start(batch, self._cache.capacity, most, rows, draws, drafted)

    def _drafts(self, slots: list[Slot]) -> dict[int, list[int]]:
        """Guesses of what follows the newest token of each answer, as many as it may still get."""
        if self.drafter is None:
            return {}
        known = {
            slot.index: [*slot.answer.request.ids, *slot.answer.completion.tokens]
            for slot in slots
            if slot.answer is not None and slot.answer.request.guide is None
        }
        room = {slot.index: slot.answer.request.limit - slot.drawn - 1 for slot in slots if slot.answer}
        guesses = self.drafter.guess(known)
        return {index: guess[: room[index]] for index, guess in guesses.items() if guess[: room[index]]}

    def _batch_of(
        self,
        rows: list[Slot],
        tokens: np.ndarray,
        counts: list[int],
        starts: list[int],
        drafted: list[int],
        draws: list[bool],
    ) -> Batch:
        numbers = [np.array(x, np.int32) for x in ([slot.index for slot in rows], counts, starts, drafted)]
        index, real, start, guessed = (self._programs.replicate(x) for x in numbers)
        return Batch(
            index, self._programs.replicate(tokens), real, start, guessed, self._programs.replicate(np.array(draws))
        )

    def _start(
        self,
        batch: Batch,
        window: int,
        most: int,
        rows: list[Slot],
        draws: list[bool],
        drafted: Sequence[int] | None = None,
    ) -> None:
        cache, self._cache = self._cache, None  # it is donated, so that an interrupted call leaves nothing behind
        assert cache is not None
        self._cache, drawn = self._requests.advance(cache, batch, window, most)
        started = [
            (row, slot, slot.answer, 0 if drafted is None else drafted[row])
            for row, (slot, drawing) in enumerate(zip(rows, draws, strict=True))
            if drawing and slot.answer is not None
        ]
        self._started.append(Started(started, drawn))

    def _read(self) -> list[Answer]:
        """Wait for the oldest call that has been started, and hand out its tokens."""
        started = self._started.popleft()
        tokens = np.asarray(started.drawn.tokens)
        drafting = any(drafts for *_, drafts in started.rows)
        counts = np.asarray(started.drawn.counts) if drafting else None
        now, changed = self._clock(), []
        for row, slot, answer, drafts in started.rows:
            if answer.done:
                continue
            count = 1 if counts is None else int(counts[row])
            slot.length += count - 1
            slot.drawn += count - 1
            self.stats.drafted += drafts
            self.stats.accepted += count - 1
            for j in range(count):
                self.stats.generated_tokens += 1
                answer.push(int(tokens[row, j]), now, _logprob(answer.request, started.drawn, row, j))
                if answer.done:
                    break
            self._requests.allow(slot.index, answer.request)
            if answer.done:
                slot.leave()
            changed.append(answer)
        return changed

    def _lose(self) -> None:
        """After an interruption: what was being computed is gone."""
        self._started.clear()
        self._cache = self._batch = None
        for slot in self._slots:
            if slot.answer is not None and not slot.answer.done:
                slot.answer.finish("cancelled")
            slot.leave()
            slot.forget()

    def _clock(self) -> float:
        """Seconds, excluding the time that programs are being compiled."""
        return time.perf_counter() - self._programs.compile_seconds


def _filled(slots: list[Slot]) -> list[Slot]:
    """Filled up to a power of two with the first one, so that few programs are needed."""
    return slots + [slots[0]] * (bucket(len(slots), 1) - len(slots))


def _logprob(request: Request, drawn: Drawn, row: int, j: int) -> TokenLogprob | None:
    if request.logprobs is None:
        return None
    top, values = (np.asarray(x)[row, j, : request.logprobs] for x in (drawn.top, drawn.top_logprobs))
    return TokenLogprob(
        int(np.asarray(drawn.tokens)[row, j]),
        float(np.asarray(drawn.logprobs)[row, j]),
        list(zip(top.tolist(), values.tolist(), strict=True)),
    )
