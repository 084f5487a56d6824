"""Matrices of low rank, and weights that an adapter adds one to (LoRA: Hu et al., 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.formats.base import Axes, Cut, Leaf, Weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(Weight):
    """The matrix `b @ diag(scale) @ a`, which is never stored as such.

    As a `Weight` it is shared out over a mesh like any other matrix: b with the rows, a with the columns.

    a: `[*batch, rank, in]`.
    b: `[*batch, out, rank]`.
    scale: float32 `[*batch, rank]`. Adapters that are summed stand side by side along the rank, each with its own.
    """

    a: Leaf
    b: Leaf
    scale: Leaf

    @property
    def format(self) -> str:
        return f"rank {self.rank}"

    @property
    def axes(self) -> dict[str, Axes]:
        return {"a": (None, Cut("in")), "b": (Cut("out"), None), "scale": (None,)}

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.b.shape[:-1], self.a.shape[-1])

    @property
    def rank(self) -> int:
        return self.scale.shape[-1]

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        a, b = (jnp.asarray(leaf, jnp.float32) for leaf in (self.a, self.b))
        return jnp.matmul(b * self.scale[..., None, :], a, precision="highest").astype(dtype)

    @classmethod
    def joined(cls, parts: Sequence[Self], rank: int) -> Self:
        """The sum of matrices on the host, as one of this rank, which is at least the sum of theirs."""
        free = rank - sum(part.rank for part in parts)

        def along(axis: int, leaves: list[np.ndarray]) -> np.ndarray:
            empty = list(leaves[0].shape)
            empty[axis] = free
            return np.concatenate([*leaves, np.zeros(empty, np.float32)], axis, dtype=np.float32)

        return cls(
            along(-2, [part.a for part in parts]),
            along(-1, [part.b for part in parts]),
            along(-1, [part.scale for part in parts]),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted(Weight):
    """A weight of any format, which stays as it is, and what adapters add to it.

    Matmuls treat the two on their own (`kernels.adapted`): the base with its own kernels and roundings, then the term
    of low rank, before the sum over devices. So both are summed in one collective.
    """

    base: Weight
    delta: LowRank

    @property
    def format(self) -> str:
        return f"{self.base.format} + {self.delta.format}"

    @property
    def axes(self) -> dict[str, Axes]:
        return self.inner_axes()

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        return (self.base.dequantize() + self.delta.dequantize()).astype(dtype)

    def add_delta(self, delta: jax.Array) -> Self:
        return replace(self, base=self.base.add_delta(delta))


def base_of(weight: Weight) -> Weight:
    """The weight without what adapters add to it."""
    return weight.base if isinstance(weight, Adapted) else weight
