"""What attention remembers of a sequence: fixed-capacity buffers that are donated from step to step."""

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.parallel import CACHE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, each `[batch, kv_heads, capacity, head_dim]`, usually cut over heads.

    `lengths[batch]` is the number of positions that hold a token. Positions from there on are never attended to, so
    they need no clearing: a padded prompt leaves rubbish there, which later tokens overwrite. `limits[batch]` is the
    length that each sequence may grow to, which decides about rotary frequencies (`Rope`).
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    limits: jax.Array

    @classmethod
    def zeros(
        cls,
        shapes: list[tuple[int, int, int]],
        batch: int,
        capacity: int,
        dtype: jax.typing.DTypeLike,
        mesh: Mesh,
        spec: PartitionSpec = CACHE,
    ) -> Self:
        """An empty cache for layers of `(kv_heads, key_dim, value_dim)`, kv_heads as placed over the mesh."""

        def make() -> Self:
            keys = tuple(jnp.zeros((batch, heads, capacity, dim), dtype) for heads, dim, _ in shapes)
            values = tuple(jnp.zeros((batch, heads, capacity, dim), dtype) for heads, _, dim in shapes)
            return cls(keys, values, jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32))

        return jax.jit(make, out_shardings=cls.shardings(len(shapes), mesh, spec))()

    @classmethod
    def shardings(cls, layers: int, mesh: Mesh, spec: PartitionSpec = CACHE) -> Self:
        """The same tree with the sharding of every array."""
        cut, whole = (NamedSharding(mesh, spec),) * layers, NamedSharding(mesh, PartitionSpec())
        return cls(cut, cut, whole, whole)

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]


def write(buffer: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """`new[batch, time, heads, dim]` into `buffer[batch, heads, capacity, dim]` from position `start[batch]` on."""
    new = jnp.swapaxes(new, 1, 2).astype(buffer.dtype)
    if buffer.shape[0] == 1:  # a plain slice update; the batched one becomes a scatter, which is slower
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, start[0], axis=2)
    return jax.vmap(lambda b, n, s: jax.lax.dynamic_update_slice_in_dim(b, n, s, axis=1))(buffer, new, start)
