"""GGUF files, single or split: metadata as plain values, tensors as weights that are still in the file.

Every count and length is checked against the size of the file before it is used. (gguf-py's reader trusts them all,
supports neither version 1 nor split files, and takes a second and a half for a vocabulary of 49,152 tokens.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from jaxllm.entries import Entries
from jaxllm.errors import InputError, located
from jaxllm.files import Stamp, part_of
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.placing import FileArray

MAGIC = b"GGUF"

# Far more than any vocabulary or chat template needs, but small enough that a damaged length cannot fill memory; and so
# for tensors, keys and other entries, each of which takes some time, and for the items of all lists together.
MOST, MOST_ENTRIES, MOST_ITEMS = 1 << 24, 1 << 17, 1 << 22

_PLAIN = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "bfloat16",
    "I8": "i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}
_SCALARS = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_WHOLE_NUMBERS = ("general.alignment", "split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True)
class GGUFFile:
    """An open file: `metadata` by key, `tensors` by name, whose leaves are `FileArray`s.

    path: the path of the file, or of the first part of a split file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Weight]

    @property
    def architecture(self) -> str:
        return Entries(self.metadata, "metadata").text("general.architecture")


def open_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file. The path may be any part of a split file.

    Raises:
        InputError: not a GGUF file, truncated, inconsistent, with tensors of an unknown type, or with missing parts.
    """
    file = _open_one(path)
    return _open_parts(file) if file.metadata.get("split.count", 0) > 1 else file


def _open_one(path: Path) -> GGUFFile:
    with located(path), path.open("rb") as file:
        if (magic := file.read(len(MAGIC))) != MAGIC:
            raise InputError(f"not a GGUF file (it begins with {magic!r}, not {MAGIC!r})")
        whole = whole_file(path, file)
        metadata, tensors = _parse(whole, file)
        if Stamp.of(file) != whole.stamp:
            raise InputError("was changed or cut short while it was read")
    return GGUFFile(path, metadata, tensors)


def whole_file(path: Path, opened: BinaryIO) -> FileArray:
    """All bytes of an open file."""
    stamp = Stamp.of(opened)
    return FileArray(path, 0, (stamp.size,), np.dtype(np.uint8), stamp=stamp)


def _open_parts(given: GGUFFile) -> GGUFFile:
    """All parts of a split file as one file; everything except the tensors comes from the first part."""
    number, count = given.metadata.get("split.no", 0), given.metadata["split.count"]
    end = f"-{number + 1:05}-of-{count:05}.gguf"
    if not given.path.name.endswith(end):
        raise InputError(f"{given.path}: part {number + 1} of {count}, but its name does not end in '{end}'")
    parts: list[GGUFFile] = []
    tensors: dict[str, Weight] = {}
    for i in range(count):
        path = given.path.with_name(given.path.name.removesuffix(end) + f"-{i + 1:05}-of-{count:05}.gguf")
        if not path.is_file():
            raise InputError(f"{given.path}: part {i + 1} of {count} is missing: {path}")
        part = given if path == given.path else _open_one(part_of(path))
        claim = [part.metadata.get(key) for key in ("split.no", "split.count")]
        if claim != [i, count]:
            raise InputError(f"{path}: split.no and split.count are {claim[0]} and {claim[1]}, not {i} and {count}")
        if twice := tensors.keys() & part.tensors.keys():
            raise InputError(f"{path}: tensor '{min(twice)}' is in an earlier part already")
        parts.append(part)
        tensors |= part.tensors
    first = parts[0]
    if len(tensors) != (announced := first.metadata.get("split.tensors.count")):
        raise InputError(f"{first.path}: split.tensors.count is {announced}, but the parts have {len(tensors)} tensors")
    return GGUFFile(first.path, first.metadata, tensors)


def _parse(whole: FileArray, opened: BinaryIO) -> tuple[dict[str, Any], dict[str, Weight]]:
    header = _Header(opened, len(MAGIC), whole.nbytes)
    tensor_count, key_count = header.length(most=MOST_ENTRIES), header.length(most=MOST_ENTRIES)
    metadata, tensors, ranges = {}, {}, []
    for _ in range(key_count):
        key = header.string()
        if key in metadata:
            raise InputError(f"metadata key {key[:64]!r} is given twice")
        metadata[key] = header.value(key)
    for key in _WHOLE_NUMBERS:
        if type(metadata.get(key, 0)) is not int:
            raise InputError(f"metadata key '{key}' is not a whole number")

    infos = [header.tensor_info() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"metadata key 'general.alignment' is {alignment}, not a power of two")
    start = math.ceil(header.offset / alignment) * alignment
    for name, dims, type_number, offset in infos:
        if name in tensors:
            raise InputError(f"tensor '{name}' is given twice")
        tensors[name] = tensor_weight(whole, start + offset, name, dims, type_number)
        if offset % alignment:
            raise InputError(f"tensor '{name}' begins at offset {offset}, which is not a multiple of {alignment}")
        ranges.append((offset, offset + tensors[name].nbytes, name))
    for (_, end, name), (begin, _, other) in pairwise(sorted(ranges)):
        if begin < end:
            raise InputError(f"tensors '{name}' and '{other}' overlap")
    return metadata, tensors


class Cursor:
    """A file, the position to read from next, and the end. Reading past it is an InputError."""

    def __init__(self, opened: BinaryIO, offset: int, end: int) -> None:
        self.opened, self.offset, self.end = opened, offset, end
        opened.seek(offset)

    @property
    def left(self) -> int:
        return max(self.end - self.offset, 0)

    def take(self, nbytes: int) -> bytes:
        self._advance(nbytes)
        taken = self.opened.read(nbytes)
        if len(taken) < nbytes:
            raise InputError("was cut short while it was read")
        return taken

    def skip(self, nbytes: int) -> None:
        self._advance(nbytes)
        self.opened.seek(self.offset)

    def _advance(self, nbytes: int) -> None:
        if nbytes > self.left:
            raise InputError(
                f"cut short or damaged: {nbytes} bytes announced at offset {self.offset}, {self.left} left"
            )
        self.offset += nbytes

    def numbers(self, dtype: str, count: int) -> list:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize * count), dtype).tolist()

    def number(self, dtype: str = "<u4") -> Any:
        return self.numbers(dtype, 1)[0]

    def length(self, nbytes: int = 4, most: int = MOST) -> int:
        """A count of the items that follow, stored in `nbytes` bytes."""
        return self.plausible(int.from_bytes(self.take(nbytes), "little"), most)

    def plausible(self, count: int, most: int = MOST) -> int:
        """The same `count`, if that many items can follow here: every item has at least one byte."""
        if count > min(most, self.left):
            raise InputError(
                f"cut short or damaged: {count} announced before offset {self.offset}, {self.left} bytes left"
            )
        return count

    def dims(self, rank: int, dtype: str = "<u4") -> list[int]:
        if not 1 <= rank <= 4:
            raise InputError(f"damaged: a tensor of {rank} dimensions before offset {self.offset}")
        return self.numbers(dtype, rank)


class _Header(Cursor):
    """The part of a GGUF file before its tensors."""

    def __init__(self, opened: BinaryIO, offset: int, end: int) -> None:
        super().__init__(opened, offset, end)
        version = self.number()
        if version & 0xFFFF == 0:
            raise InputError("a big-endian GGUF file, which is not supported")
        if version not in (1, 2, 3):
            raise InputError(f"GGUF version {version} is not supported; 1, 2 and 3 are")
        self.word = 4 if version == 1 else 8  # bytes of every count, length and dimension
        self.items = MOST_ITEMS  # how many more there may be in lists

    def length(self, nbytes: int | None = None, most: int = MOST) -> int:
        return super().length(nbytes or self.word, most)

    def string(self) -> str:
        return str(self.take(self.length()), "utf-8", "replace")

    def value(self, key: str) -> Any:
        """A metadata value as a number, a string, or a list of them."""
        kind = self.number()
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.number(self._scalar(kind, repr(key[:64])))
        item = self.number()
        if item == GGUFValueType.STRING:
            return self._strings(self._count())
        return self.numbers(self._scalar(item, f"an item of {key[:64]!r}"), self._count())

    def _count(self) -> int:
        count = self.length(most=self.items)
        self.items -= count
        return count

    def _strings(self, count: int) -> list[str]:
        """`count` strings. Vocabularies have 100,000 of them, so this loop uses local names only."""
        read, word, left, out = self.opened.read, self.word, self.left, []
        for _ in range(count):
            length = int.from_bytes(read(word), "little")
            left -= word + length
            if left < 0:
                raise InputError(
                    f"cut short or damaged: a string before offset {self.end - left} ends outside the file"
                )
            out.append(str(read(length), "utf-8", "replace"))
        self.offset = self.end - left
        return out

    def _scalar(self, kind: int, what: str) -> str:
        if kind not in _SCALARS:
            raise InputError(f"metadata: {what} has the type {kind}, which is not supported")
        return _SCALARS[GGUFValueType(kind)]

    def tensor_info(self) -> tuple[str, list[int], int, int]:
        """Name, dimensions (the innermost first), number of the type, and offset from the first tensor's place."""
        name = self.string()
        return name, self.dims(self.number(), f"<u{self.word}"), self.number(), self.number("<u8")


def tensor_weight(whole: FileArray, offset: int, name: str, dims: list[int], type_number: int) -> Weight:
    """The tensor at `offset` of a file as a weight; nothing is read.

    Args:
        dims: the innermost first.
        type_number: as in ggml's enum.

    Raises:
        InputError: the type is unknown, or the shape impossible in it or too large for the file.
    """
    if not name.isprintable():  # the name will be part of one-line messages
        raise InputError(f"damaged: a tensor with the name {name[:64]!r}")
    if type_number not in set(GGMLQuantizationType):
        raise InputError(f"tensor '{name}' has the unknown type {type_number}")
    type = GGMLQuantizationType(type_number).name
    if type not in _PLAIN and type not in BLOCK_TYPES:
        raise InputError(f"tensor '{name}' has type {type}, which is not supported")
    plain, shape = _PLAIN.get(type), dims[::-1]
    size, nbytes = (1, np.dtype(plain).itemsize) if plain else BLOCK_TYPES[type][:2]
    if dims[0] % size or 0 in dims or (len(dims) == 1 and not plain):
        raise InputError(f"tensor '{name}' has the impossible shape {shape} for {type}")
    length = math.prod(dims) // size * nbytes
    if offset + length > whole.nbytes:
        raise InputError(
            f"cut short or damaged: tensor '{name}' of shape {shape} and type {type} ends outside the file"
        )
    values = replace(whole, offset=offset, shape=(length,))
    if plain:
        return Dense(values.view(plain).reshape(*shape))
    return GGML(values.reshape(*shape[:-1], dims[0] // size, nbytes), type)
