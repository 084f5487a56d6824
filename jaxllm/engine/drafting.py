"""Guesses of what an answer goes on with, so that several tokens are checked for the price of one.

Guesses never change an answer: a guessed token is kept only if it is what the model draws there with the random key of
that place. For a guess that is certain of itself this accepts as often as rejection sampling does (Leviathan et al.,
2023), and the same seed gives the same text as without guesses.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol


class Drafter(Protocol):
    """Guesses the next tokens.

    Attributes:
        most: the most tokens that it guesses at a time.
    """

    most: int

    def guess(self, sequences: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """What may follow each of the sequences, whose numbers stay the same while they grow; none where it has no
        idea."""


class PromptLookup:
    """Goes on as the text did where its last tokens occurred before (Saxena, 2023): good where answers repeat what was
    said, such as summaries, corrections and code.

    Args:
        most: the most tokens that it guesses at a time.
        longest, shortest: how many of the last tokens have to be the same; longer ones are looked for first.
    """

    def __init__(self, most: int = 7, longest: int = 4, shortest: int = 2) -> None:
        self.most, self._lengths = most, range(longest, shortest - 1, -1)

    def guess(self, sequences: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """See `Drafter`."""
        found = {number: self._continuation(list(tokens)) for number, tokens in sequences.items()}
        return {number: tokens for number, tokens in found.items() if tokens}

    def _continuation(self, tokens: list[int]) -> list[int]:
        for length in self._lengths:
            end = tokens[-length:]
            for at in range(len(tokens) - length - 1, -1, -1):  # the newest occurrence first
                if tokens[at : at + length] == end:
                    return tokens[at + length : at + length + self.most]
        return []
