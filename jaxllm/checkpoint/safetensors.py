"""Hugging Face directories: config.json, and the tensors of model.safetensors or of the files that an index names.

Only headers are read here. A tensor is a `FileArray`, so that each device's part can be read separately later.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.entries import Entries, json_object, read_json
from jaxllm.errors import InputError
from jaxllm.files import MOST_TEXT, Stamp, part_of
from jaxllm.formats.dense import Dense
from jaxllm.placing import FileArray

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class HFDirectory:
    """An open directory: its config, and its tensors by name."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Dense]


def open_directory(path: Path) -> HFDirectory:
    """Open a Hugging Face directory. Pickles are never read.

    Raises:
        InputError: a file is missing, truncated or inconsistent, or the index points outside the directory.
    """
    config = read_json(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{path / 'config.json'}: no 'model_type'")
    arrays: dict[str, FileArray] = {}
    for file, expected in _files(path).items():
        found = read_header(file)
        missing = [name for name in expected if name not in found]
        if missing:
            raise InputError(f"{file}: the index says that tensor {missing[0]!r} is here, but it is not")
        if twice := arrays.keys() & found.keys():
            raise InputError(f"{file}: tensor '{min(twice)}' is in another file already")
        arrays |= found
    return HFDirectory(path, config, {name: Dense(array) for name, array in arrays.items()})


def optional_json(folder: Path, name: str) -> Entries:
    """A JSON file of a directory; empty if there is none."""
    file = folder / name
    return Entries(read_json(file, name) if file.is_file() else {}, name)


def _files(path: Path) -> dict[Path, list[str]]:
    """The files that make up the checkpoint, each with the tensors that the index, if there is one, lists for it."""
    if (path / SINGLE).is_file():
        return {path / SINGLE: []}
    if not (path / INDEX).is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise InputError(
                f"{path}: only pickles ({pickles[0]}), which can run code and are not read; use safetensors"
            )
        raise InputError(f"{path}: neither {SINGLE} nor {INDEX}")
    names = read_json(path / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{path / INDEX}: no 'weight_map'")
    present = {file.name for file in path.iterdir()}  # a name that no file can have would be an OSError
    files: dict[Path, list[str]] = {}
    for tensor, name in names.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{path / INDEX}: tensor {tensor!r} is said to be in {name!r}, outside the directory")
        if name not in present:
            raise InputError(f"{path / INDEX}: tensor {tensor!r} is said to be in {name!r}, which does not exist")
        files.setdefault(path / name, []).append(tensor)
    return files


def read_header(file: Path) -> dict[str, FileArray]:
    """The tensors of a safetensors file by name.

    Raises:
        InputError: the file is truncated, or its header makes no sense.
    """
    try:
        with part_of(file).open("rb") as opened:
            stamp = Stamp.of(opened)
            size = stamp.size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError(f"{file}: cut short or damaged: a header of {length} bytes in a file of {size}")
            if length > MOST_TEXT:
                raise InputError(f"{file}: a header of {length} bytes, which no such file has")
            text = opened.read(length)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    header, start = json_object(text, f"{file}: damaged header"), 8 + length
    arrays = {name: _array(file, start, stamp, name, e) for name, e in header.items() if name != "__metadata__"}
    # As in the format's own library: tensors that overlap or leave a hole mean damage, or hide something.
    end = start
    for name, array in sorted(arrays.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if array.offset != end:
            raise InputError(
                f"{file}: tensor '{name}' begins at byte {array.offset - start} of the data, but what is before it "
                f"ends at {end - start}"
            )
        end += array.nbytes
    if end != size:
        raise InputError(f"{file}: damaged: {size - end} bytes after the last tensor")
    return arrays


def _array(file: Path, start: int, stamp: Stamp, name: str, entry: object) -> FileArray:
    if not name.isprintable():  # the name will be part of one-line messages
        raise InputError(f"{file}: damaged header: a tensor with the name {name[:64]!r}")
    match entry:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [begin, end]} if all(
            type(n) is int and n >= 0 for n in (*shape, begin, end)
        ):
            pass
        case _:
            raise InputError(f"{file}: damaged header: tensor '{name}' has an impossible dtype, shape or place")
    if kind not in DTYPES:
        raise InputError(f"{file}: tensor '{name}' has the unknown dtype {kind[:64]!r}")
    array = FileArray(file, start + begin, tuple(shape), np.dtype(DTYPES[kind]), stamp=stamp)
    if end - begin != array.nbytes:
        raise InputError(f"{file}: tensor '{name}' of shape {shape} and {array.dtype} cannot have {end - begin} bytes")
    if start + end > stamp.size:
        raise InputError(f"{file}: cut short: tensor '{name}' ends {start + end - stamp.size} bytes after the file")
    return array
