"""The parts that an answer is made of, for those who read it: what a splitter gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Content:
    """A piece of the text that answers."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thought before."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete call of a function.

    Attributes:
        arguments: JSON text as the model gave it, which need not follow the function's schema. It is incomplete where
            the answer was cut off.
    """

    name: str
    arguments: str


Part = Content | Reasoning | ToolCall


class Splitter(Protocol):
    """Takes an answer apart while it comes."""

    def push(self, tokens: Sequence[int], text: str) -> list[Part]:
        """The parts that become known with the next tokens and the next text, which need not end at the same place."""

    def finish(self) -> list[Part]:
        """The parts that were held back, after the last text."""


def joined(parts: Sequence[Part]) -> list[Part]:
    """The same without empty pieces, and with neighbours of one kind put together."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, Content) and isinstance(last, Content):
            found[-1] = Content(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, ToolCall) or part.text:
            found.append(part)
    return found
