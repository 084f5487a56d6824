"""From prompts to tokens: the prompt in pieces, then one step after another.

Shapes come in few sizes (`bucket`), so that a new prompt length is not a new program: a prompt is padded on the right
and, beyond CHUNK tokens, fed in pieces; a cache has the capacity that the call needs, rounded up.
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
SMALLEST = 16  # the least that a prompt is padded to
SMALLEST_CACHE = 256


def bucket(n: int, smallest: int) -> int:
    """The power of two that `n` is rounded up to, at least `smallest`."""
    return max(smallest, 1 << max(n - 1, 0).bit_length())


@dataclass
class Memory:
    """The cache of a conversation, kept from one turn to the next: only what is new has to be processed again."""

    tokens: list[int] = field(default_factory=list)  # what the cache holds
    cache: KVCache | None = None

    def resume(self, prompt: Sequence[int], capacity: int) -> tuple[KVCache | None, int]:
        """The kept cache and how many tokens of `prompt` it covers, or (None, 0) where it is of no use."""
        cache, self.cache = self.cache, None  # it will be donated
        if cache is None or cache.capacity < capacity:
            return None, 0
        same = 0
        while same < min(len(self.tokens), len(prompt) - 1) and self.tokens[same] == prompt[same]:
            same += 1
        padded_end = same + (len(prompt) - same) // CHUNK * CHUNK + bucket((len(prompt) - same) % CHUNK, SMALLEST)
        return cache, same if padded_end <= cache.capacity else same // CHUNK * CHUNK


def pieces(prompts: Sequence[Sequence[int]], start: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Prompts from position `start` on: padded `tokens[batch, time]`, how many are real, and their first position."""
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
    cache = replace(cache, lengths=programs.whole(lengths), limits=programs.whole(np.array(limits, np.int32)))
    last = None
    for tokens, counts, position in pieces(prompts, start):
        window = min(bucket(position + tokens.shape[1], SMALLEST), cache.capacity)
        hidden, cache = programs.extend(cache, tokens, counts, window)
        newest = hidden[np.arange(len(prompts)), np.maximum(counts - 1, 0)]
        last = newest if last is None else jnp.where(counts[:, None] > 0, newest, last)
    return programs.head(last), cache


def generate_tokens(
    programs: Programs,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    seed: int = 0,
    memory: Memory | None = None,
) -> Iterator[np.ndarray]:
    """Token ids int32 `[batch]`, one step after another, until `max_new_tokens` or until the caller stops asking.

    Each prompt draws from its own random stream, so that its answer does not depend on its neighbours. `memory` is for
    a batch of one.
    """
    rows = [*prompts, *[[0]] * (bucket(len(prompts), 1) - len(prompts))]  # few batch sizes, few programs
    capacity = bucket(max(map(len, rows)) + max_new_tokens, SMALLEST_CACHE)
    cache, start = memory.resume(rows[0], capacity) if memory else (None, 0)
    cache = cache or programs.empty_cache(len(rows), capacity)
    # A conversation is told its cache's capacity: what is kept from turn to turn has to stay valid.
    limits = [cache.capacity if memory else len(row) + max_new_tokens for row in rows]
    logits, cache = prefill(programs, rows, cache, limits, start)
    state = programs.start(logits, rows, seed, sampler)
    held = list(rows[0])
    for remaining in reversed(range(max_new_tokens)):
        if memory is not None:
            memory.tokens, memory.cache = list(held), cache
        tokens = np.asarray(state.token)
        yield tokens[: len(prompts)]
        if remaining:
            held.append(int(tokens[0]))
            cache, state = programs.decode_step(cache, state, sampler)
