"""`python -m jaxllm.convert`: a Hugging Face directory in another dtype, or to and from the files of DeepSeek's demo.

A tensor is read, converted and written piece by piece, so memory use does not grow with the model. (Mapping the file
would be shorter, but pages read from a map stay with the process, and truncating the file meanwhile would kill it.)

Conversion to another dtype has two cases. A checkpoint with blockwise FP8 has chosen its dtypes matrix by matrix: only
its FP8 matrices are dequantized, as in DeepSeek's fp8_cast_bf16.py, and nothing else changes. Any other checkpoint is
converted entirely, except for the router's correction bias, since rounding it changes which experts are chosen
(transformers keeps it in float32 too).
"""

import argparse
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from tqdm import tqdm

from jaxllm.checkpoint.declared import NOT_CONVERTED, Declared, declared
from jaxllm.checkpoint.demo import BLOCK, is_demo
from jaxllm.checkpoint.demo_convert import DECLARATION, to_demo, to_huggingface
from jaxllm.checkpoint.quantized import join, only
from jaxllm.checkpoint.safetensors import HFDirectory, open_directory
from jaxllm.checkpoint.scaled_schemes import FP8, block_fp8
from jaxllm.checkpoint.writing import GB, Tensor, nth, write_directory, write_files
from jaxllm.checkpoint.writing import pieces as _pieces
from jaxllm.cli import Parser, execute
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.scaled import Scaled
from jaxllm.placing import FileArray

TARGETS = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
LAYOUTS = ("demo", "huggingface")
DEMO_CONFIG = "config_demo.json"
# FP8 that is not declared is in DeepSeek's blocks; tools that write other kinds declare them.
_UNDECLARED = only(block_fp8(BLOCK), block_fp8(BLOCK, scales=".weight_scale_inv"))
_CORRECTION_BIAS = re.compile(r"(?:.*\.)?(?:e_score_correction_bias|expert_bias)")
_FLOATS = {np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
_SCALES = re.compile(r"scales?(_|$)|absmax|zeros?$|SCB")
# Files that hold weights or run code when they are opened, their indexes (".index."), and hidden files.
_LEFT_OUT = re.compile(r"\.(safetensors|bin|pth?|ckpt|pkl|pickle|np[yz]|h5|msgpack|gguf|onnx\w*|ot)$|\.index\.|^\.")
_PICKLES = (b"\x80", b"PK\x03\x04")  # the first bytes of a pickle, and of an archive such as torch's


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    to: str,
    max_shard_size: int | str = "5GB",
    model_parallel: int | None = None,
    n_experts: int | None = None,
    config: str | os.PathLike | None = None,
    progress: bool = True,
) -> None:
    """Convert a Hugging Face directory to another dtype or to the files of DeepSeek's demo, or convert those back.

    For another dtype, the FP8 matrices of a blockwise FP8 checkpoint are dequantized; its other tensors stay the same
    bit for bit. A matrix whose scales are missing stays FP8: a warning names it, and the written config.json still
    declares FP8 but excludes the dequantized matrices. In a checkpoint without FP8, all floating-point tensors are
    converted except the router's correction bias (`e_score_correction_bias`, `expert_bias`); integers do not change.

    Files that hold no weights are copied; hidden files and subdirectories are not.

    Args:
        src: the directory to read.
        dst: the directory to write; it must be empty or not exist. It appears when everything is written.
        to: "bfloat16" (rounded to nearest, ties to even) or "float32"; "demo", or "huggingface" from the demo's files,
            both of which change no value.
        max_shard_size: bytes per file, or text such as "500MB"; a larger tensor gets its own file.
        model_parallel: how many files to write for the demo, one per GPU.
        n_experts: the expected number of experts, for "demo".
        config: for "huggingface", a config.json to use unchanged, or the demo's ModelArgs; by default those in `src`.
        progress: whether to show progress, and a final line, on stderr.

    Raises:
        InputError: a file or argument cannot be used; one line saying what and where.
    """
    if to not in (*TARGETS, *LAYOUTS):
        raise InputError(f"to '{to}': choose one of {', '.join((*TARGETS, *LAYOUTS))}")
    if (to == "demo") != (model_parallel is not None) or (n_experts is not None and to != "demo"):
        raise InputError("to 'demo' needs model_parallel, the number of files, and nothing else takes it or n_experts")
    if config is not None and to != "huggingface":
        raise InputError(f"config '{config}': only to 'huggingface' takes one")
    src, dst, limit = Path(src), Path(dst), parse_size(max_shard_size)
    if dst.resolve().is_relative_to(src.resolve()):
        raise InputError(f"{dst}: is {src} itself or inside it; name a directory elsewhere")
    begun = time.perf_counter()
    if to == "huggingface":
        tensors, said = to_huggingface(src, None if config is None else Path(config))
        configs = {"config.json": said}
    else:
        folder = _open(src)
        try:
            if model_parallel is not None:  # to the demo's files
                parts, args = to_demo(folder, model_parallel, n_experts)
                tensors, configs = list(chain(*parts.values())), {} if args is None else {DEMO_CONFIG: args}
            else:
                tensors, said = _to_dtype(folder, to)
                configs = {"config.json": said}
        except InputError as error:
            raise InputError(f"{src}: {error}") from error
    files: dict[str, Path | bytes] = {file.name: file for file in sorted(src.iterdir()) if _comes_along(file)}
    if to in LAYOUTS:
        files = {name: file for name, file in files.items() if not re.fullmatch(r"config.*\.json", name)}
    files |= {name: (json.dumps(said, indent=2) + "\n").encode() for name, said in configs.items()}

    total = sum(t.nbytes for t in tensors)
    hide = None if progress else True  # None: where stderr is not a terminal
    with tqdm(desc="converting", total=total, unit="B", unit_scale=True, disable=hide, leave=False) as bar:
        if to == "demo":
            write_files(dst, parts, files, bar.update)
        else:
            write_directory(dst, tensors, files, limit, bar.update)
    if progress:
        seconds = time.perf_counter() - begun
        rate = f"{seconds:.1f} s, {total / GB / seconds:.2f} GB/s"
        print(f"{dst}: {len(tensors)} tensors, {total} bytes, {rate}", file=sys.stderr)


def parse_size(size: int | str) -> int:
    """Bytes, from a number or from text such as "5GB", "1.5 GiB" or "1000"."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d*)?)\s*(?:(?:([KMGT])(i?))?B)?", str(size).strip(), re.IGNORECASE)
    power = "KMGT".find((found[2] or "-").upper()) + 1 if found else 0
    number = int(float(found[1]) * (1024 if found[3] else 1000) ** power) if found else 0
    if number < 1:
        raise InputError(f"max_shard_size '{size}': give a number of bytes, or for example 500MB or 5GB")
    return number


def _open(src: Path) -> HFDirectory:
    """The source, if it is of a kind that can be converted."""
    if src.suffix == ".gguf" or (not (src / "config.json").exists() and any(src.glob("*.gguf"))):
        raise InputError(f"{src}: GGUF cannot be converted yet; give a Hugging Face directory")
    if not src.is_dir():
        raise InputError(f"{src}: not a directory")
    if is_demo(src):
        raise InputError(f"{src}: files of DeepSeek's demo; convert them to 'huggingface' first")
    return open_directory(src)


def _to_dtype(folder: HFDirectory, to: str) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors in another dtype, and the config that says so."""
    config, dtype = dict(folder.config), TARGETS[to]
    weights: dict[str, Weight] = dict(folder.tensors)
    if (found := _blockwise(folder)) is None:
        fp8, unscaled = [], []
    else:
        given = config.pop("quantization_config", None) or DECLARATION
        fp8 = [name for name, weight in weights.items() if weight.leaf("values").dtype.name in FP8]
        unscaled = [name for name in fp8 if not _has_scales(name, weights, found)]
        weights = join({name: weight for name, weight in folder.tensors.items() if name not in unscaled}, found)
    if reason := _quantized(config, weights):
        raise InputError(f"quantized ({reason}), which cannot be converted yet")
    config = _with_dtype(config, to)
    if not fp8:
        kept = _CORRECTION_BIAS.fullmatch
        return [_same(n, w) if kept(n) else _cast(n, w, dtype) for n, w in weights.items()], config
    tensors = [_dequantized(n, w, dtype) if isinstance(w, Scaled) else _same(n, w) for n, w in weights.items()]
    if unscaled:  # the result is still FP8, except for the dequantized matrices
        left_out = [name.removesuffix(".weight") for name, weight in weights.items() if isinstance(weight, Scaled)]
        key = next((key for key in NOT_CONVERTED if given.get(key) is not None), NOT_CONVERTED[0])
        config["quantization_config"] = {**given, key: [*(given.get(key) or ()), *left_out]}
    for name in unscaled:
        warnings.warn(f"'{name}' is FP8, but '{name}_scale_inv' is missing; it stays FP8", stacklevel=3)
        tensors.append(_same(name, folder.tensors[name]))
    return tensors, config


def _blockwise(folder: HFDirectory) -> Declared | None:
    """The declaration of blockwise FP8, from the config or from the tensors' names; None if there is no such FP8."""
    given = folder.config.get("quantization_config")
    if isinstance(given, dict) and given.get("quant_method") == "fp8" and given.get("weight_block_size"):
        return declared(folder.config, {})
    fp8 = [name for name, weight in folder.tensors.items() if weight.leaf("values").dtype.name in FP8]
    shown = any(_has_scales(name, folder.tensors, _UNDECLARED) for name in fp8)
    return _UNDECLARED if shown and not given else None


def _has_scales(name: str, tensors: Mapping[str, Weight], found: Declared) -> bool:
    """Whether a matrix has its scales, under any of the declared names."""
    ours = (scheme for scheme in found.schemes(name) if name.endswith(scheme.result))
    return any(name.removesuffix(scheme.result) + scheme.key in tensors for scheme in ours)


def _quantized(config: Mapping[str, Any], weights: Mapping[str, Weight]) -> str | None:
    """Evidence that the checkpoint is quantized in some other way; None if every value stands for itself."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "quantization", "compression_config"):
            if part.get(key):
                return f"config.json has '{key}'"
    plain = {name: weight for name, weight in weights.items() if not isinstance(weight, Scaled)}
    split = [name.rpartition(".") for name in plain]
    scaled = {stem for stem, dot, last in split if dot and _SCALES.search(last)}
    for name, weight in plain.items():
        values = weight.leaf("values")
        dtype = values.dtype
        packed = dtype.kind in "iu" and dtype.itemsize <= 4 and values.ndim > 1
        if packed and not scaled.isdisjoint((name, name.rpartition(".")[0])):
            return f"tensor '{name}' of {dtype} has scales"
        if dtype.kind not in "iub" and dtype not in _FLOATS:
            return f"tensor '{name}' is {dtype}"
    return None


def _comes_along(file: Path) -> bool:
    if not file.is_file() or _LEFT_OUT.search(file.name):
        return False
    with file.open("rb") as opened:
        return not opened.read(4).startswith(_PICKLES)


def _with_dtype(config: Mapping[str, Any], to: str) -> dict[str, Any]:
    """The config, and the configs inside it of a model's parts, with another dtype where they name one."""
    changed = {key: _with_dtype(value, to) for key, value in config.items() if isinstance(value, dict)}
    return dict(config) | changed | {key: to for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}


def _same(name: str, weight: Weight) -> Tensor:
    array: FileArray = weight.leaf("values")
    return Tensor(name, array.dtype, array.shape, _pieces(name, array))


def _cast(name: str, weight: Weight, dtype: np.dtype) -> Tensor:
    array: FileArray = weight.leaf("values")
    dtype = dtype if array.dtype in _FLOATS else array.dtype
    return Tensor(name, dtype, array.shape, (_rounded(piece, dtype) for piece in _pieces(name, array)))


def _dequantized(name: str, weight: Scaled, dtype: np.dtype) -> Tensor:
    return Tensor(name, dtype, weight.shape, _bands(name, weight, dtype))


def _bands(name: str, weight: Scaled, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The matrix, or a stack of them, dequantized in bands of complete blocks."""
    (rows, _), (*lead, _, width) = weight.block, weight.shape
    assert rows is not None  # blockwise
    scales = np.concatenate([*_pieces(f"the scales of {name}", weight.scales)])
    for i, grid in enumerate(scales.reshape(math.prod(lead), *weight.scales.shape[-2:])):
        begin = 0
        for piece in _pieces(name, nth(weight.values, weight.shape[-2:], i), rows * width):
            values = piece.reshape(-1, width)
            high = math.ceil(len(values) / rows)
            yield _decode(replace(weight, values=values, scales=grid[begin : begin + high]), dtype)
            begin += high


def _decode(band: Scaled, dtype: np.dtype) -> np.ndarray:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(_dequantize(band, dtype))


@partial(jax.jit, static_argnums=1)
def _dequantize(band: Scaled, dtype: np.dtype) -> jax.Array:
    return band.dequantize(dtype)


def _rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounded once, to nearest, ties to even; the same dtype keeps every bit."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore", invalid="ignore"):  # large values become infinite, signalling NaNs become quiet
        if x.dtype == np.float64 and dtype == ml_dtypes.bfloat16:
            # ml_dtypes first rounds to the nearest float32, which can turn values near a tie into a tie. So round
            # toward zero, and set the last bit if that is inexact: no tie can result.
            nearest = x.astype(np.float32)
            bits = nearest.view(np.uint32) - (np.abs(nearest) > np.abs(x))
            x = (bits | (nearest != x)).view(np.float32)
        return x.astype(dtype)


class _Parser(Parser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)  # SRC and DST may be apart


def parser() -> argparse.ArgumentParser:
    p = _Parser("jaxllm.convert", __doc__.splitlines()[0])
    p.add_argument("paths", nargs="*", metavar="SRC DST", help="a directory, and the one to write, new or empty")
    converting = "as DeepSeek's convert.py has it"
    casting = "as DeepSeek's fp8_cast_bf16.py has it; implies --to bfloat16"
    src, dst = p.add_mutually_exclusive_group(), p.add_mutually_exclusive_group()
    src.add_argument("--hf-ckpt-path", metavar="SRC", help=f"instead of SRC, {converting}")
    src.add_argument("--input-fp8-hf-path", metavar="SRC", help=f"instead of SRC, {casting}")
    dst.add_argument("--save-path", metavar="DST", help=f"instead of DST, {converting}")
    dst.add_argument("--output-bf16-hf-path", metavar="DST", help=f"instead of DST, {casting}")
    p.add_argument(
        "--to",
        choices=(*TARGETS, *LAYOUTS),
        help="a dtype: for the FP8 matrices if there are any, otherwise for all floating-point tensors except the "
        "router's correction bias; the files of DeepSeek's demo (with --model-parallel); or huggingface from those",
    )
    p.add_argument("--model-parallel", type=int, metavar="N", help="files for the demo, each for one GPU")
    p.add_argument("--n-experts", type=int, metavar="N", help="for the demo: how many there should be")
    p.add_argument("--config", metavar="FILE", help="to huggingface: a config.json, or the demo's ModelArgs")
    p.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file, such as 500MB (5GB)")
    return p


def run(args: argparse.Namespace) -> None:
    paths = [args.hf_ckpt_path, args.input_fp8_hf_path, *args.paths, args.save_path, args.output_bf16_hf_path]
    paths = [path for path in paths if path is not None]
    if len(paths) != 2:
        raise InputError("give SRC and DST, the directory to read and the one to write")
    casting = args.input_fp8_hf_path or args.output_bf16_hf_path
    implied = "bfloat16" if casting else "demo" if args.model_parallel is not None else None
    to = args.to or implied
    if to is None:
        raise InputError("give --to, what to convert to")
    options = {name: getattr(args, name) for name in ("max_shard_size", "model_parallel", "n_experts", "config")}
    try:
        convert(*paths, to=to, **options)
    except OSError as error:
        raise InputError(str(error)) from error


if __name__ == "__main__":
    sys.exit(execute(parser(), run))
