"""Texts through the model, in chunks of few sizes.

Shapes are rounded up to a few sizes (`bucket`), so that a new prompt length does not need a new program. A prompt is
padded on the right and, beyond CHUNK tokens, processed in several chunks. A cache's capacity is rounded up too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxllm.layers.cache import KVCache
from jaxllm.programs import Programs

CHUNK = 512  # the most tokens of a prompt that are processed at once
SMALLEST = 16  # a prompt is padded to at least this length
SMALLEST_CACHE = 512  # the smallest capacity of a cache, and the fewest of its positions that a prompt looks at


def bucket(n: int, smallest: int) -> int:
    """`n` rounded up to a power of two, at least `smallest`."""
    return max(smallest, 1 << max(n - 1, 0).bit_length())


def looked_at(end: int, capacity: int) -> int:
    """How many positions of a cache are read for tokens that stand before `end`: one of few numbers."""
    return min(bucket(end, SMALLEST_CACHE), capacity)


def cache_for(programs: Programs, batch: int, length: int) -> KVCache:
    """An empty cache for sequences of up to `length` tokens."""
    cache = programs.empty_cache(batch, bucket(length, SMALLEST))
    return replace(cache, limits=programs.replicate(np.full(batch, length, np.int32)))


@dataclass(frozen=True)
class Chunk:
    """The result for a part of a text that was processed at once."""

    hidden: jax.Array  # [batch, real or more, hidden]: padding follows the real tokens
    real: int
    cache: KVCache  # holds the text up to the end of this chunk


def hidden_states(programs: Programs, tokens: np.ndarray, cache: KVCache, start: int) -> Iterator[Chunk]:
    """Append `tokens[batch, time]` to sequences of `start` tokens, chunk by chunk. The cache is donated."""
    for begin in range(0, tokens.shape[1], CHUNK):
        chunk = tokens[:, begin : begin + CHUNK]
        batch, count = chunk.shape
        position, padded = start + begin, bucket(count, SMALLEST) if tokens.shape[1] > 1 else 1
        if position + padded > cache.capacity:  # XLA would shift a write that extends past the end
            padded = count
        chunk = np.pad(chunk, ((0, 0), (0, padded - count))).astype(np.int32)
        counts, window = np.full(batch, count, np.int32), looked_at(position + padded, cache.capacity)
        hidden, cache = programs.extend(cache, chunk, counts, window)
        yield Chunk(hidden, count, cache)
