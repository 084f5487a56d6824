"""Where special tokens stand in the text of an answer, from which they are left out."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxllm.tokenizer import Tokenizer


class Mark(NamedTuple):
    """A special token."""

    name: str


class Marks:
    """Puts special tokens back to their places between the characters.

    Text can lag behind the tokens, where it might become a stop string, and end before them, where it did. So a token's
    place is counted in characters, and it comes out once the text before it has.

    Args:
        names: the tokens that matter. Those that the tokenizer does not have, or has as text, never come out.
    """

    def __init__(self, tokenizer: Tokenizer, names: Iterable[str]) -> None:
        special = {
            i: token.content for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special
        }
        self._names = {i: name for i, name in special.items() if name in set(names)}
        self._stream = tokenizer.stream() if self._names else None
        self._waiting: deque[tuple[int, str]] = deque()
        self._decoded = self._shown = 0  # characters

    def push(self, tokens: Sequence[int], text: str) -> Iterator[str | Mark]:
        """The new text, with the marks that stand in it or at its end."""
        if self._stream is not None:
            for token in tokens:
                if token in self._names:
                    self._waiting.append((self._decoded, self._names[token]))
                self._decoded += len(self._stream.push(token))
        while self._waiting and self._waiting[0][0] <= self._shown + len(text):
            place, name = self._waiting.popleft()
            before, text = text[: place - self._shown], text[place - self._shown :]
            self._shown = place
            if before:
                yield before
            yield Mark(name)
        self._shown += len(text)
        if text:
            yield text
