"""A model as compiled programs over flat arrays.

The model's state is flattened once, because flattening NNX variables at every step costs more than many a step. Each
program is compiled explicitly, once for each shape it is called with: nothing can retrace behind our back, the time it
takes is known apart from the time of running, and the compiled text is there to be looked at.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.layers.cache import KVCache
from jaxllm.sampling import Sampler


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a decode step hands to the next one."""

    token: jax.Array  # int32 [batch], the newest token, not yet in the cache
    seen: jax.Array  # bool [batch, vocab], tokens of the prompt and the answer so far
    keys: jax.Array  # one random key per row


class Programs:
    """The compiled functions behind every answer.

    Attributes:
        compile_seconds: time spent on compiling (or on finding the result in the compilation cache) so far.
        compiled: the programs by what they were compiled for.
    """

    def __init__(self, model: nnx.Module, mesh: Mesh, dtype: jax.typing.DTypeLike) -> None:
        graph, state = nnx.split(model)
        self.leaves, tree = jax.tree.flatten(state)
        self.mesh, self.dtype, self._model = mesh, jnp.dtype(dtype), model
        self.compile_seconds = 0.0
        self.compiled: dict[Hashable, jax.stages.Compiled] = {}

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
            return cache, _draw(model.logits(hidden[:, 0]), state, sampler)

        whole = NamedSharding(mesh, PartitionSpec())
        cache = model.cache_shardings(mesh)
        self._extend = jax.jit(extend, static_argnames="window", donate_argnames="cache", out_shardings=(whole, cache))
        self._head = jax.jit(head, out_shardings=whole)
        self._decode_step = jax.jit(decode_step, donate_argnames=("cache", "state"), out_shardings=(cache, whole))
        self._draw = jax.jit(_draw, out_shardings=whole)

    def whole(self, value: np.ndarray) -> jax.Array:
        """An array, whole on every device."""
        return jax.device_put(value, NamedSharding(self.mesh, PartitionSpec()))

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        return self._model.empty_cache(batch, capacity, self.dtype, self.mesh)

    def extend(self, cache: KVCache, tokens: np.ndarray, counts: np.ndarray, window: int) -> tuple[jax.Array, KVCache]:
        """Hidden states `[batch, time, hidden]` of `tokens[batch, time]`, of which `counts[batch]` are real."""
        key = "extend", tokens.shape, cache.capacity, window
        args = self.leaves, cache, self.whole(tokens), self.whole(counts)
        return self._program(key, self._extend, *args, window=window)(*args)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 `[..., vocab]`."""
        args = self.leaves, self.whole(hidden)
        return self._program(("head", hidden.shape), self._head, *args)(*args)

    def decode_step(self, cache: KVCache, state: State, sampler: Sampler) -> tuple[KVCache, State]:
        """Put the newest token into the cache and draw the next one. Returns when it is there.

        Emulated devices share one pool of threads; steps dispatched without waiting starve each other's collectives.
        """
        key = "decode_step", state.token.shape, cache.capacity, sampler.kind
        args = self.leaves, cache, state, sampler
        cache, state = self._program(key, self._decode_step, *args)(*args)
        return cache, jax.block_until_ready(state)

    def start(self, logits: jax.Array, prompts: list[list[int]], seed: int, sampler: Sampler) -> State:
        """Draw the first token after each prompt from logits `[batch, vocab]`. Returns when it is there."""
        seen = np.zeros(logits.shape, bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = True
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(prompts)))
        state = jax.tree.map(self.whole, State(np.zeros(len(prompts), np.int32), seen, keys))
        args = logits, state, sampler
        return jax.block_until_ready(self._program(("draw", logits.shape, sampler.kind), self._draw, *args)(*args))

    def _program(self, key: Hashable, function: Callable, *args: object, **static: object) -> jax.stages.Compiled:
        if key not in self.compiled:
            begun = time.perf_counter()
            with jax.set_mesh(self.mesh):
                self.compiled[key] = function.lower(*args, **static).compile()
            self.compile_seconds += time.perf_counter() - begun
        return self.compiled[key]


def _draw(logits: jax.Array, state: State, sampler: Sampler) -> State:
    """The state with a next token drawn from `logits[batch, vocab]`."""
    keys = jax.vmap(jax.random.split)(state.keys)
    token = sampler(logits, state.seen, keys[:, 0])
    seen = state.seen.at[jnp.arange(token.shape[0]), token].set(True)
    return State(token, seen, keys[:, 1])
