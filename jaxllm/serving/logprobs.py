"""Log-probabilities in OpenAI's shapes."""

from collections.abc import Sequence
from typing import Any

from jaxllm.engine import TokenLogprob
from jaxllm.structured import token_bytes
from jaxllm.tokenizer import Tokenizer


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As /v1/chat/completions has them: of every token, also of those that end an answer or are reasoning."""
    content = [
        _named(tokenizer, l.token, l.logprob) | {"top_logprobs": [_named(tokenizer, *pair) for pair in l.top]}
        for l in logprobs
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """As /v1/completions has them.

    Args:
        offset: characters of the text before these tokens.
    """
    tokens = [_text(tokenizer, l.token) for l in logprobs]
    offsets = [offset]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [l.logprob for l in logprobs],
        "top_logprobs": [{_text(tokenizer, token): value for token, value in l.top} for l in logprobs],
        "text_offset": offsets,
    }


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": _text(tokenizer, token),
        "logprob": logprob,
        "bytes": list(token_bytes(tokenizer, token)),
    }


def _text(tokenizer: Tokenizer, token: int) -> str:
    """The token's text; bytes that are only a part of a character become U+FFFD."""
    return token_bytes(tokenizer, token).decode(errors="replace")
