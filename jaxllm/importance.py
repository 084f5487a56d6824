"""Importance matrices: what is known of the activations that each matrix of a model is multiplied by, and its files.

An encoder that knows the mean square of each input rounds more carefully where inputs are large. Three programs keep
such means in files: llama.cpp in a GGUF file (sums and counts, by expert), formerly in a format of its own (means times
the number of chunks, no experts), and mistral.rs in `.cimatrix` (means times the number of calls; the names were
positions once). Only the first keeps enough to join two files; so it is what we write, beside mistral.rs's newer form.
"""

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoint.gguf import MAGIC, MOST_ENTRIES, Cursor, GGUFFile, open_gguf
from jaxllm.checkpoint.gguf_writing import ALIGNMENT, header
from jaxllm.errors import InputError, located
from jaxllm.formats.dense import Dense
from jaxllm.tracking import Statistics

SUMS, COUNTS = ".in_sum2", ".counts"
Importance = dict[str, Statistics]


def read_importance(path: Path) -> Importance:
    """Read an importance matrix of llama.cpp (`.gguf`, or `.imatrix` and `.dat`) or of mistral.rs (`.cimatrix`).

    Returns:
        Statistics by the names in the file. llama.cpp names tensors, "blk.0.attn_q.weight"; mistral.rs names modules,
        "model.layers.0.self_attn.q_proj", and up to its release 0.8 the positions of layers, "0", "1".

    Raises:
        InputError: the file is of none of these kinds, has no data, or is damaged.
    """
    path = Path(path)
    with located(path):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"not read: {error.strerror}") from error
        if data.startswith(MAGIC):
            return _from_gguf(open_gguf(path))
        try:
            return _entries(Cursor(io.BytesIO(data), 0, len(data)), _reader(data))
        except InputError as error:
            raise InputError(f"not an importance matrix of llama.cpp or mistral.rs, or damaged: {error}") from error


def write_gguf(
    path: Path, stats: Mapping[str, Statistics], datasets: Sequence[str], chunks: int, chunk_size: int
) -> None:
    """Write llama.cpp's GGUF form: a file that appears complete or not at all, and takes the place of an older one.

    Args:
        stats: by the names of tensors, "blk.0.attn_q.weight".
        datasets: one or more names of the texts.
        chunks: how many pieces of text were seen, each of `chunk_size` tokens.

    Raises:
        InputError: the file cannot be written.
    """
    tensors = {}
    for name, entry in sorted(stats.items()):
        counts = np.asarray(entry.counts, np.float32).reshape(-1, 1)
        tensors[name + SUMS] = np.asarray(entry.squares, np.float32).reshape(len(counts), -1)
        tensors[name + COUNTS] = counts
    metadata: dict[str, Any] = {"general.type": "imatrix", "imatrix.datasets": list(datasets)}
    metadata |= {"imatrix.chunk_count": chunks, "imatrix.chunk_size": chunk_size}
    text, begins = header(metadata, [(name, array.shape, "F32") for name, array in tensors.items()])
    with _new_file(path) as temporary, temporary.open("wb") as file:
        file.write(text)
        for begin, array in zip(begins, tensors.values(), strict=True):
            file.seek(begin)
            file.write(array.tobytes())
        file.truncate(-(-file.tell() // ALIGNMENT) * ALIGNMENT)  # llama.cpp reads the padding behind the last tensor


def write_cimatrix(path: Path, stats: Mapping[str, Statistics]) -> None:
    """Write mistral.rs's `.cimatrix`, as its releases after 0.8 read it; otherwise as `write_gguf`.

    Args:
        stats: by the names of modules, "model.layers.0.self_attn.q_proj". Those that saw no token are left out.
    """
    seen = {name: entry.importance for name, entry in sorted(stats.items()) if np.any(entry.counts)}
    with _new_file(path) as temporary, temporary.open("wb") as file:
        file.write(np.uint64(len(seen)).tobytes())
        for name, values in seen.items():
            key = name.encode()
            file.write(np.uint64(len(key)).tobytes() + key + np.uint64(values.size).tobytes() + values.tobytes())


Entry = tuple[str, Statistics | None]


def _from_gguf(file: GGUFFile) -> Importance:
    """The entries of llama.cpp's GGUF form. Other tensors, such as plain sums (`.in_sum`), are of no use here."""
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    if not names:
        raise InputError(f"a GGUF file, but no importance matrix: it has no tensor '*{SUMS}'")
    stats = {}
    for name in names:
        squares, counts = _tensor(file, name + SUMS), _tensor(file, name + COUNTS).reshape(-1)
        if squares.size % counts.size or not np.isfinite(counts).all() or (counts < 0).any():
            raise InputError(f"'{name}' has {squares.size} sums for these counts of tokens: {counts.tolist()[:8]}")
        lead = () if counts.size == 1 else (counts.size,)
        stats[name] = _checked(name, squares.reshape(*lead, -1), np.rint(counts).astype(np.int64).reshape(lead))
    return stats


def _tensor(file: GGUFFile, name: str) -> np.ndarray:
    tensor = file.tensors.get(name)
    if not isinstance(tensor, Dense) or tensor.values.dtype != np.float32:
        raise InputError(f"tensor '{name}' is {'missing' if tensor is None else f'{tensor.format}, not float32'}")
    return np.array(tensor.values)


def _reader(data: bytes) -> Callable[[Cursor, int], Iterator[Entry]]:
    """What reads a file that is no GGUF. None of the formats has a mark, but their first bytes differ.

    llama.cpp begins with two 32-bit numbers: how many entries, and the length of a name, which is not 0. mistral.rs
    begins with one of 64 bits, whose upper half is 0. Its second number, also of 64 bits, is followed by a byte that is
    0 or 1 in the older form, and the first letter of a name in the newer one.
    """
    if len(data) < 17:
        raise InputError(f"a file of {len(data)} bytes")
    if any(data[4:8]):
        return _legacy
    return _positions if data[16] <= 1 else _keys


def _entries(cursor: Cursor, read: Callable[[Cursor, int], Iterator[Entry]]) -> Importance:
    count = cursor.length(4 if read is _legacy else 8, MOST_ENTRIES)
    stats: Importance = {}
    for name, entry in read(cursor, count):
        if name in stats:
            raise InputError(f"'{name}' is given twice")
        if entry is not None:
            stats[name] = entry
    if cursor.left:
        raise InputError(f"{cursor.left} bytes follow the last entry")
    if not stats:
        raise InputError("it has no data")
    return stats


def _legacy(cursor: Cursor, count: int) -> Iterator[Entry]:
    """llama.cpp's own format: means times the number of chunks; behind them, perhaps, a count and a text's name."""
    for _ in range(count):
        name = _text(cursor, cursor.length())
        chunks, size = cursor.number("<i4"), cursor.length()
        yield name, _checked(name, _floats(cursor, size), np.int64(max(chunks, 1)))  # 0 and means: means alone
    if cursor.left:
        cursor.take(4)
    if cursor.left:
        cursor.take(cursor.length())


def _keys(cursor: Cursor, count: int) -> Iterator[Entry]:
    """mistral.rs's format: means times the number of calls, which is not written down."""
    for _ in range(count):
        name = _text(cursor, cursor.length(8))
        yield name, _checked(name, _floats(cursor, cursor.length(8)), np.int64(1))


def _positions(cursor: Cursor, count: int) -> Iterator[Entry]:
    """mistral.rs's format up to release 0.8: layers by position, and perhaps nothing about them."""
    for _ in range(count):
        position, known = cursor.number("<u8"), cursor.number("u1")
        if position >= count or known > 1:
            raise InputError(f"entry {position} of {count}, with the mark {known}")
        name = str(position)
        yield name, _checked(name, _floats(cursor, cursor.length(8)), np.int64(1)) if known else None


def _text(cursor: Cursor, length: int) -> str:
    text = str(cursor.take(length), "utf-8", "replace")
    if not text or not text.isprintable():  # it will be part of one-line messages
        raise InputError(f"an entry with the name {text[:64]!r}")
    return text


def _floats(cursor: Cursor, count: int) -> np.ndarray:
    return np.frombuffer(cursor.take(4 * count), "<f4").astype(np.float32)


def _checked(name: str, squares: np.ndarray, counts: np.ndarray | np.int64) -> Statistics:
    if not squares.size or not np.isfinite(squares).all() or (squares < 0).any():
        raise InputError(f"'{name}' has no values, or values that are negative or not finite")
    return Statistics(squares, np.asarray(counts))


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A file to write, in a hidden directory beside `path`. It takes its place at the end; an error removes it."""
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: not written: {error}") from error
