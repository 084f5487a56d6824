"""Matmuls of blockwise FP8 weights with activations rounded to FP8, as DeepSeek-V3 was trained: what they mean."""

import jax
import jax.numpy as jnp

from jaxllm.formats.fp8 import E4M3_MAX, BlockFP8


def act_quant(x: jax.Array, group: int = 128) -> tuple[jax.Array, jax.Array]:
    """Activations as FP8, with a scale for each `group` neighbours: the largest of them becomes 448.

    A group of zeros gets scale 1 (the demo's kernel divides 0 by 0 there). The last group may be smaller.

    Args:
        x: `[..., in]` of any floating dtype.

    Returns:
        float8_e4m3fn `[..., in]` and float32 `[..., ceil(in / group)]`.
    """
    size = x.shape[-1]
    groups = -(-size // group)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, groups * group - size)]
    wide = jnp.pad(x.astype(jnp.float32), pad).reshape(*x.shape[:-1], groups, group)
    peak = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scales = jnp.where(peak == 0, jnp.float32(1), peak / jnp.float32(E4M3_MAX))
    values = jnp.clip(wide / scales, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    return values.reshape(*x.shape[:-1], -1)[..., :size], scales[..., 0]


def act_dequant(values: jax.Array, scales: jax.Array, group: int) -> jax.Array:
    """The float32 values that `act_quant` stands for."""
    return values.astype(jnp.float32) * jnp.repeat(scales, group, axis=-1)[..., : values.shape[-1]]


def rounded(x: jax.Array, weight: BlockFP8) -> jax.Array:
    """`x[..., in]` as the matmul with this weight sees it: through FP8 and back to float32."""
    return act_dequant(*act_quant(x, weight.activation_group), weight.activation_group)
