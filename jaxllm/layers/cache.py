"""The key/value cache: fixed-capacity buffers that are donated from step to step.

A layer with a sliding window keeps a ring of about that many positions, whatever the capacity: position p is stored in
slot `p mod length` until a later position overwrites it.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.kernels.coded import Buffer, stored
from jaxllm.parallel import CACHE, of_batch

LayerCache = tuple[Buffer, Buffer]  # keys and values of one layer, [batch, heads, length, dim]

REWIND = 64  # positions that a ring keeps beyond its window, so that a conversation can go back a little


@dataclass(frozen=True)
class CacheShape:
    """What one layer caches per position: `heads` as placed on the mesh, and the sizes of a key and a value.

    window: how many positions, the newest included, are ever attended to; None: all of them.
    latent: whether the keys serve as values too, and what is cached as values is what they go on with.
    """

    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    latent: bool = False

    def length(self, capacity: int) -> int:
        """How many positions the layer keeps of a sequence of up to `capacity` tokens."""
        return capacity if self.window is None else min(capacity, self.window + REWIND)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, each `[batch, heads, length, dim]`, usually sharded over heads; those in 8 bits
    are `Coded`.

    `lengths[batch]` is the number of positions that hold a token. Later positions are never attended to, so they need
    no clearing: a padded prompt leaves garbage there, which later tokens overwrite. `limits[batch]` is the length that
    each sequence may grow to, which decides its rotary frequencies (`Rope`). `capacity` is the largest number of
    positions that a sequence may have.
    """

    keys: tuple[Buffer, ...]
    values: tuple[Buffer, ...]
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
        """The cache of these layers as shapes with shardings; `zeros` allocates it."""
        sharded, copied = NamedSharding(mesh, of_batch(spec, batch, mesh)), NamedSharding(mesh, PartitionSpec())

        @functools.cache  # most layers' are alike
        def buffer(shape: CacheShape, dim: int) -> Any:
            numbers = jax.ShapeDtypeStruct((batch, shape.heads, shape.length(capacity), dim), jnp.float32)
            held = jax.eval_shape(lambda x: stored(x, dtype), numbers)
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharded), held)

        number = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=copied)
        keys, values = (buffer(s, s.key_dim) for s in shapes), (buffer(s, s.value_dim) for s in shapes)
        arrays: dict[str, Any] = {"keys": tuple(keys), "values": tuple(values), "lengths": number, "limits": number}
        return cls(**arrays, shapes=shapes, capacity=capacity)

    def zeros(self) -> Self:
        """An empty cache of these shapes; compiled with `shardings`, it lies there."""
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self)

    def copied(self, source: jax.Array, target: jax.Array) -> Self:
        """With what is held of sequence `source` in the place of `target`; lengths and limits stay."""
        keys, values = jax.tree.map(lambda x: x.at[target].set(x[source]), (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    @property
    def shardings(self) -> Self:
        """The same tree with the sharding of every array."""
        return jax.tree.map(lambda leaf: leaf.sharding, self)

    def can_rewind(self, length: int, to: int) -> bool:
        """Whether a sequence of `length` can continue from position `to`: whether all it would attend to is kept."""
        rings = ((s.length(self.capacity), s.window) for s in self.shapes if s.window is not None)
        return all(length <= size or length - to <= size - window for size, window in rings)


def as_held(new: jax.Array, buffer: Buffer) -> Buffer:
    """`new[batch, time, heads, dim]` as `buffer` would hold it: `[batch, heads, time, dim]`."""
    return stored(jnp.swapaxes(new, 1, 2), buffer.dtype)


def write[B: Buffer](buffer: B, new: jax.Array, start: jax.Array, rows: jax.Array | None = None) -> B:
    """Write `new[batch, time, heads, dim]` into `buffer[sequences, heads, length, dim]` from slot `start[batch]` on.

    `rows[batch]` are the sequences that are written to; None: each row of `new` is a sequence.
    """
    return jax.tree.map(lambda old, x: _write(old, x, start, rows), buffer, as_held(new, buffer))


def write_ring[B: Buffer](
    ring: B, new: jax.Array, start: jax.Array, counts: jax.Array, rows: jax.Array | None = None
) -> B:
    """Like `write`, for a ring: of the first `counts[batch]` new positions, writes the newest of each slot."""
    return jax.tree.map(lambda old, x: _write_ring(old, x, start, counts, rows), ring, as_held(new, ring))


def _write(buffer: jax.Array, new: jax.Array, start: jax.Array, rows: jax.Array | None) -> jax.Array:
    if rows is None and buffer.shape[0] == 1:  # a plain slice update; the batched one becomes a scatter, slower
        return jax.lax.dynamic_update_slice_in_dim(buffer, new, start[0], axis=2)
    if rows is None:
        return jax.vmap(lambda b, n, s: jax.lax.dynamic_update_slice_in_dim(b, n, s, axis=1))(buffer, new, start)
    for i in range(new.shape[0]):
        buffer = jax.lax.dynamic_update_slice(buffer, new[i : i + 1], (rows[i], 0, start[i], 0))
    return buffer


def _write_ring(
    ring: jax.Array, new: jax.Array, start: jax.Array, counts: jax.Array, rows: jax.Array | None
) -> jax.Array:
    if rows is not None:
        return _write(ring, _write_ring(ring[rows], new, start, counts, None), jnp.zeros_like(start), rows)
    newest = ring_positions(ring.shape[2], start + counts - 1)  # [batch, length]
    fresh = newest >= start[:, None]
    index = jnp.where(fresh, newest - start[:, None], 0)[:, None, :, None]
    return jnp.where(fresh[:, None, :, None], jnp.take_along_axis(new, index, axis=2), ring)


def ring_positions(length: int, last: jax.Array) -> jax.Array:
    """The position in each slot after `last[batch]` is written: int32 `[batch, length]`, negative for empty slots."""
    last = last[:, None]
    return last - jnp.mod(last - jnp.arange(length, dtype=jnp.int32), length)
