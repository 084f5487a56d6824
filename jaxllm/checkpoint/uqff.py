"""UQFF, mistral.rs's format of quantized models: a folder with the quantized layers in `<type>-<n>.uqff`, everything
else in residual.safetensors, and the config and tokenizer of a Hugging Face directory.

Since version 1.0 the files are safetensors in which each layer says what it is: `<layer>.weight.format` is a number
that stands for a kind of quantization (`SCHEMES`), and further tensors describe the details. Names are Hugging Face's,
so from here on such a folder is one of those. What older files lack is in `uqff_legacy`.

Source: the page "UQFF format" of mistral.rs's documentation, and files of versions 0.6.0, 0.8.4 and 0.9.5.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from jaxllm.checkpoint import integer_schemes, repack, scaled_schemes
from jaxllm.checkpoint.declared import Declared
from jaxllm.checkpoint.quantized import join
from jaxllm.checkpoint.safetensors import DTYPES, HFDirectory, optional_json, read_header
from jaxllm.checkpoint.schemes import FLOATS, Part, Scheme, expect
from jaxllm.entries import Entries, read_json
from jaxllm.errors import InputError
from jaxllm.formats import mxfp4
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.scaled import Scaled
from jaxllm.layers.rope import half_split_rows
from jaxllm.placing import FileArray, HostArray

RESIDUAL, REPORT = "residual.safetensors", "uqff_report.json"
MAJOR, MINOR, PATCH = 1, 2, 0
VERSION = "uqff.version"
LAYOUT = "_mistralrs_qk_rope_layout"
# Tensors of GGML types that are plain numbers.
PLAIN = {"F32": DTYPES["F32"], "F16": DTYPES["F16"], "BF16": DTYPES["BF16"]}
_NUMBERED = re.compile(r"(.+)-(\d+)\.uqff")


def is_uqff(path: Path) -> bool:
    """Whether this is a UQFF file, or a folder of them."""
    return path.suffix == ".uqff" or (path.is_dir() and next(path.glob("*.uqff"), None) is not None)


def read_folder(path: Path) -> tuple[HFDirectory, dict[str, FileArray]]:
    """The folder's config and residual tensors, and the tensors of its UQFF files.

    Args:
        path: any of the files; or the folder, if its files are of one type.

    Raises:
        InputError: a file is missing or damaged, or a tensor is there twice.
    """
    folder = path if path.is_dir() else path.parent
    residual = folder / RESIDUAL
    if not residual.is_file():
        raise InputError(f"{residual}: no such file; UQFF files hold only the quantized layers, and this all others")
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{folder / 'config.json'}: no 'model_type'")
    arrays: dict[str, FileArray] = {}
    for file in files(path):
        found = read_header(file)
        if twice := [name for name in found if name in arrays and not name.startswith(VERSION)]:
            raise InputError(f"{file}: tensor '{twice[0]}' is in another file already")
        arrays |= found
    rest = {name: Dense(array) for name, array in read_header(residual).items()}
    return HFDirectory(folder, config, rest), arrays


def files(path: Path) -> list[Path]:
    """The files that belong together, in order. Raises InputError if some are missing."""
    if path.is_dir():
        kinds = sorted({_stem(file.name): file for file in sorted(path.glob("*.uqff"), reverse=True)}.values())
        if len(kinds) > 1:
            names = ", ".join(file.name for file in kinds)
            raise InputError(f"{path}: has files of several types; name one of {names}")
        path = kinds[0]
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if (stem := _stem(path.name)) == path.stem:
        return [path]
    numbered = {int(m[2]): f for f in path.parent.iterdir() if (m := _NUMBERED.fullmatch(f.name)) and m[1] == stem}
    listed = next((shards for shards in _reported(path.parent) if path.name in shards), ())
    for i in range(max(max(numbered) + 1, len(listed))):
        if i not in numbered:
            raise InputError(f"{path.with_name(f'{stem}-{i}.uqff')}: missing; {path.name} is a part of the same model")
    return [numbered[i] for i in sorted(numbered)]


def _reported(folder: Path) -> list[Sequence[str]]:
    """What a report says of files that belong together: the names of some."""
    outputs = optional_json(folder, REPORT).values.get("outputs")
    found = (
        [output.get("shards") for output in outputs if isinstance(output, dict)] if isinstance(outputs, list) else []
    )
    return [shards for shards in found if isinstance(shards, list)]


def _stem(name: str) -> str:
    return m[1] if (m := _NUMBERED.fullmatch(name)) else name.removesuffix(".uqff")


def weights_of(arrays: Mapping[str, HostArray]) -> dict[str, Weight]:
    """The weights of UQFF 1.x by name, from its tensors; biases as they are.

    Raises:
        InputError: the version is newer, or some layers make no sense; lists these.
    """
    _check(arrays)
    return joined({name: array for name, array in arrays.items() if not name.startswith(VERSION)})


def joined(arrays: Mapping[str, HostArray]) -> dict[str, Weight]:
    """The same, of any version."""

    def scheme(module: str) -> Sequence[Scheme]:
        if (found := arrays.get(module + FORMAT.suffix)) is None:
            return ()
        if found.dtype != np.uint8 or found.shape not in ((), (1,)):
            raise InputError(f"'{module}{FORMAT.suffix}' is {found.dtype} of shape {[*found.shape]}, not one byte")
        code = int(np.asarray(found).reshape(()))
        if code >= len(SCHEMES):
            raise InputError(f"'{module}' has the unknown format {code}; known are 0 to {len(SCHEMES) - 1}")
        return (SCHEMES[code],)

    tensors = {name: Dense(_bias(array) if name.endswith(".bias") else array) for name, array in arrays.items()}
    return join(tensors, Declared(scheme, frozenset({FORMAT.suffix})))


def _bias(array: HostArray) -> HostArray:
    """mistral.rs 0.9.5 casts the biases of FP8 layers to FP8, without a scale: what it wrote, in floats."""
    if array.dtype.name != "float8_e4m3fn":
        return array
    return repack.derived(array.shape, np.float32, lambda: np.asarray(array).astype(np.float32))


def in_half_split_order(config: Mapping[str, Any], weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights with the rows of q and k as Hugging Face has them.

    Files that mistral.rs made of a GGUF file keep its order, in which the two values that a rotary angle turns are
    neighbours; the config says so.

    Raises:
        InputError: the config says something else, or the matrices are not of such heads.
    """
    entries = Entries(config, "config.json")
    if entries.choice(LAYOUT, ("adjacent", ""), "") == "":
        return dict(weights)
    heads = entries.integer("num_attention_heads")
    counts = {"q": heads, "k": entries.integer("num_key_value_heads", default=heads)}
    found = {}
    for name, weight in weights.items():
        if m := re.fullmatch(r"model\.layers\.\d+\.self_attn\.(q|k)_proj\.(weight|bias)", name):
            size, rest = divmod(weight.shape[0], counts[m[1]])
            if rest or size % 2:
                raise InputError(f"'{name}' has {weight.shape[0]} rows, which are not {counts[m[1]]} heads of pairs")
            weight = repack.arranged(weight, half_split_rows(counts[m[1]], size, size))
        found[name] = weight
    return found


def _check(arrays: Mapping[str, HostArray]) -> None:
    """Raise InputError for a version that we do not know."""
    found = [arrays.get(f"{VERSION}.{part}") for part in ("major", "minor", "patch")]
    if any(part is None or part.shape != () or part.dtype != np.uint32 for part in found):
        raise InputError("the version is missing or damaged: no UQFF file, or not its first part")
    major, minor, patch = (int(np.asarray(part)) for part in found)
    if major != MAJOR or minor > MINOR:
        raise InputError(f"UQFF version {major}.{minor}.{patch} is not supported; 0.1 to {MAJOR}.{MINOR} are")


FORMAT = Part(".weight.format", frozenset({"uint8"}), 0, 0)
_BYTES = Part(".weight", frozenset({"uint8"}), 1, 1)
_SHAPE = Part(".weight.shape", frozenset({"uint32"}), 1, 1)


def _number(suffix: str, dtype: str) -> Part:
    return Part(f".weight.{suffix}", frozenset({dtype}), 0, 0)


def _value(array: HostArray) -> int:
    return int(np.asarray(array))


def _ggml(format: HostArray, weight: HostArray, dtype: HostArray, shape: HostArray) -> Weight:
    """Blocks of llama.cpp's types, or floats, as bytes."""
    code, dims = _value(dtype), [int(n) for n in np.asarray(shape)]
    type = GGMLQuantizationType(code).name if code in set(GGMLQuantizationType) else f"of number {code}"
    if type not in PLAIN and type not in BLOCK_TYPES:
        raise InputError(f"the type {type} is not supported")
    size, nbytes = (1, np.dtype(PLAIN[type]).itemsize) if type in PLAIN else BLOCK_TYPES[type][:2]
    if not 2 <= len(dims) <= 3 or 0 in dims or dims[-1] % size:
        raise InputError(f"its shape is said to be {dims}, which is impossible for {type}")
    expect("its weight", weight, math.prod(dims) // size * nbytes)
    if type in PLAIN:
        return Dense(weight.view(PLAIN[type]).reshape(*dims))
    return GGML(weight.reshape(*dims[:-1], dims[-1] // size, nbytes), type)


def _dense(format: HostArray, weight: HostArray) -> Dense:
    return Dense(weight)


def _hqq(format: HostArray, weight: HostArray, **others: HostArray) -> Weight:
    names = {"scale": "scales", "zero": "zeros", "shape": "shape", "nbits": "bits", "group_size": "group_size"}
    renamed = {ours: others[theirs] for ours, theirs in names.items()}
    return integer_schemes.HQQ.build(packed=weight, axis=others["axis"], **renamed)


def _fp8(format: HostArray, weight: HostArray, scale: HostArray) -> Scaled:
    """One scale for the matrix. (A scale for activations is also there, but mistral.rs does not round these.)"""
    return Scaled(weight, scale.reshape(1, 1), (None, None))


def _afq(
    format: HostArray, weight: HostArray, scales: HostArray, biases: HostArray, bits: HostArray, group_size: HostArray
) -> Weight:
    """MLX's affine mode under another name."""
    count, group = _value(bits), _value(group_size)
    if count not in (2, 3, 4, 5, 6, 8) or group not in (32, 64, 128):
        raise InputError(f"{count} bits in groups of {group} are not supported")
    return integer_schemes.mlx(count, group).build(scales=scales, weight=weight, biases=biases)


def _f8q8(format: HostArray, weight: HostArray, num_blocks: HostArray, shape: HostArray) -> Weight:
    expect("its weight", weight, (count := _value(num_blocks)) * 33)
    return scaled_schemes.F8Q8.build(blocks=weight.reshape(count, 33), shape=shape)


def _mxfp4(format: HostArray, weight: HostArray, scales: HostArray) -> MXFP4:
    *lead, half = weight.shape
    if half * 2 % mxfp4.BLOCK:
        raise InputError(f"rows of {half * 2} are not whole blocks of {mxfp4.BLOCK}")
    expect("scales", scales, *lead, half * 2 // mxfp4.BLOCK)
    return MXFP4(weight, scales)


def _floats(suffix: str) -> Part:
    return Part(f".weight.{suffix}", FLOATS)


def _codes(dtypes: Iterable[str], most: int = 3) -> Part:
    return Part(".weight", frozenset(dtypes), 2, most)


_KIND = {"format": FORMAT}
_ENDS = {"shape": _SHAPE, "bits": _number("bits", "uint8"), "group_size": _number("group_size", "uint32")}
# By their numbers in files.
SCHEMES = (
    Scheme("GGUF", _KIND | {"weight": _BYTES, "dtype": _number("dtype", "uint32"), "shape": _SHAPE}, _ggml),
    Scheme("unquantized", _KIND | {"weight": _codes(FLOATS)}, _dense),
    Scheme(
        "HQQ",
        _KIND
        | {"weight": _codes(("uint8", "int32"), 2), "scales": _floats("scales"), "zeros": _floats("zeros")}
        | _ENDS
        | {"axis": _number("axis", "uint8")},
        _hqq,
        unused=(".weight.optimization_steps", ".weight.round_zeros", ".weight.channel_wise"),
    ),
    Scheme(
        "FP8",
        _KIND | {"weight": _codes(("float8_e4m3fn",), 2), "scale": _number("dequant_w_scale", "float32")},
        _fp8,
        unused=(".weight.dequant_x_scale", ".weight.quant_scale", ".weight.dtype"),
    ),
    Scheme(
        "AFQ",
        _KIND
        | {"weight": _codes(("uint32",)), "scales": _floats("scales"), "biases": _floats("biases")}
        | {name: _number(name, "uint8") for name in ("bits", "group_size")},
        _afq,
    ),
    Scheme("F8Q8", _KIND | {"weight": _BYTES, "num_blocks": _number("num_blocks", "uint32"), "shape": _SHAPE}, _f8q8),
    Scheme(
        "MXFP4",
        _KIND | {"weight": _codes(("uint8",)), "scales": Part(".weight.scales", frozenset({"uint8"}))},
        _mxfp4,
    ),
)
