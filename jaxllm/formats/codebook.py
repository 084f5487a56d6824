"""Four-bit codes that index a table of 16 values, with a scale per group: bitsandbytes' NF4 and FP4."""

import math
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp

from jaxllm.formats.base import Axes, Cut, Leaf, Weight, repeated, static_field
from jaxllm.formats.ggml_bits import fields, flat


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Codebook(Weight):
    """`W[o, i] = table[code of o, i] * scales[o, i // group]`.

    Attributes:
        codes: uint8 `[*batch, out, in / 2]`, the even column in the high nibble.
        scales: float32 `[*batch, out, in / group]`, the largest magnitudes of the groups.
        table: float32 `[*batch, 16]`.
        name: "NF4" or "FP4".
    """

    codes: Leaf
    scales: Leaf
    table: Leaf
    group: int = static_field()
    name: str = static_field()

    @property
    def format(self) -> str:
        return self.name

    @property
    def axes(self) -> dict[str, Axes]:
        return {"codes": (Cut("out"), Cut("in", 2)), "scales": (Cut("out"), Cut("in", self.group)), "table": (None,)}

    def granularity(self, dim: str) -> int:
        return 2 if dim == "in" else 1

    def refined(self, out: int, in_: int) -> Self:
        """The same matrix with smaller groups: each scale is repeated for the parts of its group."""
        group = math.gcd(self.group, in_)
        scales = repeated(self.scales, self.group // group, -1, self.shape[-1] // group)
        return replace(self, scales=scales, group=group)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        codes = flat(fields(self.codes, 4, 2)[..., ::-1], 2)
        table = self.table if self.table.ndim == 1 else self.table[..., None, :]
        table = jnp.broadcast_to(table, (*codes.shape[:-1], 16))
        values = jnp.take_along_axis(table, codes.astype(jnp.int32), axis=-1)
        return (values * jnp.repeat(self.scales, self.group, axis=-1)).astype(dtype)
