"""Activations rounded as a whole row at a time, for matrices with one scale for a row or for all of it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.formats.base import Weight
from jaxllm.formats.scaled import E4M3_MAX, Scaled

LIMITS = {"float8_e4m3fn": E4M3_MAX, "int8": 127.0}


Peak = Callable[[jax.Array], jax.Array]


def whole(values: jax.Array) -> jax.Array:
    return values


def seen(
    x: jax.Array, weight: Weight, peak: Peak = whole, of_rows: Peak = whole, columns: Peak | None = None
) -> jax.Array:
    """`x[..., in]` as a matmul with this weight sees it: as it is, or, where the weight asks for it, rounded to the
    weight's own dtype and back (float32).

    The product of what this gives with the decoded weight is what products of codes, scaled, come to. LLM.int8
    (Dettmers et al., 2022) leaves columns alone in which any value reaches its threshold; a row's scale is then that of
    its values below. Gradients pass as if nothing had been rounded.

    Args:
        peak: given the largest magnitudes of the rows here, those of whole rows, if `in` is cut.
        of_rows: given a stack's input scales, those of the rows of x.
        columns: given whether each value reaches the threshold, whether one of its column does, among the rows that
            meet the same matrix; by default all.
    """
    if not isinstance(weight, Scaled) or weight.activation_group != -1:
        return x
    given, limit = x.astype(jnp.float32), LIMITS[weight.values.dtype.name]
    wide = lax.stop_gradient(given)
    size = jnp.abs(wide)
    outlier = size >= weight.threshold if weight.threshold else jnp.zeros(wide.shape, bool)
    if weight.input_scale is not None:
        scale = of_rows(weight.input_scale)
    else:
        largest = peak(jnp.max(jnp.where(outlier, 0.0, size), axis=-1, keepdims=True))
        scale = jnp.where(largest == 0, 1.0, largest / limit)
    codes = jnp.clip(wide / scale, -limit, limit)
    codes = jnp.round(codes) if weight.values.dtype == jnp.int8 else codes.astype(weight.values.dtype)
    alone = columns(outlier) if columns else jnp.any(outlier, axis=tuple(range(x.ndim - 1)), keepdims=True)
    return jnp.where(alone, wide, codes.astype(jnp.float32) * scale) + (given - wide)
