"""Log-probabilities in OpenAI's shapes."""

from collections.abc import Sequence
from typing import Any

from jaxllm.engine.answer import TokenLogprob
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
    spelled = [token_bytes(tokenizer, l.token) for l in logprobs]
    lengths = [len(token.decode(errors="replace")) for token in spelled]
    return {
        "tokens": [_key(token) for token in spelled],
        "token_logprobs": [l.logprob for l in logprobs],
        "top_logprobs": [{_key(token_bytes(tokenizer, token)): value for token, value in l.top} for l in logprobs],
        "text_offset": [offset + sum(lengths[:i]) for i in range(len(lengths))],
    }


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    spelled = token_bytes(tokenizer, token)
    return {"token": spelled.decode(errors="replace"), "logprob": logprob, "bytes": list(spelled)}


def _key(token: bytes) -> str:
    """A token's text or, of a part of a character, its bytes as OpenAI's API wrote them: keys have to differ."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
