"""Which tokens each sequence of the cache holds, who uses it, and where a new prompt's beginning is found."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxllm.engine.answer import Answer

# A beginning that another sequence holds is copied if it is longer by as much than what the own one holds. (Copying one
# position of a layer moves its bytes once; computing it takes part in reading the whole model.)
WORTH_COPYING = 64
BLOCK = 256


@dataclass(eq=False)
class Slot:
    """A sequence of the cache.

    Attributes:
        index: its row.
        held: tokens whose keys and values it holds, as far as they are known, from the first one on.
        length: how many positions have been written: `held`, and those that are being computed.
        frequencies: of its rotary embedding, see `Programs.frequencies`; None: what it holds is of no use.
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
        return 0 if self.answer is None else max(0, len(self.answer.request.ids) - self.length)

    @property
    def decodes(self) -> bool:
        """Whether the next step of its answer can be started."""
        return self.answer is not None and not self.prompt_left and self.drawn < self.answer.request.limit

    def take(self, answer: Answer, kept: int, frequencies: Hashable, used: int) -> None:
        """Begin an answer after the first `kept` positions, which hold its prompt's beginning already."""
        self.held, self.length, self.frequencies = [], kept, frequencies
        self.answer, self.drawn, self.used = answer, 0, used
        answer.completion.cached_tokens = kept

    def known(self) -> list[int]:
        """The tokens that it holds."""
        if self.answer is None:
            return self.held
        return self.answer.known[: self.length]

    def leave(self) -> None:
        """The answer has ended; what was computed stays."""
        self.held, self.answer = self.known(), None

    def forget(self) -> None:
        """What it holds is not to be found any more."""
        self.held, self.frequencies = [], None


class Place(NamedTuple):
    """Where an answer can begin: in `slot`, after `kept` positions, which are copied from `source` if that is
    another."""

    slot: Slot
    kept: int
    source: Slot


CanRewind = Callable[[int, int], bool]


def find(slots: list[Slot], ids: list[int], frequencies: Hashable, can_rewind: CanRewind, copies: bool) -> Place | None:
    """The free slot from which an answer to the prompt `ids` takes the least work; None: it should wait.

    It waits if there is no free one; or while another prompt is processed that has a long beginning in common with it.

    Args:
        can_rewind: whether a sequence of a length can go back to another.
        copies: whether sequences can be copied.
    """
    free = [slot for slot in slots if slot.answer is None]
    if not free:
        return None

    def kept(slot: Slot) -> int:
        """How many positions hold the beginning of the prompt; its last token has to be computed in any case."""
        same = in_common(slot.known(), ids[:-1]) if slot.frequencies == frequencies else 0
        return same if can_rewind(slot.length, same) else 0

    found = {slot: kept(slot) for slot in slots}
    own = max(free, key=lambda slot: (found[slot], -slot.used))
    other = max(slots, key=lambda slot: found[slot])
    if not copies:
        return Place(own, found[own], own)
    for slot in slots:
        if slot.answer is not None and slot.prompt_left and slot.frequencies == frequencies:
            coming, end = in_common(slot.answer.request.ids, ids[:-1]), len(slot.answer.request.ids)
            if coming >= found[other] + WORTH_COPYING and can_rewind(end, coming):
                return None
    if found[other] >= found[own] + WORTH_COPYING:
        return Place(min(free, key=lambda slot: slot.used), found[other], other)
    return Place(own, found[own], own)


def in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the first one on."""
    end, at = min(len(a), len(b)), 0
    while at < end and a[at : at + BLOCK] == b[at : at + BLOCK]:
        at += BLOCK
    while at < end and a[at] == b[at]:
        at += 1
    return min(at, end)
