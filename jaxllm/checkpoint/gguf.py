"""GGUF files: metadata as plain values, tensors as weights over the mapped file.

The container is read by gguf-py. Its reader trusts every count and length in the file, and takes a second and a half
over a vocabulary of 49,152 tokens, one numpy view at a time; `_Reader` bounds every read by the file's size and reads
arrays in one go.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES

MAGIC = b"GGUF"


@dataclass(frozen=True)
class GGUFFile:
    """An open file: `metadata` by key, `tensors` by name with memory-mapped leaves."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Weight]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))


def open_gguf(path: Path) -> GGUFFile:
    """Map a GGUF file; nothing but its header is read.

    Raises:
        InputError: not a GGUF file, cut short, inconsistent, or with tensors of an unknown type.
    """
    with path.open("rb") as file:
        magic, version = file.read(4), file.read(4)
    if magic != MAGIC:
        raise InputError(f"{path}: not a GGUF file (it begins with {magic!r}, not {MAGIC!r})")
    if version[:2] == b"\0\0":
        raise InputError(f"{path}: a big-endian GGUF file, which is not supported")
    try:
        reader = _Reader(path)
        metadata = {key: _value(field) for key, field in reader.fields.items()}
        tensors = {t.name: _weight(t) for t in reader.tensors}
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        # gguf-py reports what it finds wrong with these; `_Reader` has ruled out reads past the end.
        raise InputError(f"{path}: damaged GGUF file: {_first_line(error)}") from error
    return GGUFFile(path, metadata, tensors)


def _first_line(error: Exception) -> str:
    return str(error.args[0] if error.args else error).split("\n")[0]


class _Reader(GGUFReader):
    """gguf-py's reader, within the bounds of the file and without a Python object for every array item."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        need, have = int(count) * np.dtype(dtype).itemsize, len(self.data) - int(offset)
        if need > have:
            raise InputError(f"cut short or damaged: {need} bytes announced at offset {offset}, {max(have, 0)} left")
        return super()._get(int(offset), dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        item, count = GGUFValueType(int(head[0][0])), int(head[1][0])
        start = orig_offs + 12
        if item == GGUFValueType.STRING:
            items, end = self._strings(start, count)
        elif item in self.gguf_scalar_to_np:
            items = self._get(start, self.gguf_scalar_to_np[item], count)
            end = start + items.nbytes
        else:
            raise InputError(f"arrays of {item.name} in metadata are not supported")
        return end - orig_offs, [*head, items], [2], [GGUFValueType.ARRAY, item]

    def _get_tensor_info_field(self, orig_offs: int) -> Any:
        field = super()._get_tensor_info_field(orig_offs)
        dims, raw_type = field.parts[3].tolist(), int(field.parts[4][0])
        if raw_type not in set(GGMLQuantizationType):
            raise InputError(f"tensor '{field.name}' has the unknown type {raw_type}")
        block = GGML_QUANT_SIZES[GGMLQuantizationType(raw_type)][0]
        if not 1 <= len(dims) <= 4 or dims[0] % block or not 0 < math.prod(dims) < 8 * len(self.data) * block:
            raise InputError(f"tensor '{field.name}' has the impossible shape {dims[::-1]}")
        return field

    def _strings(self, offset: int, count: int) -> tuple[list[str], int]:
        self._get(offset, np.uint64, count)  # every string has a length of 8 bytes: bounds the count
        data = memoryview(self.data)
        strings = []
        for _ in range(count):
            end = offset + 8 + int.from_bytes(data[offset : offset + 8], "little")
            if end > len(data):
                raise InputError(f"cut short or damaged: a string at offset {offset} ends outside the file")
            strings.append(str(data[offset + 8 : end], "utf-8", "replace"))
            offset = end
        return strings, offset


def _value(field: Any) -> Any:
    """A metadata field as a plain value: a number, a string, or a list of them."""
    value = field.parts[field.data[0]]
    if field.types[0] == GGUFValueType.ARRAY:
        return value if isinstance(value, list) else value.tolist()
    if field.types[0] == GGUFValueType.STRING:
        return str(bytes(value), "utf-8", "replace")
    return value[0].item()


def _weight(tensor: Any) -> Weight:
    """A tensor of the file as a weight. gguf-py gives floats as they are, and blocks as rows of bytes."""
    name = GGMLQuantizationType(tensor.tensor_type).name
    if name in ("F32", "F16"):
        return Dense(tensor.data)
    if name == "BF16":
        return Dense(tensor.data.view("bfloat16"))
    if name not in BLOCK_TYPES:
        raise InputError(f"tensor '{tensor.name}' has type {name}, which is not supported")
    return GGML(tensor.data.reshape(*tensor.data.shape[:-1], -1, BLOCK_TYPES[name].nbytes), name)
