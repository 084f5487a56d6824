"""What attention remembers of a sequence: fixed-capacity buffers that are donated from step to step.

A layer that looks back a limited distance keeps a ring of about that many positions, whatever the capacity: position p
stands in slot `p mod length` until a later one takes its place.
"""

from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.parallel import CACHE

LayerCache = tuple[jax.Array, jax.Array]  # keys and values of one layer, [batch, heads, length, dim]

REWIND = 64  # positions more than its window that a ring keeps, so that a conversation can be taken back a little


@dataclass(frozen=True)
class CacheShape:
    """What one layer caches of a position: `heads` as placed over the mesh, and the sizes of a key and a value.

    window: how many positions back, the newest included, are ever looked at; None: all of them.
    """

    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def length(self, capacity: int) -> int:
        """Positions that the layer keeps of a sequence of up to `capacity`."""
        return capacity if self.window is None else min(capacity, self.window + REWIND)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, each `[batch, heads, length, dim]`, usually sharded over heads.

    `lengths[batch]` is the number of positions that hold a token. Positions from there on are never attended to, so
    they need no clearing: a padded prompt leaves rubbish there, which later tokens overwrite. `limits[batch]` is the
    length that each sequence may grow to, which decides about rotary frequencies (`Rope`). `capacity` is the most
    positions that a sequence may have.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    limits: jax.Array
    shapes: tuple[CacheShape, ...] = field(metadata={"static": True})
    capacity: int = field(metadata={"static": True})

    @classmethod
    def abstract(
        cls,
        shapes: tuple[CacheShape, ...],
        batch: int,
        capacity: int,
        dtype: jax.typing.DTypeLike,
        mesh: Mesh,
        spec: PartitionSpec = CACHE,
    ) -> Self:
        """The cache of these layers as shapes with shardings; `zeros` makes it."""
        sharded, copied = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec())

        def buffer(shape: CacheShape, dim: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch, shape.heads, shape.length(capacity), dim), dtype, sharding=sharded)

        number = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=copied)
        keys, values = (buffer(s, s.key_dim) for s in shapes), (buffer(s, s.value_dim) for s in shapes)
        arrays: dict[str, Any] = {"keys": tuple(keys), "values": tuple(values), "lengths": number, "limits": number}
        return cls(**arrays, shapes=shapes, capacity=capacity)

    def zeros(self) -> Self:
        """An empty cache of these shapes."""

        def zeros(leaf: jax.Array) -> jax.Array:
            return jnp.zeros(leaf.shape, leaf.dtype)

        return jax.jit(lambda: jax.tree.map(zeros, self), out_shardings=self.shardings)()

    @property
    def shardings(self) -> Self:
        """The same tree with the sharding of every array."""
        return jax.tree.map(lambda leaf: leaf.sharding, self)

    def can_rewind(self, length: int, to: int) -> bool:
        """Whether a sequence of `length` can go on from position `to`: whether all that is seen from there is kept."""
        rings = ((s.length(self.capacity), s.window) for s in self.shapes if s.window is not None)
        return all(length <= size or length - to <= size - window for size, window in rings)


def write(buffer: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """`new[batch, time, heads, dim]` into `buffer[batch, heads, length, dim]` from slot `start[batch]` on."""
    new = jnp.swapaxes(new, 1, 2).astype(buffer.dtype)
    if buffer.shape[0] == 1:  # a plain slice update; the batched one becomes a scatter, which is slower
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, start[0], axis=2)
    return jax.vmap(lambda b, n, s: jax.lax.dynamic_update_slice_in_dim(b, n, s, axis=1))(buffer, new, start)


def write_ring(ring: jax.Array, new: jax.Array, start: jax.Array, counts: jax.Array) -> jax.Array:
    """As `write`, of the first `counts[batch]` of the new positions those that are the newest of their slots."""
    newest = ring_positions(ring.shape[2], start + counts - 1)  # [batch, length]
    fresh = newest >= start[:, None]
    index = jnp.where(fresh, newest - start[:, None], 0)[:, None, :, None]
    taken = jnp.take_along_axis(jnp.swapaxes(new, 1, 2).astype(ring.dtype), index, axis=2)
    return jnp.where(fresh[:, None, :, None], taken, ring)


def ring_positions(length: int, last: jax.Array) -> jax.Array:
    """Which position stands in each slot after position `last[batch]`: int32 `[batch, length]`, below 0 where none."""
    last = last[:, None]
    return last - jnp.mod(last - jnp.arange(length, dtype=jnp.int32), length)
