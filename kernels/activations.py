"""Activations rounded as a whole row at a time, for matrices with one scale for a row or for all of it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.formats.base import Weight
from jaxllm.formats.fp8 import E4M3_MAX, BlockFP8

LIMITS = {"float8_e4m3fn": E4M3_MAX, "int8": 127.0}


Peak = Callable[[jax.Array], jax.Array]


def whole(values: jax.Array) -> jax.Array:
    return values


def seen(x: jax.Array, weight: Weight, peak: Peak = whole, of_rows: Peak = whole) -> jax.Array:
    """`x[..., in]` as a matmul with this weight sees it: as it is, or, where the weight asks for it, rounded to the
    weight's own dtype and back (float32).

    The product of what this gives with the decoded weight is what products of codes, scaled, come to. LLM.int8
    (Dettmers et al., 2022) leaves columns alone in which any value reaches its threshold; a row's scale is then that of
    its values below.

    Args:
        peak: given the largest magnitudes of the rows here, those of whole rows, if `in` is cut.
        of_rows: given a stack's input scales, those of the rows of x.
    """
    if not isinstance(weight, BlockFP8) or weight.activation_group != -1:
        return x
    wide, limit = x.astype(jnp.float32), LIMITS[weight.values.dtype.name]
    size = jnp.abs(wide)
    inlier = size < weight.threshold if weight.threshold else jnp.ones(wide.shape, bool)
    if weight.input_scale is not None:
        scale = of_rows(weight.input_scale)
    else:
        largest = peak(jnp.max(jnp.where(inlier, size, 0.0), axis=-1, keepdims=True))
        scale = jnp.where(largest == 0, 1.0, largest / limit)
    codes = jnp.clip(wide / scale, -limit, limit)
    codes = jnp.round(codes) if weight.values.dtype == jnp.int8 else codes.astype(weight.values.dtype)
    kept = jnp.all(inlier, axis=tuple(range(x.ndim - 1)), keepdims=True)  # columns without outliers
    return jnp.where(kept, codes.astype(jnp.float32) * scale, wide)
