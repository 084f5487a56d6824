"""Guesses of what an answer goes on with, so that several tokens are checked for the price of one.

Guesses never change an answer: a guessed token is kept only if it is what the model draws there, with the random
numbers of that place. So the same seed gives the same text as without guesses, which is not so with rejection sampling
(Leviathan et al., 2023). A guess that is certain of itself is accepted as often as there: with the probability that the
model gives it. A guess that another model draws with the same random numbers is accepted nearly as often: if the two
distributions differ by d in total variation, at least with probability (1 - d) / (1 + d) (Daliri et al., 2024), and
there with 1 - d.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import jax
import numpy as np

from jaxllm.decoding import CHUNK, SMALLEST, bucket, looked_at
from jaxllm.engine.answer import Answer
from jaxllm.engine.sequences import Row, Sequences
from jaxllm.engine.slots import in_common
from jaxllm.errors import InputError
from jaxllm.programs import Programs


class Drafter(Protocol):
    """Guesses the next tokens.

    Attributes:
        most: the most tokens that it guesses at a time.
    """

    most: int

    def prepare(self, slots: int, capacity: int) -> None:
        """Called before the first guess: at most `slots` answers at a time, of `capacity` positions each."""

    def guess(self, answers: Mapping[int, Answer]) -> dict[int, list[int]]:
        """What may follow each of the answers, by their slots; none where it has no idea."""


class PromptLookup:
    """Goes on as the text did where its last tokens occurred before (Saxena, 2023): good where answers repeat what was
    said, as summaries, corrections and code do.

    Args:
        most: the most tokens that it guesses at a time.
        longest, shortest: how many of the last tokens have to be the same; longer ones are looked for first.
    """

    def __init__(self, most: int = 7, longest: int = 4, shortest: int = 2) -> None:
        self.most, self._lengths = most, range(longest, shortest - 1, -1)

    def prepare(self, slots: int, capacity: int) -> None:
        """See `Drafter`: nothing has to be prepared."""

    def guess(self, answers: Mapping[int, Answer]) -> dict[int, list[int]]:
        """See `Drafter`."""
        found = {slot: self.continuation(answer.known) for slot, answer in answers.items()}
        return {slot: tokens for slot, tokens in found.items() if tokens}

    def continuation(self, tokens: list[int]) -> list[int]:
        """What followed the newest earlier occurrence of the last tokens."""
        for length in self._lengths:
            end = tokens[-length:]
            for at in range(len(tokens) - length - 1, -1, -1):
                if tokens[at : at + length] == end:
                    return tokens[at + length : at + length + self.most]
        return []


class Model(Protocol):
    """What a drafter needs of a `LanguageModel`."""

    programs: Programs
    name: str


class DraftModel:
    """Guesses with a smaller model, which has to have the same vocabulary.

    It draws with the same settings and random numbers as the answer does.

    Args:
        most: the most tokens that it guesses at a time.
    """

    def __init__(self, model: Model, most: int = 4) -> None:
        self.most, self._model = most, model

    def prepare(self, slots: int, capacity: int) -> None:
        """Allocate its cache, see `Drafter`.

        Raises:
            InputError: its rows lie on different devices.
        """
        if self._model.programs.whole_batches:
            raise InputError(f"{self._model.name}: a model that guesses cannot distribute rows (dp above 1)")
        # Prompts are padded here without a look at where they end.
        self._sequences = Sequences(self._model.programs, slots, bucket(capacity + CHUNK, SMALLEST))
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._answers: list[Answer | None] = [None] * slots

    def guess(self, answers: Mapping[int, Answer]) -> dict[int, list[int]]:
        """See `Drafter`.

        Raises:
            InputError: the answers have tokens that its vocabulary lacks.
        """
        for slot, answer in answers.items():
            if max(answer.known) >= self._model.programs.vocab_size:
                raise InputError(f"{self._model.name} has a smaller vocabulary, so it cannot guess for this model")
            if self._answers[slot] is not answer:
                self._answers[slot], self._held[slot] = answer, []
            self._sequences.begin(slot, answer.request, len(answer.completion.tokens))
            self._read(slot, answer.known)
        slots, padded = list(answers), bucket(len(answers), 1) - len(answers)
        rows = [Row(slot, answers[slot].known[len(self._held[slot]) :], len(self._held[slot])) for slot in slots]
        drawn = [self._advance([*rows, *[replace(rows[0], draws=False)] * padded], 1 + self.most)]
        rows = [*(Row(slot) for slot in slots), *[Row(slots[0], draws=False)] * padded]
        drawn += [self._advance(rows, 1) for _ in range(self.most - 1)]
        guesses = np.concatenate([np.asarray(tokens)[: len(slots)] for tokens in drawn], axis=1).tolist()
        for slot, guess in zip(slots, guesses, strict=True):
            self._held[slot] = [*answers[slot].known, *guess[:-1]]
        return dict(zip(slots, guesses, strict=True))

    def _read(self, slot: int, tokens: list[int]) -> None:
        """Process what it does not hold yet of a sequence, but for a few tokens, which all rows process together."""
        held = in_common(self._held[slot], tokens[:-1])
        while len(tokens) - held > 1 + self.most:
            piece = tokens[held : min(held + CHUNK, len(tokens) - 1)]
            self._advance([Row(slot, piece, held, draws=False)], bucket(len(piece), SMALLEST))
            held += len(piece)
        self._held[slot] = tokens[:held]

    def _advance(self, rows: list[Row], time: int) -> jax.Array:
        end = max((row.start for row in rows), default=0) + time
        window = self._sequences.capacity if time == 1 else looked_at(end, self._sequences.capacity)
        return self._sequences.advance(rows, time, window).tokens
