"""Plain floating-point weights, and the compute copy that other formats are dequantized into."""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp

from jaxllm.formats.base import Axes, Cut, Leaf, Weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense(Weight):
    """An unquantized float matrix: `values` `[*batch, out, in]`, or a vector `[out]`, of any floating dtype."""

    values: Leaf

    @property
    def format(self) -> str:
        return self.values.dtype.name

    @property
    def axes(self) -> dict[str, Axes]:
        return {"values": (Cut("out"), Cut("in"))[: self.values.ndim]}

    def swapped(self) -> Self:
        """The transpose."""
        return replace(self, values=self.values.swapaxes(-1, -2))

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        return jnp.asarray(self.values, dtype)

    @classmethod
    def from_dense(cls, w: jax.Array, dtype: jax.typing.DTypeLike) -> Self:
        return cls(jnp.asarray(w, dtype))

    def like(self, w: jax.Array) -> Self:
        return self.from_dense(w, self.values.dtype)
