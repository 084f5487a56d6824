"""The definition of matmuls of blockwise FP8 weights with activations rounded to FP8, as DeepSeek-V3 was trained."""

import jax
import jax.numpy as jnp

from jaxllm.formats.scaled import E4M3_MAX, Scaled, quotient, scale_for
from jaxllm.kernels import dense
from jaxllm.kernels.activations import Quantized, group_of, rounds_to_powers
from jaxllm.kernels.dense import weight_dequant

__all__ = ["act_quant", "grouped_matmul", "matmul", "weight_dequant"]


def act_quant(x: jax.Array, group: int = 128, power_of_two: bool = False) -> tuple[jax.Array, jax.Array]:
    """Activations as FP8, with a scale for each `group` neighbours: the largest of them becomes 448.

    A group of zeros gets scale 1 (the demo's kernel divides 0 by 0 there). The last group may be smaller.

    Args:
        x: `[..., in]` of any floating dtype.
        power_of_two: whether scales are rounded up to powers of two ("ue8m0", as DeepSeek-V3.1 was trained).

    Returns:
        float8_e4m3fn `[..., in]` and float32 `[..., ceil(in / group)]`.
    """
    size = x.shape[-1]
    groups = -(-size // group)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, groups * group - size)]
    wide = jnp.pad(x.astype(jnp.float32), pad).reshape(*x.shape[:-1], groups, group)
    peak = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scales = scale_for(peak, E4M3_MAX, power_of_two)
    values = jnp.clip(quotient(wide, scales), -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    return values.reshape(*x.shape[:-1], -1)[..., :size], scales[..., 0]


def matmul(x: jax.Array | Quantized, weight: Scaled) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`.

    If the weight requires groups of x to be rounded (W8A8), that happens first. Then both are dequantized and
    multiplied as floats, which equals the sum of code products, scaled block by block.
    """
    return dense.matmul(_rounded(x, weight), weight)


def grouped_matmul(x: jax.Array | Quantized, stack: Scaled, expert: jax.Array) -> jax.Array:
    """`matmul` for tiles of rows, each with its own matrix, see `dense.grouped_matmul`."""
    return dense.grouped_matmul(_rounded(x, stack), stack, expert)


def _rounded(x: jax.Array | Quantized, weight: Scaled) -> jax.Array:
    """`x[..., in]` rounded to FP8 as in a W8A8 matmul, and converted back to float32."""
    if not isinstance(x, Quantized):
        if (group := group_of(weight)) is None:
            return x
        x = Quantized(*act_quant(x, group, rounds_to_powers(weight)), group)
    return x.dequantize()
