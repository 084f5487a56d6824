"""/v1/responses: conversations as lists of items, streamed as named events. Nothing is stored."""

import copy
import time
from collections.abc import Iterator
from typing import Any

from jaxllm.serving.answers import Served, new_id, usage
from jaxllm.serving.bodies import (
    SAMPLING,
    Call,
    CalledFunction,
    Chat,
    InputCall,
    InputMessage,
    InputReasoning,
    InputResult,
    Message,
    Named,
    NamedTool,
    Response,
    ResponseChoice,
    ResponseSchema,
    SchemaFormat,
    Tool,
)
from jaxllm.serving.chat import Conversation
from jaxllm.serving.errors import RequestError
from jaxllm.serving.parts import Content, Reasoning, ToolCall
from jaxllm.serving.worker import Event

# Items that hold text: what the text is called, with the fields that clients expect beside it.
TEXT: dict[str, dict[str, Any]] = {
    "message": {"type": "output_text", "annotations": [], "logprobs": []},
    "reasoning": {"type": "reasoning_text"},
}
START: dict[str, dict[str, Any]] = {"message": {"role": "assistant"}, "reasoning": {"summary": []}}
IDS = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
# What a response repeats of its request, and what it says otherwise.
ECHOED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "temperature": None,
    "top_p": None,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "text": {"format": {"type": "text"}},
    "reasoning": None,
    "tools": [],
    "tool_choice": "auto",
    "metadata": {},
    "safety_identifier": None,
    "prompt_cache_key": None,
}
# What no request changes here.
FIXED: dict[str, Any] = {
    "error": None,
    "background": False,
    "max_tool_calls": None,
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "service_tier": "default",
    "store": False,
    "top_logprobs": 0,
    "truncation": "disabled",
}


def as_chat(body: Response) -> Chat:
    """The same request as /v1/chat/completions has it."""
    form, choice = body.text.format if body.text else None, body.tool_choice
    return Chat(
        model=body.model,
        messages=list(_turns(body)),
        max_completion_tokens=body.max_output_tokens,
        response_format=SchemaFormat(type="json_schema", json_schema=form)
        if isinstance(form, ResponseSchema)
        else form,
        tools=[Tool(type="function", function=tool) for tool in body.tools or ()],
        tool_choice=NamedTool(type="function", function=Named(name=choice.name))
        if isinstance(choice, ResponseChoice)
        else choice,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        **{name: getattr(body, name) for name in (*SAMPLING, "seed")},
    )


def _turns(body: Response) -> Iterator[Message]:
    """Items as turns: reasoning, text and calls that follow each other are one turn of the assistant."""
    if body.instructions is not None:
        yield Message(role="system", content=body.instructions)
    items = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    turn = Message(role="assistant")
    for item in items:
        if isinstance(item, InputCall):
            call = Call(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
            turn.tool_calls = turn.tool_calls or []
            turn.tool_calls.append(call)
            continue
        is_answer = isinstance(item, InputMessage) and item.role == "assistant"
        if turn.content or turn.tool_calls or (turn.reasoning_content and not is_answer):
            yield turn
            turn = Message(role="assistant")
        if isinstance(item, InputReasoning):
            turn.reasoning_content = "".join(part.text for part in item.content or ())
        elif isinstance(item, InputResult):
            yield Message(role="tool", content=item.output, tool_call_id=item.call_id)
        elif is_answer:
            turn.content = item.content
        else:
            yield Message(role=item.role, content=item.content)
    if turn.content or turn.tool_calls:
        yield turn


class Output:
    """The items of an answer as they grow, and the events that say so.

    Attributes:
        items: of which only the last can be in progress.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open, self._count = False, 0

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The next event of the stream, with copies of what still grows."""
        self._count += 1
        return {"type": kind, "sequence_number": self._count - 1} | copy.deepcopy(fields)

    def add(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        """Text of the last item if it is of this kind, or else of a new one."""
        if not (self._is_open and self.items[-1]["type"] == kind):
            yield from self.close()
            yield from self._begin(kind, **START[kind], content=[])
            self.items[-1]["content"].append(dict(TEXT[kind], text=""))
            yield self._about_text("response.content_part.added", part=self.items[-1]["content"][0])
        part = self.items[-1]["content"][0]
        part["text"] += text
        yield self._about_text(f"response.{part['type']}.delta", delta=text, **_logprobs(kind))

    def add_call(self, call_id: str, call: ToolCall) -> Iterator[dict[str, Any]]:
        """A call of a tool, which is an item of its own."""
        yield from self.close()
        yield from self._begin("function_call", call_id=call_id, name=call.name, arguments="")
        self.items[-1]["arguments"] = call.arguments
        id = self.items[-1]["id"]
        yield self._about_item("response.function_call_arguments.delta", item_id=id, delta=call.arguments)
        yield self._about_item("response.function_call_arguments.done", item_id=id, arguments=call.arguments)
        yield from self.close()

    def close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """The end of the item in progress, if there is one."""
        if not self._is_open:
            return
        self._is_open, item = False, self.items[-1]
        if item["type"] in TEXT:
            [part] = item["content"]
            yield self._about_text(f"response.{part['type']}.done", text=part["text"], **_logprobs(item["type"]))
            yield self._about_text("response.content_part.done", part=part)
        item["status"] = status
        yield self._about_item("response.output_item.done", item=item)

    def _begin(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        self._is_open = True
        self.items.append({"type": kind, "id": new_id(IDS[kind]), "status": "in_progress"} | fields)
        yield self._about_item("response.output_item.added", item=self.items[-1])

    def _about_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self.event(kind, output_index=len(self.items) - 1, **fields)

    def _about_text(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._about_item(kind, item_id=self.items[-1]["id"], content_index=0, **fields)


def _logprobs(kind: str) -> dict[str, Any]:
    """Clients expect these in events about content."""
    return {"logprobs": []} if kind == "message" else {}


class ResponseReply:
    """See `Reply`."""

    end = b""

    def __init__(self, served: Served, body: Response) -> None:
        talk = Conversation(served, as_chat(body))
        self.asks, [self._choice] = talk.asks, talk.choices
        self._output = Output()
        given = body.model_dump(include=set(ECHOED), exclude_none=True, by_alias=True)
        given["tools"] = [tool.model_dump() for tool in body.tools or ()]
        used = {"temperature": served.sampling.temperature or 0, "top_p": served.sampling.top_p or 1}
        self._common = (
            FIXED
            | ECHOED
            | used
            | given
            | {
                "id": new_id("resp_"),
                "object": "response",
                "created_at": int(time.time()),
                "model": served.name,
            }
        )

    def begin(self) -> list[dict[str, Any]]:
        return [
            self._output.event(f"response.{state}", response=self._response("in_progress"))
            for state in ("created", "in_progress")
        ]

    def push(self, event: Event) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        for part in self._choice.push(event):
            match part:
                case Content(text):
                    events += self._output.add("message", text)
                case Reasoning(text):
                    events += self._output.add("reasoning", text)
                case ToolCall():
                    calls = sum(item["type"] == "function_call" for item in self._output.items)
                    events += self._output.add_call(*self._choice.calls[calls])
        if not self._choice.completion:
            return events
        if not self._output.items:
            events += self._output.add("message", "")  # clients expect something
        return [*events, *self._output.close(self._status)]

    def finish(self) -> list[dict[str, Any]]:
        return [self._output.event(f"response.{self._status}", response=self.whole())]

    def whole(self) -> dict[str, Any]:
        return self._response(self._status)

    def failure(self, error: RequestError) -> dict[str, Any]:
        return self._output.event("error", message=str(error), code=error.code, param=error.param)

    @property
    def _status(self) -> str:
        return "incomplete" if self._choice.finish_reason == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        used = self._usage() if self._choice.completion else None
        return self._common | {
            "status": status,
            "incomplete_details": cut,
            "output": self._output.items,
            "usage": used,
            "completed_at": int(time.time()) if status == "completed" else None,
        }

    def _usage(self) -> dict[str, Any]:
        counted = usage([self._choice], each=1)
        return {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": counted["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": counted["completion_tokens_details"],
            "total_tokens": counted["total_tokens"],
        }
