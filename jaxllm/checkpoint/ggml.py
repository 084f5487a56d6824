"""Llama files from before GGUF: "ggml", "ggmf" and "ggjt", presented as GGUF files.

The three differ little: "ggmf" added a version and the scores of tokens, "ggjt" the alignment of tensors. The layout of
blocks changed with versions 2 and 3 of "ggjt", so quantized files can be read only if they are of version 3.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGMLQuantizationType as T
from gguf import TokenType

from jaxllm.checkpoint.gguf import MOST_ENTRIES, MOST_ITEMS, Cursor, tensor_weight, whole_file
from jaxllm.errors import InputError, located
from jaxllm.formats.base import Weight

# As bytes in the file: the magics are little-endian words.
_VERSIONS = {b"lmgg": ("ggml", ()), b"fmgg": ("ggmf", (1,)), b"tjgg": ("ggjt", (1, 2, 3))}
_OTHERS = {b"algg": "a LoRA adapter (ggla)", b"nsgg": "a saved state of llama.cpp (ggsn)"}

_FLOATS = {T.F32, T.F16}
_BLOCKS = {T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K}

_NAMES = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
_LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",  # rows in the same order as in GGUF: neighbours are paired
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


@dataclass(frozen=True)
class HParams:
    """The numbers after a file's magic, with llama.cpp's names."""

    n_vocab: int
    n_embd: int
    n_mult: int
    n_head: int
    n_layer: int
    n_rot: int
    ftype: int


@dataclass(frozen=True)
class GGMLFile:
    """An open file. `metadata` and `tensors` have the keys and names of GGUF; leaves are `FileArray`s.

    kind: the container and its version, for example "ggjt version 3".
    vocabulary: tokens as bytes, with their scores.
    """

    path: Path
    kind: str
    hparams: HParams
    vocabulary: list[tuple[bytes, float]]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Weight]
    architecture: str = "llama"


def is_ggml(path: Path) -> bool:
    """Whether a file is of a kind that `open_ggml` reads, or refuses with a specific message."""
    with path.open("rb") as file:
        return file.read(4) in (*_VERSIONS, *_OTHERS)


def open_ggml(path: Path, gqa: int = 1, context: int = 4096) -> GGMLFile:
    """Read the header and vocabulary of a file from before GGUF.

    Args:
        gqa: query heads per key/value head. The files do not contain it; it is 8 for the 70B model of Llama 2.
        context: positions the model was trained on. The files do not contain it; it is 2048 for the first Llama.

    Raises:
        InputError: the file is of another kind, truncated, inconsistent, or quantized in an obsolete layout.
    """
    with located(path), path.open("rb") as file:
        magic = file.read(4)
        if magic in _OTHERS:
            raise InputError(f"{_OTHERS[magic]}, not a model")
        if magic not in _VERSIONS:
            raise InputError(f"not a GGML file (it begins with {magic!r})")
        return _parse(path, file, magic, gqa, context)


def _parse(path: Path, opened: BinaryIO, magic: bytes, gqa: int, context: int) -> GGMLFile:
    whole = whole_file(path, opened)
    cursor = Cursor(opened, len(magic), whole.nbytes)
    container, versions = _VERSIONS[magic]
    version = cursor.number() if versions else None
    kind = f"{container} version {version}" if versions else f"{container} (unversioned)"
    if versions and version not in versions:
        raise InputError(f"{kind} is not supported; known: {', '.join(map(str, versions))}")
    if container != "ggjt" and (more := path.with_name(f"{path.name}.1")).exists():
        raise InputError(f"a model split over several files (there is {more.name}), which is not supported")

    hparams = HParams(*cursor.numbers("<u4", len(fields(HParams))))
    vocabulary = _vocabulary(cursor, hparams.n_vocab, scores=bool(versions))
    tensors: dict[str, Weight] = {}
    while cursor.left:
        if len(tensors) == MOST_ENTRIES:
            raise InputError(f"damaged: more than {MOST_ENTRIES} tensors")
        name, dims, type_number = _tensor_info(cursor)
        if type_number not in _FLOATS and (kind != "ggjt version 3" or type_number not in _BLOCKS):
            raise InputError(_unreadable(name, type_number, kind))
        if container == "ggjt":
            cursor.skip(-cursor.offset % 32)
        name = _gguf_name(name)
        if name in tensors:
            raise InputError(f"tensor '{name}' is given twice")
        tensors[name] = tensor_weight(whole, cursor.offset, name, dims, type_number)
        cursor.skip(tensors[name].nbytes)
    metadata = _sizes(hparams, tensors, gqa, context) | _tokenizer(vocabulary)
    return GGMLFile(path, kind, hparams, vocabulary, metadata, tensors)


def _vocabulary(cursor: Cursor, count: int, scores: bool) -> list[tuple[bytes, float]]:
    """Tokens with scores. Missing scores become minus the id, since SentencePiece sorts its pieces by falling score.

    (llama.cpp's converter writes zeros instead, so that text is merged into tokens that differ from the training's.)
    """
    vocabulary = []
    for i in range(cursor.plausible(count, MOST_ITEMS // 4)):
        token = cursor.take(cursor.length())
        vocabulary.append((token, cursor.number("<f4") if scores else -float(i)))
    return vocabulary


def _tensor_info(cursor: Cursor) -> tuple[str, list[int], int]:
    rank, length, type_number = cursor.number(), cursor.length(), cursor.number()
    dims = cursor.dims(rank)
    return str(cursor.take(length), "utf-8", "replace"), dims, type_number


def _unreadable(name: str, type_number: int, kind: str) -> str:
    type = T(type_number).name if type_number in set(T) else type_number
    found = f"tensor {name[:64]!r} has type {type}"
    if kind == "ggjt version 3":
        return f"{found}, which such files do not have"
    return (
        f"{found}, and {kind} files lay out quantized blocks in a way that is no longer used (only F32 and F16 can be "
        "read): convert it to F16 with the llama.cpp of its time, or use a GGUF file"
    )


def _gguf_name(name: str) -> str:
    """The name in GGUF; an unknown name stays unchanged, so that the error message can show it."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"blk.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"
    return _NAMES.get(name, name)


def _sizes(hparams: HParams, tensors: Mapping[str, Weight], gqa: int, context: int) -> dict[str, Any]:
    """A model's sizes as GGUF metadata. Constants that these files lack are Llama 2's."""
    for name in ("token_embd.weight", "blk.0.ffn_gate.weight"):
        if name not in tensors:
            raise InputError(f"tensor '{name}' is missing")
    shape, want = tensors["token_embd.weight"].shape, (hparams.n_vocab, hparams.n_embd)
    if shape != want:
        raise InputError(f"tensor 'token_embd.weight' has shape {list(shape)}, but the header says {list(want)}")
    if hparams.n_layer > len(tensors):
        raise InputError(f"cut short or damaged: {hparams.n_layer} layers announced, {len(tensors)} tensors found")
    heads, width = hparams.n_head, hparams.n_embd
    if heads == 0 or width % (2 * heads):
        raise InputError(f"damaged: {heads} heads for a width of {width}")
    if gqa < 1 or heads % gqa:
        raise InputError(f"gqa {gqa} does not divide the model's {heads} heads")
    return {
        "general.architecture": "llama",
        "llama.block_count": hparams.n_layer,
        "llama.context_length": context,
        "llama.embedding_length": width,
        "llama.feed_forward_length": tensors["blk.0.ffn_gate.weight"].shape[0],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": heads // gqa,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": width // heads,  # not n_rot: "obsolete" in every converter
        "llama.rope.freq_base": 10000.0,
    }


def _tokenizer(vocabulary: list[tuple[bytes, float]]) -> dict[str, Any]:
    """The vocabulary as llama.cpp's `convert-llama-ggml-to-gguf.py` writes it into a GGUF file."""
    if len(vocabulary) < 3:
        raise InputError(f"a vocabulary of {len(vocabulary)} tokens, too few for those that begin and end a text")
    special = {0: ("<unk>", TokenType.UNKNOWN), 1: ("<s>", TokenType.CONTROL), 2: ("</s>", TokenType.CONTROL)}
    tokens, types = [], []
    for i, (token, _) in enumerate(vocabulary):
        if i in special:
            text, type = special[i]
        elif not token:
            text, type = "", TokenType.CONTROL
        elif i <= 258 and len(token) == 1:
            text, type = f"<0x{token[0]:02X}>", TokenType.BYTE
        else:
            text, type = token.decode("utf-8", "replace").replace(" ", "\u2581"), TokenType.NORMAL
        tokens.append(text)
        types.append(int(type))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [score for _, score in vocabulary],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
