"""Matmuls of blockwise FP8 weights with activations rounded to FP8, as DeepSeek-V3 was trained: what they mean."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxllm.kernels import dense

from jaxllm.formats.scaled import E4M3_MAX, Scaled


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
    scales = jnp.where(peak == 0, jnp.float32(1), peak / jnp.float32(E4M3_MAX))
    if power_of_two:
        scales = next_power_of_two(scales)
    values = jnp.clip(wide / scales, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    return values.reshape(*x.shape[:-1], -1)[..., :size], scales[..., 0]


def next_power_of_two(scales: jax.Array) -> jax.Array:
    """Positive normal float32s, those between two powers of two brought to the upper one."""
    bits = lax.bitcast_convert_type(scales, jnp.int32)
    return lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


def act_dequant(values: jax.Array, scales: jax.Array, group: int) -> jax.Array:
    """The float32 values that `act_quant` stands for."""
    return values.astype(jnp.float32) * jnp.repeat(scales, group, axis=-1)[..., : values.shape[-1]]


def weight_dequant(weight: Scaled, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
    """The matrix `[*batch, out, in]`: decoded in float32, then rounded once. Blocks of any size, ragged at edges."""
    return weight.dequantize(dtype)


def matmul(x: jax.Array, weight: Scaled) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`.

    With `weight.activation_group` (W8A8), x is rounded to FP8 first, and both are multiplied as the floats they stand
    for: that is what the sums of products of codes, scaled block by block, come to.
    """
    return dense.matmul(_rounded(x, weight), weight)


def grouped_matmul(x: jax.Array, stack: Scaled, expert: jax.Array) -> jax.Array:
    """`matmul` for tiles of rows, each with a matrix of its own, see `dense.grouped_matmul`."""
    return dense.grouped_matmul(_rounded(x, stack), stack, expert)


def _rounded(x: jax.Array, weight: Scaled) -> jax.Array:
    """`x[..., in]` as a W8A8 matmul sees it: through FP8 and back to float32."""
    group = weight.activation_group
    return x if group is None else act_dequant(*act_quant(x, group), group)
