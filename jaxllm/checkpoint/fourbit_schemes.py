"""Schemes of four-bit codes that stand for floats: MXFP4, NVFP4, and bitsandbytes' NF4 and FP4."""

import json
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxllm.checkpoint import repack
from jaxllm.checkpoint.repack import derived
from jaxllm.checkpoint.schemes import ANY, Part, Scheme, decoded, expect
from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.formats import mxfp4
from jaxllm.formats.base import Weight
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.dense import Dense
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.nvfp4 import NVFP4
from jaxllm.placing import HostArray


def _mxfp4(blocks: HostArray, scales: HostArray) -> MXFP4:
    """Blocks are bytes `[..., out, in / 2]`, bytes with an extra axis for each block's bytes, or words of 8 codes."""
    if blocks.ndim == scales.ndim + 1 and blocks.shape[-1] == mxfp4.BLOCK // 2:
        blocks = blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])
    blocks, scales = (array.view(np.uint8) for array in (blocks, scales))
    if blocks.shape[-1] % (mxfp4.BLOCK // 2):
        raise InputError(f"rows of {2 * blocks.shape[-1]} are not whole blocks of {mxfp4.BLOCK}")
    want = [*blocks.shape[:-1], blocks.shape[-1] // (mxfp4.BLOCK // 2)]
    if [*scales.shape] != want:
        raise InputError(f"scales have shape {[*scales.shape]}, expected {want}: one for {mxfp4.BLOCK} values")
    return MXFP4(blocks, scales)


def _codes(suffix: str, most: int = 3) -> dict[str, Part]:
    return {"blocks": Part(suffix, frozenset({"uint8", "uint32"}), 2, most)}


def _powers(suffix: str) -> dict[str, Part]:
    return {"scales": Part(suffix, frozenset({"uint8", "float8_e8m0fnu"}))}


MXFP4_GPT_OSS = Scheme("MXFP4", _codes("_blocks", 4) | _powers("_scales"), _mxfp4, result="")
MXFP4_PLAIN = Scheme("MXFP4", _codes(".blocks", 4) | _powers(".scales"), _mxfp4)
MXFP4_MLX = Scheme("MXFP4", _powers(".scales") | _codes(".weight"), _mxfp4)
MXFP4_COMPRESSED = Scheme("MXFP4", _codes(".weight_packed") | _powers(".weight_scale"), _mxfp4)


def _nvfp4(divides: bool) -> Callable[..., NVFP4]:
    def build(
        blocks: HostArray,
        scales: HostArray,
        global_scale: HostArray | None = None,
        input_scale: HostArray | None = None,
    ) -> NVFP4:
        blocks, scales = blocks.view(np.uint8), scales.view(ml_dtypes.float8_e4m3fn)
        expect("scales", scales, *blocks.shape[:-1], blocks.shape[-1] // 8)
        if global_scale is not None and math.prod(global_scale.shape) != math.prod(blocks.shape[:-2]):
            raise InputError(f"a global scale of shape {[*global_scale.shape]} for a matrix of {[*blocks.shape]} bytes")
        return NVFP4(
            blocks, scales, None if global_scale is None else global_scale.reshape(*blocks.shape[:-2], 1), divides
        )

    return build


def _small(suffix: str) -> dict[str, Part]:
    return {"scales": Part(suffix, frozenset({"float8_e4m3fn", "uint8"}))}


def _one(name: str, suffix: str) -> dict[str, Part]:
    return {name: Part(suffix, frozenset({"float32"}), 0, 1)}


NVFP4_MODELOPT = Scheme(
    "NVFP4",
    _one("global_scale", ".weight_scale_2") | _codes(".weight") | _small(".weight_scale"),
    _nvfp4(divides=False),
    _one("input_scale", ".input_scale"),
)
NVFP4_COMPRESSED = Scheme(
    "NVFP4",
    _codes(".weight_packed") | _small(".weight_scale") | _one("global_scale", ".weight_global_scale"),
    _nvfp4(divides=True),
    _one("input_scale", ".input_global_scale"),
)
NVFP4_MLX = Scheme(
    "NVFP4", _small(".scales") | _codes(".weight"), _nvfp4(divides=False), _one("global_scale", ".global_scale")
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
        state = Entries(json.loads(np.asarray(state).tobytes()), "its 'quant_state'")
    except ValueError as error:
        raise InputError(f"its 'quant_state' makes no sense: {error}") from error
    if not isinstance(state.values, dict):
        raise InputError("its 'quant_state' is no JSON object")
    block, whole = state.integer("blocksize"), f"two sizes below {2**24}"
    out, in_ = state.get(
        "shape",
        None,
        lambda v: isinstance(v, list) and len(v) == 2 and all(type(n) is int and 0 < n < 2**24 for n in v),
        whole,
    )
    count = -(-out * in_ // block)
    if (entries := math.prod(weight.shape)) * weight.dtype.itemsize != -(-out * in_ // 2):
        raise InputError(f"weight has {entries} entries of {weight.dtype}, but its quant_state says {out} x {in_}")
    expect("absmax", absmax, count)
    expect("quant_map", quant_map, 16)
    if absmax.dtype == np.uint8 and (nested_absmax is None or nested_quant_map is None):
        raise InputError("its absmax is quantized, but 'nested_absmax' or 'nested_quant_map' is missing")
    if absmax.dtype == np.uint8:
        size, codes = state.integer("nested_blocksize"), absmax
        offset = np.float32(state.number("nested_offset", above=-math.inf))
        expect("nested_absmax", nested_absmax, -(-count // size))
        expect("nested_quant_map", nested_quant_map, 256)

        def unnested() -> np.ndarray:
            scale = np.asarray(nested_absmax).repeat(size)[:count]
            return np.asarray(nested_quant_map)[np.asarray(codes)] * scale + offset

        absmax = derived((count,), np.float32, unnested)
    group, flat, name = repack.group_size(in_, block), weight.view(np.uint8), "FP4" if nf4 is None else "NF4"
    scales = repack.by_rows(absmax, (out, in_), block)
    if in_ % 2 == 0:
        return Codebook(flat.reshape(out, in_ // 2), scales, quant_map, group, name)

    def dense() -> Dense:
        data = np.asarray(flat).reshape(-1)
        codes = np.stack([data >> 4, data & 15], -1).reshape(-1)[: out * in_].reshape(out, in_)
        return Dense(np.asarray(quant_map)[codes] * np.repeat(np.asarray(scales), group, 1))

    return decoded(dense, (out, in_))


_FLOAT32, _STATE = frozenset({"float32"}), ".weight.quant_state.bitsandbytes__"
BNB_4BIT = Scheme(
    "bitsandbytes 4-bit",
    {"absmax": Part(".weight.absmax", frozenset({"float32", "uint8"}), 1, 1), "weight": Part(".weight", ANY, 1, 2)}
    | {"quant_map": Part(".weight.quant_map", _FLOAT32, 1, 1)},
    _bnb_4bit,
    {name: Part(f".weight.{name}", _FLOAT32, 1, 1) for name in ("nested_absmax", "nested_quant_map")}
    | {name: Part(_STATE + name, frozenset({"uint8"}), 1, 1) for name in ("nf4", "fp4")},
)
