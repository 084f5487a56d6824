"""Write checkpoints: safetensors files of bounded size, in a directory that appears complete or not at all.

Values are produced piece by piece while they are written, so no tensor is ever completely in memory. (The `safetensors`
package needs a dictionary of everything in a file, and overwrites an existing file.)
"""

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jaxllm.checkpoint.safetensors import DTYPES, INDEX, SINGLE
from jaxllm.errors import InputError
from jaxllm.placing import FileArray, JoinedArray

GB = 10**9
PIECE = 1 << 18  # about how many values are in memory at a time
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

Advance = Callable[[int], object]


class Tensor(NamedTuple):
    """A tensor's entry in the header, and its values in order: arrays of `dtype` and any shape, read once."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Iterable[np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_directory(
    path: Path,
    tensors: Iterable[Tensor],
    files: Mapping[str, Path | bytes],
    max_shard_size: int = 5 * GB,
    advance: Advance = lambda nbytes: None,
) -> None:
    """Write a Hugging Face directory. If there are several shards, their index is written last.

    Args:
        path: must not exist, or be an empty directory.
        files: everything except weights and their index: names with contents, or with a file to copy.
        advance: called with the number of tensor bytes just written.

    Raises:
        InputError: `path` cannot be made or has too little space, or writing failed; nothing is left behind.
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
    write_files(path, dict(zip(names, parts, strict=True)), files, advance, last)


def write_files(
    path: Path,
    parts: Mapping[str, Sequence[Tensor]],
    files: Mapping[str, Path | bytes],
    advance: Advance = lambda nbytes: None,
    last: Mapping[str, Path | bytes] = MappingProxyType({}),
) -> None:
    """Write a directory with these tensors as safetensors files, and with other files; see `write_directory`.

    Args:
        last: files like `files`, written after everything else.
    """
    needed = sum(_space(tensor) for part in parts.values() for tensor in part)
    needed += sum(
        len(file) if isinstance(file, bytes) else file.stat().st_size for file in (*files.values(), *last.values())
    )
    with new_directory(path, needed) as folder:
        _copy(files, folder)
        for name, part in parts.items():
            write_file(folder / name, part, advance)
        _copy(last, folder)


def _copy(files: Mapping[str, Path | bytes], folder: Path) -> None:
    for name, file in files.items():
        if isinstance(file, bytes):
            (folder / name).write_bytes(file)
        else:
            shutil.copyfile(file, folder / name)


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


def write_file(path: Path, tensors: Iterable[Tensor], advance: Advance = lambda nbytes: None) -> None:
    """Write one safetensors file. Dtypes with large items come first, so that every tensor is aligned."""
    tensors = sorted(tensors, key=lambda t: -t.dtype.itemsize)
    text = _header(tensors)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            begin = file.tell()
            for piece in tensor.pieces:
                assert piece.dtype == tensor.dtype, f"{tensor.name}: {piece.dtype} for {tensor.dtype}"
                advance(file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8)))
            assert file.tell() - begin == tensor.nbytes, f"{tensor.name}: not as many values as its shape says"


@contextmanager
def new_directory(path: Path, nbytes: int) -> Iterator[Path]:
    """A hidden directory beside `path` to fill with `nbytes`. It becomes `path` at the end; an error removes it.

    Raises:
        InputError: `path` is taken or cannot be made, there is too little space, or the operating system refused.
    """
    try:
        final = path.resolve()
        if final.is_mount():
            raise InputError(f"{path}: a file system is mounted here; name a directory inside it")
        if final.exists() and not (final.is_dir() and next(final.iterdir(), None) is None):
            raise InputError(f"{path}: exists already; name a directory that does not exist, or an empty one")
        if not final.parent.is_dir():
            raise InputError(f"{path}: {final.parent} is not a directory; make it first")
        if (free := shutil.disk_usage(final.parent).free) < nbytes:
            raise InputError(f"{path}: {nbytes / GB:.2f} GB are needed, but {free / GB:.2f} GB are free on that disk")
        # The directory inside has the usual permissions; those of a temporary one are narrower.
        with tempfile.TemporaryDirectory(prefix=f".{final.name}.", suffix=".partial", dir=final.parent) as temporary:
            folder = Path(temporary, final.name)
            folder.mkdir()
            yield folder
            for made in (*folder.rglob("*"), folder):
                _sync(made)
            folder.rename(final)
        _sync(final.parent)
    except OSError as error:
        raise InputError(f"{path}: not written: {error}") from error


def pieces(name: str, array: FileArray | JoinedArray, unit: int = 1) -> Iterator[np.ndarray]:
    """The values of a tensor in order, a few at a time: flat arrays of a multiple of `unit`, except the last.

    Raises:
        InputError: the file has become shorter.
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
    left, most = math.prod(array.shape), max(PIECE // max(unit, 1), 1) * unit
    with array.path.open("rb") as file:
        file.seek(array.offset)
        while left:
            piece = np.fromfile(file, array.dtype, min(left, most))
            left -= piece.size
            if piece.size < min(left + piece.size, most):
                raise InputError(f"{array.path}: cut short: {left} values of tensor '{name}' are missing")
            yield piece


def nth(array: FileArray, shape: tuple[int, ...], i: int) -> FileArray:
    """The i-th of the consecutive arrays of this shape in an array."""
    return dataclasses.replace(array, offset=array.offset + i * math.prod(shape) * array.dtype.itemsize, shape=shape)


def _header(tensors: Iterable[Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        begin, end = end, end + t.nbytes
        entries[t.name] = {"dtype": _NAMES[t.dtype], "shape": t.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _space(tensor: Tensor) -> int:
    """The size of a file with only this tensor. It takes less in a file with others, even with longer offsets."""
    return 8 + len(_header([tensor])) + tensor.nbytes


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
