"""Calls of functions in the text of an answer, which comes in pieces."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxllm.errors import InputError
from jaxllm.serving.forms import Form, Schemas
from jaxllm.serving.parts import Content, Part, ToolCall
from jaxllm.serving.tags import Until

Tools = Sequence[Mapping[str, Any]]  # {"type": "function", "function": {"name": ..., "parameters": ...}}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def schemas_of(tools: Tools) -> dict[str, Any]:
    """The schemas of the functions' arguments by name.

    Raises:
        InputError: a tool is no function with a name.
    """
    found = {}
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        name = function.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
            raise InputError(f"tools[{i}]: a function with a 'name' of letters, digits, '_', '-' and '.' is expected")
        found[name] = function.get("parameters") or _NO_ARGUMENTS
    return found


class Calls(Protocol):
    """Reads calls in the text of an answer."""

    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]: ...


def _calls(form: Form, text: str, schemas: Schemas) -> list[ToolCall]:
    """The calls in a text of them; none if it is something else."""
    try:
        return form.parse(text, schemas)
    except (ValueError, RecursionError):
        return []


def reader(form: Form, schemas: Schemas) -> Calls:
    return Bare(form, schemas) if form.opening is None else Enclosed(form, schemas)


class Enclosed:
    """Calls after an opening tag. What cannot be parsed is content, tags, white space and all."""

    def __init__(self, form: Form, schemas: Schemas) -> None:
        self._form, self._schemas, self._opening = form, schemas, form.opening or ""
        self._content = Until(self._opening, after_tag=False)
        self._call: str | None = None  # the text of a call, once the tag has been read

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        while True:
            if self._call is None:
                parts.append(Content(self._content.push(text)))
                if self._content.rest is None:
                    return parts
                self._call, text = "", self._content.rest
            self._call += text
            if self._form.closing is None or self._form.closing not in self._call:
                return parts
            call, text = self._call.split(self._form.closing, 1)
            parts += self._parsed(call, self._form.closing)
            self._content, self._call = Until(self._opening, after_tag=isinstance(parts[-1], ToolCall)), None

    def finish(self) -> list[Part]:
        return [Content(self._content.finish())] if self._call is None else self._parsed(self._call, "")

    def _parsed(self, text: str, closing: str) -> list[Part]:
        as_content = self._content.space + self._opening + text + closing
        return list(_calls(self._form, text, self._schemas)) or [Content(as_content)]


class Bare:
    """Calls that are the whole answer. One that begins as calls do is held back to its end."""

    _BEGINNINGS = ('{"name":', '{"type":', '{"parameters":')

    def __init__(self, form: Form, schemas: Schemas) -> None:
        self._form, self._schemas = form, schemas
        self._text: str | None = ""  # None once it is known to be content

    def push(self, text: str) -> list[Part]:
        if self._text is None:
            return [Content(text)]
        self._text += text
        start = "".join(self._without_tags(self._text[:100]).split())
        beginnings = (*self._BEGINNINGS, *self._form.tags)
        if any(start.startswith(beginning) or beginning.startswith(start) for beginning in beginnings):
            return []
        content, self._text = self._text, None
        return [Content(content)]

    def finish(self) -> list[Part]:
        if self._text is None:
            return []
        return list(_calls(self._form, self._without_tags(self._text), self._schemas)) or [Content(self._text)]

    def _without_tags(self, text: str) -> str:
        for tag in self._form.tags:
            text = text.replace(tag, "")
        return text
