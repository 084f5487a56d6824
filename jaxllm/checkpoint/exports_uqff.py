"""A weight as the tensors that UQFF 1.x has for it, by the end of their names: the inverse of `uqff.SCHEMES`.

Nothing is rounded. Tensors are lazy, and know their shapes even if the weight's leaves are only shapes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

from jaxllm.checkpoint import repack
from jaxllm.checkpoint.exports_integers import Laid, as_it_is, matrix, mlx
from jaxllm.checkpoint.repack import derived
from jaxllm.errors import InputError
from jaxllm.formats import hqq
from jaxllm.formats.affine import Affine
from jaxllm.formats.base import Leaf, Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.scaled import E4M3_MAX, Scaled
from jaxllm.placing import DerivedArray

NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
F8E4M3 = 9  # candle's number for the dtype, which mistral.rs writes for FP8 layers


class Kind(NamedTuple):
    """How UQFF holds a weight.

    name: what mistral.rs calls a layer of this kind.
    code: its number in files.
    write: its tensors except the number, by the end of their names after ".weight".
    """

    name: str
    code: int
    write: Callable[[Any], Laid]


def kind(weight: Weight) -> Kind:
    """How UQFF holds this weight. Raises InputError if it cannot."""
    match weight:
        case GGML():
            return Kind(weight.type.lower().replace("_k", "k"), 0, _ggml)
        case Dense() if len(weight.shape) > 2:  # mistral.rs multiplies by stacks only in GGUF's types
            return Kind(NAMES[weight.format], 0, _plain_ggml)
        case Dense():
            return Kind("unquant", 1, _dense)
        case Affine(name="HQQ", bits=4 | 8) if weight.out_groups is not None:
            return Kind(f"hqq{weight.bits}", 2, _hqq)
        case Scaled(block=(None, None)) if weight.values.dtype == jnp.float8_e4m3fn:
            return Kind("fp8", 3, _fp8)
        case Affine(name="MLX"):
            return Kind(f"afq{weight.bits}", 4, _afq)
        case Scaled(block=(1, 32)) if weight.factor == 1 / E4M3_MAX:
            return Kind("f8q8", 5, _f8q8)
        case MXFP4():
            return Kind("mxfp4", 6, _mxfp4)
    raise InputError(f"{weight.format}, which UQFF has no layers for")


def lay(weight: Weight, shape: Sequence[int]) -> Laid:
    """The tensors of a matrix, or of a stack of them. Raises InputError if UQFF cannot hold it.

    Args:
        shape: the matrix's; that of the weight may be another where groups run across rows (HQQ).
    """
    how = kind(weight)
    tensors = {f".weight{end}": array for end, array in how.write(weight).items()}
    tensors |= {".weight.shape": _sizes(*shape)} if ".weight.shape" in tensors else {}
    return tensors | {".weight.format": _scalar(how.code, np.uint8)}


def _scalar(value: float, dtype: np.typing.DTypeLike) -> DerivedArray:
    return derived((), dtype, lambda: np.array(value, dtype))


def _sizes(*sizes: int) -> DerivedArray:
    return derived((len(sizes),), np.uint32, lambda: np.array(sizes, np.uint32))


def _ggml(weight: GGML) -> Laid:
    flat = derived((weight.nbytes,), np.uint8, lambda: np.asarray(weight.blocks).reshape(-1))
    number = int(GGMLQuantizationType[weight.type])
    return {"": flat, ".dtype": _scalar(number, np.uint32), ".shape": _sizes(*weight.shape)}


def _plain_ggml(weight: Dense) -> Laid:
    nbytes = math.prod(weight.shape) * weight.values.dtype.itemsize
    flat = derived((nbytes,), np.uint8, lambda: np.ascontiguousarray(weight.values).reshape(-1).view(np.uint8))
    number = int(GGMLQuantizationType[NAMES[weight.format].upper()])
    return {"": flat, ".dtype": _scalar(number, np.uint32), ".shape": _sizes(*weight.shape)}


def _dense(weight: Dense) -> Laid:
    return {"": as_it_is(weight.values)}


def _hqq(weight: Affine) -> Laid:
    """Groups along the first axis of the matrix read as `[64, -1]`; halves of the rows of that are on top of each other
    in a byte."""
    (out, in_), bits = matrix(weight), weight.bits
    count = out * in_ // hqq.GROUP

    def packed() -> np.ndarray:
        codes = repack.bit_stream(np.asarray(weight.codes).reshape(out, -1), bits, in_).reshape(hqq.GROUP, count)
        return codes if bits == 8 else codes[: hqq.GROUP // 2] << bits | codes[hqq.GROUP // 2 :]

    def grid(leaf: Leaf) -> DerivedArray:
        def values() -> np.ndarray:
            return np.asarray(leaf)[1:].astype(np.float32).reshape(1, count)  # group 0 is for padding

        return derived((1, count), np.float32, values)

    numbers = {"axis": 0, "bits": bits, "round_zeros": 0, "channel_wise": 1}
    return {
        "": derived((hqq.GROUP * bits // 8, count), np.uint8, packed),
        ".scales": grid(weight.scales),
        ".zeros": grid(weight.zeros),
        ".shape": _sizes(out, in_),
        ".group_size": _scalar(hqq.GROUP, np.uint32),
        ".optimization_steps": _scalar(hqq.STEPS, np.uint32),
        **{f".{name}": _scalar(value, np.uint8) for name, value in numbers.items()},
    }


def _fp8(weight: Scaled) -> Laid:
    matrix(weight)

    def scale() -> np.ndarray:
        return np.asarray(weight.scales, np.float32).reshape(())

    return {
        "": as_it_is(weight.values),
        ".dequant_w_scale": derived((), np.float32, scale),
        ".dequant_x_scale": derived((), np.float32, scale),
        ".quant_scale": derived((), np.float32, lambda: np.float32(1) / scale()),
        ".dtype": _scalar(F8E4M3, np.uint32),
    }


def _afq(weight: Affine) -> Laid:
    numbers = {".bits": _scalar(weight.bits, np.uint8), ".group_size": _scalar(weight.group, np.uint8)}
    return {end.removeprefix(".weight"): array for end, array in mlx(weight).items()} | numbers


def _f8q8(weight: Scaled) -> Laid:
    out, in_ = matrix(weight)
    count = out * in_ // 32

    def blocks() -> np.ndarray:
        scales, values = np.asarray(weight.scales).view(np.uint8), np.asarray(weight.values).view(np.uint8)
        return np.concatenate([scales.reshape(count, 1), values.reshape(count, 32)], 1).reshape(-1)

    return {
        "": derived((count * 33,), np.uint8, blocks),
        ".num_blocks": _scalar(count, np.uint32),
        ".shape": _sizes(out, in_),
    }


def _mxfp4(weight: MXFP4) -> Laid:
    return {"": as_it_is(weight.blocks), ".scales": as_it_is(weight.scales)}
