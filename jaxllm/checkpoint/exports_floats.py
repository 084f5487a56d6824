"""How weights of small floats are stored: FP8, MXFP8, MXFP4, NVFP4, NF4 and FP4; and plain numbers.

The inverse of `scaled_schemes` and `fourbit_schemes`; see `exports_integers`.
"""

import json

import numpy as np

from jaxllm.checkpoint.exports_integers import Laid, as_it_is, matrix
from jaxllm.checkpoint.repack import derived
from jaxllm.errors import InputError
from jaxllm.formats import mxfp4
from jaxllm.formats.base import Leaf, Weight
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.dense import Dense
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.nvfp4 import NVFP4
from jaxllm.formats.scaled import Scaled
from jaxllm.placing import DerivedArray

BNB_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that bitsandbytes can multiply with


def dense(weight: Weight, stacks: str) -> Laid:
    """Plain numbers.

    Args:
        stacks: the end of the name of a stack of experts; Hugging Face's have no ".weight".
    """
    assert isinstance(weight, Dense)
    return {stacks if len(weight.shape) == 3 else ".weight": as_it_is(weight.values)}


def block_fp8(weight: Weight) -> Laid:
    """Blockwise FP8. A stack of experts has no ".weight" in its name, as transformers has it."""
    assert isinstance(weight, Scaled) and None not in weight.block and weight.factor == 1
    name = "" if len(weight.shape) == 3 else ".weight"
    return {name: as_it_is(weight.values), f"{name}_scale_inv": as_it_is(weight.scales)}


def row_fp8(weight: Weight) -> Laid:
    """compressed-tensors' float-quantized: a scale for each row; if there is one for the entire matrix, in each row."""
    assert isinstance(weight, Scaled) and weight.block[1] is None and weight.factor == 1
    out, _ = matrix(weight)
    scales = derived((out, 1), weight.scales.dtype, lambda: np.broadcast_to(np.asarray(weight.scales), (out, 1)))
    return {".weight": as_it_is(weight.values), ".weight_scale": scales}


def mxfp8_compressed(weight: Weight) -> Laid:
    """compressed-tensors' mxfp8-quantized."""
    assert isinstance(weight, Scaled)
    matrix(weight)
    return {".weight": as_it_is(weight.values), ".weight_scale": _bytes(weight.scales)}


def mxfp8_mlx(weight: Weight) -> Laid:
    """MLX puts four values into a word."""
    assert isinstance(weight, Scaled)
    return {".weight": _words(weight.values), ".scales": _bytes(weight.scales)}


def mxfp4_experts(weight: Weight) -> Laid:
    """GPT-OSS' stacks: the bytes of a block have their own axis."""
    assert isinstance(weight, MXFP4)
    if len(weight.shape) != 3:
        raise InputError(f"a matrix {[*weight.shape]}, where GPT-OSS' files hold stacks of experts in MXFP4")
    shape = (*weight.scales.shape, mxfp4.BLOCK // 2)
    blocks = derived(shape, np.uint8, lambda: np.asarray(weight.blocks).reshape(shape))
    return {"_blocks": blocks, "_scales": as_it_is(weight.scales)}


def mxfp4_compressed(weight: Weight) -> Laid:
    """compressed-tensors' mxfp4-pack-quantized."""
    assert isinstance(weight, MXFP4)
    matrix(weight)
    return {".weight_packed": as_it_is(weight.blocks), ".weight_scale": as_it_is(weight.scales)}


def mxfp4_mlx(weight: Weight) -> Laid:
    """MLX puts eight codes into a word."""
    assert isinstance(weight, MXFP4)
    return {".weight": _words(weight.blocks), ".scales": as_it_is(weight.scales)}


def nvfp4_compressed(weight: Weight) -> Laid:
    """compressed-tensors' nvfp4-pack-quantized, which divides by the scale of the matrix.

    If the weight multiplies by it, its inverse is written, rounded once: values may differ in their last bit.
    """
    assert isinstance(weight, NVFP4)
    matrix(weight)

    def overall() -> np.ndarray:
        scale = np.ones(1, np.float32) if weight.global_scale is None else np.asarray(weight.global_scale)
        return scale if weight.divides else np.float32(1) / scale

    return {
        ".weight_packed": as_it_is(weight.blocks),
        ".weight_scale": as_it_is(weight.scales),
        ".weight_global_scale": derived((1,), np.float32, overall),
    }


def nvfp4_mlx(weight: Weight) -> Laid:
    """MLX puts eight codes into a word; its layers know no scale of the matrix."""
    assert isinstance(weight, NVFP4)
    if weight.global_scale is not None:
        raise InputError("NVFP4 with a scale for the entire matrix, which MLX's layers do not apply")
    return {".weight": _words(weight.blocks), ".scales": _bytes(weight.scales)}


def bnb_4bit(weight: Weight) -> Laid:
    """bitsandbytes' NF4 and FP4: bytes of the flattened matrix; what else its decoder has to know is text."""
    assert isinstance(weight, Codebook)
    out, in_ = matrix(weight)
    if weight.group not in BNB_BLOCKS:
        raise InputError(f"groups of {weight.group}, where bitsandbytes knows {', '.join(map(str, BNB_BLOCKS))}")
    kind = weight.name.lower()
    state = {"quant_type": kind, "blocksize": weight.group, "dtype": "bfloat16", "shape": [out, in_]}
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    size, count = out * in_ // 2, out * in_ // weight.group
    return {
        ".weight": derived((size, 1), np.uint8, lambda: np.asarray(weight.codes).reshape(size, 1)),
        ".weight.absmax": derived((count,), np.float32, lambda: np.asarray(weight.scales).reshape(count)),
        ".weight.quant_map": as_it_is(weight.table),
        f".weight.quant_state.bitsandbytes__{kind}": as_it_is(text),
    }


def _bytes(leaf: Leaf) -> DerivedArray:
    return derived(leaf.shape, np.uint8, lambda: np.asarray(leaf).view(np.uint8))


def _words(leaf: Leaf) -> DerivedArray:
    shape = (*leaf.shape[:-1], leaf.shape[-1] // 4)
    return derived(shape, np.uint32, lambda: np.ascontiguousarray(np.asarray(leaf)).view(np.uint32))
