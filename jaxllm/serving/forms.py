"""The forms in which models write calls of functions, as their chat templates teach them.

No file says which form a model has, so it is read off the text of its template. A form says how to read calls, and what
a call has to be where an answer must be one.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxllm.serving.parts import ToolCall
from jaxllm.tokenizer import Tokenizer

Schemas = Mapping[str, Any]  # of the functions' arguments, by the functions' names


@dataclass(frozen=True)
class Form:
    """How some models write calls.

    Attributes:
        parse: the calls in the text between `opening` and `closing`. None, or a ValueError, if it is something else.
        opening: what calls begin with; None if an answer is nothing but calls.
        closing: what they end with; None if nothing follows them.
        call: one call, with $NAME and $ARGUMENTS in it; None if its arguments are not JSON.
        around: what stands before, between and after calls; "between" is None if there is only one.
        tags: what else in a call may be a special token.
    """

    parse: Callable[[str, Schemas], list[ToolCall]]
    opening: str | None
    closing: str | None
    call: str | None
    around: tuple[str, str | None, str] = ("", None, "")
    tags: tuple[str, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(tag for tag in (self.opening, self.closing, *self.tags) if tag)


def _json_calls(text: str, schemas: Schemas) -> list[ToolCall]:
    """`{"name": ..., "arguments": ...}`, or a list of them."""
    values = json.loads(text)
    return [_json_call(value) for value in (values if isinstance(values, list) else [values])]


def _json_call(value: object) -> ToolCall:
    call = value if isinstance(value, dict) else {}
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
    if not isinstance(name, str) or not isinstance(arguments, dict | str):
        raise ValueError("not a call")
    # Some models write the arguments as text that holds JSON, as the protocol does.
    return ToolCall(name, arguments if isinstance(arguments, str) else _dumps(arguments))


def _llama_calls(text: str, schemas: Schemas) -> list[ToolCall]:
    """Objects with `;` between them. One that is no call of a known function is an answer that happens to be JSON."""
    calls, rest = [], text.strip()
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        calls.append(_json_call(value))
        rest = rest[end:].lstrip("; \n")
    if any(call.name not in schemas for call in calls):
        raise ValueError("not calls")
    return calls


def _mistral_calls(text: str, schemas: Schemas) -> list[ToolCall]:
    """A list in JSON; since version 11 of the tokenizer `name[ARGS]{...}`, each after a `[TOOL_CALLS]`."""
    if text.lstrip().startswith("["):
        return _json_calls(text, schemas)
    call = r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?(.*)"
    return [_named_call(call, part) for part in text.split("[TOOL_CALLS]")]


_DEEPSEEK_BEGIN, _DEEPSEEK_END, _DEEPSEEK_SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


def _deepseek_calls(text: str, schemas: Schemas) -> list[ToolCall]:
    """`name` and JSON; before version 3.1 `function`, `name`, and JSON as a block of code."""
    call = rf"(?:function{_DEEPSEEK_SEPARATOR})?([^\s<]+)(?:{_DEEPSEEK_SEPARATOR}|\s*```json)(.*?)(?:```)?\s*"
    parts = re.findall(f"{_DEEPSEEK_BEGIN}(.*?){_DEEPSEEK_END}", text, re.DOTALL)
    return [_named_call(call, part) for part in parts]


def _named_call(pattern: str, text: str) -> ToolCall:
    """A call of which `pattern` finds the name and the arguments."""
    found = re.fullmatch(pattern, text, re.DOTALL)
    if found is None:
        raise ValueError("not a call")
    return ToolCall(found[1], _dumps(json.loads(found[2])))


def _glm_calls(text: str, schemas: Schemas) -> list[ToolCall]:
    """`name`, and `<arg_key>key</arg_key><arg_value>value</arg_value>` for each argument, text as it is."""
    pair = r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*"
    found = re.fullmatch(rf"\s*([^\s<]+)\s*((?:{pair})*)", text, re.DOTALL)
    if found is None:
        raise ValueError("not a call")
    properties = schemas.get(found[1], {}).get("properties", {})
    arguments = {key: _glm_value(value, properties.get(key)) for key, value in re.findall(pair, found[2], re.DOTALL)}
    return [ToolCall(found[1], _dumps(arguments))]


def _glm_value(text: str, schema: object) -> object:
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


_CALL = '{"name": "$NAME", "arguments": $ARGUMENTS}'

# Hermes, Qwen, SmolLM 3, Granite 4.
TAGGED = Form(
    _json_calls,
    opening="<tool_call>",
    closing="</tool_call>",
    call=f"<tool_call>\n{_CALL}\n</tool_call>",
    around=("", "\n", ""),
)
GLM = Form(
    _glm_calls,
    opening="<tool_call>",
    closing="</tool_call>",
    call=None,
    tags=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
GRANITE = Form(_json_calls, opening="<|tool_call|>", closing=None, call=_CALL, around=("<|tool_call|>[", ", ", "]"))
MISTRAL = Form(_mistral_calls, opening="[TOOL_CALLS]", closing=None, call=_CALL, around=("[TOOL_CALLS][", ", ", "]"))
MISTRAL_11 = Form(
    _mistral_calls,
    opening="[TOOL_CALLS]",
    closing=None,
    call="[TOOL_CALLS]$NAME[ARGS]$ARGUMENTS",
    around=("", "", ""),
    tags=("[ARGS]", "[CALL_ID]"),
)
DEEPSEEK = Form(
    _deepseek_calls,
    opening="<｜tool▁calls▁begin｜>",
    closing="<｜tool▁calls▁end｜>",
    call=f"{_DEEPSEEK_BEGIN}$NAME{_DEEPSEEK_SEPARATOR}$ARGUMENTS{_DEEPSEEK_END}",
    around=("<｜tool▁calls▁begin｜>", "", "<｜tool▁calls▁end｜>"),
    tags=(_DEEPSEEK_BEGIN, _DEEPSEEK_END, _DEEPSEEK_SEPARATOR),
)
DEEPSEEK_3 = replace(
    DEEPSEEK,
    call=f"{_DEEPSEEK_BEGIN}function{_DEEPSEEK_SEPARATOR}$NAME\n```json\n$ARGUMENTS\n```{_DEEPSEEK_END}",
    around=("<｜tool▁calls▁begin｜>", "\n", "<｜tool▁calls▁end｜>"),
)
LLAMA = Form(
    _llama_calls,
    opening=None,
    closing=None,
    call='{"name": "$NAME", "parameters": $ARGUMENTS}',
    tags=("<|python_tag|>",),
)


def form_of(tokenizer: Tokenizer) -> Form | None:
    """The form that the chat template shows; None if it shows none that we know. (Harmony is not one of these.)"""
    source = tokenizer.chat_template.source if tokenizer.chat_template else ""
    signs = (
        ("<｜tool▁calls▁begin｜>", DEEPSEEK_3 if "```json" in source else DEEPSEEK),
        ("[TOOL_CALLS]", MISTRAL_11 if "[ARGS]" in source else MISTRAL),
        ("<|tool_call|>", GRANITE),
        ("<arg_key>", GLM),
        ("<function=", None),  # Qwen 3 Coder's, in tags of its own inside of <tool_call>
        ("<tool_call>", TAGGED),
        ("<|python_tag|>", LLAMA),
        ('"parameters": dictionary of argument', LLAMA),
    )
    return next((form for sign, form in signs if sign in source), None)
