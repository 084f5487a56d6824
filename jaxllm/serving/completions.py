"""/v1/completions: texts that are continued as they are, without a chat template."""

import time
from collections.abc import Sequence
from typing import Any

from jaxllm.engine.answer import TokenLogprob
from jaxllm.serving.answers import DONE, Choice, Served, counts_usage, new_id, usage
from jaxllm.serving.bodies import Text
from jaxllm.serving.errors import RequestError
from jaxllm.serving.logprobs import text_logprobs
from jaxllm.serving.parts import Content, Part
from jaxllm.serving.worker import Event

MAX_TOKENS = 16  # what OpenAI makes by default


class Unsplit:
    """A splitter that finds nothing but content."""

    def push(self, tokens: Sequence[int], text: str) -> list[Part]:
        return [Content(text)] if text else []

    def finish(self) -> list[Part]:
        return []


class TextReply:
    """See `Reply`. Choice i*n + j is the answer j to prompt i."""

    end = DONE

    def __init__(self, served: Served, body: Text) -> None:
        if body.echo and body.logprobs is not None:
            raise RequestError(400, "log-probabilities of a prompt are not computed: echo or logprobs", param="echo")
        tokenizer = served.tokenizer
        prompts = [tokenizer.encode(p) if isinstance(p, str) else p for p in body.prompts]
        self._each = body.n or 1
        ask = body.asked() | {"max_new_tokens": body.max_tokens or MAX_TOKENS, "logprobs": body.logprobs}
        self.asks = [ask | {"prompt": ids, "stream": stream} for ids in prompts for stream in range(self._each)]
        self._choices = [Choice(Unsplit()) for _ in self.asks]
        echoes = [tokenizer.decode(ids) if body.echo else "" for ids in prompts]
        self._echoes = [text for text in echoes for _ in range(self._each)]
        self._tokenizer, self._counts = tokenizer, counts_usage(body)
        self._common = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }

    def begin(self) -> list[dict[str, Any]]:
        return [self._chunk(index, text) for index, text in enumerate(self._echoes) if text]

    def push(self, event: Event) -> list[dict[str, Any]]:
        choice = self._choices[event.index]
        before = len(choice.content)
        choice.push(event)
        text, logprobs = choice.content[before:], event.piece.logprobs
        if not (text or logprobs or choice.completion):
            return []
        return [self._chunk(event.index, text, choice.finish_reason, logprobs, before)]

    def finish(self) -> list[dict[str, Any]]:
        return [self._common | {"choices": [], "usage": self._usage()}] if self._counts else []

    def whole(self) -> dict[str, Any]:
        choices = [
            self._choice(index, echo + choice.content, choice.finish_reason, choice.logprobs, 0)
            for index, (choice, echo) in enumerate(zip(self._choices, self._echoes, strict=True))
        ]
        return self._common | {"choices": choices, "usage": self._usage()}

    def failure(self, error: RequestError) -> dict[str, Any]:
        return error.body()

    def _usage(self) -> dict[str, Any]:
        return usage(self._choices, self._each)

    def _chunk(
        self,
        index: int,
        text: str,
        finish_reason: str | None = None,
        logprobs: Sequence[TokenLogprob] | None = None,
        offset: int = 0,
    ) -> dict[str, Any]:
        choice = self._choice(index, text, finish_reason, logprobs, offset)
        return self._common | {"choices": [choice]} | ({"usage": None} if self._counts else {})

    def _choice(
        self, index: int, text: str, finish_reason: str | None, logprobs: Sequence[TokenLogprob] | None, offset: int
    ) -> dict[str, Any]:
        found = text_logprobs(self._tokenizer, logprobs, offset) if logprobs else None
        return {"index": index, "text": text, "logprobs": found, "finish_reason": finish_reason}
