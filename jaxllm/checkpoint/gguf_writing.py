"""The header of a GGUF file that is to be written: metadata, and where each tensor's bytes have to go.

gguf-py's writer wants all tensors before it says where the first one goes, and keeps them in memory or in a temporary
file. Here the header is complete bytes, after which tensors can be written in any order, and again after a crash.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from jaxllm.checkpoint.gguf import MAGIC
from jaxllm.errors import InputError

VERSION, ALIGNMENT = 3, 32

_DTYPES = {
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT8: "u1",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
}
# Kinds of items that llama.cpp insists on and that Python values do not show.
_ITEMS = {
    "tokenizer.ggml.tokens": GGUFValueType.STRING,
    "tokenizer.ggml.merges": GGUFValueType.STRING,
    "tokenizer.ggml.scores": GGUFValueType.FLOAT32,
    "tokenizer.ggml.token_type": GGUFValueType.INT32,
    "tokenizer.ggml.precompiled_charsmap": GGUFValueType.UINT8,
}


def header(metadata: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...], str]]) -> tuple[bytes, list[int]]:
    """Everything before the first tensor's bytes, and where each tensor begins, from the start of the file.

    Numbers become uint32 (int32 below zero, 64 bits where those are too few) or float32, whole numbers in lists int32.
    Each tensor begins at a multiple of `general.alignment` bytes; what lies between them is not read.

    Args:
        metadata: in the file's order; "general.architecture" should be the first.
        tensors: name, shape (outermost first) and the type's name in ggml, such as "Q4_K".

    Raises:
        InputError: a value that GGUF cannot hold, an unknown type, or rows that are not whole blocks.
    """
    alignment = metadata.get("general.alignment", ALIGNMENT)
    keys = b"".join(_string(key) + _value(key, value) for key, value in metadata.items())
    infos, begin, begins = [], 0, []
    for name, shape, type_name in tensors:
        kind = _type(name, type_name)
        dims = np.array(shape[::-1], "<u8").tobytes()
        infos.append(_string(name) + _number(len(shape)) + dims + _number(kind) + _number(begin, "<u8"))
        begins.append(begin)
        begin += math.ceil(tensor_bytes(name, shape, type_name) / alignment) * alignment
    text = MAGIC + _number(VERSION) + _number(len(tensors), "<u8") + _number(len(metadata), "<u8")
    text += keys + b"".join(infos)
    text += b"\0" * (-len(text) % alignment)
    return text, [len(text) + begin for begin in begins]


def tensor_bytes(name: str, shape: tuple[int, ...], type_name: str) -> int:
    """The size of a tensor of this shape and type; `name` is for errors, see `header`."""
    size, nbytes = GGML_QUANT_SIZES[_type(name, type_name)]
    if not 1 <= len(shape) <= 4 or shape[-1] % size:
        raise InputError(f"tensor '{name}' of shape {list(shape)} cannot be of type {type_name}, in blocks of {size}")
    return math.prod(shape) // size * nbytes


def _type(name: str, type_name: str) -> GGMLQuantizationType:
    if type_name not in GGMLQuantizationType.__members__:
        raise InputError(f"tensor '{name}': GGUF files have no type {type_name!r}")
    return GGMLQuantizationType[type_name]


def _value(key: str, value: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str):
        return _number(GGUFValueType.STRING) + _string(value)
    if not isinstance(value, list):
        kind = _scalar(key, value, value, GGUFValueType.UINT32)
        return _number(kind) + _number(value, _DTYPES[kind])
    item = _item(key, value)
    begin = _number(GGUFValueType.ARRAY) + _number(item) + _number(len(value), "<u8")
    if item == GGUFValueType.STRING:
        return begin + b"".join(map(_string, value))
    return begin + np.array(value, _DTYPES[item]).tobytes()


def _item(key: str, values: list[Any]) -> GGUFValueType:
    """The type of all items of a list."""
    if key in _ITEMS:
        return _ITEMS[key]
    kinds = {type(value) for value in values}
    if kinds == {str}:
        return GGUFValueType.STRING
    if kinds <= {int}:
        return _scalar(key, min(values, default=0), max(values, default=0), GGUFValueType.INT32)
    if kinds <= {int, float}:
        return GGUFValueType.FLOAT32
    if kinds == {bool}:
        return GGUFValueType.BOOL
    raise InputError(f"metadata key '{key}' is a list of {' and '.join(sorted(k.__name__ for k in kinds))}")


def _scalar(key: str, least: Any, most: Any, preferred: GGUFValueType) -> GGUFValueType:
    """The type of numbers from `least` to `most`: the preferred one, or one of those that hold them."""
    if isinstance(least, bool):
        return GGUFValueType.BOOL
    if isinstance(least, float):
        return GGUFValueType.FLOAT32
    if not isinstance(least, int):
        raise InputError(f"metadata key '{key}' is of type {type(least).__name__}, which GGUF cannot hold")
    for kind in (preferred, GGUFValueType.INT32, GGUFValueType.UINT64, GGUFValueType.INT64):
        limits = np.iinfo(_DTYPES[kind])
        if limits.min <= least and most <= limits.max:
            return kind
    raise InputError(f"metadata key '{key}' does not fit into 64 bits")


def _string(text: str) -> bytes:
    data = text.encode()
    return _number(len(data), "<u8") + data


def _number(value: Any, dtype: str = "<u4") -> bytes:
    return np.array(value, dtype).tobytes()
