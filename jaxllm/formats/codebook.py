"""Four-bit codes that index a table of 16 values, with a scale per group: bitsandbytes' NF4 and FP4."""

import math
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.formats.base import Axes, Cut, Leaf, Weight, repeated, static_field
from jaxllm.formats.ggml_bits import fields, flat

# bitsandbytes' tables. NF4's values cut a normal distribution into equally likely parts.
_NF4 = "-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334"
_NF4 += " -0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224"
_NF4 += " 0.44070982933044434 0.5626170039176941 0.7229568362236023 1"
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
TABLES = {"NF4": np.array(_NF4.split(), np.float32), "FP4": np.concatenate([_FP4, 0 - _FP4])}


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

    @classmethod
    def from_dense(cls, w: jax.Array, name: str, group: int = 64) -> Self:
        """Encode floats `[*batch, out, in]` with the table `name`, as bitsandbytes does: values divided by the group's
        largest magnitude become the nearest entry, and the lower one if two are equally near."""
        table = TABLES[name]
        order = np.argsort(table, stable=True)
        middles = (table[order][1:] + table[order][:-1]) / 2
        grid = jnp.asarray(w, jnp.float32).reshape(*w.shape[:-1], -1, group)
        scales = jnp.max(jnp.abs(grid), axis=-1)
        share = grid * (1 / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny))[..., None]
        place = sum((share > middle).astype(jnp.uint8) for middle in middles)
        codes = jnp.asarray(order.astype(np.uint8))[place].reshape(*w.shape[:-1], -1, 2)
        return cls(
            codes[..., 0] << 4 | codes[..., 1], scales, jnp.broadcast_to(table, (*w.shape[:-2], 16)), group, name
        )
