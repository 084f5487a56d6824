"""What endpoints have in common: a request made into work for the engine, and an answer as it grows."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxllm.engine.answer import Completion, TokenLogprob
from jaxllm.sampling import Sampling
from jaxllm.serving.bodies import Sampled
from jaxllm.serving.errors import RequestError
from jaxllm.serving.parts import Content, Part, Reasoning, Splitter, ToolCall
from jaxllm.serving.worker import Event
from jaxllm.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Served:
    """What answers have to know of the model.

    Attributes:
        name: what clients call it.
        capacity: the most tokens that a prompt and its answer may have together.
        sampling: what a request leaves open.
    """

    name: str
    tokenizer: Tokenizer
    capacity: int
    sampling: Sampling


class Reply(Protocol):
    """The answer to a request in the shape of its endpoint.

    Whatever is streamed or not, the same events go through `push`, and so both say the same.
    """

    @property
    def asks(self) -> Sequence[dict[str, Any]]:
        """What the engine has to do, the arguments of `Engine.add`."""

    @property
    def end(self) -> bytes:
        """What ends a stream after its last object, as it is sent."""

    def begin(self) -> list[dict[str, Any]]:
        """What a stream begins with."""

    def push(self, event: Event) -> list[dict[str, Any]]:
        """Take in what is new, and return what a stream says of it."""

    def finish(self) -> list[dict[str, Any]]:
        """What a stream ends with."""

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def failure(self, error: RequestError) -> dict[str, Any]:
        """What a stream ends with that has begun and cannot go on."""


@dataclass
class Choice:
    """One answer of a request: what came so far, taken apart.

    Attributes:
        calls: each with its id.
        reasoning_tokens: those before the first token of the content, if there was reasoning among them.
    """

    splitter: Splitter
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, ToolCall]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reasoning_tokens: int = 0
    completion: Completion | None = None

    def push(self, event: Event) -> list[Part]:
        """Take in what is new, and return the parts that this makes."""
        parts = self.splitter.push(event.piece.tokens, event.piece.text)
        if event.completion:
            parts += self.splitter.finish()
            self.completion = event.completion
        for part in parts:
            match part:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case ToolCall():
                    self.calls.append((new_id("call_"), part))
        if self.reasoning and not self.content and not self.calls:
            self.reasoning_tokens += len(event.piece.tokens)
        self.logprobs += event.piece.logprobs or ()
        return parts

    @property
    def finish_reason(self) -> str | None:
        """In OpenAI's words; None while the answer is not complete. Time that was up is a limit of length."""
        if self.completion is None:
            return None
        if self.completion.finish_reason != "stop":
            return "length"
        return "tool_calls" if self.calls else "stop"


def counts_usage(body: Sampled) -> bool:
    """Whether a stream has to end with its usage."""
    return bool(body.stream_options and body.stream_options.include_usage)


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def usage(choices: Sequence[Choice], each: int) -> dict[str, Any]:
    """Tokens of complete answers; a prompt counts once for its `each` answers."""
    done = [choice.completion for choice in choices if choice.completion]
    prompt, made = sum(c.prompt_tokens for c in done[::each]), sum(len(c.tokens) for c in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in done[::each])},
        "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)},
    }
