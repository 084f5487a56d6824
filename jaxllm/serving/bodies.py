"""What requests may contain: the bodies of OpenAI's endpoints, checked by pydantic.

A field that is unknown is an error, as it is at OpenAI: a setting that is silently ignored is worse than one that is
refused. Fields that do not change an answer are listed in `Idle`. Ranges of sampling options are checked by `Sampling`.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, FailFast, Field, Tag, model_validator
from pydantic_core import from_json

# Only the first mistake is described: very many would take very much memory.
type Several[T] = Annotated[list[T], FailFast()]

SAMPLING = "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """A null says nothing, also where we do not know the field: clients send back whatever their classes have."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class Idle(Body):
    """Fields that say nothing about the answer."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None


class Options(Idle):
    """What all endpoints that generate text have. What a request leaves open, the checkpoint decides.

    Attributes:
        top_k, min_p, repetition_penalty: not of OpenAI's; named as in vLLM.
    """

    model: str
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    @property
    def answers(self) -> int:
        """How many are asked for."""
        return 1

    def asked(self) -> dict[str, Any]:
        """The arguments of `Engine.add` that these fields are. Without a seed, one is drawn."""
        options = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        return options | {"seed": secrets.randbits(31) if self.seed is None else self.seed % 2**31}


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Any = None


class Sampled(Options):
    """What chat and completions have besides.

    Attributes:
        logit_bias: added to the logits of these tokens, from -100 to 100.
    """

    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | Several[str] | None = None
    logit_bias: dict[Annotated[int, Field(strict=False)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream_options: StreamOptions | None = None

    @property
    def answers(self) -> int:
        return self.n or 1

    def asked(self) -> dict[str, Any]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return super().asked() | {"stop": stop, "logit_bias": self.logit_bias}


# Conversations.


def _is_text(type: str) -> str:
    if type not in ("text", "input_text", "output_text"):
        raise ValueError(f"'{type}' is not understood here, only text")
    return type


class TextPart(Body):
    type: Annotated[str, AfterValidator(_is_text)]
    text: str
    annotations: Any = None
    logprobs: Any = None


Content = str | Several[TextPart] | None


def text_of(content: Content) -> str:
    """What is written in a message."""
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def _arguments(text: str) -> str:
    if not isinstance(from_json(text), dict):
        raise ValueError("the arguments of a call must be a JSON object")
    return text


class CalledFunction(Body):
    name: str
    arguments: Annotated[str, AfterValidator(_arguments)]


class Call(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """A turn of a conversation, as a client writes it or sends back what it was given."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Several[Call] | None = None
    tool_call_id: str | None = None
    refusal: Any = None
    annotations: Any = None

    def for_template(self) -> dict[str, Any]:
        """The turn as chat templates expect it: arguments of calls as objects, reasoning by both of its names."""
        turn: dict[str, Any] = {"role": self.role, "content": text_of(self.content)}
        if self.reasoning_content is not None:
            turn |= {"reasoning_content": self.reasoning_content, "thinking": self.reasoning_content}
        if self.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": from_json(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return turn | {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None}


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_template(self) -> dict[str, Any]:
        described = {"name": self.name, "description": self.description or "", "parameters": self.parameters or {}}
        return {"type": "function", "function": described}


class Tool(Body):
    type: Literal["function"]
    function: Function


class Named(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: Named


class Schema(Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class AnyFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: Schema


MOST_TOOLS = 1024  # which OpenAI's API limits to 128; a prompt has to hold them all
RESERVED = {"messages", "tools", "add_generation_prompt"}


def _variables(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    if taken := RESERVED & set(variables):
        raise ValueError(f"'{min(taken)}' has a field of its own")
    return variables


class Chat(Sampled):
    """The body of /v1/chat/completions.

    Attributes:
        chat_template_kwargs: not of OpenAI's, named as in vLLM: more variables for the chat template.
    """

    messages: Annotated[Several[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: AnyFormat | SchemaFormat | None = Field(None, discriminator="type")
    tools: Annotated[Several[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_variables)] | None = None
    modalities: Several[Literal["text"]] | None = None


Ids = Several[Annotated[int, Field(ge=0, lt=2**31)]]


class Text(Sampled):
    """The body of /v1/completions."""

    prompt: str | Several[str] | Ids | Several[Ids]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> Sequence[str | Ids]:
        """Prompts as a list of them: a text, or a list of ids, is one."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [cast(str | Ids, self.prompt)]
        return cast(Sequence[str | Ids], self.prompt)

    @property
    def answers(self) -> int:
        return super().answers * len(self.prompts)


# /v1/responses writes most of this in other words.


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: Any = None
    status: Any = None
    phase: Any = None


class ReasoningPart(Body):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Body):
    type: Literal["reasoning"]
    content: Several[ReasoningPart] | None = None
    summary: Any = None
    id: Any = None
    status: Any = None
    encrypted_content: Any = None


class InputCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Annotated[str, AfterValidator(_arguments)]
    id: Any = None
    status: Any = None


class InputResult(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Several[TextPart]
    id: Any = None
    status: Any = None


class ResponseTool(Function):
    type: Literal["function"]


class ResponseChoice(Named):
    type: Literal["function"]


class ResponseSchema(Schema):
    type: Literal["json_schema"]


class TextOptions(Body):
    format: AnyFormat | ResponseSchema | None = Field(None, discriminator="type")
    verbosity: Any = None


class ReasoningOptions(Body):
    effort: str | None = None
    summary: Any = None
    generate_summary: Any = None


def _kind(item: Any) -> str | None:
    """What an item is called; those that do not say it are messages."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputReasoning, Tag("reasoning")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")],
    Discriminator(_kind),
]


class Response(Options):
    """The body of /v1/responses. Nothing is stored here, so a conversation is sent as a whole each time."""

    input: str | Several[Item]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[Several[ResponseTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseChoice | None = None
    include: Several[Literal["reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
