"""The files of DeepSeek's inference demo: `model{i}-mp{n}.safetensors`, where each file holds what one of n GPUs needs.

Tensors that the demo splits are joined again while they are read, so n does not restrict the mesh. Experts are not
split: each is complete in one file. Replicated tensors are in every file, and are read from the first.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.checkpoint.quantized import join, only
from jaxllm.checkpoint.safetensors import read_header
from jaxllm.checkpoint.scaled_schemes import block_fp8, is_ue8m0
from jaxllm.entries import Entries, read_json
from jaxllm.errors import InputError, located
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.models.deepseek.config import DEMO_DEFAULTS, DeepseekConfig, demo_args
from jaxllm.models.deepseek.names import DEMO_AXES, DEMO_EXPERT
from jaxllm.placing import FileArray, JoinedArray

BLOCK = (128, 128)
_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")


def is_demo(path: Path) -> bool:
    return path.is_dir() and any(_FILE.fullmatch(file.name) for file in path.iterdir())


def open_demo(path: Path, config: Path | None = None) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Open a directory of the demo's files: fields of its `ModelArgs`, and tensors, FP8 ones joined with their scales.

    Args:
        config: a file with fields of `ModelArgs`; by default the only such `config*.json` in the directory.

    Raises:
        InputError: files are missing, damaged, or do not fit together, or there is no such config.
    """
    args = read_args(config.resolve() if config else find_config(path))  # a link of the user's own may lead anywhere
    return args, joined(demo_tensors(path), args)


def joined(tensors: Mapping[str, Dense], args: Mapping[str, object]) -> dict[str, Weight]:
    """The tensors of the demo's files, FP8 ones joined with their scales; `args` are fields of `ModelArgs`."""
    ue8m0 = is_ue8m0(Entries(args, "ModelArgs"))
    return join(tensors, only(block_fp8(BLOCK, values=".weight", scales=".scale", power_of_two=ue8m0)))


def demo_tensors(path: Path) -> dict[str, Dense]:
    """The tensors of a directory of the demo's files, see `open_demo`."""
    files = [read_header(file) for file in _files(path)]
    names = dict.fromkeys(name for file in files for name in file)
    arrays = {name: _joined(name, [file.get(name) for file in files]) for name in names}
    _refuse_split_blocks(path, arrays)
    return {name: Dense(array) for name, array in arrays.items()}


def read_args(file: Path) -> dict[str, Any]:
    """All fields of the demo's `ModelArgs`, from a JSON file that may give only some of them.

    Raises:
        InputError: the demo does not have a field, or a field has an impossible value.
    """
    with located(file):
        args = demo_args(read_json(file))
        DeepseekConfig.from_demo(args)  # read again later, with the tensors; here, errors name the file
    return args


def find_config(path: Path) -> Path:
    found = [file for file in sorted(path.glob("config*.json")) if read_json(file).keys() <= DEMO_DEFAULTS.keys()]
    if len(found) != 1:
        what = "more than one" if found else "no"
        raise InputError(f"{path}: {what} config*.json with fields of the demo's ModelArgs; name it (--config FILE)")
    return found[0]


def _files(path: Path) -> list[Path]:
    found = {file: _FILE.fullmatch(file.name) for file in sorted(path.glob("model*-mp*.safetensors"))}
    counts = sorted({int(m[2]) for m in found.values() if m})
    if len(counts) != 1:
        listed = " and ".join(f"mp{n}" for n in counts) or "no file"
        raise InputError(f"{path}: {listed} of the demo's model*-mp*.safetensors; one set of them is expected")
    files = [path / f"model{i}-mp{counts[0]}.safetensors" for i in range(counts[0])]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: is missing, of {counts[0]} files that make up the model")
    return files


def _joined(name: str, parts: list[FileArray | None]) -> FileArray | JoinedArray:
    """The complete tensor, from each file's part of it."""
    there = [part for part in parts if part is not None]
    if DEMO_EXPERT.fullmatch(name):
        if len(there) > 1:
            raise InputError(f"{there[1].path}: tensor '{name}' is in {there[0].path.name} already")
        return there[0]
    if len(there) < len(parts):
        lacking = there[0].path.with_name(f"model{parts.index(None)}-mp{len(parts)}.safetensors")
        raise InputError(f"{lacking}: tensor '{name}' is missing, which {there[0].path.name} has")
    for part in there:
        if (part.shape, part.dtype) != (there[0].shape, there[0].dtype):
            raise InputError(f"{part.path}: tensor '{name}' has another shape or dtype than in {there[0].path.name}")
    axis = demo_axis(name)
    if axis is None or len(there) == 1:
        return there[0]
    if axis >= there[0].ndim:
        raise InputError(f"{there[0].path}: tensor '{name}' has shape {list(there[0].shape)}, which cannot be a part")
    return JoinedArray(tuple(there), axis)


def demo_axis(name: str) -> int | None:
    """The axis along which the demo splits a tensor of this name; it does not split experts."""
    return None if DEMO_EXPERT.fullmatch(name) else DEMO_AXES.get(name.split(".")[-2:][0])


def _refuse_split_blocks(path: Path, arrays: Mapping[str, FileArray | JoinedArray]) -> None:
    """Refuse blocks that span two files: it would be unknown which values their scales belong to."""
    for name, array in arrays.items():
        stem = name.removesuffix(".weight")
        if stem != name and f"{stem}.scale" in arrays and isinstance(array, JoinedArray):
            check_blocks(f"{path}: tensor '{name}'", array.axis, array.shape[array.axis], len(array.parts))


def check_blocks(what: str, axis: int, size: int, count: int) -> None:
    """Raise InputError if `count` parts along an axis of FP8 values would not be whole blocks."""
    if count > 1 and size % (count * BLOCK[axis]):
        raise InputError(
            f"{what}: dimension {axis} of {size} is not {count} parts of whole FP8 blocks of {BLOCK[axis]}"
        )
