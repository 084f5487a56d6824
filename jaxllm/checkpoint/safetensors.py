"""Hugging Face directories: config.json and the tensors of model.safetensors, or of the files that an index names.

Only headers are read here. A tensor is a `FileArray`, so that later each device's part is read on its own.
"""

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def json(self, name: str) -> "Entries":
        """Another JSON file of the directory; empty if there is none."""
        file = self.path / name
        return Entries(read_json(file, name) if file.is_file() else {}, name)


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
            raise InputError(f"{file}: the index says that tensor {missing[0]!r} is here, but it is not")
        if twice := arrays.keys() & found.keys():
            raise InputError(f"{file}: tensor '{min(twice)}' is in another file already")
        arrays |= found
    return HFDirectory(path, config, {name: Dense(array) for name, array in arrays.items()})


def _files(path: Path) -> dict[Path, list[str]]:
    """The files that make up the checkpoint, and the tensors that the index, if it is needed, says are in each."""
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
    files: dict[Path, list[str]] = {}
    for tensor, name in names.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{path / INDEX}: tensor {tensor!r} is said to be in {name!r}, outside the directory")
        if not (path / name).is_file():
            raise InputError(f"{path / INDEX}: tensor {tensor!r} is said to be in {name!r}, which does not exist")
        files.setdefault(path / name, []).append(tensor)
    return files


def read_header(file: Path) -> dict[str, FileArray]:
    """The tensors of a safetensors file by name.

    Raises:
        InputError: the file is cut short, or its header makes no sense.
    """
    try:
        with file.open("rb") as opened:
            size = file.stat().st_size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError(f"{file}: cut short or damaged: a header of {length} bytes in a file of {size}")
            text = opened.read(length)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    header, start = _json_object(text, f"{file}: damaged header"), 8 + length
    arrays = {name: _array(file, start, size, name, e) for name, e in header.items() if name != "__metadata__"}
    # As the format's own library: what overlaps or leaves a hole is damaged, or hides something.
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


def _array(file: Path, start: int, size: int, name: str, entry: object) -> FileArray:
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
    array = FileArray(file, start + begin, tuple(shape), np.dtype(DTYPES[kind]))
    if end - begin != array.nbytes:
        raise InputError(f"{file}: tensor '{name}' of shape {shape} and {array.dtype} cannot have {end - begin} bytes")
    if start + end > size:
        raise InputError(f"{file}: cut short: tensor '{name}' ends {start + end - size} bytes after the file")
    return array


def read_json(file: Path, where: str | None = None) -> dict[str, object]:
    """A JSON object; `where` stands for the file in errors.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    where = where or str(file)
    try:
        text = file.read_bytes()
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from error
    return _json_object(text, where)


def _json_object(text: bytes, where: str) -> dict[str, object]:
    try:
        value = json.loads(text.decode())
    except RecursionError as error:
        raise InputError(f"{where}: not JSON: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object")
    return value


@dataclass(frozen=True)
class Entries:
    """Entries of a JSON object, read as what they have to be. A null stands for an entry that is not there.

    Every method raises InputError where an entry without a default is missing or is something else.
    """

    values: Mapping[str, object]
    where: str  # for errors

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default: object, good: Callable[[Any], bool], what: str) -> Any:
        value = self.values[key] if key in self else default
        if value is None:
            raise InputError(f"{self.where}: '{key}' is missing")
        if not good(value):
            raise InputError(f"{self.where}: '{key}' is {reprlib.repr(value)}, not {what}")
        return value

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = 2**24) -> int:
        what = f"a whole number from {least} to {most}"
        return self.get(key, default, lambda value: type(value) is int and least <= value <= most, what)

    def number(self, key: str, default: float | None = None, above: float = 0.0, most: float = math.inf) -> float:
        above_what = f" above {above:g}" if above > -math.inf else ""
        what = f"a number{above_what}" + (f", at most {most:g}" if most < math.inf else "")
        return self.get(key, default, lambda value: _is_number(value) and above < value <= most, what)

    def numbers(self, key: str, count: int) -> list[float]:
        """So many numbers above 0."""

        def good(value: object) -> bool:
            return isinstance(value, list) and len(value) == count and all(_is_number(n) and n > 0 for n in value)

        return self.get(key, None, good, f"a list of {count} numbers above 0")

    def flag(self, key: str, default: bool = False) -> bool:
        return self.get(key, default, lambda value: isinstance(value, bool), "true or false")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2.0**127
