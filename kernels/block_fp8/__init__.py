"""Matmuls of blockwise FP8 weights, as DeepSeek-V3 was trained: the functions of its demo's kernel.py.

They run on one device, on the kernels of its platform (`dispatch.choose`). The demo returns torch's default dtype,
which its generate.py sets to bfloat16; these return `dtype`, by default bfloat16.
"""

import jax
import jax.numpy as jnp

from jaxllm.errors import InputError
from jaxllm.formats.scaled import Scaled
from jaxllm.kernels import dispatch
from jaxllm.kernels.activations import Quantized

__all__ = ["act_quant", "fp8_gemm", "weight_dequant"]

BLOCK = 128  # columns that share a scale, and rows of a weight


def act_quant(x: jax.Array, block_size: int = BLOCK, scale_fmt: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Activations as FP8, with a scale for each `block_size` neighbours: their largest magnitude / 448.

    A group of zeros gets scale 1 (the demo divides 0 by 0 there); the last group may be smaller.

    Args:
        x: floats `[..., in]`.
        scale_fmt: "ue8m0" rounds scales up to powers of two, as DeepSeek-V3.1 was trained.

    Returns:
        float8_e4m3fn `[..., in]` and float32 `[..., ceil(in / block_size)]`.

    Raises:
        InputError: x does not hold floats, or there is no such `scale_fmt`.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize == 1:
        raise InputError(f"x is of {x.dtype.name}: only float32, bfloat16 and float16 are rounded to FP8")
    if scale_fmt not in (None, "ue8m0"):
        raise InputError(f"scale_fmt '{scale_fmt}': choose 'ue8m0' or None")
    return dispatch.choose("act_quant", x, Scaled).kernel.function(x, block_size, scale_fmt == "ue8m0")


def weight_dequant(
    x: jax.Array, s: jax.Array, block_size: int = BLOCK, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> jax.Array:
    """Dequantize FP8 codes with one scale per block.

    Args:
        x: float8_e4m3fn `[out, in]`, or a stack `[*batch, out, in]`.
        s: float32 `[*batch, ceil(out / block_size), ceil(in / block_size)]`.

    Returns:
        `x * s` in float32, rounded once to `dtype`.

    Raises:
        InputError: the number of scales is wrong.
    """
    weight = _weight(x, s, block_size)
    return dispatch.choose("weight_dequant", None, weight).kernel.function(weight, dtype)


def fp8_gemm(
    a: jax.Array, a_s: jax.Array, b: jax.Array, b_s: jax.Array, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> jax.Array:
    """The product of FP8 activations from `act_quant` and a transposed FP8 weight, both in blocks of 128.

    Args:
        a: float8_e4m3fn `[..., in]`.
        a_s: float32 `[..., ceil(in / 128)]`.
        b: float8_e4m3fn `[out, in]`.
        b_s: float32 `[ceil(out / 128), ceil(in / 128)]`.

    Returns:
        `[..., out]`: summed in float32, then rounded to `dtype`.

    Raises:
        InputError: sizes or dtypes do not match.
    """
    if b.ndim != 2 or a.shape[-1] != b.shape[-1]:
        raise InputError(f"a {[*a.shape]} and b {[*b.shape]}: b has to be a matrix with as many columns as a")
    _expect("a_s", a_s, (*a.shape[:-1], -(-a.shape[-1] // BLOCK)))
    return dispatch.matmul(Quantized(a, a_s, BLOCK), _weight(b, b_s, BLOCK)).astype(dtype)


def _weight(values: jax.Array, scales: jax.Array, block: int) -> Scaled:
    *batch, out, in_ = values.shape
    _expect("scales", scales, (*batch, -(-out // block), -(-in_ // block)))
    return Scaled(values, scales, (block, block))


def _expect(name: str, scales: jax.Array, shape: tuple[int, ...]) -> None:
    if scales.shape != shape:
        raise InputError(f"{name} of shape {[*scales.shape]}, expected {[*shape]}")
