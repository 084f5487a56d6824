"""A Hugging Face `Tokenizer` from the metadata of a GGUF file, with the ids of llama.cpp.

GGUF describes two families. "gpt2" is byte-level BPE: the file only names the rule that splits text into pieces first
(pretokenizers.py). "llama" is SentencePiece's BPE: the file has scores but no merges, and text is joined pair by pair,
best score first. We derive the merges, so both become `models.BPE`. The alternative, `Unigram` over the same scores, is
another algorithm: it maximizes a sum of scores and gives other ids.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxllm.errors import InputError
from jaxllm.tokenizer import pretokenizers

_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"
_REQUIRED = object()

# Values of tokenizer.ggml.token_type that matter here; normal, unused and byte tokens are plain entries of the BPE.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

LONGEST = 1000  # characters of a token of SentencePiece; those of published models have up to 50

# Tokens that end a turn are control tokens even where a converter forgot to say so; llama.cpp does the same.
_ENDS = {
    *("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>"),
    *("<end_of_turn>", "<turn|>", "<｜end▁of▁sentence｜>"),
}


class _Vocabulary(NamedTuple):
    tokens: list[str]
    ids: dict[str, int]
    types: np.ndarray


def build(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that GGUF `metadata` describes. It adds neither BOS nor EOS; control tokens in text are parsed.

    Raises:
        InputError: the kind of tokenizer is not supported, or the metadata contradicts itself.
    """
    model = _get(metadata, "model", str)
    if model not in ("gpt2", "gemma4", "llama"):
        raise InputError(f"{_PREFIX}model is {model!r}, which is not supported; 'gpt2', 'gemma4' and 'llama' are")
    vocabulary = _vocabulary(metadata)
    if model == "llama":
        tokenizer = _sentencepiece(metadata, vocabulary)
    else:
        # A "gemma4" model is merges over plain text whatever its `pre` says.
        pre = "gemma4" if model == "gemma4" else _get(metadata, "pre", str, None)
        tokenizer = _merging(metadata, vocabulary, pretokenizers.lookup(pre))
    _add_tokens(tokenizer, vocabulary, str(metadata.get("general.name", "")))
    return tokenizer


def _sentencepiece(metadata: Mapping[str, object], vocabulary: _Vocabulary) -> Tokenizer:
    if (longest := max(map(len, vocabulary.tokens))) > LONGEST:  # deriving merges takes time like its square
        raise InputError(f"{_PREFIX}tokens has one of {longest} characters, but at most {LONGEST} are supported")
    scores = _numbers(metadata, "scores", len(vocabulary.tokens), kinds="iuf")
    if np.isnan(scores).any():
        raise InputError(f"{_PREFIX}scores[{int(np.isnan(scores).argmax())}] is not a number")
    prefix = _get(metadata, "add_space_prefix", bool, True)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary.ids,
            _derive_merges(vocabulary, scores),
            unk_token=vocabulary.tokens[_token_id(metadata, "unknown_token_id", vocabulary, default=0)],
            byte_fallback=True,
        )
    )
    # `Prepend` acts on every stretch of text between special tokens, which is where llama.cpp puts the space too.
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    tokenizer.decoder = _text_decoder(strip=prefix)
    return tokenizer


def _merging(
    metadata: Mapping[str, object], vocabulary: _Vocabulary, pre_tokenizer: pretokenizers.PreTokenizer
) -> Tokenizer:
    byte_level = pre_tokenizer.byte_level
    merges = _read_merges(metadata, vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocabulary.ids, merges, ignore_merges=pre_tokenizer.ignore_merges, byte_fallback=not byte_level)
    )
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre_tokenizer.patterns]
    if byte_level:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.decoder = _text_decoder(strip=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def _text_decoder(strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def _derive_merges(vocabulary: _Vocabulary, scores: np.ndarray) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score of the third first.

    SentencePiece joins the leftmost of equally good pairs, and ranks cannot say "leftmost". Within a run of one
    character, the longer tokens are on the left, so taking the pairs with the longest left half first comes to the
    same. (Ordering them by id, as transformers does, cuts runs of spaces in other places.)
    """
    ids = vocabulary.ids
    pairs = [
        (-score, -cut, token[:cut], token[cut:])
        for token, score in zip(vocabulary.tokens, scores.tolist(), strict=True)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _read_merges(metadata: Mapping[str, object], vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    lines, ids = _strings(metadata, "merges"), vocabulary.ids
    cuts = [line.find(" ", 1) for line in lines]
    if -1 in cuts:
        raise InputError(f"{_PREFIX}merges: {lines[cuts.index(-1)]!r} is not two tokens with a space between them")
    pairs = [(line[:cut], line[cut + 1 :]) for line, cut in zip(lines, cuts, strict=True)]
    for left, right in pairs:
        if not (left in ids and right in ids and left + right in ids):
            lacking = next(token for token in (left, right, left + right) if token not in ids)
            raise InputError(
                f"{_PREFIX}merges: {f'{left} {right}'!r} needs {lacking!r}, which is not in {_PREFIX}tokens"
            )
    return list(dict.fromkeys(pairs))  # of duplicates, the first one counts


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary, name: str) -> None:
    # Phi-3 was trained with the white space after these tokens removed, a fact that GGUF has no key for.
    is_phi3 = any(s in name.lower() for s in ("phi-3", "phi3"))
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types.tolist(), strict=True):
        is_special = kind in (UNKNOWN, CONTROL) or token in _ENDS
        if is_special or kind == USER_DEFINED:
            rstrip = is_phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")
            added = AddedToken(token, rstrip=rstrip, normalized=False, special=is_special)
            (special if is_special else plain).append(added)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _vocabulary(metadata: Mapping[str, object]) -> _Vocabulary:
    # An empty token cannot be looked up; llama.cpp gives it this name.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_strings(metadata, "tokens"))]
    if not tokens:
        raise InputError(f"{_PREFIX}tokens is empty")
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if ids.setdefault(token, i) != i:
            raise InputError(f"{_PREFIX}tokens has {token!r} twice, as {ids[token]} and {i}")
    types = np.ones(len(tokens), np.int32)  # all normal
    if _PREFIX + "token_type" in metadata:
        types = _numbers(metadata, "token_type", len(tokens), kinds="iu")
    vocabulary = _Vocabulary(tokens, ids, types)
    for key in metadata:
        if key.startswith(_PREFIX) and key.endswith("_token_id"):
            _token_id(metadata, key.removeprefix(_PREFIX), vocabulary)
    return vocabulary


def _token_id(metadata: Mapping[str, object], name: str, vocabulary: _Vocabulary, default: object = _REQUIRED) -> int:
    index = _get(metadata, name, int, default)
    if not 0 <= index < len(vocabulary.tokens):
        raise InputError(f"{_PREFIX}{name} is {index}, but there are {len(vocabulary.tokens)} tokens")
    return index


def _get[T](metadata: Mapping[str, Any], name: str, kind: type[T], default: Any = _REQUIRED) -> T:
    value = metadata.get(_PREFIX + name, default)
    if value is _REQUIRED:
        raise InputError(f"{_PREFIX}{name} is missing")
    if value is not default and type(value) is not kind:
        raise InputError(f"{_PREFIX}{name} is of type {type(value).__name__}, expected {kind.__name__}")
    return value


def _strings(metadata: Mapping[str, object], name: str) -> list[str]:
    strings = _get(metadata, name, list)
    for i, s in enumerate(strings):
        if not isinstance(s, str):
            raise InputError(f"{_PREFIX}{name}[{i}] is of type {type(s).__name__}, expected str")
    try:
        "".join(strings).encode()
    except UnicodeEncodeError:
        i = next(i for i, s in enumerate(strings) if s != s.encode(errors="replace").decode())
        raise InputError(f"{_PREFIX}{name}[{i}] is {strings[i]!r}, which is not Unicode text") from None
    return strings


def _numbers(metadata: Mapping[str, object], name: str, count: int, kinds: str) -> np.ndarray:
    """One number for each token, of one of numpy's `kinds`."""
    value = metadata.get(_PREFIX + name, _REQUIRED)
    if value is _REQUIRED:
        raise InputError(f"{_PREFIX}{name} is missing")
    try:
        numbers = np.asarray(value)
    except ValueError:  # ragged
        numbers = np.empty(0, object)
    if numbers.ndim != 1 or numbers.dtype.kind not in kinds:
        raise InputError(f"{_PREFIX}{name} is not a list of numbers")
    if len(numbers) != count:
        raise InputError(f"{_PREFIX}{name} has {len(numbers)} entries for {count} tokens")
    return numbers
