"""Schemes of four-bit codes that stand for floats: MXFP4, NVFP4, and bitsandbytes' NF4 and FP4."""

import json
from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxllm.checkpoint import repack
from jaxllm.checkpoint.placing import HostArray
from jaxllm.checkpoint.repack import derived
from jaxllm.checkpoint.schemes import Scheme, decoded, expect
from jaxllm.errors import InputError
from jaxllm.formats import mxfp4
from jaxllm.formats.base import Weight
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.dense import Dense
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.nvfp4 import NVFP4


def _mxfp4(blocks: HostArray, scales: HostArray) -> MXFP4:
    """Blocks `[..., out, in / 2]` of bytes, or with the bytes of a block on an axis of their own, or eight codes to a
    word."""
    if blocks.dtype not in (np.uint8, np.uint32) or scales.dtype.itemsize != 1:
        raise InputError(f"MXFP4 in {blocks.dtype} with scales in {scales.dtype}; both should be bytes")
    if blocks.ndim == scales.ndim + 1 and blocks.shape[-1] == mxfp4.BLOCK // 2:
        blocks = blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])
    blocks, scales = (array.view(np.uint8) for array in (blocks, scales))
    if blocks.shape[-1] % (mxfp4.BLOCK // 2):
        raise InputError(f"rows of {2 * blocks.shape[-1]} are not whole blocks of {mxfp4.BLOCK}")
    want = [*blocks.shape[:-1], blocks.shape[-1] // (mxfp4.BLOCK // 2)]
    if [*scales.shape] != want:
        raise InputError(f"scales have shape {[*scales.shape]}, expected {want}: one for {mxfp4.BLOCK} values")
    return MXFP4(blocks, scales)


MXFP4_GPT_OSS = Scheme("MXFP4", {"blocks": "_blocks", "scales": "_scales"}, _mxfp4, result="")
MXFP4_PLAIN = Scheme("MXFP4", {"blocks": ".blocks", "scales": ".scales"}, _mxfp4)
MXFP4_MLX = Scheme("MXFP4", {"scales": ".scales", "blocks": ".weight"}, _mxfp4)
MXFP4_COMPRESSED = Scheme("MXFP4", {"blocks": ".weight_packed", "scales": ".weight_scale"}, _mxfp4)


def _nvfp4(divides: bool) -> Callable[..., NVFP4]:
    def build(
        blocks: HostArray, scales: HostArray, whole: HostArray | None = None, input_scale: HostArray | None = None
    ) -> NVFP4:
        if blocks.dtype not in (np.uint8, np.uint32) or scales.dtype.itemsize != 1:
            raise InputError(f"NVFP4 in {blocks.dtype} with scales in {scales.dtype}; both should be bytes")
        blocks, scales = blocks.view(np.uint8), scales.view(ml_dtypes.float8_e4m3fn)
        expect("scales", scales, *blocks.shape[:-1], blocks.shape[-1] // 8)
        return NVFP4(blocks, scales, None if whole is None else whole.reshape(*blocks.shape[:-2], 1), divides)

    return build


NVFP4_MODELOPT = Scheme(
    "NVFP4",
    {"whole": ".weight_scale_2", "blocks": ".weight", "scales": ".weight_scale"},
    _nvfp4(divides=False),
    {"input_scale": ".input_scale"},
)
NVFP4_COMPRESSED = Scheme(
    "NVFP4",
    {"blocks": ".weight_packed", "scales": ".weight_scale", "whole": ".weight_global_scale"},
    _nvfp4(divides=True),
    {"input_scale": ".input_global_scale"},
)
NVFP4_MLX = Scheme(
    "NVFP4", {"scales": ".scales", "blocks": ".weight"}, _nvfp4(divides=False), {"whole": ".global_scale"}
)


def _bnb_4bit(
    absmax: HostArray,
    weight: HostArray,
    quant_map: HostArray,
    nested_absmax: HostArray | None = None,
    nested_quant_map: HostArray | None = None,
    nf4: HostArray | None = None,
    fp4: HostArray | None = None,
) -> Weight:
    if (state := nf4 if fp4 is None else fp4) is None:
        raise InputError("its 'quant_state' is missing")
    try:
        state = json.loads(np.asarray(state).tobytes())
        (out, in_), block = state["shape"], state["blocksize"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"its 'quant_state' makes no sense: {error}") from error
    count = -(-out * in_ // block)
    if weight.shape[0] * weight.shape[-1] * weight.dtype.itemsize != -(-out * in_ // 2):
        raise InputError(
            f"weight has {weight.shape[0]} entries of {weight.dtype}, but its quant_state says {out} x {in_}"
        )
    expect("absmax", absmax, count)
    if nested_absmax is not None:
        size, offset, codes = state["nested_blocksize"], np.float32(state["nested_offset"]), absmax

        def unnested() -> np.ndarray:
            scale = np.asarray(nested_absmax).repeat(size)[:count]
            return np.asarray(nested_quant_map)[np.asarray(codes)] * scale + offset

        absmax = derived((count,), np.float32, unnested)
    group, flat, name = repack.group_size(in_, block), weight.view(np.uint8), "FP4" if nf4 is None else "NF4"
    scales = repack.by_rows(absmax, (out, in_), block)
    if in_ % 2 == 0:
        return Codebook(flat.reshape(out, in_ // 2), scales, quant_map, group, name)

    def whole() -> Dense:
        data = np.asarray(flat).reshape(-1)
        codes = np.stack([data >> 4, data & 15], -1).reshape(-1)[: out * in_].reshape(out, in_)
        return Dense(np.asarray(quant_map)[codes] * np.repeat(np.asarray(scales), group, 1))

    return decoded(whole, (out, in_))


_STATE = ".weight.quant_state.bitsandbytes__"
BNB_4BIT = Scheme(
    "bitsandbytes 4-bit",
    {"absmax": ".weight.absmax", "weight": ".weight", "quant_map": ".weight.quant_map"},
    _bnb_4bit,
    {"nested_absmax": ".weight.nested_absmax", "nested_quant_map": ".weight.nested_quant_map"}
    | {"nf4": f"{_STATE}nf4", "fp4": f"{_STATE}fp4"},
)
