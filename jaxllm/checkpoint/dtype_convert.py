"""A Hugging Face directory's tensors in another dtype, for any model, also one that we cannot run.

A checkpoint with blockwise FP8 has chosen its dtypes matrix by matrix: only its FP8 matrices are dequantized, as in
DeepSeek's fp8_cast_bf16.py, and nothing else changes. Any other checkpoint is converted entirely, except for the
router's correction bias, since rounding it changes which experts are chosen (transformers keeps it in float32 too).
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxllm.checkpoint.declared import NOT_CONVERTED, Declared, declared
from jaxllm.checkpoint.demo import BLOCK
from jaxllm.checkpoint.demo_convert import DECLARATION
from jaxllm.checkpoint.quantized import join, only
from jaxllm.checkpoint.safetensors import HFDirectory
from jaxllm.checkpoint.scaled_schemes import FP8, block_fp8
from jaxllm.checkpoint.writing import Tensor, nth
from jaxllm.checkpoint.writing import pieces as _pieces
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.scaled import Scaled
from jaxllm.placing import FileArray

TARGETS = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# FP8 that is not declared is in DeepSeek's blocks; tools that write other kinds declare them.
_UNDECLARED = only(block_fp8(BLOCK), block_fp8(BLOCK, scales=".weight_scale_inv"))
_CORRECTION_BIAS = re.compile(r"(?:.*\.)?(?:e_score_correction_bias|expert_bias)")
_FLOATS = {np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}
_SCALES = re.compile(r"scales?(_|$)|absmax|zeros?$|SCB")


class NeedsModel(InputError):
    """Only who knows the model can say which tensors make up a matrix, and what they stand for."""


def to_dtype(folder: HFDirectory, to: str) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors in another dtype, and the config that says so.

    Raises:
        NeedsModel: the checkpoint is quantized, and not in blocks of FP8.
    """
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
        raise NeedsModel(f"quantized ({reason})")
    config = with_dtype(config, to)
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


def with_dtype(config: Mapping[str, Any], to: str) -> dict[str, Any]:
    """The config, and the configs inside it of a model's parts, with another dtype where they name one."""
    changed = {key: with_dtype(value, to) for key, value in config.items() if isinstance(value, dict)}
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
