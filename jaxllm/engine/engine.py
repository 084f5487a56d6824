"""`Engine`: answers to many requests at a time, with one cache and one decode loop.

Each sequence of the cache is a slot. A round either processes a piece of some prompts or draws the next token of every
answer; where both are to be done, rounds alternate, so that long prompts do not silence the others. Where programs run
ahead, the next step is started before the newest token is read, so that the device never waits for Python (mlx-lm's
`async_eval`); an answer that ends unforeseen wastes one step of its row.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, Unpack

import numpy as np

from jaxllm.decoding import CHUNK, SMALLEST, SMALLEST_CACHE, bucket, looked_at
from jaxllm.drawing import MOST_BIASES, Drawn
from jaxllm.engine.answer import Answer, Completion, Prompt, Request, TokenLogprob
from jaxllm.engine.drafting import Drafter
from jaxllm.engine.sequences import Row, Sequences
from jaxllm.engine.slots import Slot, find
from jaxllm.errors import InputError
from jaxllm.programs import Programs
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

    rows: list[tuple[Slot, Answer | None, Row]]
    drawn: Drawn


class Engine:
    """Answers many requests, which may come at any time. One thread at a time may use it.

        engine = jaxllm.Engine(model, slots=8)
        answers = [engine.add(prompt, 100) for prompt in prompts]
        while engine.busy:
            for answer in engine.step():
                print(answer.take().text)

    An answer does not depend on its neighbours. With the native kernels of a CPU it is the same to the bit, where they
    multiply by all matrices (in float32, XLA does it); elsewhere sums may be in another order if there are more rows,
    which can change a token that is nearly as likely as another.

    Args:
        slots: how many requests are answered at a time; others wait.
        capacity: the most positions of prompt and answer together, rounded up to a power of two; by default the
            model's context, at most 4096.
        drafter: guesses tokens, several of which are then checked at a time (`jaxllm.PromptLookup`); None: no guesses.

    Attributes:
        model, slots, capacity: see above.
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
        self.model = model
        self.slots, self.capacity = slots, bucket(capacity, SMALLEST_CACHE)
        self.stats = Stats()
        self._slots = [Slot(i) for i in range(slots)]
        self._waiting: deque[Answer] = deque()
        self._started: deque[Started] = deque()
        self._sequences: Sequences | None = None  # made when they are first needed, and again after an interruption
        self._version: object = None  # of the parameters
        self._begun, self._prefilled = 0, False
        self.drafter = drafter

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests are being answered."""
        return sum(slot.answer is not None for slot in self._slots)

    @property
    def drafter(self) -> Drafter | None:
        """What guesses tokens; can be changed between steps."""
        return self._drafter

    @drafter.setter
    def drafter(self, drafter: Drafter | None) -> None:
        if drafter is not None:
            drafter.prepare(self.slots, self.capacity)
        self._drafter = drafter

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
            return self._round()
        except BaseException:
            self._lose()
            raise

    def _round(self) -> list[Answer]:
        sequences, failed = self._admit()
        return [*failed, *self._worked(sequences)]

    def _worked(self, sequences: Sequences) -> list[Answer]:
        """Process a piece of the prompts, or draw the next tokens."""
        prompts = [slot for slot in self._slots if slot.prompt_left]
        if prompts and not (self._prefilled and self._decoding()):
            self._prefilled = True
            self._prefill(sequences, prompts)
            return [answer for _ in range(len(self._started)) for answer in self._read(sequences)]
        self._prefilled = False
        ahead = self._programs.runs_ahead and self.drafter is None and not self._guided()
        while len(self._started) < (2 if ahead else 1) and (slots := self._decoding()):
            self._decode(sequences, slots)
        return self._read(sequences) if self._started else []

    def _admit(self) -> tuple[Sequences, list[Answer]]:
        """Give free slots to those who wait, in their order. Returns also the answers that cannot begin."""
        if self._version is not self._programs.version:  # the parameters are others: what is held belongs to the old
            for slot in self._slots:
                slot.forget()
            self._version = self._programs.version
        if self._sequences is None:
            self._sequences = Sequences(self._programs, self.slots, self.capacity)
        sequences, copies, failed = self._sequences, not self._programs.whole_batches, []
        for answer in list(self._waiting):
            request = answer.request
            frequencies = self._programs.frequencies(len(request.ids) + request.limit)
            place = find(self._slots, request.ids, frequencies, sequences.can_rewind, copies)
            if place is None:
                continue
            self._waiting.remove(answer)
            if place.source is not place.slot:
                sequences.copy(place.source.index, place.slot.index)
            self._begun += 1
            place.slot.take(answer, place.kept, frequencies, self._begun)
            try:
                sequences.begin(place.slot.index, request)
            except InputError as error:  # a grammar that cannot begin
                answer.fail(error)
                place.slot.leave()
                place.slot.forget()
                failed.append(answer)
                continue
            self.stats.prompt_tokens += len(request.ids)
            self.stats.cached_tokens += place.kept
            answer.times.append(self._clock())
        return sequences, failed

    def _prefill(self, sequences: Sequences, waiting: list[Slot]) -> None:
        """Process a piece of the prompts that came first."""
        waiting.sort(key=lambda slot: slot.used)
        budget = PIECE_BESIDE_ANSWERS if self._decoding() else CHUNK
        time = min(bucket(waiting[0].prompt_left, SMALLEST), budget)
        if waiting[0].length + time > sequences.capacity:  # XLA would shift a write that extends past the end
            time = 1 << (waiting[0].prompt_left.bit_length() - 1)  # not all that is left: that has any length
            time = time if time >= SMALLEST else 1  # as answers have it, for which there is a program
        group = [slot for slot in waiting if slot.length + time <= sequences.capacity][: max(1, budget // time)]
        group = group[: 1 << (len(group).bit_length() - 1)]  # few sizes, few programs

        def row(slot: Slot) -> Row:
            if slot not in group or slot.answer is None:
                return Row(slot.index, (), slot.length, draws=False)
            tokens = slot.answer.request.ids[slot.length : slot.length + time]
            return Row(slot.index, tokens, slot.length, draws=len(tokens) == slot.prompt_left)

        slots = self._slots if self._programs.whole_batches else group
        rows = [row(slot) for slot in slots]
        window = looked_at(max(slot.length for slot in slots) + time, sequences.capacity)
        for slot, new in zip(slots, rows, strict=True):
            slot.length += len(new.tokens)
            slot.drawn += new.draws
        self._start(sequences, slots, rows, time, window)

    def _decode(self, sequences: Sequences, slots: list[Slot]) -> None:
        """Start the next step of these answers."""
        drafts, time = self._drafts(slots), 1
        if drafts and self.drafter:
            time += self.drafter.most
            if max(slot.length for slot in self._slots) + time > sequences.capacity:
                time = 1
        if self._programs.whole_batches:
            held = self._slots
        else:  # filled up to a power of two with the first one, so that few programs are needed
            held = slots + [slots[0]] * (bucket(len(slots), 1) - len(slots))

        def row(i: int, slot: Slot) -> Row:
            if slot not in slots:
                return Row(slot.index, (), draws=False)
            drafted = drafts.get(slot.index, []) if time > 1 else []
            start = slot.length if self.drafter else -1  # the device does not know how many guesses were right
            return Row(slot.index, (-1, *drafted), start, len(drafted), draws=slot not in held[:i])

        rows = [row(i, slot) for i, slot in enumerate(held)]
        for slot in slots:
            slot.length += 1
            slot.drawn += 1
        self.stats.steps += 1
        self._start(sequences, held, rows, time, sequences.capacity)

    def _start(self, sequences: Sequences, slots: list[Slot], rows: list[Row], time: int, window: int) -> None:
        drawn = sequences.advance(rows, time, window)
        self._started.append(Started([(slot, slot.answer, row) for slot, row in zip(slots, rows, strict=True)], drawn))

    def _read(self, sequences: Sequences) -> list[Answer]:
        """Wait for the oldest call that has been started, and hand out its tokens."""
        started = self._started.popleft()
        drawn, drafts = started.drawn, any(row.drafted for *_, row in started.rows)
        tokens = np.asarray(drawn.tokens)
        counts = np.asarray(drawn.counts) if drafts else np.ones(len(tokens), np.int32)
        now = self._clock()
        changed = []
        for i, (slot, answer, row) in enumerate(started.rows):
            if answer is None or answer.done or not row.draws:
                continue
            more = int(counts[i]) - 1
            slot.length, slot.drawn = slot.length + more, slot.drawn + more
            self.stats.drafted, self.stats.accepted = self.stats.drafted + row.drafted, self.stats.accepted + more
            try:
                for j in range(more + 1):
                    answer.push(int(tokens[i, j]), now, _logprob(answer.request, drawn, i, j))
                    self.stats.generated_tokens += 1
                    if answer.done:
                        break
                else:
                    sequences.allow(slot.index, answer.request)
            except InputError as error:  # a grammar that cannot go on
                answer.fail(error)
            if answer.done:
                slot.leave()
            changed.append(answer)
        return changed

    def _drafts(self, slots: list[Slot]) -> dict[int, list[int]]:
        """Guesses of what follows the newest token of each answer, as many as it may still get."""
        if self.drafter is None:
            return {}
        free = {slot.index: slot.answer for slot in slots if slot.answer and slot.answer.request.guide is None}
        guesses = self.drafter.guess(free) if free else {}
        room = {index: answer.request.limit - len(answer.completion.tokens) - 1 for index, answer in free.items()}
        return {index: guess[: room[index]] for index, guess in guesses.items() if guess[: room[index]]}

    def _decoding(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.decodes]

    def _guided(self) -> bool:
        """Whether a token has to be known before the next step, as it decides what may come then."""
        return any(slot.answer is not None and slot.answer.request.guide is not None for slot in self._slots)

    def _lose(self) -> None:
        """After an interruption: what was being computed is gone."""
        self._started.clear()
        self._sequences = None
        for slot in self._slots:
            if slot.answer is not None and not slot.answer.done:
                slot.answer.finish("cancelled")
            slot.leave()
            slot.forget()

    def _clock(self) -> float:
        """Seconds, excluding the time that programs are being compiled."""
        return perf_counter() - self._programs.compile_seconds


def _logprob(request: Request, drawn: Drawn, i: int, j: int) -> TokenLogprob | None:
    if request.logprobs is None:
        return None
    top, values = (np.asarray(x)[i, j, : request.logprobs].tolist() for x in (drawn.top, drawn.top_logprobs))
    token, logprob = int(np.asarray(drawn.tokens)[i, j]), float(np.asarray(drawn.logprobs)[i, j])
    return TokenLogprob(token, logprob, list(zip(top, values, strict=True)))
