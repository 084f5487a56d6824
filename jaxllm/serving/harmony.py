"""Harmony, the answers of GPT-OSS: messages on channels, between special tokens.

An answer continues after `<|start|>assistant`, for example with

    <|channel|>analysis<|message|>The user greets.<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>

and a call with `<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>`.
Source: the format's public description and its parser (openai-harmony), which the tests compare with.
"""

import re
from collections.abc import Mapping, Sequence

from jaxllm.serving.marks import Mark, Marks
from jaxllm.serving.parts import Content, Part, Reasoning, ToolCall, joined
from jaxllm.structured import TEXT, Constraint
from jaxllm.tokenizer import Tokenizer

_CHANNEL, _MESSAGE, _START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_NAMES = (_CHANNEL, _MESSAGE, _START, "<|constrain|>", *_ENDS)


def is_harmony(tokenizer: Tokenizer) -> bool:
    return all(tokenizer.backend.token_to_id(name) is not None for name in (_CHANNEL, _MESSAGE))


def constrained(last: str, parts: Mapping[str, Constraint]) -> Constraint:
    """Any number of thoughts and remarks, and then the message `last`.

    Args:
        last: in Lark, from its channel on; it calls `parts` by name.
    """
    other = '<|channel|> ("analysis" | "commentary") <|message|> TEXT <|end|> <|start|> "assistant"'
    return Constraint.compose(f"start: other* {last}\nother: {other}\n{TEXT}", parts)


class Harmony:
    """A splitter for answers on channels.

    "analysis" is reasoning; "final", and "commentary" that is addressed to no tool, are content. Several messages of
    one kind have an empty line between them. A call of `functions.name` is a call of `name`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._marks = Marks(tokenizer, _NAMES)
        self._header: str | None = ""  # of the message that begins; None inside of its body
        self._kind: type[Content] | type[Reasoning] = Content
        self._call: str | None = None  # whom the message is for
        self._body = ""  # of a call, so far
        self._given: set[type] = set()

    def push(self, tokens: Sequence[int], text: str) -> list[Part]:
        return joined([part for piece in self._marks.push(tokens, text) for part in self._read(piece)])

    def finish(self) -> list[Part]:
        """A call that was cut off; or all text, where no message began at all."""
        if self._header is not None and not self._given and not self._header.startswith(_CHANNEL):
            return joined([Content(self._header)])
        return self._end()

    def _read(self, piece: str | Mark) -> list[Part]:
        if piece == Mark(_START):
            ended = self._end()
            self._header = ""
            return ended
        if self._header is not None:
            if piece == Mark(_MESSAGE):
                return self._begin(self._header)
            self._header += piece if isinstance(piece, str) else piece.name
        elif isinstance(piece, str) and self._call is None:
            return [self._kind(piece)]
        elif isinstance(piece, str):
            self._body += piece
        elif piece.name in _ENDS:
            ended = self._end()
            self._header = ""
            return ended
        return []

    def _begin(self, header: str) -> list[Part]:
        channel = re.search(re.escape(_CHANNEL) + r"\s*(\w+)", header)
        recipient = re.search(r"(?:^|\s)to=([^\s<]+)", header)
        self._header = None
        self._kind = Reasoning if channel and channel[1] == "analysis" else Content
        self._call = recipient[1].removeprefix("functions.") if recipient else None
        again = self._call is None and self._kind in self._given
        self._given.add(ToolCall if self._call else self._kind)
        return [self._kind("\n\n")] if again else []

    def _end(self) -> list[Part]:
        call = [ToolCall(self._call, self._body)] if self._header is None and self._call is not None else []
        self._call, self._body = None, ""
        return list(call)
