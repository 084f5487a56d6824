"""UQFF before version 1.0: tensors of bytes that are named by their number, each a layer with a header of its own.

Which layer is which, a file does not say: it depends on the order in which mistral.rs went through the model. We know
from the model which matrices there are, and which of them residual.safetensors holds. The layers are the others, in
mistral.rs's order, and have to have their shapes. Experts are stacks or single matrices, as mistral.rs's backend wanted
them. Tied heads are layers too; where there is one, it is the head.

Every layer is rewritten as the tensors that version 1.x has for it, of which `uqff` makes weights. Nothing is read
except headers.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.gguf import Cursor
from jaxllm.checkpoint.safetensors import HFDirectory
from jaxllm.checkpoint.uqff import RESIDUAL, joined
from jaxllm.errors import InputError, located
from jaxllm.formats.base import Weight
from jaxllm.layers.parameter import parameters
from jaxllm.models.describe import tensors_of
from jaxllm.models.families import FAMILIES
from jaxllm.models.family import HUGGING_FACE, family_of
from jaxllm.parallel import make_mesh
from jaxllm.placing import FileArray, HostArray

MINOR = 2
HEAD = "lm_head.weight"
# By their numbers in files.
DTYPES = (
    np.uint8, np.uint32, np.int32, np.int64, np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int16,
    ml_dtypes.float8_e4m3fn,
)  # fmt: skip
# What a layer of each kind consists of after its header: the names of tensors in version 1.x, after ".weight", and a
# dtype or one of these. A header is the version, the kind, for kind 0 the number of bytes, and whether there is a bias,
# which is a tensor at the end.
TENSOR, SHAPE, BYTES, F8Q8_BYTES = "tensor", "shape", "bytes", 33
FIELDS: tuple[tuple[tuple[str, str], ...], ...] = (
    ((".dtype", "<u4"), (".shape", SHAPE), ("", BYTES)),
    (("", TENSOR),),
    (
        *(("", TENSOR), (".scales", TENSOR), (".zeros", TENSOR), (".shape", SHAPE), (".bits", "u1")),
        *((".group_size", "<u4"), (".axis", "u1"), (".optimization_steps", "<u4")),
        *((".round_zeros", "u1"), (".channel_wise", "u1")),
    ),
    (
        ("", TENSOR),
        (".dequant_w_scale", "<f4"),
        (".dequant_x_scale", "<f4"),
        (".quant_scale", "<f4"),
        (".dtype", "<u4"),
    ),
    (("", TENSOR), (".scales", TENSOR), (".biases", TENSOR), (".bits", "u1"), (".group_size", "u1")),
    ((".num_blocks", "<u4"), (".shape", SHAPE), ("", BYTES)),
    (("", TENSOR), (".scales", TENSOR)),
)
# The order of matrices in a block.
ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "k_proj", "v_proj", "qkv_proj")
ORDER = (*ATTENTION, "o_proj", "gate", "w1", "w2", "w3", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
_NAME = re.compile(r"(?:model\.layers\.(\d+)\.\w+\.)?(?:experts\.(?:(\d+)\.)?|(shared_experts?)\.)?(\w+)\.weight")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def is_legacy(arrays: Mapping[str, FileArray]) -> bool:
    """Whether these are the tensors of such files."""
    return bool(arrays) and all(name.isdecimal() for name in arrays)


def legacy_weights(folder: HFDirectory, arrays: Mapping[str, FileArray]) -> dict[str, Weight]:
    """The weights by Hugging Face's names.

    Raises:
        InputError: the version is not known, layers are missing or damaged, or they do not fit the model.
    """
    if missing := [i for i in range(len(arrays)) if str(i) not in arrays]:
        raise InputError(f"layer {missing[0]} of {len(arrays)} is missing: another file of the same model has it")
    tensors: dict[str, HostArray] = {}
    for i in range(len(arrays)):
        with located(f"layer {i}"), arrays[str(i)].path.open("rb") as opened:
            tensors |= {f"{i}.{end}": array for end, array in _Layer(arrays[str(i)], opened).tensors().items()}
    weights = joined(tensors)
    shapes = [weights[f"{i}.weight"].shape for i in range(len(arrays))]
    wanted = matrices(folder.config, any(len(shape) == 3 for shape in shapes))
    wanted = {name: shape for name, shape in wanted.items() if name not in folder.tensors}
    if len(wanted) + 1 == len(shapes) and HEAD not in wanted:
        wanted = {HEAD: shapes[0], **wanted}
    elif HEAD in wanted and shapes and shapes[0] != wanted[HEAD]:
        wanted[HEAD] = wanted.pop(HEAD)  # at last, as in GPT-OSS
    _check(shapes, wanted)
    names = {f"{i}": name.removesuffix(".weight") for i, name in enumerate(wanted)}
    parts = [(key.partition("."), weight) for key, weight in weights.items()]
    return {f"{names[number]}.{end}": weight for (number, _, end), weight in parts}


def matrices(description: Mapping[str, Any], stacked: bool) -> dict[str, tuple[int, ...]]:
    """The matrices of such a model with their shapes, in mistral.rs's order."""
    family = family_of(FAMILIES, HUGGING_FACE, str(description["model_type"]))
    dialect = family.dialects[HUGGING_FACE]
    config = dialect.config(description, {})
    declared = parameters(family.model(config, make_mesh(), 1))
    shapes = {path: param.get_value().shape for path, param in declared.items()}
    written = {each.name: each.shape(shapes) for each in tensors_of(dialect, config, shapes)}
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted((name for name in written if _NAME.fullmatch(name)), key=place):
        if len(shape := written[name]) == 2 and stacked and (m := re.search(r"\.experts\.\d+\.(\w+)", name)):
            name = name.replace(m[0], f".experts.{_MIXTRAL.get(m[1], m[1])}")
            shape = (found[name][0] + 1 if name in found else 1, *shape)
        if len(shape) > 1:
            found[name] = shape
    return {name: found[name] for name in sorted(found, key=place)}


def place(name: str) -> tuple[int, ...]:
    """Where a matrix of this name comes in that order."""
    layer, expert, shared, matrix = _NAME.fullmatch(name).groups()  # type: ignore[union-attr]
    rank = ORDER.index(matrix) if matrix in ORDER else -1
    part = 2 if shared else 1 if ".experts." in name else 0
    return int(layer or -1), part, int(expert or 0), rank


def _check(shapes: list[tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    if len(shapes) != len(wanted):
        raise InputError(f"{len(shapes)} layers, but {len(wanted)} matrices of the model are not in {RESIDUAL}")
    pairs = enumerate(zip(shapes, wanted.items(), strict=True))
    if wrong := [f"layer {i} is {[*has]}, '{name}' {[*shape]}" for i, (has, (name, shape)) in pairs if has != shape]:
        raise InputError("layers in an unknown order: " + "; ".join(wrong[:4]))


class _Layer(Cursor):
    """A layer: a version, a kind, and what that kind has."""

    def __init__(self, file: FileArray, opened: BinaryIO) -> None:
        if file.dtype != np.uint8 or file.ndim != 1:
            raise InputError(f"damaged: {file.dtype} of shape {[*file.shape]}, not bytes")
        super().__init__(opened, file.offset, file.offset + file.nbytes)
        self.file = file
        version = self.number()
        if version >> 16 or version >> 8 > MINOR:
            said = f"{version >> 16}.{version >> 8 & 255}.{version & 255}"
            raise InputError(f"UQFF version {said} is not supported in files of numbered layers; 0.1 and 0.2 are")

    def tensors(self) -> dict[str, HostArray]:
        """Its tensors as version 1.x has them, by the end of their names."""
        kind = self.number("u1")
        if kind >= len(FIELDS):
            raise InputError(f"the unknown format {kind}; known are 0 to {len(FIELDS) - 1}")
        length = self.number() if kind == 0 else 0
        biased = self.number("u1")
        found: dict[str, HostArray] = {}
        for name, field in FIELDS[kind]:
            if field == TENSOR:
                found[name] = self._tensor()
            elif field == SHAPE:
                found[name] = np.array(self.dims(self.number()), np.uint32)
            elif field == BYTES:
                found[name] = self._bytes(length if kind == 0 else int(found[".num_blocks"]) * F8Q8_BYTES)
            else:
                found[name] = np.array(self.number(field), field)
        found = {f"weight{end}": array for end, array in found.items()} | {"weight.format": np.array(kind, np.uint8)}
        if biased:
            found["bias"] = self._tensor()
        if self.left:
            raise InputError(f"damaged: {self.left} bytes behind its end")
        return found

    def _tensor(self) -> HostArray:
        nbytes, code, dims = self.number(), self.number(), self.dims(self.number())
        if code >= len(DTYPES):
            raise InputError(f"a tensor of the unknown dtype {code}")
        dtype = np.dtype(DTYPES[code])
        if nbytes != math.prod(dims) * dtype.itemsize:
            raise InputError(f"damaged: a tensor {dims} of {dtype} with {nbytes} bytes")
        return self._bytes(nbytes).view(dtype).reshape(*dims)

    def _bytes(self, count: int) -> FileArray:
        begin = self.offset
        self.skip(count)
        return replace(self.file, offset=begin, shape=(count,))
