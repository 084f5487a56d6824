"""Schemes of integers with a scale and an offset for each group: GPTQ, AWQ, MLX, compressed-tensors, HQQ."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from jaxllm.checkpoint import repack
from jaxllm.checkpoint.repack import derived
from jaxllm.checkpoint.schemes import ANY, FLOATS, INTEGERS, WORDS, Part, Scheme, decoded, expect
from jaxllm.errors import InputError
from jaxllm.formats.affine import WORD, Affine, word_values
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.placing import HostArray, read_part


def affine(
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
) -> Affine | Dense:
    """A weight from codes `[out, in]`, computed later, or from words that are already in our layout.

    If the codes of a row do not fill its words, they are stored with more bits.
    """
    out, in_ = shape
    held = next((b for b in sorted({bits, 4, 8}) if b >= bits and in_ % word_values(b) == 0), None)
    if held is None:

        def padded() -> Dense:
            extra = -in_ % 4
            packed = repack.into_stream(np.pad(codes(), ((0, 0), (0, extra))), 8)
            wide = [None if a is None else np.pad(np.asarray(a), ((0, 0), (0, extra))) for a in (scales, zeros)]
            whole = Affine(packed, wide[0], 8, group, name, zero, zeros=wide[1], out_groups=out_groups)
            return Dense(np.asarray(whole.dequantize())[:, :in_])

        return decoded(padded, shape)
    if words is None or held != bits:
        words = derived(repack.words_shape(out, in_, held), np.uint32, lambda: repack.into_stream(codes(), held))
    return Affine(words, scales, held, group, name, zero, zeros=zeros, out_groups=out_groups)


def _indexed(weight: Affine, index: np.ndarray) -> Affine:
    """The weight with `index` as the group of each column. Groups count from 1; group 0 has scale 0."""

    def behind_nothing(array: HostArray | None) -> HostArray | None:
        if array is None:
            return None
        shape = (array.shape[0], array.shape[1] + 1)
        return derived(shape, array.dtype, lambda: np.pad(np.asarray(array), ((0, 0), (1, 0))))

    return replace(
        weight,
        scales=behind_nothing(weight.scales),
        zeros=behind_nothing(weight.zeros),
        in_groups=(index + 1).astype(np.int32),
        even=bool((np.bincount(index, minlength=weight.scales.shape[-1]) == weight.group).all()),
    )


def grouped(
    weight: Affine | Dense, index: np.ndarray | None, shape: tuple[int, int], groups: int, group: int
) -> Weight:
    """The weight with its columns in the groups of `index`; if there is only one group, in that group."""
    in_ = shape[1]
    if index is not None and (index.min() < 0 or index.max() >= groups):
        raise InputError(f"g_idx goes from {index.min()} to {index.max()}, but there are {groups} groups")
    if index is not None and np.array_equal(index, np.arange(in_) // group):
        index = None
    if index is None and (groups > 1 or isinstance(weight, Dense)):
        return weight
    if isinstance(weight, Dense):
        raise InputError(f"columns in groups of their own (g_idx), and rows of {in_} that are not whole words")
    return _indexed(weight, np.zeros(in_, np.int32) if index is None else index)


def gptq(bits: int, group_size: int, v2: bool) -> Scheme:
    """GPTQ: words along `in`, zero points less 1 in version 1."""

    def build(qweight: HostArray, scales: HostArray, qzeros: HostArray, g_idx: HostArray | None = None) -> Weight:
        rows, out = qweight.shape
        in_, rest = divmod(rows * WORD, bits)
        if rest or qweight.dtype.itemsize != 4:
            raise InputError(f"qweight of {qweight.dtype} {[*qweight.shape]} does not hold codes of {bits} bits")
        group = in_ if group_size == -1 else group_size
        groups = -(-in_ // group)
        expect("scales", scales, groups, out)
        expect("qzeros", qzeros, groups, out * bits // WORD)
        if g_idx is not None:
            expect("g_idx", g_idx, in_)
        shape, words_shape = (out, in_), repack.words_shape(out, in_, bits)
        words = None
        if in_ % word_values(bits) == 0:
            _, n, width = words_shape
            words = derived(
                words_shape,
                np.uint32,
                lambda: read_part(qweight).view(np.uint32).reshape(n, width, out).transpose(2, 0, 1),
            )
        kind = np.dtype(np.uint8 if bits < 8 else np.int16)  # has to hold 2^bits, which can occur in version 1

        def zero_points() -> np.ndarray:
            return repack.bit_stream(np.asarray(qzeros), bits, out).T.astype(kind) + kind.type(not v2)

        zeros = derived((out, groups), kind, zero_points)

        def codes() -> np.ndarray:
            return repack.bit_stream(read_part(qweight).T, bits, in_)

        weight = affine("GPTQ", codes, shape, bits, group, scales.swapaxes(0, 1), zeros, words=words)
        return grouped(weight, None if g_idx is None else np.asarray(g_idx), shape, groups, group)

    parts = {"qweight": Part(".qweight", WORDS), "qzeros": Part(".qzeros", WORDS), "scales": Part(".scales", FLOATS)}
    return Scheme(f"GPTQ {bits}-bit", _flat(parts), build, {"g_idx": Part(".g_idx", INTEGERS, 1, 1)})


def awq(group_size: int) -> Scheme:
    """AWQ's GEMM order: words along `out`."""

    def build(qweight: HostArray, scales: HostArray, qzeros: HostArray | None = None) -> Weight:
        in_, out = qweight.shape[0], qweight.shape[1] * 8
        group = in_ if group_size == -1 else group_size
        if in_ % group:
            raise InputError(f"groups of {group} do not divide the {in_} inputs")
        expect("scales", scales, in_ // group, out)
        zeros = None
        if qzeros is not None:
            expect("qzeros", qzeros, in_ // group, out // 8)
            zeros = derived((out, in_ // group), np.uint8, lambda: repack.awq_columns(qzeros).T)
        weight = affine(
            "AWQ",
            lambda: repack.awq_columns(qweight).T,
            (out, in_),
            4,
            group,
            scales.swapaxes(0, 1),
            zeros,
            zero=8,
        )
        return grouped(weight, None, (out, in_), in_ // group, group)

    parts = {"qweight": Part(".qweight", WORDS), "scales": Part(".scales", FLOATS)}
    return Scheme("AWQ", _flat(parts), build, _flat({"qzeros": Part(".qzeros", WORDS)}))


def mlx(bits: int, group: int) -> Scheme:
    """MLX's affine mode: words along `in`, an offset in floats. Stacks too."""

    def build(scales: HostArray, weight: HostArray, biases: HostArray) -> Affine:
        *lead, n = weight.shape
        in_ = n * WORD // bits
        if weight.dtype != np.uint32 or n * WORD % (bits * group):
            raise InputError(
                f"weight of {weight.dtype} {[*weight.shape]}: not whole groups of {group} {bits}-bit codes"
            )
        expect("scales", scales, *lead, in_ // group)
        expect("biases", biases, *lead, in_ // group)
        values = word_values(bits)
        codes = weight.reshape(*lead, in_ // values, values * bits // WORD)
        return Affine(codes, scales, bits, group, "MLX", biases=biases)

    parts = {"scales": Part(".scales", FLOATS), "weight": Part(".weight", WORDS), "biases": Part(".biases", FLOATS)}
    return Scheme(f"MLX {bits}-bit", parts, build)


def pack_quantized(bits: int, group_size: int | None) -> Scheme:
    """compressed-tensors' pack-quantized: words along `in`, zero points packed along `out`."""

    def build(
        weight_packed: HostArray,
        weight_scale: HostArray,
        weight_shape: HostArray,
        weight_zero_point: HostArray | None = None,
        weight_g_idx: HostArray | None = None,
    ) -> Weight:
        out, in_ = sizes(weight_shape)
        groups = weight_scale.shape[-1]
        group = group_size or -(-in_ // groups)
        expect("weight_scale", weight_scale, out, -(-in_ // group))
        dense, spaced = -(-in_ * bits // WORD), -(-in_ // (WORD // bits))
        if tuple(weight_packed.shape) not in ((out, dense), (out, spaced)):
            raise InputError(f"weight_packed has shape {[*weight_packed.shape]}, expected {[out, dense]}")

        def stream(words: np.ndarray, count: int) -> np.ndarray:
            """Unpack codes. Before release 0.20, bits of a word that could not hold a complete code stayed empty."""
            if words.shape[1] == -(-count * bits // WORD):
                return repack.bit_stream(words, bits, count)
            per_word = WORD // bits
            return repack.bit_stream(words.reshape(-1, 1), bits, per_word).reshape(len(words), -1)[:, :count]

        words, values = None, word_values(bits)
        if weight_packed.shape[1] * WORD == in_ * bits and in_ % values == 0:
            words = weight_packed.view(np.uint32).reshape(out, in_ // values, values * bits // WORD)
        zeros = None
        if weight_zero_point is not None:
            if weight_zero_point.shape[0] not in (-(-out * bits // WORD), -(-out // (WORD // bits))):
                raise InputError(f"weight_zero_point has shape {[*weight_zero_point.shape]} for {out} rows")
            expect("weight_zero_point", weight_zero_point, weight_zero_point.shape[0], groups)
            zeros = derived(
                (out, groups), np.uint8, lambda: stream(np.ascontiguousarray(read_part(weight_zero_point).T), out).T
            )

        def codes() -> np.ndarray:
            return stream(np.ascontiguousarray(read_part(weight_packed)), in_)

        half = 2 ** (bits - 1)
        weight = affine("INT", codes, (out, in_), bits, group, weight_scale, zeros, half, words)
        index = None if weight_g_idx is None else np.asarray(weight_g_idx)
        if index is not None and (index == -1).all():  # how the library says "in order"
            index = None
        return grouped(weight, index, (out, in_), groups, group)

    parts = _flat({"weight_packed": Part(".weight_packed", WORDS), "weight_scale": Part(".weight_scale", FLOATS)})
    optional = _flat({"weight_zero_point": Part(".weight_zero_point", WORDS)})
    optional |= {"weight_g_idx": Part(".weight_g_idx", INTEGERS, 1, 1)}
    shape = {"weight_shape": Part(".weight_shape", INTEGERS, 1, 1)}
    return Scheme(f"INT {bits}-bit", parts | shape, build, optional)


def _flat(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts, restricted to matrices (no stacks)."""
    return {name: replace(part, most=2) for name, part in parts.items()}


def sizes(shape: HostArray) -> tuple[int, int]:
    """`[out, in]` from a tensor that holds these numbers."""
    values = np.asarray(shape)
    if values.shape != (2,) or values.min() < 1 or values.max() >= 2**31:
        raise InputError(f"its shape is said to be {values.tolist()}, expected two sizes")
    return int(values[0]), int(values[1])


_HQQ_UNUSED = (
    "channel_wise",
    "optimize",
    "round_zero",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "compute_dtype",
    "unpack_view_dtype",
    "packing",
)


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
    bits, group, axis = (int(np.asarray(a).reshape(-1)[0]) for a in (nbits, group_size, axis))
    out, in_ = sizes(shape)
    if bits not in (1, 2, 3, 4, 8) or axis not in (0, 1) or group < 1 or out * in_ % group:
        raise InputError(f"{bits} bits in groups of {group} along axis {axis} of {[out, in_]} are not supported")
    rows = group if axis == 0 else out * in_ // group
    stored = packed.view(np.int32 if bits == 3 else np.uint8)
    expect("W_q", stored, -(-rows // (10 if bits == 3 else 8 // bits)), out * in_ // rows)

    def codes() -> np.ndarray:
        return repack.hqq_codes(np.asarray(stored), bits, rows).reshape(out, in_)

    count = out * in_ // group
    for what, array in (("scale", scale), ("zero", zero)):
        expect(what, array, *((1, count) if axis == 0 else (count, 1)))
    if axis == 1:
        groups = [repack.by_rows(a, (out, in_), group) for a in (scale, zero)]
        return affine("HQQ", codes, (out, in_), bits, repack.group_size(in_, group), groups[0], groups[1])
    if out % group:
        spread = [derived((out, in_), a.dtype, partial(_across, a, group, out, in_)) for a in (scale, zero)]
        return affine("HQQ", codes, (out, in_), bits, 1, spread[0], spread[1])
    # Row o is member o // (out / group) of the groups that begin in row o % (out / group).
    heads = out // group

    def behind(array: HostArray) -> HostArray:
        """The array with a group of zeros before the first one."""
        return derived(
            (heads + 1, in_), array.dtype, lambda: np.pad(np.asarray(array).reshape(heads, in_), ((1, 0), (0, 0)))
        )

    index = (np.arange(out) % heads + 1).astype(np.int32)
    return affine("HQQ", codes, (out, in_), bits, 1, behind(scale), behind(zero), out_groups=index)


def _across(values: HostArray, group: int, out: int, in_: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(values), (group, out * in_ // group)).reshape(out, in_)


HQQ = Scheme(
    "HQQ",
    _flat({"packed": Part(".W_q", ANY), "scale": Part(".scale", FLOATS), "zero": Part(".zero", FLOATS)})
    | {"shape": Part(".shape", INTEGERS, 1, 1)}
    | {name: Part(f".{name}", INTEGERS, 0, 1) for name in ("nbits", "group_size", "axis")},
    _hqq,
    unused=tuple(f".{name}" for name in _HQQ_UNUSED),
)
