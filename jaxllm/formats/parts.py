"""What most formats have in common: a code for each weight, and a scale, perhaps an offset, for each group of codes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats.base import Leaf, static_field
from jaxllm.formats.ggml_bits import f32, lookup, scaled


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Levels:
    """One number for each group of a row: `fine * coarse`, or `fine / coarse`.

    Arrays of float16 are held as their bits, uint16, because TPUs have no float16.

    Attributes:
        fine: a number for each group, of any dtype.
        coarse: numbers that several neighbouring entries of `fine` share, evenly; None: 1.
        divides: whether fine is divided by coarse.
    """

    fine: Leaf
    coarse: Leaf | None = None
    divides: bool = static_field(False)

    def values(self) -> jax.Array:
        """float32, of the shape of `fine`. (The last axis of `coarse` divides that of `fine`.)"""
        fine = numbers(self.fine)
        if self.coarse is None:
            return fine
        coarse = numbers(self.coarse)
        shared = jnp.repeat(coarse, fine.shape[-1] // coarse.shape[-1], axis=-1)
        # XLA would multiply by the reciprocal of a single number; this selection hides that it is one.
        return fine / jnp.where(jnp.isnan(fine), fine, shared) if self.divides else fine * shared


def numbers(leaf: jax.Array) -> jax.Array:
    """An array of `Levels` as float32."""
    held = lax.bitcast_convert_type(leaf, jnp.float16) if leaf.dtype == jnp.uint16 else leaf
    return held.astype(jnp.float32)


def held(values: jax.Array) -> jax.Array:
    """Floats as an array of `Levels`."""
    return lax.bitcast_convert_type(values, jnp.uint16) if values.dtype == jnp.float16 else values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Parts:
    """Weights taken apart: `value(code) * scale + offset`, where a value is `code - zero`, or `table[code]`.

    Attributes:
        codes: uint8 `[..., weights]`, in the order of the weights.
        scales: one `[..., groups]` for every `weights / groups` weights.
        bits: of a code.
        zero: what is subtracted from codes.
        zeros: the same for each group, or None.
        offsets: shaped like the scales, or None.
        table: float32 `[..., 16]`, or None.
    """

    codes: Leaf
    scales: Levels
    bits: int = static_field()
    zero: float = static_field(0)
    zeros: Leaf | None = None
    offsets: Levels | None = None
    table: Leaf | None = None

    def values(self) -> jax.Array:
        """float32 `[..., weights]`, of parts without `zeros`, whose table is a constant."""
        numbers = f32(self.codes) - self.zero if self.table is None else lookup(np.asarray(self.table), self.codes)
        products = scaled(self.scales.values(), numbers)
        if self.offsets is None:
            return products
        offsets = self.offsets.values()
        return products + jnp.repeat(offsets, products.shape[-1] // offsets.shape[-1], axis=-1)
