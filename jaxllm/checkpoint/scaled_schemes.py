"""Schemes of small floats or integers with scales: FP8 of every kind, MXFP8, INT8, LLM.int8 and F8Q8."""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxllm.checkpoint import repack
from jaxllm.checkpoint.integer_schemes import affine, grouped, sizes
from jaxllm.checkpoint.repack import derived
from jaxllm.checkpoint.schemes import ANY, FLOATS, INTEGERS, Part, Scheme, expect
from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.scaled import Activations, Scaled
from jaxllm.placing import HostArray, read_part

SCALE_FORMATS = ("ue8m0", "float")
FP8 = frozenset({"float8_e4m3fn", "float8_e5m2"})
SCALES = FLOATS | {"float8_e8m0fnu"}


def block_fp8(
    block: tuple[int, int], values: str = "", scales: str = "_scale_inv", power_of_two: bool = False
) -> Scheme:
    """Blockwise FP8; by default as in Hugging Face checkpoints, where `X` has its scales in `X_scale_inv`.

    Args:
        power_of_two: whether scales of activations are rounded up to powers of two, see `is_ue8m0`.
    """

    def build(scales: HostArray, values: HostArray) -> Scaled:
        *lead, out, in_ = values.shape
        grid = -(-out // block[0]), -(-in_ // block[1])
        if len(scales.shape) == 4 and not lead:  # ModelOpt's [rows, 1, columns, 1]
            scales = scales.reshape(scales.shape[0], scales.shape[2])
        expect("the grid of scales", scales, *lead, *grid)
        return Scaled(values, scales, block, Activations(block[1], power_of_two))

    parts = {"scales": Part(scales, SCALES, most=4), "values": Part(values, FP8)}
    return Scheme("blockwise FP8", parts, build, result=values)


def is_ue8m0(entries: Entries) -> bool:
    """Whether a config's `scale_fmt` says that the scales of activations are rounded up to powers of two.

    Raises:
        InputError: it is neither "ue8m0" nor "float" nor missing.
    """
    known = f"one of {', '.join(SCALE_FORMATS)}"
    return entries.get("scale_fmt", "float", lambda value: value in SCALE_FORMATS, known) == "ue8m0"


def scaled(name: str, scale: str = ".weight_scale", fused: Callable[[int], list[int]] | None = None) -> Scheme:
    """One scale for all of `.weight`, for each row, or for each part of a fused matrix.

    Args:
        fused: given the number of scales, the number of rows for each of them.
    """

    def build(
        scales: HostArray,
        values: HostArray,
        zero_point: HostArray | None = None,
        input_scale: HostArray | None = None,
        activation_scale: HostArray | None = None,
    ) -> Weight:
        if input_scale is not None and activation_scale is not None:
            raise InputError("both 'input_scale' and 'activation_scale', which mean the same")
        input_scale = activation_scale if input_scale is None else input_scale
        if input_scale is not None and int(np.prod(input_scale.shape)) != 1:
            raise InputError(f"an input scale of shape {[*input_scale.shape]}, expected one number")
        *lead, out, in_ = values.shape
        size = int(np.prod(scales.shape))
        block: tuple[int | None, int | None]
        if size == int(np.prod(lead)):
            scales, block = scales.reshape(*lead, 1, 1), (None, None)
        elif size == int(np.prod(lead)) * out:
            scales, block = scales.reshape(*lead, out, 1), (1, None)
        elif not lead and fused is not None and sum(parts := fused(size)) == out:
            few = scales
            scales = derived((out, 1), few.dtype, lambda: np.repeat(np.asarray(few).reshape(-1), parts)[:, None])
            block = (1, None)
        else:
            raise InputError(f"scales of shape {[*scales.shape]} for a matrix of {[*values.shape]}")
        if zero_point is None:
            one = None if input_scale is None else input_scale.reshape(*lead, 1)
            return Scaled(values, scales, block, Activations(scale=one))
        rows = scales if block[0] else derived((out, 1), scales.dtype, lambda: np.repeat(np.asarray(scales), out, 0))
        zeros = derived(
            (out, 1),
            np.int16,
            lambda: np.broadcast_to(read_part(zero_point).astype(np.int16).reshape(-1, 1) + 128, (out, 1)),
        )
        weight = affine("INT", lambda: read_part(values).view(np.uint8) ^ 128, (out, in_), 8, in_, rows, zeros)
        return grouped(weight, None, (out, in_), 1, in_)

    optional = {n: Part(f".{n}", FLOATS, 0, 2) for n in ("input_scale", "activation_scale")}
    optional |= {"zero_point": Part(".weight_zero_point", frozenset({"int8", "int32"}), 0, 2)}
    parts = {"scales": Part(scale, SCALES, 0), "values": Part(".weight", FP8 | {"int8"})}
    return Scheme(name, parts, build, optional, unused=(".input_zero_point",))


def _mxfp8(scales: HostArray, values: HostArray) -> Scaled:
    """Each 32 values share a power-of-two scale; the values are bytes or, in MLX, words of four bytes."""
    values = values.view(ml_dtypes.float8_e4m3fn)
    if values.shape[-1] % 32:
        raise InputError(f"rows of {values.shape[-1]} are not whole blocks of 32")
    expect("scales", scales, *values.shape[:-1], values.shape[-1] // 32)
    return Scaled(values, scales.view(ml_dtypes.float8_e8m0fnu), (1, 32))


_ONE_BYTE = frozenset({"uint8", "float8_e8m0fnu"})
_MXFP8_VALUES = {"values": Part(".weight", frozenset({"uint8", "uint32", "float8_e4m3fn"}))}
_MXFP8_SCALES = {"scales": Part(".weight_scale", _ONE_BYTE)}
MXFP8 = Scheme("MXFP8", _MXFP8_SCALES | _MXFP8_VALUES, _mxfp8, unused=(".input_scale",))
MXFP8_MLX = Scheme("MXFP8", {"scales": Part(".scales", _ONE_BYTE)} | _MXFP8_VALUES, _mxfp8)


def llm_int8(threshold: float) -> Scheme:
    """bitsandbytes in 8 bits: a scale for each row, 127 times too large.

    Args:
        threshold: see `Activations`.
    """

    def build(scales: HostArray, values: HostArray, weight_format: HostArray | None = None) -> Scaled:
        if weight_format is not None and np.asarray(weight_format).any():
            raise InputError("weight_format is not 0: only plain rows can be read, not tiles for one kind of GPU")
        out = values.shape[0]
        expect("SCB", scales, out)
        return Scaled(values, scales.reshape(out, 1), (1, None), Activations(threshold=threshold), factor=1 / 127)

    parts = {"scales": Part(".SCB", frozenset({"float32"}), 1, 1), "values": Part(".weight", frozenset({"int8"}), 2, 2)}
    return Scheme("LLM.int8", parts, build, {"weight_format": Part(".weight_format", ANY, 0, 1)})


def _f8q8(blocks: HostArray, shape: HostArray) -> Weight:
    """mistral.rs's blocks over the flattened matrix: a float8 scale, then 32 signed bytes."""
    out, in_ = sizes(shape)
    expect("blocks", blocks, -(-out * in_ // 32), 33)
    step = derived(
        (blocks.shape[0],),
        np.float32,
        lambda: read_part(blocks)[:, 0].view(ml_dtypes.float8_e4m3fn).astype(np.float32) / np.float32(448),
    )
    values = derived(
        (out, in_), np.int8, lambda: read_part(blocks)[:, 1:].view(np.int8).reshape(-1)[: out * in_].reshape(out, in_)
    )
    return Scaled(values, repack.by_rows(step, (out, in_), 32), (1, repack.group_size(in_, 32)))


_F8Q8_PARTS = {"blocks": Part(".blocks", frozenset({"uint8"}), 2, 2), "shape": Part(".shape", INTEGERS, 1, 1)}
F8Q8 = Scheme("F8Q8", _F8Q8_PARTS, _f8q8)
