"""The two compiled functions behind every answer, `extend` and `decode_step`, and the loop around them.

Shapes come in few sizes (`bucket`), so that a new prompt length is not a new program: a prompt is padded on the right
and, beyond CHUNK tokens, fed in pieces; a cache has the capacity that the call needs, rounded up. The model's state is
flattened once (`Compiled`), because flattening NNX variables at every step costs more than many a step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.layers.cache import KVCache
from jaxllm.sampling import Sampler

CHUNK = 512  # the most tokens of a prompt that are processed at once
SMALLEST = 16  # the least that a prompt is padded to
SMALLEST_CACHE = 256


def bucket(n: int, smallest: int) -> int:
    """The power of two that `n` is rounded up to, at least `smallest`."""
    return max(smallest, 1 << max(n - 1, 0).bit_length())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a decode step hands to the next one."""

    token: jax.Array  # int32 [batch], the newest token, not yet in the cache
    seen: jax.Array  # bool [batch, vocab], tokens of the prompt and the answer so far
    keys: jax.Array  # one random key per row


class Compiled:
    """A model as compiled functions over its flat leaves."""

    def __init__(self, model: nnx.Module, mesh: Mesh, dtype: jax.typing.DTypeLike) -> None:
        graph, state = nnx.split(model)
        self.leaves, tree = jax.tree.flatten(state)
        self.mesh, self.dtype = mesh, jnp.dtype(dtype)
        self._model = model

        def merge(leaves: list[jax.Array]) -> nnx.Module:
            return nnx.merge(graph, jax.tree.unflatten(tree, leaves))

        def extend(
            leaves: list[jax.Array], cache: KVCache, tokens: jax.Array, counts: jax.Array, window: int
        ) -> tuple[jax.Array, KVCache]:
            return merge(leaves)(tokens, cache, counts, window, self.dtype)

        def head(leaves: list[jax.Array], hidden: jax.Array) -> jax.Array:
            return merge(leaves).logits(hidden)

        def decode_step(
            leaves: list[jax.Array], cache: KVCache, state: State, sampler: Sampler
        ) -> tuple[KVCache, State]:
            model = merge(leaves)
            ones = jnp.ones_like(cache.lengths)
            hidden, cache = model(state.token[:, None], cache, ones, cache.capacity, self.dtype)
            return cache, draw(model.logits(hidden[:, 0]), state, sampler)

        self._extend = jax.jit(extend, static_argnames="window", donate_argnames="cache")
        self._head = jax.jit(head)
        self._decode_step = jax.jit(decode_step, donate_argnames=("cache", "state"))
        self._draw = jax.jit(draw)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        return self._model.empty_cache(batch, capacity, self.dtype, self.mesh)

    def extend(self, cache: KVCache, tokens: np.ndarray, counts: np.ndarray, window: int) -> tuple[jax.Array, KVCache]:
        """Hidden states `[batch, time, hidden]` of `tokens[batch, time]`, of which `counts[batch]` are real."""
        with jax.set_mesh(self.mesh):
            return self._extend(self.leaves, cache, tokens, counts, window=window)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 `[..., vocab]`."""
        with jax.set_mesh(self.mesh):
            return self._head(self.leaves, hidden)

    def decode_step(self, cache: KVCache, state: State, sampler: Sampler) -> tuple[KVCache, State]:
        """Put the newest token into the cache and draw the next one. Returns when it is there.

        Emulated devices share one pool of threads; steps dispatched without waiting starve each other's collectives.
        """
        with jax.set_mesh(self.mesh):
            cache, state = self._decode_step(self.leaves, cache, state, sampler)
            return cache, jax.block_until_ready(state)

    def start(self, logits: jax.Array, prompts: Sequence[Sequence[int]], seed: int, sampler: Sampler) -> State:
        """Draw the first token after each prompt from logits `[batch, vocab]`."""
        seen = np.zeros(logits.shape, bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = True
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(prompts)))
        with jax.set_mesh(self.mesh):
            return self._draw(logits, State(jnp.zeros(len(prompts), jnp.int32), seen, keys), sampler)


def draw(logits: jax.Array, state: State, sampler: Sampler) -> State:
    """The state with a next token drawn from `logits[batch, vocab]`."""
    keys = jax.vmap(jax.random.split)(state.keys)
    token = sampler(logits, state.seen, keys[:, 0])
    seen = state.seen.at[jnp.arange(token.shape[0]), token].set(True)
    return State(token, seen, keys[:, 1])


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
    compiled: Compiled, prompts: Sequence[Sequence[int]], cache: KVCache, start: int = 0
) -> tuple[jax.Array, KVCache]:
    """Logits `[batch, vocab]` after the last token of each prompt, and the cache that holds them all.

    Positions before `start` must be in the cache already.
    """
    cache = replace(cache, lengths=jnp.full((len(prompts),), start, jnp.int32))
    last = None
    for tokens, counts, position in pieces(prompts, start):
        window = min(bucket(position + tokens.shape[1], SMALLEST), cache.capacity)
        hidden, cache = compiled.extend(cache, tokens, counts, window)
        newest = hidden[np.arange(len(prompts)), np.maximum(counts - 1, 0)]
        last = newest if last is None else jnp.where(counts[:, None] > 0, newest, last)
    return compiled.head(last), cache


def generate_tokens(
    compiled: Compiled,
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
    logits, cache = prefill(compiled, rows, cache or compiled.empty_cache(len(rows), capacity), start)
    state = compiled.start(logits, rows, seed, sampler)
    held = list(rows[0])
    for remaining in reversed(range(max_new_tokens)):
        if memory is not None:
            memory.tokens, memory.cache = list(held), cache
        tokens = np.asarray(state.token)
        yield tokens[: len(prompts)]
        if remaining:
            held.append(int(tokens[0]))
            cache, state = compiled.decode_step(cache, state, sampler)
