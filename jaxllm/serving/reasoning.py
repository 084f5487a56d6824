"""Answers that begin with `<think>...</think>`, as those of DeepSeek R1, Qwen 3, SmolLM 3 and GLM 4.5 do."""

from collections.abc import Sequence

from jaxllm.serving.parts import Content, Part, Reasoning
from jaxllm.serving.tags import Until
from jaxllm.tokenizer import Tokenizer

OPENING, CLOSING = "<think>", "</think>"


def starts_inside(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool | None:
    """Whether an answer begins inside of thoughts. None without thoughts: the template has no tags, or closed them."""
    source = tokenizer.chat_template.source if tokenizer.chat_template else ""
    if OPENING not in source and CLOSING not in source:
        return None
    end = tokenizer.backend.decode(list(prompt[-16:]), skip_special_tokens=False).rstrip()
    return None if end.endswith(CLOSING) else end.endswith(OPENING)


class Thoughts:
    """Tells the thoughts at the beginning of an answer from what follows them.

    Tags later in the answer are text: an answer may be about them.

    Args:
        inside: whether the prompt ends with the opening tag, as some chat templates write it.
    """

    def __init__(self, inside: bool) -> None:
        self._start: str | None = None if inside else ""  # what was read, until it is known whether it is the tag
        self._thoughts: Until | None = Until(CLOSING) if inside else None
        self._at_tag = False

    def push(self, text: str) -> list[Part]:
        if self._start is not None:
            self._start += text
            start = self._start.lstrip()
            if OPENING.startswith(start):
                return []
            if start.startswith(OPENING):
                self._thoughts, text = Until(CLOSING), start.removeprefix(OPENING)
            else:
                text = self._start
            self._start = None
        parts: list[Part] = []
        if self._thoughts is not None:
            parts.append(Reasoning(self._thoughts.push(text)))
            if self._thoughts.rest is None:
                return parts
            text, self._thoughts, self._at_tag = self._thoughts.rest, None, True
        if self._at_tag:
            text = text.lstrip()
            self._at_tag = not text
        return [*parts, Content(text)]

    def finish(self) -> list[Part]:
        if self._thoughts is not None:
            return [Reasoning(self._thoughts.finish())]
        return [Content(self._start or "")]
