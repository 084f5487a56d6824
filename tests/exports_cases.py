"""Weights of every type that can be written, for tests/test_exports.py and tests/reference/exports_check.py.

Codes are random, and scales such that values are about as large as those of models: no encoder is needed, and every
code occurs. Expectations are not made here.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
from quantized_writers import FP4_CODE, NF4_CODE, pack_bits

from jaxllm.checkpoint.exports import EXPORTS, gptq
from jaxllm.formats.affine import Affine
from jaxllm.formats.base import Weight
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.dense import Dense
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.nvfp4 import NVFP4
from jaxllm.formats.scaled import Scaled

Array = np.ndarray
Shape = tuple[int, ...]
Make = Callable[[np.random.Generator, Shape], Weight]
BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu


def scales(rng: np.random.Generator, shape: Shape, size: float) -> Array:
    return (rng.uniform(0.5, 1, shape) * size).astype(np.float32)


def words(rng: np.random.Generator, shape: Shape, bits: int) -> Array:
    """Random codes as `Affine` holds them."""
    values = 32 // math.gcd(bits, 32)
    return pack_bits(rng.integers(0, 2**bits, (*shape[:-1], shape[-1] // values, values)), bits)


def small_floats(rng: np.random.Generator, shape: Shape) -> Array:
    """E4M3 of every size and sign, but no NaN."""
    codes = rng.integers(0, 0x7F, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
    return codes.view(E4M3)


def integers(bits: int, symmetric: bool, ordered: bool = False, group: int = 128) -> Make:
    def make(rng: np.random.Generator, shape: Shape) -> Affine:
        grid = (shape[0], -(-shape[1] // group))
        half = 2 ** (bits - 1)
        zeros = np.full(grid, half, np.uint8) if symmetric else rng.integers(0, 2**bits, grid, np.uint8)
        size = scales(rng, grid, 0.05 / half).astype(np.float16)
        weight = Affine(words(rng, shape, bits), size, bits, group, "GPTQ", zeros=zeros)
        if not ordered:
            return weight
        index = rng.permutation(np.arange(shape[1]) // group).astype(np.int32)
        nothing = ((0, 0), (1, 0))
        return replace(weight, scales=np.pad(size, nothing), zeros=np.pad(zeros, nothing), in_groups=index + 1)

    return make


def int4(rng: np.random.Generator, shape: Shape) -> Affine:
    size = scales(rng, (shape[0], shape[1] // 128), 0.05 / 8).astype(np.float16)
    return Affine(words(rng, shape, 4), size, 4, 128, "INT", zero=8)


def afq(bits: int, dtype: np.typing.DTypeLike = np.float16) -> Make:
    def make(rng: np.random.Generator, shape: Shape) -> Affine:
        step = scales(rng, (*shape[:-1], shape[-1] // 64), 0.1 / 2**bits)
        size, offset = step.astype(dtype), (step * -(2 ** (bits - 1))).astype(dtype)
        return Affine(words(rng, shape, bits), size, bits, 64, "MLX", biases=offset)

    return make


def fp8(block: tuple[int | None, int | None]) -> Make:
    def make(rng: np.random.Generator, shape: Shape) -> Scaled:
        *lead, out, in_ = shape
        grid = (*lead, -(-out // (block[0] or out)), -(-in_ // (block[1] or in_)))
        return Scaled(small_floats(rng, shape), scales(rng, grid, 1e-3), block)

    return make


def int8(rng: np.random.Generator, shape: Shape) -> Scaled:
    values = rng.integers(-127, 128, shape, np.int8)
    return Scaled(values, scales(rng, (shape[0], 1), 0.05), (1, None), factor=1 / 127)


def powers(rng: np.random.Generator, shape: Shape, below: int) -> Array:
    """Powers of two, as bytes, that bring values of up to 2^below to about 0.05."""
    return rng.integers(127 - below - 6, 127 - below - 3, (*shape[:-1], shape[-1] // 32), np.uint8)


def mxfp8(rng: np.random.Generator, shape: Shape) -> Scaled:
    return Scaled(small_floats(rng, shape), powers(rng, shape, 8).view(E8M0), (1, 32))


def nibbles(rng: np.random.Generator, shape: Shape) -> Array:
    return rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)


def mxfp4(rng: np.random.Generator, shape: Shape) -> MXFP4:
    return MXFP4(nibbles(rng, shape), powers(rng, shape, 2))


def nvfp4(overall: float | None, divides: bool = False) -> Make:
    def make(rng: np.random.Generator, shape: Shape) -> NVFP4:
        size = scales(rng, (*shape[:-1], shape[-1] // 16), 448 if overall else 0.03).astype(E4M3)
        return NVFP4(nibbles(rng, shape), size, np.array([overall], np.float32) if overall else None, divides)

    return make


def codebook(name: str, table: Array) -> Make:
    def make(rng: np.random.Generator, shape: Shape) -> Codebook:
        return Codebook(nibbles(rng, shape), scales(rng, (shape[0], shape[1] // 64), 0.1), table, 64, name)

    return make


def dense(dtype: np.typing.DTypeLike) -> Make:
    return lambda rng, shape: Dense((rng.standard_normal(shape) * 0.05).astype(dtype))


PLAIN = {"bfloat16": dense(BF16), "float16": dense(np.float16), "float32": dense(np.float32)}
MAKERS: dict[tuple[str, str], Make] = {
    **{(container, name): make for container in ("huggingface", "mlx") for name, make in PLAIN.items()},
    ("huggingface", "fp8_block"): fp8((128, 128)),
    ("huggingface", "fp8"): fp8((None, None)),
    ("huggingface", "mxfp8"): mxfp8,
    ("huggingface", "mxfp4"): mxfp4,
    ("huggingface", "mxfp4_experts"): mxfp4,
    ("huggingface", "nvfp4"): nvfp4(7000.0, divides=True),
    ("huggingface", "nf4"): codebook("NF4", NF4_CODE),
    ("huggingface", "fp4"): codebook("FP4", FP4_CODE),
    ("huggingface", "int8"): int8,
    ("huggingface", "llm_int8"): int8,
    ("huggingface", "int4"): int4,
    **{("huggingface", f"gptq{bits}"): integers(bits, True) for bits in (2, 3, 4, 8)},
    **{("huggingface", f"gptq{bits}_asym"): integers(bits, False) for bits in (2, 3, 4, 8)},
    ("huggingface", "gptq4_act_order"): integers(4, True, True),
    ("huggingface", "gptq3_asym_act_order"): integers(3, False, True),
    ("huggingface", "awq"): integers(4, False),
    **{("mlx", f"afq{bits}"): afq(bits) for bits in (2, 3, 4, 5, 6, 8)},
    ("mlx", "mxfp4"): mxfp4,
    ("mlx", "nvfp4"): nvfp4(None),
    ("mlx", "mxfp8"): mxfp8,
}
FORMS = EXPORTS | {(form.container, form.name): form for form in (gptq(4, True, True), gptq(3, False, True))}
STACKED = ("huggingface", "mxfp4_experts")
