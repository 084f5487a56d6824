"""Tokenizers between Hugging Face's files and GGUF metadata: the inverse of gguf.py, and what that builds, as files.

GGUF has no place for the steps of a tokenizer.json. It names one of llama.cpp's two families, and the rule that splits
text. So each step has to be one that such a name stands for; anything else would give other ids, and is refused.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import processors

from jaxllm.errors import InputError
from jaxllm.tokenizer import gguf, pretokenizers
from jaxllm.tokenizer.gguf import CONTROL, UNKNOWN, USER_DEFINED
from jaxllm.tokenizer.text import Tokenizer

_G, _TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
NORMAL, UNUSED, BYTE = 1, 5, 6
_SPACE = "\u2581"
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}  # (sic)
_PROBLEM = "tokenizer.json: {} cannot be said in a GGUF file"

# Names that llama.cpp's converter gives the most models of a group; other groups' first names are the usual ones.
_USUAL = {"llama3": "llama-bpe", "starcoder": "smollm"}


def gguf_tokenizer(
    tokenizer_json: Mapping[str, Any], tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The GGUF metadata for the tokenizer of a Hugging Face directory.

    Args:
        tokenizer_config: with the chat template, which may have been a file of its own, as `chat_template`.
        config: the config.json, for the size of the vocabulary (which is filled up with unused tokens) and for ids of
            special tokens.

    Raises:
        InputError: the tokenizer has a step that GGUF has no name for.
    """
    model = tokenizer_json["model"]
    if model.get("type") != "BPE":
        raise InputError(_PROBLEM.format(f"a model of type {model.get('type')!r}"))
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise InputError(_PROBLEM.format(f"'{option}'"))
    added = {token["id"]: token for token in tokenizer_json.get("added_tokens") or []}
    tokens = _tokens(model["vocab"], added, int(config.get("vocab_size") or 0))
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    unknown = (model.get("unk_token"), _text(tokenizer_config.get("unk_token"))) if model.get("byte_fallback") else ()
    types = [_type(i, token, added.get(i), unknown) for i, token in enumerate(tokens)]
    kind = _plain if model.get("byte_fallback") else _byte_level
    metadata = kind(tokenizer_json, tokens, types, merges) | {_G + "tokens": tokens, _G + "token_type": types}
    metadata |= _special(tokenizer_json, tokenizer_config, config, {token: i for i, token in enumerate(tokens)})
    return metadata | _templates(tokenizer_config.get("chat_template"))


def _tokens(vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], size: int) -> list[str]:
    by_id = {i: token for token, i in vocab.items()} | {i: token["content"] for i, token in added.items()}
    last = max(by_id)
    if size and last >= size:
        raise InputError(f"tokenizer.json: token {last} is outside the vocabulary of {size} tokens ('vocab_size')")
    return [by_id.get(i, f"[PAD{i}]") for i in range(max(size, last + 1))]


def _type(i: int, token: str, added: Mapping[str, Any] | None, unknown: tuple[str | None, ...]) -> int:
    """The type of a token. Only vocabularies with an `unknown` token, those of plain text, have types for bytes."""
    if token == f"[PAD{i}]" and added is None:
        return UNUSED
    if unknown and re.fullmatch("<0x[0-9A-F]{2}>", token):
        return BYTE
    if token in unknown:
        return UNKNOWN
    return NORMAL if added is None else CONTROL if added["special"] else USER_DEFINED


def _byte_level(
    tokenizer_json: Mapping[str, Any], tokens: list[str], types: list[int], merges: list[tuple[str, str]]
) -> dict[str, Any]:
    for step in _steps(tokenizer_json["normalizer"], "normalizers"):
        if step["type"] != "NFC":  # which llama.cpp leaves out
            raise InputError(_PROBLEM.format(f"a normalizer {step['type']!r}"))
    steps = _steps(tokenizer_json["pre_tokenizer"], "pretokenizers")
    if not steps or not any(step["type"] == "ByteLevel" for step in steps):
        raise InputError(_PROBLEM.format("a BPE model whose text is neither bytes nor falls back to them"))
    patterns = tuple(pattern for step in steps for pattern in _patterns(step))
    made = set(map("".join, merges))
    normal = [token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL]
    complete = all(len(token) == 1 or token in made for token in normal)
    ignore = bool(tokenizer_json["model"].get("ignore_merges"))
    pre = _name(lambda p: p.byte_level and p.patterns == patterns and (complete or p.ignore_merges == ignore))
    if pre is None:
        raise InputError(_PROBLEM.format(f"splitting text by {' ; '.join(patterns) or 'nothing'}"))
    merged = {_G + "merges": list(map(" ".join, merges)), _G + "add_space_prefix": False}
    return {_G + "model": "gpt2", _G + "pre": pre} | merged


def _plain(
    tokenizer_json: Mapping[str, Any], tokens: list[str], types: list[int], merges: list[tuple[str, str]]
) -> dict[str, Any]:
    """Tokens of plain text with U+2581 for spaces: SentencePiece's, or merges over lines."""
    steps = _steps(tokenizer_json["pre_tokenizer"], "pretokenizers")
    normal = _steps(tokenizer_json["normalizer"], "normalizers")
    prefix = False
    for step in [*normal, *steps]:
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Metaspace" and step["replacement"] == _SPACE and step.get("split") is False:
            prefix = step["prepend_scheme"] != "never"
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            pass
        elif step["type"] == "Split" and step["pattern"] in ({"String": " "}, {"Regex": pretokenizers.LINES}):
            pass  # there are no spaces any more; of lines see below
        else:
            raise InputError(_PROBLEM.format(f"the step {step['type']!r} before a model that falls back to bytes"))
    if any(step.get("pattern") == {"Regex": pretokenizers.LINES} for step in steps):
        model = "gemma4" if tokenizer_json["model"].get("ignore_merges") else "gpt2"
        pre = "gemma4" if model == "gemma4" else "sarvam-moe"
        return {_G + "model": model, _G + "pre": pre, _G + "merges": list(map(" ".join, merges))}
    scores = _scores(tokens, types, merges)
    return {_G + "model": "llama", _G + "pre": "default", _G + "scores": scores, _G + "add_space_prefix": prefix}


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """A score for each token so that joining the best first is what the merges say, see `gguf._derive_merges`.

    It is the rank of the first merge that makes the token, negative. Tokens whose merges stand between each other's
    have the same, as they have in SentencePiece's model.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
        last["".join(pair)] = rank
    ids, known = set(tokens), set(merges)
    for token, kind in zip(tokens, types, strict=True):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)) if kind == NORMAL)
        if any(a in ids and b in ids and (a, b) not in known for a, b in cuts):
            raise InputError(_PROBLEM.format(f"a model that does not join {token!r} from every pair of its parts"))
    scores: dict[str, float] = {}
    score, end = 0, -1
    for token, rank in first.items():
        score, end = (-rank - 1 if rank > end else score), max(end, last[token])
        scores[token] = float(score)
    return [scores.get(token, 0.0) for token in tokens]


def _steps(step: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return [inner for s in step[parts] for inner in _steps(s, parts)] if step["type"] == "Sequence" else [step]


def _patterns(step: Mapping[str, Any]) -> list[str]:
    """The patterns by which a step of a byte-level tokenizer splits text."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [pretokenizers.GPT2] if step.get("use_regex", True) else []
    if kind == "Digits":
        return [r"\p{N}" if step["individual_digits"] else r"\p{N}+"]
    isolated = step.get("behavior") == "Isolated" or (step.get("behavior") == "Removed" and step.get("invert"))
    if kind == "Split" and isolated:
        return [step["pattern"].get("Regex") or re.escape(step["pattern"]["String"])]
    raise InputError(_PROBLEM.format(f"the step {kind!r} before a byte-level model"))


def _name(good: Callable[[pretokenizers.PreTokenizer], bool]) -> str | None:
    name = next((name for name, pre in pretokenizers.BY_NAME.items() if good(pre)), None)
    return None if name is None else _USUAL.get(name, name)


def _special(
    tokenizer_json: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    config: Mapping[str, Any],
    ids: Mapping[str, int],
) -> dict[str, Any]:
    """Ids of special tokens, and which of them come before and after a text."""
    metadata: dict[str, Any] = {}
    for role, name in _ROLES.items():
        text = _text(tokenizer_config.get(f"{role}_token"))
        given = config.get(f"{role}_token_id")
        index = ids.get(text, given) if text is not None else given
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and 0 <= index < len(ids):
            metadata[f"{_G}{name}_token_id"] = index
    ends = config.get("eos_token_id")
    more = [i for i in ends if i != metadata.get(_G + "eos_token_id")] if isinstance(ends, list) else []
    metadata |= {f"{_G}{name}_token_id": i for name, i in zip(("eot", "eom"), more, strict=False)}
    before, after = _surrounding(tokenizer_json.get("post_processor"))
    bos, eos = (metadata.get(f"{_G}{role}_token_id") for role in ("bos", "eos"))
    for what, given, own, role in (("bos", before, bos, "before"), ("eos", after, eos, "after")):
        if any(ids.get(token) != own for token in given) or len(given) > 1:
            raise InputError(_PROBLEM.format(f"'{' '.join(given)}' {role} each text"))
        metadata[f"{_G}add_{what}_token"] = bool(given)
    return metadata


def _text(token: Any) -> str | None:
    """A token in tokenizer_config.json is text, or an object with it."""
    return token.get("content") if isinstance(token, Mapping) else token


def _surrounding(step: Mapping[str, Any] | None) -> tuple[list[str], list[str]]:
    """The special tokens that a post-processor puts before and after a text."""
    before: list[str] = []
    after: list[str] = []
    for inner in _steps(step, "processors"):
        if inner["type"] == "TemplateProcessing":
            names = [next(iter(part.items())) for part in inner["single"]]
            at = next(i for i, (kind, _) in enumerate(names) if kind == "Sequence")
            before, after = ([part["id"] for _, part in some] for some in (names[:at], names[at + 1 :]))
        elif inner["type"] != "ByteLevel":
            raise InputError(_PROBLEM.format(f"a post-processor {inner['type']!r}"))
    return before, after


def _templates(template: Any) -> dict[str, Any]:
    if not isinstance(template, list):
        return {} if template is None else {_TEMPLATE: template}
    named = {entry["name"]: entry["template"] for entry in template}
    default = {_TEMPLATE: named.pop("default")} if "default" in named else {}
    others = {f"{_TEMPLATE}.{name}": text for name, text in named.items()}
    return default | others | ({"tokenizer.chat_templates": list(named)} if named else {})


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int | list[int]]:
    """What a config.json and a generation_config.json say of special tokens; `eos_token_id` may be several."""
    names = {"bos_token_id": "bos", "pad_token_id": "padding"}
    ids: dict[str, int | list[int]] = {
        key: metadata[f"{_G}{name}_token_id"] for key, name in names.items() if f"{_G}{name}_token_id" in metadata
    }
    first = metadata.get(_G + "eos_token_id")
    ends = [*([] if first is None else [first]), *sorted(Tokenizer.from_gguf(metadata).eos_ids - {first})]
    return ids | ({} if not ends else {"eos_token_id": ends[0] if len(ends) == 1 else ends})


def huggingface_tokenizer(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a Hugging Face directory for the tokenizer in GGUF metadata, with the ids that `gguf.build` gives.

    Raises:
        InputError: the tokenizer is of an unknown kind, or inconsistent.
    """
    tokenizer = Tokenizer.from_gguf(metadata)
    backend = gguf.build(metadata)
    roles = {role: metadata.get(f"{_G}{name}_token_id") for role, name in _ROLES.items()}
    names = {role: backend.id_to_token(index) for role, index in roles.items() if index is not None}
    before = tokenizer.encode("")
    after = [roles["eos"]] if metadata.get(_G + "add_eos_token") and roles["eos"] is not None else []
    if before or after:
        around = [(backend.id_to_token(i), i) for i in (*before, *after)]
        texts = [name for name, _ in around]
        first, last = texts[: len(before)], texts[len(before) :]
        backend.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{name}:1" for name in first), "$B:1", *(f"{name}:1" for name in last)],
            special_tokens=around,
        )
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": name for role, name in names.items()}
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    config |= {} if context is None else {"model_max_length": context}
    if _TEMPLATE in metadata:
        config["chat_template"] = metadata[_TEMPLATE]
    if "tokenizer.chat_templates" in metadata:
        named = {name: metadata[f"{_TEMPLATE}.{name}"] for name in metadata["tokenizer.chat_templates"]}
        named |= {"default": metadata[_TEMPLATE]} if _TEMPLATE in metadata else {}
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    files = {"tokenizer_config.json": config, "generation_config.json": special_ids(metadata)}
    return {"tokenizer.json": backend.to_str().encode()} | {name: _json(value) for name, value in files.items()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
