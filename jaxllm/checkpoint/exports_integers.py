"""How weights of integers are stored: GPTQ, AWQ, MLX's affine mode, and compressed-tensors' packed and plain integers.

The inverse of `integer_schemes`, in its words: a function here takes a weight and gives its tensors by the end of their
names. They are lazy, and know their shapes even if the weight's leaves are only shapes. Nothing is rounded, with one
exception: whatever reads GPTQ and AWQ holds their scales in float16, so that is how they are written.
"""

from collections.abc import Callable, Mapping

import numpy as np

from jaxllm.checkpoint import repack
from jaxllm.checkpoint.repack import derived
from jaxllm.errors import InputError
from jaxllm.formats.affine import WORD, Affine
from jaxllm.formats.base import Leaf, Weight
from jaxllm.formats.scaled import Scaled
from jaxllm.placing import DerivedArray

Laid = Mapping[str, DerivedArray]  # by the end of the name, after the module's name


def as_it_is(leaf: Leaf) -> DerivedArray:
    return derived(leaf.shape, leaf.dtype, lambda: np.asarray(leaf))


def matrix(weight: Weight) -> tuple[int, int]:
    """Its sizes. Raises InputError for a stack."""
    if len(weight.shape) != 2:
        raise InputError(f"a stack {[*weight.shape]} of {weight.format}, whose files hold single matrices")
    return weight.shape[0], weight.shape[1]


def gptq(weight: Weight, symmetric: bool, ordered: bool) -> Laid:
    """GPTQ: words along `in`, scales and zero points `[groups, out]`.

    Symmetric ones are written as version 1, which every reader knows, and which stores zero points less 1. It has no
    code for a zero point of 0; others are therefore written as version 2, which has one.

    Args:
        ordered: whether columns may be in any group (`desc_act`). If the config denies it, some readers ignore g_idx.
    """
    assert isinstance(weight, Affine)
    (out, in_), bits = matrix(weight), weight.bits
    if out * bits % WORD:
        raise InputError(f"{out} rows: the zero points of {bits} bits do not fill words, which GPTQ needs")
    scales, zeros, index = _grouped(weight, np.float16)
    groups = scales.shape[1]

    def words() -> np.ndarray:
        return np.ascontiguousarray(np.asarray(weight.codes).reshape(out, -1).T).view(np.int32)

    def zero_words() -> np.ndarray:
        points = zeros.read()
        if symmetric and (points != 2 ** (bits - 1)).any():
            raise InputError(f"zero points other than {2 ** (bits - 1)} in a matrix that is declared symmetric")
        return repack.packed_rows(points.T - np.uint8(symmetric), bits).view(np.int32)

    return {
        ".qweight": derived((in_ * bits // WORD, out), np.int32, words),
        ".qzeros": derived((groups, out * bits // WORD), np.int32, zero_words),
        ".scales": derived((groups, out), np.float16, lambda: scales.read().T),
        ".g_idx": derived((in_,), np.int32, index if ordered else lambda: _in_order(index(), groups)),
    }


def awq(weight: Weight) -> Laid:
    """AWQ's GEMM order: words along `out`, eight columns in an order of their own."""
    assert isinstance(weight, Affine) and weight.bits == 4
    out, in_ = matrix(weight)
    scales, zeros, index = _grouped(weight, np.float16)
    groups = scales.shape[1]
    if out % 8 or groups * weight.group != in_:
        raise InputError(f"{[out, in_]} in groups of {weight.group}; AWQ needs multiples of 8 rows and whole groups")

    def words() -> np.ndarray:
        _in_order(index(), groups)
        codes = repack.bit_stream(np.asarray(weight.codes).reshape(out, -1), 4, in_)
        return repack.awq_words(codes.T)

    return {
        ".qweight": derived((in_, out // 8), np.int32, words),
        ".qzeros": derived((groups, out // 8), np.int32, lambda: repack.awq_words(zeros.read().T)),
        ".scales": derived((groups, out), np.float16, lambda: scales.read().T),
    }


def _grouped(weight: Affine, dtype: np.typing.DTypeLike) -> tuple[DerivedArray, DerivedArray, Callable[[], np.ndarray]]:
    """Scales in `dtype` and zero points uint8, both `[out, groups]`, and the group of each column, int32 `[in]`."""
    assert weight.biases is None and weight.out_groups is None
    first = int(weight.in_groups is not None)  # with `in_groups`, group 0 is nothing's
    out, in_ = weight.shape
    shape = (out, weight.scales.shape[1] - first)

    def zeros() -> np.ndarray:
        if weight.zeros is None:
            return np.full(shape, weight.zero, np.uint8)
        points = np.asarray(weight.zeros)[:, first:]
        kept = points.astype(np.uint8)
        if (kept != points).any() or kept.max() >= 2**weight.bits:
            raise InputError(f"zero points that are no integers of {weight.bits} bits")
        return kept

    def index() -> np.ndarray:
        own = np.arange(in_) // weight.group if weight.in_groups is None else np.asarray(weight.in_groups) - 1
        return own.astype(np.int32)

    scales = derived(shape, dtype, lambda: np.asarray(weight.scales)[:, first:].astype(dtype))
    return scales, derived(shape, np.uint8, zeros), index


def _in_order(index: np.ndarray, groups: int) -> np.ndarray:
    """The groups of columns. Raises InputError if they are not neighbours."""
    if (np.diff(index) < 0).any() or (np.bincount(index, minlength=groups)[:-1] != np.bincount(index).max()).any():
        raise InputError("columns in groups of their own (act order), which this type does not declare")
    return index


def pack_quantized(weight: Weight) -> Laid:
    """compressed-tensors' pack-quantized, symmetric: words along `in`."""
    assert isinstance(weight, Affine) and weight.biases is None and weight.out_groups is None
    out, in_ = matrix(weight)
    if weight.zeros is not None or weight.zero != 2 ** (weight.bits - 1) or weight.in_groups is not None:
        raise InputError("zero points or columns in groups of their own in a matrix that is declared symmetric")
    return {
        ".weight_packed": derived(
            (out, in_ * weight.bits // WORD),
            np.int32,
            lambda: np.ascontiguousarray(np.asarray(weight.codes)).reshape(out, -1).view(np.int32),
        ),
        ".weight_scale": as_it_is(weight.scales),
        ".weight_shape": derived((2,), np.int64, lambda: np.array([out, in_], np.int64)),
    }


def mlx(weight: Weight) -> Laid:
    """MLX's affine mode: words along `in`, an offset in floats. Stacks too."""
    assert isinstance(weight, Affine) and weight.biases is not None
    *lead, in_ = weight.shape
    shape = (*lead, in_ * weight.bits // WORD)
    words = derived(shape, np.uint32, lambda: np.asarray(weight.codes).reshape(shape))
    return {".weight": words, ".scales": as_it_is(weight.scales), ".biases": as_it_is(weight.biases)}


def int8(weight: Weight) -> Laid:
    """compressed-tensors' int-quantized: a scale for each row.

    It has no constant factor. Where the weight has one, as LLM.int8 does, scales are multiplied by it and rounded once.
    """
    assert isinstance(weight, Scaled) and weight.block == (1, None)
    matrix(weight)
    scales = derived(
        weight.scales.shape,
        weight.scales.dtype,
        lambda: np.asarray(weight.scales) * np.asarray(weight.scales).dtype.type(weight.factor),
    )
    return {".weight": as_it_is(weight.values), ".weight_scale": scales}


def llm_int8(weight: Weight) -> Laid:
    """bitsandbytes in 8 bits: the largest magnitude of each row; rows in order, which is format 0."""
    assert isinstance(weight, Scaled) and weight.block == (1, None) and weight.factor == 1 / 127
    out, _ = matrix(weight)
    return {
        ".weight": as_it_is(weight.values),
        ".SCB": derived((out,), np.float32, lambda: np.asarray(weight.scales).reshape(out)),
        ".weight_format": as_it_is(np.array(0, np.uint8)),
    }
