"""A directory's settings for text: its tokenizer, the tokens that end an answer, and how answers are sampled."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxllm.checkpoint.safetensors import optional_json
from jaxllm.entries import Entries
from jaxllm.errors import located
from jaxllm.sampling import Sampling
from jaxllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Texts:
    """A checkpoint's tokenizer and generation settings.

    tokenizer: None where the checkpoint has none.
    eos_ids: tokens that end an answer; a tokenizer may know more of them.
    sampling: what generation_config.json asks for.
    """

    tokenizer: Tokenizer | None = None
    eos_ids: frozenset[int] = frozenset()
    sampling: Sampling = Sampling()


def read_texts(folder: Path, config: Mapping[str, object]) -> Texts:
    """Read these settings from a directory and its `config`.

    Raises:
        InputError: one of the files cannot be read, or asks for something impossible.
    """
    generation = optional_json(folder, "generation_config.json")
    eos = _eos(generation if "eos_token_id" in generation else Entries(config, "config.json"))
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_directory(folder, optional_json(folder, "tokenizer_config.json").values, eos)
    return Texts(tokenizer, frozenset(eos), _sampling(generation))


def _eos(entries: Entries) -> list[int]:
    def listed(value: object) -> list:
        return value if isinstance(value, list) else [value]

    def good(value: object) -> bool:
        return all(type(token) is int and -1 <= token < 2**31 for token in listed(value))

    tokens = listed(entries.get("eos_token_id", [], good, "a token id or a list of them"))
    return [token for token in tokens if token >= 0]  # some write -1 for "there is none"


def _sampling(generation: Entries) -> Sampling:
    """How answers are sampled. Values that mean "off" in transformers (top_k 0, min_p 0) are left out."""
    if not generation.flag("do_sample"):
        return Sampling()
    names = [option.name for option in fields(Sampling) if option.name in generation]
    given: dict[str, Any] = {name: generation.number(name, above=-math.inf) for name in names}
    with located(generation.where):
        return Sampling(**{"temperature": 1.0} | {k: v for k, v in given.items() if v or k not in ("top_k", "min_p")})
