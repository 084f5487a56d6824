"""What a directory says of texts: its tokenizer, the tokens that end an answer, and how answers are sampled."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxllm.checkpoint.safetensors import optional_json
from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.sampling import Sampler
from jaxllm.tokenizer import Tokenizer

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Texts:
    """How texts become tokens and tokens texts.

    tokenizer: None where the checkpoint has none.
    eos_ids: tokens that end an answer; a tokenizer may know more of them.
    sampling: what generation_config.json asks for, by the names of `LanguageModel.generate`.
    """

    tokenizer: Tokenizer | None = None
    eos_ids: frozenset[int] = frozenset()
    sampling: Mapping[str, float] = field(default_factory=dict)


def read_texts(folder: Path, config: Mapping[str, object]) -> Texts:
    """What the files of a directory say beside its `config`.

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


def _sampling(generation: Entries) -> dict[str, float]:
    """What answers are drawn with; what transformers takes for "not done" (top_k 0, min_p 0) is left out."""
    if not generation.flag("do_sample"):
        return {}
    given = {key: generation.number(key, above=-math.inf) for key in SAMPLING if key in generation}
    given = {"temperature": 1.0} | {k: v for k, v in given.items() if v or k not in ("top_k", "min_p")}
    try:
        Sampler.of(**given)
    except InputError as error:
        raise InputError(f"{generation.where}: {error}") from error
    return given
