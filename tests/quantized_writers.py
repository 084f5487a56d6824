"""Quantized checkpoints for tests: writers and plain readers of the formats that other tools publish.

`WRITERS[name](matrix, rng)` quantizes a float32 matrix [out, in] by rounding to the nearest code and gives the tensors
of a linear layer, named and typed as checkpoints have them, with the matrix that a correct reader makes of them.
`CONFIGS[name]` is what config.json says about it, under its key. `quantized_checkpoint` does that to a whole model.

The dequantized matrix is computed FROM the tensors by `dequantize`, a slow and plain reader that knows nothing of
jaxllm. tests/test_quantized_writers.py holds it against the files in tests/golden/quantized, which other
implementations dequantized; that is what makes it an oracle. Numbers are numpy's and ml_dtypes', arithmetic is
float32 in the order that those implementations keep.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Array = np.ndarray
Tensors = dict[str, Array]
Config = dict[str, Any]
Encoder = Callable[[Array, np.random.Generator, Any], Tensors]

BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble n of a word holds column AWQ_ORDER[n]
FP4_CODE = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)
NF4_CODE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


class Written(NamedTuple):
    """Tensors by the suffix that follows the module's name and a dot, and the matrix float32 [out, in]."""

    tensors: Tensors
    dequantized: Array


# ---- safetensors, which safetensors.numpy does not read or write in these dtypes -----------------------------------

DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": BF16,
    "F8_E4M3": E4M3,
    "F8_E8M0": E8M0,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U32": np.uint32,
    "U8": np.uint8,
}


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        flat = np.frombuffer(data[start + first : start + last], DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors, metadata


def write_safetensors(path: Path, tensors: Tensors) -> None:
    names = {np.dtype(v): k for k, v in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, end = [], 0
    for name, x in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):  # aligned, as they have to
        parts.append(x.tobytes())
        header[name] = {"dtype": names[x.dtype], "shape": x.shape, "data_offsets": [end, end + len(parts[-1])]}
        end += len(parts[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


# ---- packing -------------------------------------------------------------------------------------------------------


def pack_bits(codes: Array, bits: int) -> Array:
    """Codes [..., n] as uint32 words [..., ceil(n * bits / 32)]: code k in bits k * bits and up of the whole row."""
    spread = codes[..., None].astype(np.int64) >> np.arange(bits) & 1
    stream = spread.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    padding = [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)]
    return np.packbits(np.pad(stream, padding), axis=-1, bitorder="little").view("<u4")


def unpack_bits(words: Array, bits: int, count: int) -> Array:
    """The first `count` codes of each row, int32."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    stream = stream[..., : count * bits].reshape(*words.shape[:-1], count, bits)
    return (stream.astype(np.int32) << np.arange(bits, dtype=np.int32)).sum(-1, dtype=np.int32)


def pack_nibbles(codes: Array) -> Array:
    """Codes [..., n] as bytes [..., n / 2], the first in the low half."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def unpack_nibbles(data: Array) -> Array:
    return np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], -1)


def stacked_shifts(bits: int) -> list[int]:
    """HQQ packs the k-th of these parts of the rows at the k-th shift: the first part in the highest bits."""
    parts = 10 if bits == 3 else 8 // bits
    return [bits * k for k in reversed(range(parts))]


def pack_stacked(codes: Array, bits: int) -> Array:
    shifts = stacked_shifts(bits)
    padded = np.pad(codes, ((0, -len(codes) % len(shifts)), (0, 0)))
    packed = sum(part.astype(np.int64) << s for part, s in zip(np.split(padded, len(shifts)), shifts, strict=True))
    return packed.astype(np.int32 if bits == 3 else np.uint8)


def unpack_stacked(packed: Array, bits: int, rows: int) -> Array:
    parts = [packed >> s & 2**bits - 1 for s in stacked_shifts(bits)]
    return np.concatenate(parts)[:rows].astype(np.int32)


def to_e2m1(x: Array) -> Array:
    """The nearest of the 16 codes; what is too large becomes 6."""
    return np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15


def to_e4m3(x: Array) -> Array:
    return np.clip(x, -448, 448).astype(E4M3)


def power_of_two(codes: Array) -> Array:
    """E8M0 bytes as float32; 0 is 2^-127, a denormal number."""
    return np.ldexp(np.float32(1), codes.astype(np.int32) - 127)


def spread(scales: Array, shape: tuple[int, ...], block: tuple[int, ...] | None = None) -> Array:
    """A grid of scales repeated to `shape`; blocks at the ends may be cut. Without `block` they divide evenly."""
    block = block or tuple(n // s for n, s in zip(shape, scales.shape, strict=True))
    for axis, size in enumerate(block):
        scales = scales.repeat(size, axis).take(range(shape[axis]), axis)
    return scales


def f32(x: Array) -> Array:
    return np.asarray(x).astype(np.float32)


# ---- readers -------------------------------------------------------------------------------------------------------


def unpack_gptq(t: Tensors, config: Config) -> Array:
    bits = config["bits"]
    n_in, n_out = t["qweight"].shape[0] * 32 // bits, t["scales"].shape[1]
    codes = unpack_bits(t["qweight"].T, bits, n_in)  # [out, in]
    zeros = unpack_bits(t["qzeros"], bits, n_out)
    if config.get("checkpoint_format", config.get("format")) != "gptq_v2":
        zeros = zeros + 1
    group = n_in if config["group_size"] == -1 else config["group_size"]
    index = t.get("g_idx", np.arange(n_in) // group)
    return f32(codes - zeros[index].T) * f32(t["scales"])[index].T


def unpack_awq(t: Tensors, config: Config) -> Array:
    def columns(words: Array) -> Array:
        nibbles = unpack_bits(words, 4, words.shape[1] * 8).reshape(len(words), -1, 8)
        out = np.empty_like(nibbles)
        out[:, :, AWQ_ORDER] = nibbles
        return out.reshape(len(words), -1)

    codes, zeros = columns(t["qweight"]), columns(t["qzeros"])
    index = np.arange(len(codes)) // (len(codes) // len(zeros))
    return (f32(codes - zeros[index]) * f32(t["scales"])[index]).T


def unpack_bitsandbytes(t: Tensors, config: Config) -> Array:
    if "SCB" in t:
        return f32(t["weight"]) * t["SCB"][:, None] * np.float32(7.874015718698502e-3)  # 1 / 127
    (state,) = (json.loads(v.tobytes()) for k, v in t.items() if ".quant_state." in k)
    absmax = t["weight.absmax"]
    if "nested_blocksize" in state:
        scale = t["weight.nested_absmax"].repeat(state["nested_blocksize"])[: absmax.size]
        absmax = t["weight.nested_quant_map"][absmax] * scale + np.float32(state["nested_offset"])
    n_out, n_in = state["shape"]
    data = t["weight"].reshape(-1).view(np.uint8)
    codes = np.stack([data >> 4, data & 15], -1).reshape(-1)[: n_out * n_in]  # the first in the HIGH half
    return (t["weight.quant_map"][codes] * absmax.repeat(state["blocksize"])[: codes.size]).reshape(n_out, n_in)


def unpack_mlx(t: Tensors, config: Config) -> Array:
    bits, mode, words = config["bits"], config.get("mode", "affine"), t["weight"]
    codes = unpack_bits(words, bits, words.shape[-1] * 32 // bits)
    scales = t["scales"]
    if mode == "affine":
        repeat = codes.shape[-1] // scales.shape[-1]
        return f32(codes) * f32(scales).repeat(repeat, -1) + f32(t["biases"]).repeat(repeat, -1)
    values = f32(codes.astype(np.uint8).view(E4M3)) if mode == "mxfp8" else E2M1_VALUES[codes]
    factors = f32(scales.view(E4M3)) if mode == "nvfp4" else power_of_two(scales)
    return values * factors.repeat(codes.shape[-1] // scales.shape[-1], -1)


def unpack_hqq(t: Tensors, config: Config) -> Array:
    bits, axis, group = (int(t[k]) for k in ("nbits", "axis", "group_size"))
    shape = tuple(t["shape"].tolist())
    packed = t["W_q"].view(np.int32 if bits == 3 else np.uint8)  # some are stored as floats of the same bytes
    codes = unpack_stacked(packed, bits, group if axis == 0 else shape[0] * shape[1] // group)
    return ((f32(codes) - f32(t["zero"])) * f32(t["scale"])).reshape(shape)


def unpack_fp8(t: Tensors, config: Config, block: tuple[int, int] | None = None) -> Array:
    """One scale, one a row, or one a block, whose size is the config's or `block`."""
    weight = f32(t["weight"])
    scale = f32(t["weight_scale_inv"] if "weight_scale_inv" in t else t["weight_scale"])
    block = block or config.get("weight_block_size")
    if scale.ndim == 4:  # ModelOpt's [R, 1, C, 1]
        scale = scale[:, 0, :, 0]
    if block and scale.ndim == 2:
        scale = spread(scale, weight.shape, block)
    elif scale.ndim == 1 and scale.size == len(weight):
        scale = scale[:, None]
    return weight * scale


def unpack_nvfp4(t: Tensors) -> Array:
    """ModelOpt's second scale multiplies, that of compressed-tensors divides."""
    scale = f32(t["weight_scale"])
    packed = t["weight_packed"] if "weight_packed" in t else t["weight"]
    scale = scale / t["weight_global_scale"] if "weight_packed" in t else scale * t["weight_scale_2"]
    return E2M1_VALUES[unpack_nibbles(packed)] * scale.repeat(16, -1)


def unpack_mxfp4(t: Tensors, config: Config) -> Array:
    """`blocks` [..., out, in / 2], or as GPT-OSS has them `*_blocks` [E, out, in / 32, 16]; `scales` likewise."""
    (blocks,) = (v.reshape(v.shape[:-2] + (-1,)) if "_" in k else v for k, v in t.items() if k.endswith("blocks"))
    (scales,) = (v for k, v in t.items() if k.endswith("scales"))
    return E2M1_VALUES[unpack_nibbles(blocks)] * power_of_two(scales).repeat(32, -1)


def unpack_modelopt(t: Tensors, config: Config) -> Array:
    return unpack_nvfp4(t) if "NVFP4" in config["quant_algo"] else unpack_fp8(t, config)


def unpack_compressed_tensors(t: Tensors, config: Config) -> Array:
    (group,) = config["config_groups"].values()
    args, form = group["weights"], group.get("format") or config["format"]
    if form == "pack-quantized":
        return unpack_pack_quantized(t, args)
    if form == "nvfp4-pack-quantized":
        return unpack_nvfp4(t)
    scale = t["weight_scale"]
    if form == "mxfp4-pack-quantized":
        return E2M1_VALUES[unpack_nibbles(t["weight_packed"])] * power_of_two(scale).repeat(32, -1)
    if form == "mxfp8-quantized":
        return f32(t["weight"]) * power_of_two(scale).repeat(32, -1)
    if args["type"] == "float":
        return unpack_fp8(t, {}, args.get("block_structure"))
    zero = f32(t["weight_zero_point"]) if "weight_zero_point" in t else np.float32(0)
    return (f32(t["weight"]) - zero) * f32(scale)


def unpack_pack_quantized(t: Tensors, args: Config) -> Array:
    """Offset codes; releases before 0.20 left the bits of a word empty that held no whole code."""
    bits, (n_out, n_in) = args["num_bits"], t["weight_shape"].tolist()

    def signed(words: Array, count: int) -> Array:
        if words.shape[1] == -(-count * bits // 32):
            codes = unpack_bits(words, bits, count)
        else:
            codes = unpack_bits(words[..., None], bits, 32 // bits).reshape(len(words), -1)[:, :count]
        return codes - 2 ** (bits - 1)

    codes, scale = signed(t["weight_packed"], n_in), f32(t["weight_scale"])
    zero = signed(t["weight_zero_point"].T, n_out).T if "weight_zero_point" in t else np.zeros(scale.shape, np.int32)
    index = t.get("weight_g_idx", np.arange(n_in) // (n_in // scale.shape[1]))
    return f32(codes - zero[:, index]) * scale[:, index]


def unpack_f8q8(t: Tensors, config: Config) -> Array:
    blocks = t["blocks"]
    step = f32(blocks[:, :1].view(E4M3)) / np.float32(448)
    shape = t["shape"].tolist()
    return (f32(blocks[:, 1:].view(np.int8)) * step).reshape(-1)[: shape[0] * shape[1]].reshape(shape)


READERS: dict[str, Callable[[Tensors, Config], Array]] = {
    "gptq": unpack_gptq,
    "awq": unpack_awq,
    "bitsandbytes": unpack_bitsandbytes,
    "mlx": unpack_mlx,
    "hqq": unpack_hqq,
    "fp8": unpack_fp8,
    "mxfp4": unpack_mxfp4,
    "modelopt": unpack_modelopt,
    "compressed-tensors": unpack_compressed_tensors,
    "f8q8": unpack_f8q8,
}


def dequantize(tensors: Tensors, config: Config) -> Array:
    """The matrix float32 [out, in] (stacks: [E, out, in]) of a layer's tensors; `config` as config.json has it."""
    return READERS[config.get("quant_method", "mlx")](tensors, config)


# ---- writers -------------------------------------------------------------------------------------------------------


def need(good: bool, what: str) -> None:
    if not good:
        raise ValueError(what)


def divides(size: int, n: int, what: str) -> None:
    need(n % size == 0, f"{what} {n} is not a multiple of {size}")


def affine(x: Array, bits: int, axis: int, dtype: Any, lowest: int = 0) -> tuple[Array, Array]:
    """A scale in `dtype` and a whole zero point from `lowest` up for the range of each group, 0 in it."""
    low, high = (np.minimum(x.min(axis), 0), np.maximum(x.max(axis), 0))
    scale = f32(((high - low) / (2**bits - 1)).astype(dtype))
    scale[scale == 0] = 1
    return scale, np.clip(np.rint(-low / scale), lowest, lowest + 2**bits - 1).astype(np.int32)


def absmax_scale(x: Array, axis: Any, largest: float, dtype: Any) -> Array:
    """What takes the largest magnitude to `largest`, rounded to `dtype`; the axes are kept."""
    scale = f32((np.abs(x).max(axis, keepdims=True) / np.float32(largest)).astype(dtype))
    return np.where(scale == 0, np.float32(1), scale)


def gptq(w: Array, rng: np.random.Generator, group: int, bits: int, v2: bool = False, order: bool = False) -> Tensors:
    n_out, n_in = w.shape
    group = n_in if group == -1 else group
    for size, what in ((n_in, "in"), (n_out, "out")):
        need(size * bits % 32 == 0, f"{what} {size} codes of {bits} bits do not fill words of 32")
    index = np.arange(n_in) // group
    if order:
        index = rng.permutation(index)
    # v1 stores the zero point less 1, so that 0 has no code but 2^bits has
    pairs = [affine(w[:, index == g], bits, 1, np.float16, lowest=0 if v2 else 1) for g in range(index.max() + 1)]
    scales, zeros = (np.stack(x) for x in zip(*pairs, strict=True))
    codes = np.clip(np.rint(w / scales[index].T) + zeros[index].T, 0, 2**bits - 1).astype(np.int32)
    return {
        "qweight": np.ascontiguousarray(pack_bits(codes, bits).T).view(np.int32),
        "qzeros": pack_bits(zeros - (not v2), bits).view(np.int32),
        "scales": scales.astype(np.float16),
        "g_idx": index.astype(np.int32),
    }


def awq(w: Array, rng: np.random.Generator, group: int) -> Tensors:
    n_out, n_in = w.shape
    divides(8, n_out, "out")
    divides(group, n_in, "in")
    scales, zeros = affine(w.reshape(n_out, -1, group), 4, 2, np.float16)
    codes = np.clip(np.rint(w / scales.repeat(group, 1)) + zeros.repeat(group, 1), 0, 15).astype(np.int32)

    def words(x: Array) -> Array:
        return pack_bits(x.T.reshape(x.shape[1], -1, 8)[:, :, AWQ_ORDER].reshape(x.shape[1], -1), 4).view(np.int32)

    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.T.astype(np.float16)}


def nearest(x: Array, table: Array) -> Array:
    order = np.argsort(table, kind="stable")
    middles = (table[order][1:] + table[order][:-1]) / 2
    return order[np.searchsorted(middles, x)]


def dynamic_map() -> Array:
    """The 256 values of bitsandbytes' 8-bit code, to within a rounding: fewer fraction bits the smaller the number."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1, dtype=np.float32)
        means = (edges[1:] + edges[:-1]) / 2 * np.float32(10.0 ** (i - 6))
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


def bnb_4bit(w: Array, rng: np.random.Generator, size: int, kind: str, nested: bool) -> Tensors:
    table = NF4_CODE if kind == "nf4" else FP4_CODE
    flat = np.pad(w.reshape(-1), (0, -w.size % size)).reshape(-1, size)  # blocks run over rows
    absmax = np.maximum(np.abs(flat).max(1), np.float32(1e-38))
    codes = nearest(flat / absmax[:, None], table).reshape(-1)[: w.size]
    codes = np.pad(codes, (0, w.size % 2))
    state: Config = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": list(w.shape)}
    tensors = {
        "weight": (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": table,
    }
    if nested:
        offset = absmax.mean(dtype=np.float32)
        blocks = np.pad(absmax - offset, (0, -absmax.size % 256)).reshape(-1, 256)
        largest = np.maximum(np.abs(blocks).max(1), np.float32(1e-38))
        small = nearest(blocks / largest[:, None], dynamic_map()).reshape(-1)[: absmax.size]
        tensors |= {"weight.absmax": small.astype(np.uint8), "weight.nested_absmax": largest}
        tensors["weight.nested_quant_map"] = dynamic_map()
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


def bnb_int8(w: Array, rng: np.random.Generator, group: None) -> Tensors:
    largest = absmax_scale(w, 1, 1, np.float32)
    codes = np.rint(w * (127 / largest)).astype(np.int8)
    return {"weight": codes, "SCB": largest[:, 0], "weight_format": np.array(0, np.uint8)}


def mlx_affine(w: Array, rng: np.random.Generator, group: int, bits: int) -> Tensors:
    """MLX's rule: the end of the range that is larger in magnitude is met exactly, so scales may be negative."""
    divides(group, w.shape[1], "in")
    x = w.reshape(len(w), -1, group)
    low, high = x.min(2), x.max(2)
    scale = np.maximum((high - low) / np.float32(2**bits - 1), np.float32(1e-7))
    lower = np.abs(low) > np.abs(high)
    scale, edge = np.where(lower, scale, -scale), np.where(lower, low, high)
    steps = np.rint(edge / scale)
    scale = np.where(steps == 0, scale, edge / np.where(steps == 0, 1, steps))
    bias = np.where(steps == 0, np.float32(0), edge)
    scale, bias = scale.astype(np.float16), bias.astype(np.float16)
    codes = np.clip(np.rint((x - f32(bias)[..., None]) / f32(scale)[..., None]), 0, 2**bits - 1).astype(np.int32)
    return {"weight": pack_bits(codes.reshape(w.shape), bits), "scales": scale, "biases": bias}


def e8m0_scales(w: Array, largest_exponent: int) -> Array:
    """One byte a group of 32: floor(log2(absmax)) less the largest exponent of the element type, as OCP says."""
    divides(32, w.shape[1], "in")
    absmax = np.abs(w.reshape(len(w), -1, 32)).max(2)
    exponent = np.frexp(absmax)[1] - 1 - largest_exponent
    return np.where(absmax == 0, 0, np.clip(exponent + 127, 0, 254)).astype(np.uint8)


def mx_codes(w: Array, scales: Array) -> Array:
    return to_e2m1(w / power_of_two(scales).repeat(32, 1))


def mlx_floats(w: Array, rng: np.random.Generator, group: int, mode: str) -> Tensors:
    if mode == "nvfp4":
        divides(16, w.shape[1], "in")
        scale = to_e4m3(np.maximum(absmax_scale(w.reshape(len(w), -1, 16), 2, 6, np.float32)[..., 0], 2**-9))
        codes = to_e2m1(w / f32(scale).repeat(16, 1))
        return {"weight": pack_bits(codes, 4), "scales": scale.view(np.uint8)}
    scales = e8m0_scales(w, 2 if mode == "mxfp4" else 8)
    if mode == "mxfp4":
        return {"weight": pack_bits(mx_codes(w, scales), 4), "scales": scales}
    codes = to_e4m3(w / power_of_two(scales).repeat(32, 1))
    return {"weight": codes.view(np.uint8).view(np.uint32), "scales": scales}


def hqq(w: Array, rng: np.random.Generator, group: int, bits: int, axis: int) -> Tensors:
    """Without HQQ's solver: the first guess of its scales and zero points. Scalars are tensors, text is bytes."""
    divides(group, w.size, "out * in")
    x = w.reshape(group, -1) if axis == 0 else w.reshape(-1, group)
    shifts = stacked_shifts(bits)
    need(bits == 3 or len(x) % len(shifts) == 0, f"{len(x)} rows of groups do not split into {len(shifts)} parts")
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    inverse = np.minimum((2**bits - 1) / np.maximum(high - low, np.float32(1e-4)), 2e4)
    scale, zero = (1 / inverse).astype(np.float16), (-low * inverse).astype(np.float16)
    codes = np.clip(np.rint(x / f32(scale) + f32(zero)), 0, 2**bits - 1).astype(np.int32)
    text = {"packing": "3bit_32" if bits == 3 else f"{bits}bit_u8", "compute_dtype": "torch.float16"}
    text["unpack_view_dtype"] = "torch.int32" if bits == 3 else "torch.uint8"
    flags = {"view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "offload_meta": 0, "encoded_state_dict": 1}
    flags |= {"stores_quant_config": 1, "channel_wise": 1, "optimize": 1, "round_zero": int(bits == 4)}
    numbers = {"nbits": bits, "group_size": group, "axis": axis}
    return {
        "W_q": pack_stacked(codes, bits),
        "scale": scale,
        "zero": zero,
        "shape": np.array(w.shape, np.int64),
        **{k: np.frombuffer(v.encode(), np.uint8) for k, v in text.items()},
        **{k: np.array(v, np.uint8) for k, v in flags.items()},
        **{k: np.array(v, np.int32) for k, v in numbers.items()},
    }


def fp8(
    w: Array, rng: np.random.Generator, group: None, axis: int | None, static: bool = False, dtype: Any = np.float32
) -> Tensors:
    """One scale (a scalar), or with axis 1 one a row [out, 1]."""
    scale = absmax_scale(w, axis, 448, dtype)
    stored = (scale if axis == 1 else scale.reshape(())).astype(dtype)
    out = {"weight": to_e4m3(w / scale), "weight_scale": stored}
    return out | ({"input_scale": np.array(0.05, np.float32)} if static else {})


def fp8_block(
    w: Array,
    rng: np.random.Generator,
    block: tuple[int, int],
    name: str = "weight_scale_inv",
    dtype: Any = np.float32,
) -> Tensors:
    padded = np.pad(w, [(0, -n % b) for n, b in zip(w.shape, block, strict=True)])
    tiles = padded.reshape(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    scale = absmax_scale(tiles, (1, 3), 448, dtype)[:, 0, :, 0]
    return {"weight": to_e4m3(w / spread(scale, w.shape, block)), name: scale.astype(dtype)}


def nvfp4(w: Array, rng: np.random.Generator, group: None, modelopt: bool) -> Tensors:
    divides(16, w.shape[1], "in")
    largest = np.float32(max(np.abs(w).max(), 1e-30))
    whole = largest / np.float32(6 * 448)  # multiplies; compressed-tensors stores its inverse
    local = np.abs(w.reshape(len(w), -1, 16)).max(2) / 6
    scale = to_e4m3(np.maximum(local / whole, np.float32(2**-9)))
    packed = pack_nibbles(to_e2m1(w / (f32(scale) * whole).repeat(16, 1)))
    if modelopt:
        out = {"weight": packed, "weight_scale": scale, "weight_scale_2": np.array(whole)}
        return out | {"input_scale": np.array(0.01, np.float32)}
    out = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": np.array([1 / whole], np.float32)}
    return out | {"input_global_scale": np.array([100], np.float32)}


def mxfp4(w: Array, rng: np.random.Generator, group: None, names: tuple[str, str] = ("blocks", "scales")) -> Tensors:
    scales = e8m0_scales(w, 2)
    return {names[0]: pack_nibbles(mx_codes(w, scales)), names[1]: scales}


def ct_pack(w: Array, rng: np.random.Generator, group: int | None, bits: int, symmetric: bool) -> Tensors:
    """Groups of `group`, or one a row."""
    n_out, n_in = w.shape
    group = group or n_in
    divides(group, n_in, "in")
    half, x = 2 ** (bits - 1), w.reshape(n_out, -1, group)
    if symmetric:
        scale, zero = absmax_scale(x, 2, half - 0.5, BF16)[..., 0], np.zeros((n_out, n_in // group), np.int32)
    else:
        scale, zero = affine(x, bits, 2, BF16)
        zero = zero - half
    codes = np.clip(np.rint(w / scale.repeat(group, 1)) + zero.repeat(group, 1), -half, half - 1).astype(np.int32)
    out = {
        "weight_packed": pack_bits(codes + half, bits).view(np.int32),
        "weight_scale": scale.astype(BF16),
        "weight_shape": np.array(w.shape, np.int64),
    }
    if not symmetric:
        out["weight_zero_point"] = np.ascontiguousarray(pack_bits((zero + half).T, bits).T).view(np.int32)
    return out


def ct_int8(w: Array, rng: np.random.Generator, group: None) -> Tensors:
    scale = absmax_scale(w, 1, 127.5, BF16)
    return {"weight": np.clip(np.rint(w / scale), -128, 127).astype(np.int8), "weight_scale": scale.astype(BF16)}


# ---- names and configs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """`encode(matrix, rng, group)`; `config(group)` is the object under `key`; `group` is what tiny models allow.

    `skipped` is the config's name for the list of modules left alone.
    """

    encode: Encoder
    config: Callable[[Any], Config]
    group: Any = None
    key: str = "quantization_config"
    skipped: str | None = None


def gptq_format(bits: int, group: int = 16, v2: bool = False, order: bool = False) -> Format:
    def config(group: int) -> Config:
        out = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": False}
        return out | ({"checkpoint_format": "gptq_v2"} if v2 else {})

    return Format(partial(gptq, bits=bits, v2=v2, order=order), config, group)


def bnb_format(kind: str, nested: bool) -> Format:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind}
    config |= {"bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": "uint8"}
    return Format(partial(bnb_4bit, kind=kind, nested=nested), lambda _: config, 64, skipped="llm_int8_skip_modules")


def mlx_format(mode: str, bits: int, group: int) -> Format:
    encode = partial(mlx_affine, bits=bits) if mode == "affine" else partial(mlx_floats, mode=mode)
    return Format(encode, lambda size: {"group_size": size, "bits": bits, "mode": mode}, group, "quantization")


def hqq_format(bits: int, axis: int) -> Format:
    def config(group: int) -> Config:
        weights = {"nbits": bits, "channel_wise": True, "group_size": group, "optimize": True}
        weights |= {"round_zero": bits == 4, "axis": axis, "view_as_float": False}
        inner = {"weight_quant_params": weights, "scale_quant_params": None, "zero_quant_params": None}
        return {"quant_method": "hqq", "quant_config": inner | {"offload_meta": False}}

    return Format(partial(hqq, bits=bits, axis=axis), config, 64, skipped="skip_modules")


def fp8_format(encode: Encoder, static: bool = False, block: tuple[int, int] | None = None) -> Format:
    def config(block: tuple[int, int] | None) -> Config:
        out: Config = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic"}
        return out | ({"fmt": "e4m3", "weight_block_size": list(block)} if block else {})

    return Format(encode, config, block, skipped="modules_to_not_convert")


def ct_format(form: str, encode: Encoder, weights: Config, activations: Config | None, group: Any = None) -> Format:
    def config(group: Any) -> Config:
        sized = {"group_size": group} if isinstance(group, int) else {"block_structure": list(group)} if group else {}
        given = {"symmetric": True, "dynamic": False, **weights, **sized}
        groups = {"group_0": {"targets": ["Linear"], "weights": given, "input_activations": activations}}
        out = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
        return out | {"kv_cache_scheme": None, "quantization_status": "compressed"}

    return Format(encode, config, group, skipped="ignore")


def modelopt_format(encode: Encoder, algorithm: str, weights: Config) -> Format:
    group = {"input_activations": weights, "weights": weights, "targets": ["Linear"]}
    config = {"quant_method": "modelopt", "quant_algo": algorithm, "config_groups": {"group_0": group}}
    return Format(encode, lambda _: config | {"producer": {"name": "modelopt", "version": "0.47.0"}}, skipped="ignore")


def formats() -> dict[str, Format]:
    token = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}
    e4m3 = {"num_bits": 8, "type": "float"}
    grouped = {"type": "int", "strategy": "group"}
    channel = {"type": "int", "strategy": "channel"}
    small = {"num_bits": 4, "type": "float"}
    static = {"dynamic": False, "num_bits": 8, "type": "float"}
    nv = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    ct_nv = {**small, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    ct_mx = {**small, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    asymmetric = {**grouped, "num_bits": 4, "symmetric": False}
    block = {**e4m3, "strategy": "block"}
    awq_config = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
    int8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}

    def pack(bits: int, symmetric: bool = True) -> Encoder:
        return partial(ct_pack, bits=bits, symmetric=symmetric)

    out = {f"gptq-{bits}": gptq_format(bits) for bits in (2, 3, 4, 8)}
    out |= {
        "gptq-v2": gptq_format(4, v2=True),
        "gptq-act-order": gptq_format(4, order=True),
        "gptq-one-group": gptq_format(4, group=-1),
        "awq": Format(awq, lambda g: awq_config | {"group_size": g}, 16, skipped="modules_to_not_convert"),
        "bnb-nf4": bnb_format("nf4", False),
        "bnb-nf4-nested": bnb_format("nf4", True),
        "bnb-fp4": bnb_format("fp4", False),
        "bnb-int8": Format(bnb_int8, lambda _: int8, skipped="llm_int8_skip_modules"),
    }
    out |= {f"mlx-{bits}": mlx_format("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)}
    out |= {
        "mlx-mxfp4": mlx_format("mxfp4", 4, 32),
        "mlx-nvfp4": mlx_format("nvfp4", 4, 16),
        "mlx-mxfp8": mlx_format("mxfp8", 8, 32),
        "hqq-4-axis0": hqq_format(4, 0),
        "hqq-4-axis1": hqq_format(4, 1),
        "hqq-3-axis0": hqq_format(3, 0),
    }
    out |= {f"hqq-{bits}": hqq_format(bits, 1) for bits in (8, 3, 2, 1)}
    out |= {
        "fp8-tensor": fp8_format(partial(fp8, axis=None)),
        "fp8-channel": fp8_format(partial(fp8, axis=1)),
        "fp8-static": fp8_format(partial(fp8, axis=None, static=True), static=True),
        "fp8-block": fp8_format(fp8_block, block=(32, 16)),
        "fp8-modelopt": modelopt_format(partial(fp8, axis=None, static=True), "FP8", static),
        "nvfp4-modelopt": modelopt_format(partial(nvfp4, modelopt=True), "NVFP4", nv),
        "ct-pack-4": ct_format("pack-quantized", pack(4), {**grouped, "num_bits": 4}, None, 16),
        "ct-pack-4-asym": ct_format("pack-quantized", pack(4, False), asymmetric, None, 16),
        "ct-pack-8": ct_format("pack-quantized", pack(8), {**channel, "num_bits": 8}, None),
        "ct-pack-3": ct_format("pack-quantized", pack(3), {**grouped, "num_bits": 3}, None, 16),
        "ct-int8": ct_format("int-quantized", ct_int8, {**channel, "num_bits": 8}, {**token, "type": "int"}),
        "ct-fp8": ct_format(
            "float-quantized",
            partial(fp8, axis=1, dtype=BF16),
            {**e4m3, "strategy": "channel"},
            {**token, "type": "float"},
        ),
        "ct-fp8-block": ct_format(
            "float-quantized",
            partial(fp8_block, name="weight_scale", dtype=BF16),
            block,
            {**token, "type": "float", "strategy": "group", "group_size": 16},
            (32, 16),
        ),
        "ct-nvfp4": ct_format(
            "nvfp4-pack-quantized", partial(nvfp4, modelopt=False), ct_nv, {**ct_nv, "dynamic": "local"}
        ),
        "ct-mxfp4": ct_format(
            "mxfp4-pack-quantized", partial(mxfp4, names=("weight_packed", "weight_scale")), ct_mx, None
        ),
        "mxfp4": Format(mxfp4, lambda _: {"quant_method": "mxfp4"}, skipped="modules_to_not_convert"),
    }
    return out


FORMATS = formats()


def config_entry(name: str, group: Any = None) -> Config:
    """{key: object} for config.json. `group` replaces the format's own group size (or FP8 block, a pair)."""
    form = FORMATS[name]
    return {form.key: json.loads(json.dumps(form.config(group or form.group)))}


def written(w: Array, rng: np.random.Generator, name: str, group: Any = None) -> Written:
    form = FORMATS[name]
    need(w.ndim == 2 and w.dtype == np.float32, "a float32 matrix, please")
    tensors = {k: np.asarray(v, order="C") for k, v in form.encode(w, rng, group or form.group).items()}
    (config,) = config_entry(name, group).values()
    return Written(tensors, dequantize(tensors, config))


WRITERS: dict[str, Callable[[Array, np.random.Generator], Written]] = {
    name: partial(written, name=name) for name in FORMATS
}
CONFIGS: dict[str, Config] = {name: config_entry(name) for name in FORMATS}


# ---- whole models --------------------------------------------------------------------------------------------------

# Projections of the blocks, single experts included; Mixtral calls them w1, w2, w3.
PROJECTION = re.compile(r"(.*\.layers\.\d+\..*(?:_proj|_proj_with_mqa|experts\.\d+\.w[123]))\.weight")
EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.(.*)")
MLX_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def quantized_checkpoint(
    source: Path,
    target: Path,
    name: str,
    rng: np.random.Generator,
    skip: Callable[[str], bool] = lambda module: False,
    group: Any = None,
) -> tuple[Path, Path]:
    """Writes target/quantized and target/plain and gives both: one model, in the format and dequantized in float32.

    Quantized is every 2-D projection of the blocks but those whose module name `skip` accepts; the rest stays as it
    is. MLX has no separate experts: its formats stack them as `switch_mlp`. `group` as in `config_entry`.
    """
    quantized: Tensors = {}
    plain: Tensors = {}
    left = ["lm_head"]
    for file in sorted(source.glob("*.safetensors")):
        for key, x in read_safetensors(file)[0].items():
            found = PROJECTION.fullmatch(key)
            if found is None or x.ndim != 2 or skip(found[1]):
                quantized[key], plain[key] = x, f32(x)
                if key.endswith(".weight") and x.ndim == 2 and "embed" not in key and key != "lm_head.weight":
                    left.append(key.removesuffix(".weight"))
                continue
            try:
                tensors, plain[key] = written(f32(x), rng, name, group)
            except ValueError as e:
                raise ValueError(f"{name} cannot hold {found[1]} {list(x.shape)}: {e}") from e
            quantized |= {f"{found[1]}.{suffix}": value for suffix, value in tensors.items()}
    form, entry = FORMATS[name], config_entry(name, group)
    if form.key == "quantization":
        quantized = stack_experts(quantized)
        entry["quantization"] |= {stacked(f"{module}.weight").removesuffix(".weight"): False for module in left}
        entry["quantization_config"] = entry["quantization"]  # as mlx-lm writes it
    elif form.skipped:
        entry[form.key][form.skipped] = left
    config = json.loads((source / "config.json").read_text())
    for path, tensors, more in ((target / "quantized", quantized, entry), (target / "plain", plain, {})):
        shutil.copytree(source, path, ignore=shutil.ignore_patterns("*.safetensors*", "golden.npz", "config*.json"))
        dtype = {"dtype": "float32"} if not more else {}
        (path / "config.json").write_text(json.dumps({**config, **dtype, **more}, indent=2) + "\n")
        write_safetensors(path / "model.safetensors", tensors)
    return target / "quantized", target / "plain"


def stacked(key: str) -> str:
    """`X.experts.{e}.gate_proj.S` as `X.switch_mlp.gate_proj.S`; other names stay."""
    found = EXPERT.fullmatch(key)
    return f"{found[1]}.switch_mlp.{MLX_NAMES.get(found[3], found[3])}.{found[4]}" if found else key


def stack_experts(tensors: Tensors) -> Tensors:
    """Each expert tensor of all experts as one, with a leading axis."""
    out: Tensors = {}
    experts: dict[str, dict[int, Array]] = {}
    for key, x in tensors.items():
        if found := EXPERT.fullmatch(key):
            experts.setdefault(stacked(key), {})[int(found[2])] = x
        else:
            out[key] = x
    return out | {key: np.stack([parts[e] for e in range(len(parts))]) for key, parts in experts.items()}
