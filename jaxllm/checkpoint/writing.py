"""Write checkpoints: files of tensors, complete or not at all (`unfinished`), and Hugging Face directories of them.

Values are produced piece by piece while they are written, so no tensor needs to be in memory completely, and a file is
never larger than it will be. (The `safetensors` package needs a dictionary of everything in a file.)
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jaxllm.checkpoint.safetensors import DTYPES, INDEX, SINGLE
from jaxllm.checkpoint.unfinished import GB, Unfinished, unfinished
from jaxllm.errors import InputError
from jaxllm.placing import FileArray, JoinedArray

PIECE = 1 << 18  # about how many values are in memory at a time
AHEAD = 4  # tensors whose computation is begun before it is their turn
METADATA = MappingProxyType({"format": "pt"})
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

Advance = Callable[[int], object]


def nothing(*_: object) -> None:
    """The `begin` of a tensor whose values are there, and the `advance` of a write that nobody watches."""


class Tensor(NamedTuple):
    """A tensor of a file.

    pieces: its values in order: arrays of `dtype` and any shape, read once.
    begin: begins to compute the values elsewhere, if they have to be computed.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Iterable[np.ndarray]
    begin: Callable[[], object] = nothing

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class File(NamedTuple):
    """A file of tensors: its header, and where in the file each tensor begins. Tensors are written in their order.

    unit: the file's size is a multiple of it.
    """

    name: str
    header: bytes
    tensors: Sequence[Tensor]
    offsets: Sequence[int]
    unit: int = 1

    @property
    def nbytes(self) -> int:
        ends = (offset + tensor.nbytes for offset, tensor in zip(self.offsets, self.tensors, strict=True))
        return math.ceil(max([len(self.header), *ends]) / self.unit) * self.unit


def write_directory(
    path: Path,
    tensors: Iterable[Tensor],
    files: Mapping[str, Path | bytes],
    max_shard_size: int = 5 * GB,
    advance: Advance = nothing,
    source: str = "",
    checksums: bool = False,
) -> None:
    """Write a Hugging Face directory. If there are several shards, their index is written last.

    Args:
        path: must not exist, or be an empty directory.
        files: everything except weights and their index: names with contents, or with a file to copy.
        advance: called with the number of tensor bytes just written.
        source: what the tensors are made from, if an interrupted run may go on, see `unfinished`.
        checksums: whether to write SHA256SUMS.

    Raises:
        InputError: `path` cannot be made or has too little space, or writing failed.
    """
    tensors = list(tensors)
    parts = shards(tensors, max_shard_size)
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    names = names if len(parts) > 1 else [SINGLE]
    places = {tensor.name: name for name, part in zip(names, parts, strict=True) for tensor in part}
    assert len(places) == len(tensors), "a name is given twice"
    total = sum(tensor.nbytes for tensor in tensors)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True) + "\n"

    last = {INDEX: index.encode()} if len(parts) > 1 else {}
    made = [safetensors_file(name, part) for name, part in zip(names, parts, strict=True)]
    write_files(path, made, files, advance, last, source, checksums)


def write_files(
    path: Path,
    parts: Sequence[File],
    files: Mapping[str, Path | bytes],
    advance: Advance = nothing,
    last: Mapping[str, Path | bytes] = MappingProxyType({}),
    source: str = "",
    checksums: bool = False,
) -> None:
    """Write a directory with these files of tensors, and with other files; see `write_directory`.

    Args:
        last: files like `files`, written after everything else.
    """
    needed = sum(part.nbytes for part in parts)
    needed += sum(
        len(file) if isinstance(file, bytes) else file.stat().st_size for file in (*files.values(), *last.values())
    )
    with unfinished(path, needed, _fingerprint(parts, source), checksums=checksums) as target:
        _copy(files, target.folder)
        for part in parts:
            _write(part, target, advance)
        _copy(last, target.folder)


def write_file(path: Path, part: File, advance: Advance = nothing, source: str = "", checksums: bool = False) -> None:
    """Write a single file of tensors. Raises InputError as `write_directory` does."""
    with unfinished(path, part.nbytes, _fingerprint([part], source), part.name, checksums) as target:
        _write(part, target, advance)


def _fingerprint(parts: Iterable[File], source: str) -> str:
    digest = hashlib.sha256(source.encode())
    for part in parts:
        digest.update(part.name.encode() + b"\n" + part.header)
    return digest.hexdigest()


def _copy(files: Mapping[str, Path | bytes], folder: Path) -> None:
    for name, file in files.items():
        if isinstance(file, bytes):
            (folder / name).write_bytes(file)
        else:
            shutil.copyfile(file, folder / name)


def _write(part: File, target: Unfinished, advance: Advance) -> None:
    path = target.folder / part.name
    todo = []
    for tensor, offset in zip(part.tensors, part.offsets, strict=True):
        if f"{part.name} {tensor.name}" in target.done:
            advance(tensor.nbytes)
        else:
            todo.append((tensor, offset))
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(part.nbytes)
        file.write(part.header)
        for i, (tensor, offset) in enumerate(todo):
            for following, _ in todo[i : i + AHEAD]:
                following.begin()
            file.seek(offset)
            for piece in tensor.pieces:
                assert piece.dtype == tensor.dtype, f"{tensor.name}: {piece.dtype} for {tensor.dtype}"
                advance(file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8)))
            assert file.tell() - offset == tensor.nbytes, f"{tensor.name}: not as many values as its shape says"
            file.flush()
            target.note(f"{part.name} {tensor.name}", file.fileno())
        target.sync(file.fileno())


def shards(tensors: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """The tensors in order, as many per file as fit into `limit` bytes; a larger tensor gets its own file."""
    parts: list[list[Tensor]] = []
    left = 0
    for tensor in tensors:
        if not parts or _space(tensor) > left:
            parts.append([])
            left = limit
        parts[-1].append(tensor)
        left -= _space(tensor)
    return parts or [[]]


def safetensors_file(name: str, tensors: Sequence[Tensor], metadata: Mapping[str, str] = METADATA) -> File:
    """A safetensors file. Dtypes with large items come first, so that every tensor is aligned."""
    header = _header(sorted(tensors, key=lambda t: -t.dtype.itemsize), metadata)
    start, places = len(header) + 8, {}
    for tensor in sorted(tensors, key=lambda t: -t.dtype.itemsize):
        places[tensor.name] = start
        start += tensor.nbytes
    return File(name, len(header).to_bytes(8, "little") + header, tensors, [places[t.name] for t in tensors])


def pieces(name: str, array: FileArray | JoinedArray, unit: int = 1) -> Iterator[np.ndarray]:
    """The values of a tensor in order, a few at a time: flat arrays of a multiple of `unit`, except the last.

    Raises:
        InputError: the file is not what it was when its header was read.
    """
    if isinstance(array, JoinedArray) and array.axis == 0:
        for part in array.parts:
            yield from pieces(name, part)
        return
    if isinstance(array, JoinedArray):
        width = array.parts[0].shape[-1]
        for bands in zip(*(pieces(name, part, width) for part in array.parts), strict=True):
            yield np.concatenate([band.reshape(-1, width) for band in bands], 1).reshape(-1)
        return
    total, most = math.prod(array.shape), max(PIECE // max(unit, 1), 1) * unit
    flat = array.reshape(total)
    for begin in range(0, total, most):
        try:
            yield flat.read((slice(begin, begin + most),))
        except InputError as error:
            raise InputError(f"{error}, tensor '{name}'") from error


def nth(array: FileArray, shape: tuple[int, ...], i: int) -> FileArray:
    """The i-th of the consecutive arrays of this shape in an array."""
    return dataclasses.replace(array, offset=array.offset + i * math.prod(shape) * array.dtype.itemsize, shape=shape)


def _header(tensors: Iterable[Tensor], metadata: Mapping[str, str] = METADATA) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for t in tensors:
        begin, end = end, end + t.nbytes
        entries[t.name] = {"dtype": _NAMES[t.dtype], "shape": t.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _space(tensor: Tensor) -> int:
    """The size of a file with only this tensor. It takes less in a file with others, even with longer offsets."""
    return 8 + len(_header([tensor])) + tensor.nbytes
