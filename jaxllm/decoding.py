"""From prompts to tokens: the prompt in chunks, then one decode step after another.

Shapes are rounded up to a few sizes (`bucket`), so that a new prompt length does not need a new program. A prompt is
padded on the right and, beyond CHUNK tokens, processed in several chunks. A cache's capacity is rounded up too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.layers.cache import KVCache
from jaxllm.programs import Programs
from jaxllm.sampling import Sampler

CHUNK = 512  # the most tokens of a prompt that are processed at once
SMALLEST = 16  # a prompt is padded to at least this length
SMALLEST_CACHE = 256  # the smallest capacity of a cache


def bucket(n: int, smallest: int) -> int:
    """`n` rounded up to a power of two, at least `smallest`."""
    return max(smallest, 1 << max(n - 1, 0).bit_length())


@dataclass
class Memory:
    """The cache of a conversation, kept from one turn to the next so that only new tokens have to be processed.

    Attributes:
        tokens: the tokens whose keys and values `cache` holds.
        cache: None before the first turn, and while an answer is being generated (its arrays are donated then).
        reused: how many tokens of the latest prompt were found in the cache.
        version: of the parameters that the cache was computed with, see `Programs.version`.
    """

    tokens: list[int] = field(default_factory=list)
    cache: KVCache | None = None
    reused: int = 0
    version: object = None

    def resume(self, prompt: Sequence[int], capacity: int, version: object) -> KVCache | None:
        """Take the cache if its capacity suffices and the parameters are still the same, and set `reused` to how many
        tokens of `prompt` it covers."""
        cache, self.cache, self.reused = self.cache, None, 0
        same_parameters, self.version = self.version is version, version
        if cache is None or cache.capacity < capacity or not same_parameters:
            return None
        same = 0
        while same < min(len(self.tokens), len(prompt) - 1) and self.tokens[same] == prompt[same]:
            same += 1
        # The last chunk is padded, and the padding has to fit too.
        padded_end = same + (len(prompt) - same) // CHUNK * CHUNK + bucket((len(prompt) - same) % CHUNK, SMALLEST)
        start = same if padded_end <= cache.capacity else same // CHUNK * CHUNK
        self.reused = start if cache.can_rewind(len(self.tokens), start) else 0
        return cache


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
        window = min(bucket(position + padded, SMALLEST), cache.capacity)
        hidden, cache = programs.extend(cache, chunk, np.full(batch, count, np.int32), window)
        yield Chunk(hidden, count, cache)


def chunks(prompts: Sequence[Sequence[int]], start: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Chunks of prompts from `start` on: padded `tokens[batch, time]`, how many are real, and their first position."""
    longest = max(map(len, prompts))
    while start < longest:
        time = min(bucket(longest - start, SMALLEST), CHUNK)
        tokens = np.zeros((len(prompts), time), np.int32)
        counts = np.array([np.clip(len(prompt) - start, 0, time) for prompt in prompts], np.int32)
        for row, prompt, count in zip(tokens, prompts, counts, strict=True):
            row[:count] = prompt[start : start + count]
        yield tokens, counts, start
        start += time


def prefill(
    programs: Programs, prompts: Sequence[Sequence[int]], cache: KVCache, limits: Sequence[int], start: int = 0
) -> tuple[jax.Array, KVCache]:
    """Logits `[batch, vocab]` after the last token of each prompt, and the cache that holds them all.

    Positions before `start` must be in the cache already. `limits` are the lengths that the sequences may grow to.
    """
    lengths = np.full(len(prompts), start, np.int32)
    cache = replace(cache, lengths=programs.replicate(lengths), limits=programs.replicate(np.array(limits, np.int32)))
    last = None
    for tokens, counts, position in chunks(prompts, start):
        window = min(bucket(position + tokens.shape[1], SMALLEST), cache.capacity)
        hidden, cache = programs.extend(cache, tokens, counts, window)
        newest = hidden[np.arange(len(prompts)), np.maximum(counts - 1, 0)]
        last = newest if last is None else jnp.where(counts[:, None] > 0, newest, last)
    assert last is not None  # prompts are not empty
    return programs.head(last), cache


def generate_tokens(
    programs: Programs,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    seed: int = 0,
    memory: Memory | None = None,
    first_stream: int = 0,
) -> Iterator[np.ndarray]:
    """Yield token ids int32 `[batch]`, one step after another, until `max_new_tokens` or until the caller stops.

    Where programs run ahead, each step is started before the previous step's token is read, so that the device never
    waits for Python (mlx-lm's `async_eval`). A caller that stops early wastes one step. The first token is yielded
    before the decode step is compiled.

    Args:
        memory: a conversation's memory, for a batch of one.
        first_stream: number of the first prompt's random stream. Every prompt has its own, so that its answer does not
            depend on its neighbours.
    """
    rows = [*prompts, *[[0]] * (bucket(len(prompts), 1) - len(prompts))]  # few batch sizes, few programs
    capacity = bucket(max(map(len, rows)) + max_new_tokens, SMALLEST_CACHE)
    cache = memory.resume(rows[0], capacity, programs.version) if memory else None
    start = memory.reused if memory else 0
    cache = cache or programs.empty_cache(len(rows), capacity)
    # A conversation uses its cache's capacity as the limit: the entries kept from turn to turn have to stay valid.
    limits = [cache.capacity if memory else len(row) + max_new_tokens for row in rows]
    logits, cache = prefill(programs, rows, cache, limits, start)
    state = programs.start(logits, rows, seed, first_stream, sampler)
    held = list(rows[0])
    for index in range(max_new_tokens):
        newest, more = state.token, index + 1 < max_new_tokens
        ahead = more and programs.runs_ahead and index > 0
        if ahead:
            cache, state = programs.decode_step(cache, state, sampler)
        tokens = np.asarray(newest)
        if memory is not None:
            memory.tokens, memory.cache = [*held, int(tokens[0])] if ahead else list(held), cache
        yield tokens[: len(prompts)]
        if memory is not None and more:
            memory.cache = None  # so that an interrupted step leaves no donated arrays here
        held.append(int(tokens[0]))
        if more and not ahead:
            cache, state = programs.decode_step(cache, state, sampler)
