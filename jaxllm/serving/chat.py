"""/v1/chat/completions: conversations, with tools, structured answers and reasoning."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.serving.answers import DONE, Choice, Served, counts_usage, new_id, usage
from jaxllm.serving.bodies import Chat, NamedTool, SchemaFormat
from jaxllm.serving.constraints import after_reasoning, required
from jaxllm.serving.errors import RequestError
from jaxllm.serving.logprobs import chat_logprobs
from jaxllm.serving.parts import Content, Part, Reasoning, ToolCall
from jaxllm.serving.splitter import splitter_for
from jaxllm.serving.worker import Event
from jaxllm.structured import Constraint, Guide
from jaxllm.tokenizer import Tokenizer


class Conversation:
    """A conversation that is to be continued: what the engine has to do, and how the answers are taken apart.

    Raises:
        InputError: the chat template refuses it, or a schema is none.
        RequestError: it asks for things that exclude each other.
    """

    def __init__(self, served: Served, body: Chat) -> None:
        tokenizer = served.tokenizer
        tools = [tool.function.for_template() for tool in body.tools or ()] if body.tool_choice != "none" else []
        variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
        if tools:
            variables["tools"] = tools
        if body.reasoning_effort is not None:
            variables["reasoning_effort"] = body.reasoning_effort
        turns = [message.for_template() for message in body.messages]
        prompt = tokenizer.encode_chat(turns, **variables)
        constraint = _constraint(tokenizer, prompt, body, tools)
        if constraint is not None:
            Guide(constraint, tokenizer)  # compiles it here, so that the engine's thread finds it compiled
        n = body.n or 1
        ask = body.asked() | {
            "prompt": prompt,
            "max_new_tokens": body.max_completion_tokens or body.max_tokens or served.capacity,
            "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
            "constraint": constraint,
        }
        self.asks = [ask | {"stream": stream} for stream in range(n)]
        self.choices = [Choice(splitter_for(tokenizer, prompt, tools)) for _ in range(n)]


def _constraint(
    tokenizer: Tokenizer, prompt: Sequence[int], body: Chat, tools: Sequence[dict[str, Any]]
) -> Constraint | None:
    chosen, form = body.tool_choice, body.response_format
    is_bound = form is not None and form.type != "text"
    if chosen == "required" or isinstance(chosen, NamedTool):
        if is_bound:
            raise RequestError(
                400, "response_format says what content is, but tool_choice leaves none", param="tool_choice"
            )
        return required(tokenizer, prompt, tools, chosen.function.name if isinstance(chosen, NamedTool) else None)
    if not is_bound:
        return None
    if tools:
        raise RequestError(400, "response_format together with tools is not supported", param="response_format")
    bound = (
        Constraint.json_schema(form.json_schema.schema_) if isinstance(form, SchemaFormat) else Constraint.json_object()
    )
    return after_reasoning(tokenizer, prompt, bound)


class ChatReply:
    """See `Reply`."""

    end = DONE

    def __init__(self, served: Served, body: Chat) -> None:
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        talk = Conversation(served, body)
        self.asks, self._choices = talk.asks, talk.choices
        self._tokenizer, self._counts = served.tokenizer, counts_usage(body)
        self._common = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": served.name}

    def begin(self) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(len(self._choices))]

    def push(self, event: Event) -> list[dict[str, Any]]:
        choice = self._choices[event.index]
        parts = choice.push(event)
        first_call = len(choice.calls) - sum(isinstance(part, ToolCall) for part in parts)
        calls = (call | {"index": index} for index, call in enumerate(_calls(choice)[first_call:], first_call))
        deltas = [_delta(part, calls) for part in parts]
        if event.piece.logprobs and not deltas:
            deltas = [{"content": ""}]  # the text of these tokens comes later, or never
        chunks = [self._chunk(event.index, delta) for delta in deltas]
        if event.piece.logprobs:
            chunks[0]["choices"][0]["logprobs"] = chat_logprobs(self._tokenizer, event.piece.logprobs)
        return [*chunks, self._chunk(event.index, {}, choice.finish_reason)] if choice.completion else chunks

    def finish(self) -> list[dict[str, Any]]:
        return [self._object("chat.completion.chunk", []) | {"usage": self._usage()}] if self._counts else []

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": chat_logprobs(self._tokenizer, choice.logprobs) if choice.logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return self._object("chat.completion", choices) | {"usage": self._usage()}

    def failure(self, error: RequestError) -> dict[str, Any]:
        return error.body()

    def _usage(self) -> dict[str, Any]:
        return usage(self._choices, each=len(self._choices))

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice]) | ({"usage": None} if self._counts else {})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._common | {"object": kind, "choices": choices}


def _delta(part: Part, calls: Iterator[dict[str, Any]]) -> dict[str, Any]:
    match part:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case ToolCall():
            return {"tool_calls": [next(calls)]}


def _message(choice: Choice) -> dict[str, Any]:
    content = choice.content or (None if choice.calls else "")
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.calls:
        message["tool_calls"] = _calls(choice)
    return message


def _calls(choice: Choice) -> list[dict[str, Any]]:
    return [
        {"id": id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for id, call in choice.calls
    ]
