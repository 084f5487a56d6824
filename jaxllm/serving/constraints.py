"""Constraints on one part of an answer: its content, or calls."""

import re
from collections.abc import Sequence
from typing import Any

from jaxllm.errors import InputError, located
from jaxllm.serving import harmony
from jaxllm.serving.forms import Form, form_of
from jaxllm.serving.reasoning import CLOSING, OPENING, starts_inside
from jaxllm.serving.tools import Tools, schemas_of
from jaxllm.structured import TEXT, Constraint, spelled
from jaxllm.tokenizer import Tokenizer


def after_reasoning(tokenizer: Tokenizer, prompt: Sequence[int], constraint: Constraint) -> Constraint:
    """`constraint` for what follows the thoughts of a model that thinks first. For other models, it is unchanged.

    Args:
        prompt: the ids that the answer continues.
    """
    if harmony.is_harmony(tokenizer):
        return harmony.constrained('<|channel|> "final" <|message|> @content', {"content": constraint})
    inside = starts_inside(tokenizer, prompt)
    if inside is None:
        return constraint
    opening, closing = spelled(tokenizer, OPENING), spelled(tokenizer, CLOSING)
    # Text before a special token cannot hold it. Text before characters has to end where they first come.
    lazy = "[lazy]" if closing.startswith('"') else ""
    start = "thoughts SPACE" if inside else f"({opening} thoughts SPACE)?"
    lark = f"start: {start} @content\nthoughts{lazy}: TEXT {closing}\nSPACE: /[ \\n]{{0,4}}/\n{TEXT}"
    return Constraint.compose(lark, {"content": constraint})


def required(tokenizer: Tokenizer, prompt: Sequence[int], tools: Tools, name: str | None = None) -> Constraint:
    """An answer that calls one or more of `tools`, or once the one called `name`, perhaps after thoughts.

    Args:
        prompt: the ids that the answer continues.

    Raises:
        InputError: there is no such tool, one is malformed, or the chat template shows no form of calls that can be
            forced.
    """
    schemas = {tool: schema for tool, schema in schemas_of(tools).items() if name in (None, tool)}
    if not schemas:
        raise InputError("tools: there are none to call" if name is None else f"tools: none is called {name!r}")
    arguments = {f"arguments_{i}": _arguments(*named) for i, named in enumerate(schemas.items())}
    calls = dict(zip(schemas, (f"@{part}" for part in arguments), strict=True))
    if harmony.is_harmony(tokenizer):
        call = '"commentary to=functions.{} " <|constrain|> "json" <|message|> {}'
        choice = " | ".join(call.format(tool, part) for tool, part in calls.items())
        return harmony.constrained(f"<|channel|> ({choice}) <|call|>", arguments)
    form = form_of(tokenizer)
    if form is None or form.call is None:
        raise InputError("the chat template shows no form of calls that can be forced; use tool_choice 'auto'")
    before, between, after = form.around
    more = "" if between is None or name is not None else f"({_lark(tokenizer, form, between)} call)*"
    choice = " | ".join(_lark(tokenizer, form, form.call, tool, part) for tool, part in calls.items())
    lark = f"start: {_lark(tokenizer, form, before)} call {more} {_lark(tokenizer, form, after)}\ncall: {choice}"
    return after_reasoning(tokenizer, prompt, Constraint.compose(lark, arguments))


def _arguments(tool: str, schema: Any) -> Constraint:
    with located(f"tools: the parameters of {tool}"):
        return Constraint.json_schema(schema)


def _lark(tokenizer: Tokenizer, form: Form, text: str, name: str = "", arguments: str = "") -> str:
    """`text` in Lark: its tags as tokens where they are tokens, everything else as characters."""
    tags = "|".join(f"({re.escape(tag)})" for tag in (*form.marks, "$ARGUMENTS"))
    pieces = [piece for piece in re.split(tags, text.replace("$NAME", name)) if piece]
    return " ".join(arguments if piece == "$ARGUMENTS" else spelled(tokenizer, piece) for piece in pieces)
