"""How an answer is taken apart, chosen by what is known of the model."""

from collections.abc import Sequence

from jaxllm.serving.forms import form_of
from jaxllm.serving.harmony import Harmony, is_harmony
from jaxllm.serving.marks import Mark, Marks
from jaxllm.serving.parts import Content, Part, Splitter, joined
from jaxllm.serving.reasoning import CLOSING, OPENING, Thoughts, starts_inside
from jaxllm.serving.tools import Tools, reader, schemas_of
from jaxllm.tokenizer import Tokenizer


def splitter_for(tokenizer: Tokenizer, prompt: Sequence[int], tools: Tools = ()) -> Splitter:
    """The splitter for one answer.

    Args:
        prompt: the ids that the answer continues.
        tools: functions that may be called; without any, no calls are looked for.

    Raises:
        InputError: a tool is no function with a name.
    """
    return Harmony(tokenizer) if is_harmony(tokenizer) else Tagged(tokenizer, prompt, tools)


class Tagged:
    """Thoughts, content and calls that are told from each other by tags."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], tools: Tools) -> None:
        inside, form, schemas = starts_inside(tokenizer, prompt), form_of(tokenizer), schemas_of(tools)
        self._thoughts = None if inside is None else Thoughts(inside)
        self._calls = reader(form, schemas) if form and schemas else None
        self._marks = Marks(tokenizer, (OPENING, CLOSING, *(form.marks if form and schemas else ())))

    def push(self, tokens: Sequence[int], text: str) -> list[Part]:
        pieces = self._marks.push(tokens, text)
        text = "".join(piece.name if isinstance(piece, Mark) else piece for piece in pieces)
        return joined(self._read([Content(text)] if self._thoughts is None else self._thoughts.push(text)))

    def finish(self) -> list[Part]:
        parts = self._read([] if self._thoughts is None else self._thoughts.finish())
        return joined([*parts, *([] if self._calls is None else self._calls.finish())])

    def _read(self, parts: list[Part]) -> list[Part]:
        if self._calls is None:
            return parts
        read = (self._calls.push(part.text) if isinstance(part, Content) else [part] for part in parts)
        return [part for found in read for part in found]
