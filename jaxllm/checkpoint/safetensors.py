"""Hugging Face directories: config.json and the tensors of model.safetensors, or of the files that an index names.

Only headers are read here. A tensor is a `FileArray`, so that later each device's part is read on its own.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.placing import FileArray
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense

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
    config: Mapping[str, object]
    tensors: Mapping[str, Weight]

    def json(self, name: str) -> dict[str, object]:
        """Another JSON file of the directory; empty if there is none."""
        file = self.path / name
        return read_json(file) if file.is_file() else {}


def open_directory(path: Path) -> HFDirectory:
    """Open a Hugging Face directory. Pickles are never read.

    Raises:
        InputError: a file is missing, cut short or inconsistent, or the index points outside the directory.
    """
    config = read_json(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{path / 'config.json'}: no 'model_type'")
    arrays: dict[str, FileArray] = {}
    for file, expected in _files(path).items():
        found = read_header(file)
        missing = [name for name in expected if name not in found]
        if missing:
            raise InputError(f"{file}: the index says that tensor '{missing[0]}' is here, but it is not")
        if twice := arrays.keys() & found.keys():
            raise InputError(f"{file}: tensor '{min(twice)}' is in another file already")
        arrays |= found
    return HFDirectory(path, config, {name: Dense(array) for name, array in arrays.items()})


def _files(path: Path) -> dict[Path, list[str]]:
    """The files that make up the checkpoint, and the tensors that the index, if there is one, says are in each."""
    if not (path / INDEX).is_file():
        if (path / SINGLE).is_file():
            return {path / SINGLE: []}
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise InputError(
                f"{path}: only pickles ({pickles[0]}), which can run code and are not read; use safetensors"
            )
        raise InputError(f"{path}: neither {SINGLE} nor {INDEX}")
    names = read_json(path / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{path / INDEX}: no 'weight_map'")
    files: dict[Path, list[str]] = {}
    for tensor, name in names.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{path / INDEX}: tensor '{tensor}' is said to be in {name!r}, outside the directory")
        if not (path / name).is_file():
            raise InputError(f"{path / INDEX}: tensor '{tensor}' is said to be in {name}, which does not exist")
        files.setdefault(path / name, []).append(tensor)
    return files


def read_header(file: Path) -> dict[str, FileArray]:
    """The tensors of a safetensors file by name.

    Raises:
        InputError: the file is cut short, or its header makes no sense.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{file}: cut short or damaged: a header of {length} bytes in a file of {size}")
        text = opened.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        return {name: _array(file, 8 + length, size, name, entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: damaged header: {str(error).splitlines()[0]}") from error


def _array(file: Path, start: int, size: int, name: str, entry: dict[str, object]) -> FileArray:
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{file}: tensor '{name}' has the unknown dtype {entry['dtype']!r}")
    dtype, shape, (begin, end) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise InputError(f"{file}: tensor '{name}' has an impossible shape or place")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{file}: tensor '{name}' of shape {shape} and {dtype} cannot have {end - begin} bytes")
    if start + end > size:
        raise InputError(f"{file}: cut short: tensor '{name}' ends {start + end - size} bytes after the file")
    return FileArray(file, start + begin, tuple(shape), dtype)


def read_json(file: Path) -> dict[str, object]:
    """A JSON object.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: not a JSON object")
    return value
