"""What the tensors of one quantized matrix are called in a checkpoint, and the weight that they make.

A scheme knows a naming and its bytes, nothing of models or of configurations: those choose among schemes (`quantized`).
Matrices whose sizes no packed layout of ours fits (an odd number of 3-bit codes in a row) are decoded while they are
read: exact, and as large as they are then.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import ml_dtypes
import numpy as np

from jaxllm.checkpoint import repack
from jaxllm.checkpoint.placing import HostArray
from jaxllm.checkpoint.repack import derived
from jaxllm.errors import InputError
from jaxllm.formats import mxfp4
from jaxllm.formats.affine import WORD, Affine, word_values
from jaxllm.formats.base import Weight
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.dense import Dense
from jaxllm.formats.fp8 import BlockFP8
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.nvfp4 import NVFP4


@dataclass(frozen=True)
class Scheme:
    """A naming of the tensors that make up one matrix.

    Attributes:
        name: as its users write it.
        parts: what each argument of `build` is called: the matrix's name followed by this. The first is the one by
            which a matrix in this scheme is recognised.
        build: makes the weight, raising InputError (without names) if the tensors do not fit together.
        optional: arguments of `build` that a matrix may do without.
        unused: what follows the names of tensors that may be there and mean nothing for the matrix.
        result: what follows the matrix's name in the name of the whole.
    """

    name: str
    parts: Mapping[str, str]
    build: Callable[..., Weight]
    optional: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    result: str = ".weight"

    @property
    def key(self) -> str:
        return next(iter(self.parts.values()))


def _expect(what: str, array: HostArray, *shape: int) -> None:
    if tuple(array.shape) != shape:
        raise InputError(f"{what} has shape {[*array.shape]}, expected {[*shape]}")


def _map(array: HostArray) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.map()


def _decoded(weight: Callable[[], Weight], shape: tuple[int, ...]) -> Dense:
    """A matrix that is decoded while it is read."""

    def compute() -> np.ndarray:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.asarray(jax.tree.map(np.asarray, weight()).dequantize())

    return Dense(derived(shape, np.float32, compute))


# ---- whole numbers with scales and offsets ------------------------------------------------------------------------


def _affine(
    name: str,
    codes: Callable[[], np.ndarray],
    shape: tuple[int, int],
    bits: int,
    group: int,
    scales: HostArray,
    zeros: HostArray | None = None,
    zero: int = 0,
    words: HostArray | None = None,
    out_groups: np.ndarray | None = None,
) -> Weight:
    """A weight of codes `[out, in]`, to be computed, or of their words as they are.

    Where rows are not whole words of so many bits, codes are held in more bits.
    """
    out, in_ = shape
    held = next((b for b in sorted({bits, 4, 8}) if b >= bits and in_ % word_values(b) == 0), None)
    if held is None:

        def padded() -> Affine:
            wide = np.pad(codes(), ((0, 0), (0, -in_ % 4)))
            packed = repack.into_stream(wide, 8)
            rest = [None if a is None else np.asarray(a) for a in (scales, zeros)]
            whole = Affine(packed, *rest, None, None, out_groups, 8, group, zero, name)
            return Dense(np.asarray(whole.dequantize())[:, :in_])

        return _decoded(padded, shape)
    if words is None or held != bits:
        words = derived(repack.words_shape(out, in_, held), np.uint32, lambda: repack.into_stream(codes(), held))
    return Affine(words, scales, zeros, None, None, out_groups, held, group, zero, name)


def _indexed(weight: Affine, index: np.ndarray) -> Affine:
    """The weight with the group of each column given: groups are counted from 1, behind one of scale 0."""

    def behind_nothing(array: HostArray | None) -> HostArray | None:
        if array is None:
            return None
        shape = (array.shape[0], array.shape[1] + 1)
        return derived(shape, array.dtype, lambda: np.pad(np.asarray(array), ((0, 0), (1, 0))))

    index = (index + 1).astype(np.int32)
    scales, zeros = behind_nothing(weight.scales), behind_nothing(weight.zeros)
    return Affine(weight.codes, scales, zeros, None, index, None, weight.bits, weight.group, weight.zero, weight.name)


def _grouped(weight: Weight, index: np.ndarray | None, shape: tuple[int, int], groups: int, group: int) -> Weight:
    """The weight with its columns in the groups of `index`, or, where all are in one, in that."""
    in_ = shape[1]
    if index is not None and (index.min() < 0 or index.max() >= groups):
        raise InputError(f"g_idx goes from {index.min()} to {index.max()}, but there are {groups} groups")
    in_order = index is None or np.array_equal(index, np.arange(in_) // group)
    if in_order and (groups > 1 or isinstance(weight, Dense)):
        return weight
    if isinstance(weight, Dense):
        raise InputError(f"columns in groups of their own (g_idx), and rows of {in_} that are not whole words")
    return _indexed(weight, np.zeros(in_, np.int32) if in_order else index)


def gptq(bits: int, group_size: int, v2: bool) -> Scheme:
    """GPTQ: words along `in`, zero points less 1 in version 1."""

    def build(qweight: HostArray, scales: HostArray, qzeros: HostArray, g_idx: HostArray | None = None) -> Weight:
        rows, out = qweight.shape
        in_, rest = divmod(rows * WORD, bits)
        if rest or qweight.dtype.itemsize != 4:
            raise InputError(f"qweight of {qweight.dtype} {[*qweight.shape]} does not hold codes of {bits} bits")
        group = in_ if group_size == -1 else group_size
        groups = -(-in_ // group)
        _expect("scales", scales, groups, out)
        _expect("qzeros", qzeros, groups, out * bits // WORD)
        if g_idx is not None:
            _expect("g_idx", g_idx, in_)
        shape, words_shape = (out, in_), repack.words_shape(out, in_, bits)
        words = None
        if in_ % word_values(bits) == 0:
            _, n, width = words_shape
            words = derived(
                words_shape,
                np.uint32,
                lambda: _map(qweight).view(np.uint32).reshape(n, width, out).transpose(2, 0, 1),
            )
        one = np.int16(not v2)
        zeros = derived(
            (out, groups), np.int16, lambda: repack.bit_stream(np.asarray(qzeros), bits, out).T.astype(np.int16) + one
        )

        def codes() -> np.ndarray:
            return repack.bit_stream(_map(qweight).T, bits, in_)

        weight = _affine("GPTQ", codes, shape, bits, group, scales.swapaxes(0, 1), zeros, words=words)
        return _grouped(weight, None if g_idx is None else np.asarray(g_idx), shape, groups, group)

    parts = {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}
    return Scheme(f"GPTQ {bits}-bit", parts, build, {"g_idx": ".g_idx"})


def awq(group_size: int) -> Scheme:
    """AWQ's GEMM order: words along `out`."""

    def build(qweight: HostArray, scales: HostArray, qzeros: HostArray | None = None) -> Weight:
        in_, out = qweight.shape[0], qweight.shape[1] * 8
        group = in_ if group_size == -1 else group_size
        if in_ % group:
            raise InputError(f"groups of {group} do not divide the {in_} inputs")
        _expect("scales", scales, in_ // group, out)
        zeros = None
        if qzeros is not None:
            _expect("qzeros", qzeros, in_ // group, out // 8)
            zeros = derived((out, in_ // group), np.uint8, lambda: repack.awq_columns(qzeros).T)
        weight = _affine(
            "AWQ",
            lambda: repack.awq_columns(qweight).T,
            (out, in_),
            4,
            group,
            scales.swapaxes(0, 1),
            zeros,
            zero=8,
        )
        return _grouped(weight, None, (out, in_), in_ // group, group)

    return Scheme("AWQ", {"qweight": ".qweight", "scales": ".scales"}, build, {"qzeros": ".qzeros"})


def mlx(bits: int, group: int) -> Scheme:
    """MLX's affine mode: words along `in`, an offset in floats. Stacks too."""

    def build(scales: HostArray, weight: HostArray, biases: HostArray) -> Affine:
        *lead, n = weight.shape
        in_ = n * WORD // bits
        if weight.dtype != np.uint32 or n * WORD % (bits * group):
            raise InputError(
                f"weight of {weight.dtype} {[*weight.shape]}: not whole groups of {group} {bits}-bit codes"
            )
        _expect("scales", scales, *lead, in_ // group)
        _expect("biases", biases, *lead, in_ // group)
        values = word_values(bits)
        codes = weight.reshape(*lead, in_ // values, values * bits // WORD)
        return Affine(codes, scales, None, biases, None, None, bits, group, 0, "MLX")

    return Scheme(f"MLX {bits}-bit", {"scales": ".scales", "weight": ".weight", "biases": ".biases"}, build)


def pack_quantized(bits: int, group_size: int | None) -> Scheme:
    """compressed-tensors' pack-quantized: words along `in`, zero points packed along `out`."""

    def build(
        weight_packed: HostArray,
        weight_scale: HostArray,
        weight_shape: HostArray,
        weight_zero_point: HostArray | None = None,
        weight_g_idx: HostArray | None = None,
    ) -> Weight:
        out, in_ = np.asarray(weight_shape).tolist()
        groups = weight_scale.shape[-1]
        group = group_size or -(-in_ // groups)
        _expect("weight_scale", weight_scale, out, -(-in_ // group))
        dense, spaced = -(-in_ * bits // WORD), -(-in_ // (WORD // bits))
        if tuple(weight_packed.shape) not in ((out, dense), (out, spaced)):
            raise InputError(f"weight_packed has shape {[*weight_packed.shape]}, expected {[out, dense]}")

        def stream(words: np.ndarray, count: int) -> np.ndarray:
            """Releases before 0.20 left the bits of a word empty that held no whole code."""
            if words.shape[1] == -(-count * bits // WORD):
                return repack.bit_stream(words, bits, count)
            per_word = WORD // bits
            return repack.bit_stream(words.reshape(-1, 1), bits, per_word).reshape(len(words), -1)[:, :count]

        words, values = None, word_values(bits)
        if weight_packed.shape[1] * WORD == in_ * bits and in_ % values == 0:
            words = weight_packed.view(np.uint32).reshape(out, in_ // values, values * bits // WORD)
        zeros = None
        if weight_zero_point is not None:
            zeros = derived(
                (out, groups), np.uint8, lambda: stream(np.ascontiguousarray(_map(weight_zero_point).T), out).T
            )

        def codes() -> np.ndarray:
            return stream(np.ascontiguousarray(_map(weight_packed)), in_)

        half = 2 ** (bits - 1)
        weight = _affine("INT", codes, (out, in_), bits, group, weight_scale, zeros, half, words)
        index = None if weight_g_idx is None else np.asarray(weight_g_idx)
        return _grouped(weight, index, (out, in_), groups, group)

    parts = {name: f".{name}" for name in ("weight_packed", "weight_scale", "weight_shape")}
    optional = {name: f".{name}" for name in ("weight_zero_point", "weight_g_idx")}
    return Scheme(f"INT {bits}-bit", parts, build, optional)


_HQQ_UNUSED = ("channel_wise", "optimize", "round_zero", "view_as_float", "quant_scale", "quant_zero", "offload_meta")
_HQQ_UNUSED += ("encoded_state_dict", "stores_quant_config", "compute_dtype", "unpack_view_dtype", "packing")


def _hqq(
    packed: HostArray,
    scale: HostArray,
    zero: HostArray,
    shape: HostArray,
    nbits: HostArray,
    group_size: HostArray,
    axis: HostArray,
) -> Weight:
    """Groups along either axis of the matrix reshaped to `[group, -1]` or `[-1, group]`."""
    bits, group, axis = (int(np.asarray(a).reshape(())) for a in (nbits, group_size, axis))
    out, in_ = np.asarray(shape).tolist()
    if bits not in (1, 2, 3, 4, 8) or axis not in (0, 1) or group < 1 or out * in_ % group:
        raise InputError(f"{bits} bits in groups of {group} along axis {axis} of {[out, in_]} are not supported")
    rows = group if axis == 0 else out * in_ // group

    def codes() -> np.ndarray:
        stored = np.asarray(packed).view(np.int32 if bits == 3 else np.uint8)
        return repack.hqq_codes(stored, bits, rows).reshape(out, in_)

    count = out * in_ // group
    for what, array in (("scale", scale), ("zero", zero)):
        _expect(what, array, *((1, count) if axis == 0 else (count, 1)))
    if axis == 1:
        groups = (repack.by_rows(a, (out, in_), group) for a in (scale, zero))
        return _affine("HQQ", codes, (out, in_), bits, repack.group_size(in_, group), *groups)
    if out % group:
        spread = (derived((out, in_), a.dtype, lambda a=a: _across(a, group, out, in_)) for a in (scale, zero))
        return _affine("HQQ", codes, (out, in_), bits, 1, *spread)
    # Row o is member o // (out / group) of the groups that begin in row o % (out / group).
    heads = out // group
    behind = (
        derived((heads + 1, in_), a.dtype, lambda a=a: np.pad(np.asarray(a).reshape(heads, in_), ((1, 0), (0, 0))))
        for a in (scale, zero)
    )
    index = (np.arange(out) % heads + 1).astype(np.int32)
    return _affine("HQQ", codes, (out, in_), bits, 1, *behind, out_groups=index)


def _across(values: HostArray, group: int, out: int, in_: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(values), (group, out * in_ // group)).reshape(out, in_)


HQQ = Scheme(
    "HQQ",
    {"packed": ".W_q", **{name: f".{name}" for name in ("scale", "zero", "shape", "nbits", "group_size", "axis")}},
    _hqq,
    unused=tuple(f".{name}" for name in _HQQ_UNUSED),
)


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------


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
    _expect("absmax", absmax, count)
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

    return _decoded(whole, (out, in_))


_STATE = ".weight.quant_state.bitsandbytes__"
BNB_4BIT = Scheme(
    "bitsandbytes 4-bit",
    {"absmax": ".weight.absmax", "weight": ".weight", "quant_map": ".weight.quant_map"},
    _bnb_4bit,
    {"nested_absmax": ".weight.nested_absmax", "nested_quant_map": ".weight.nested_quant_map"}
    | {"nf4": f"{_STATE}nf4", "fp4": f"{_STATE}fp4"},
)


def _bnb_8bit(SCB: HostArray, weight: HostArray, weight_format: HostArray | None = None) -> BlockFP8:  # noqa: N803
    if weight_format is not None and np.asarray(weight_format).reshape(()) != 0:
        raise InputError("weight_format is not 0: only rows as they are can be read, not tiles for one kind of GPU")
    _expect("SCB", SCB, weight.shape[0])
    return BlockFP8(weight, SCB.reshape(weight.shape[0], 1), (1, None), None, factor=1 / 127)


BNB_8BIT = Scheme("LLM.int8", {"SCB": ".SCB", "weight": ".weight"}, _bnb_8bit, {"weight_format": ".weight_format"})


# ---- small floats with scales ---------------------------------------------------------------------------------------


def block_fp8(block: tuple[int, int], values: str = "", scales: str = "_scale_inv") -> Scheme:
    """Blockwise FP8; by default as in Hugging Face checkpoints, where `X` has its scales in `X_scale_inv`."""

    def build(scales: HostArray, values: HostArray) -> BlockFP8:
        *lead, out, in_ = values.shape
        grid = -(-out // block[0]), -(-in_ // block[1])
        if len(scales.shape) == 4 and not lead:  # ModelOpt's [rows, 1, columns, 1]
            scales = scales.reshape(scales.shape[0], scales.shape[2])
        _expect("the grid of scales", scales, *lead, *grid)
        return BlockFP8(values, scales, block, None)

    return Scheme("blockwise FP8", {"scales": scales, "values": values}, build, result=values)


def scaled(name: str, scale: str = ".weight_scale", parts: Callable[[int], list[int]] | None = None) -> Scheme:
    """One scale for the whole of `.weight`, for each row, or for each of the parts that a fused matrix consists of.

    Args:
        parts: given how many scales there are, how many rows each of them has.
    """

    def build(
        scales: HostArray, values: HostArray, zero_point: HostArray | None = None, **activations: HostArray
    ) -> Weight:
        *lead, out, in_ = values.shape
        size = int(np.prod(scales.shape))
        if size == int(np.prod(lead)):
            scales, block = scales.reshape(*lead, 1, 1), (None, None)
        elif size == int(np.prod(lead)) * out:
            scales, block = scales.reshape(*lead, out, 1), (1, None)
        elif not lead and parts is not None and sum(rows := parts(size)) == out:
            few = scales
            scales = derived((out, 1), few.dtype, lambda: np.repeat(np.asarray(few).reshape(-1), rows)[:, None])
            block = (1, None)
        else:
            raise InputError(f"scales of shape {[*scales.shape]} for a matrix of {[*values.shape]}")
        if zero_point is None:
            return BlockFP8(values, scales, block, None)
        rows = scales if block[0] else derived((out, 1), scales.dtype, lambda: np.repeat(np.asarray(scales), out, 0))
        zeros = derived(
            (out, 1),
            np.int16,
            lambda: np.broadcast_to(_map(zero_point).astype(np.int16).reshape(-1, 1) + 128, (out, 1)),
        )
        weight = _affine("INT", lambda: _map(values).view(np.uint8) ^ 128, (out, in_), 8, in_, rows, zeros)
        return _grouped(weight, None, (out, in_), 1, in_)

    optional = {"zero_point": ".weight_zero_point", "input_scale": ".input_scale"}
    optional |= {"activation_scale": ".activation_scale"}
    return Scheme(name, {"scales": scale, "values": ".weight"}, build, optional)


def _mxfp8(scales: HostArray, values: HostArray) -> BlockFP8:
    """Scales are powers of two, one for 32; the values are bytes or, in MLX, words of four."""
    values = values.view(ml_dtypes.float8_e4m3fn)
    if values.shape[-1] % 32:
        raise InputError(f"rows of {values.shape[-1]} are not whole blocks of 32")
    _expect("scales", scales, *values.shape[:-1], values.shape[-1] // 32)
    return BlockFP8(values, scales.view(ml_dtypes.float8_e8m0fnu), (1, 32), None)


MXFP8 = Scheme("MXFP8", {"scales": ".weight_scale", "values": ".weight"}, _mxfp8, {}, (".input_scale",))
MXFP8_MLX = Scheme("MXFP8", {"scales": ".scales", "values": ".weight"}, _mxfp8)


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
        _expect("scales", scales, *blocks.shape[:-1], blocks.shape[-1] // 8)
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


def _f8q8(blocks: HostArray, shape: HostArray) -> Weight:
    """mistral.rs's blocks over the flat matrix: a float8 scale, then 32 signed bytes."""
    out, in_ = np.asarray(shape).tolist()
    _expect("blocks", blocks, -(-out * in_ // 32), 33)
    step = derived(
        (blocks.shape[0],),
        np.float32,
        lambda: _map(blocks)[:, 0].view(ml_dtypes.float8_e4m3fn).astype(np.float32) / np.float32(448),
    )
    values = derived(
        (out, in_), np.int8, lambda: _map(blocks)[:, 1:].view(np.int8).reshape(-1)[: out * in_].reshape(out, in_)
    )
    return BlockFP8(values, repack.by_rows(step, (out, in_), 32), (1, repack.group_size(in_, 32)), None)


F8Q8 = Scheme("F8Q8", {"blocks": ".blocks", "shape": ".shape"}, _f8q8)
