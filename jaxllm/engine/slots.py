"""The sequences of a cache: which tokens each holds, who uses it, and where a new prompt's beginning is found."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from jaxllm.engine.answer import Answer

# A beginning that another sequence holds is copied if it is longer by as much than what the own one holds. (Copying one
# position of a layer moves its bytes once; computing it reads the whole model for a chunk.)
WORTH_COPYING = 64
BLOCK = 256


@dataclass(eq=False)
class Slot:
    """A sequence of the cache.

    Attributes:
        index: its row.
        held: tokens whose keys and values it holds, as far as they are known, from the first one on.
        length: how many positions have been written: `held` and those that are being computed.
        frequencies: of its rotary embedding, see `Programs.frequencies`.
        answer: who uses it.
        drawn: how many tokens of the answer have been drawn, or are being drawn.
        used: when it was last taken, in a count of answers.
    """

    index: int
    held: list[int] = field(default_factory=list)
    length: int = 0
    frequencies: Hashable = None
    answer: Answer | None = None
    drawn: int = 0
    used: int = 0

    @property
    def prompt_left(self) -> int:
        """How many tokens of the prompt have still to be processed."""
        return 0 if self.answer is None else len(self.answer.request.ids) - self.length

    @property
    def decodes(self) -> bool:
        """Whether the next step of its answer can be started."""
        return self.answer is not None and self.prompt_left <= 0 and self.drawn < self.answer.request.limit

    def take(self, answer: Answer, kept: int, frequencies: Hashable, used: int) -> None:
        """Begin an answer after the first `kept` positions, which hold its prompt's beginning already."""
        self.held, self.length, self.frequencies = answer.request.ids[:kept], kept, frequencies
        self.answer, self.drawn, self.used = answer, 0, used
        answer.completion.cached_tokens = kept

    def known(self) -> list[int]:
        """The tokens that it holds."""
        if self.answer is None:
            return self.held
        return [*self.answer.request.ids, *self.answer.completion.tokens][: self.length]

    def leave(self) -> None:
        """The answer has ended; what was computed stays."""
        self.held, self.answer = self.known(), None

    def forget(self) -> None:
        """What it holds is not to be found any more."""
        self.held, self.frequencies = [], None


def in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the first one on."""
    end, at = min(len(a), len(b)), 0
    while at < end and a[at : at + BLOCK] == b[at : at + BLOCK]:
        at += BLOCK
    while at < end and a[at] == b[at]:
        at += 1
    return min(at, end)
