"""A model as compiled programs over flat arrays.

The model's state is flattened once, because flattening NNX variables at every step can cost more than the step. Each
program is compiled explicitly, once for each shape it is called with. So nothing is retraced unnoticed, compile time
can be told from run time, and the compiled text can be inspected.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm import tracking
from jaxllm.compilation_cache import damaged_entries_removed
from jaxllm.kernels.activations import rounding
from jaxllm.layers.cache import KVCache
from jaxllm.layers.decoder import Decoder
from jaxllm.sampling import Sampler


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a decode step passes to the next one."""

    token: jax.Array  # int32 [batch], the newest token, not yet in the cache
    occurred: jax.Array  # bool [batch, vocab], which tokens occur in the prompt or the answer so far
    keys: jax.Array  # one random key per row


def runs_ahead(mesh: Mesh) -> bool:
    """Whether programs may be started before earlier ones have finished.

    They may not on several emulated CPU devices: these share one pool of threads, so a later program can take the
    threads that the collectives of an earlier one wait for.
    """
    return mesh.devices.size == 1 or mesh.devices.flat[0].platform != "cpu"


# A program takes about 100 memory mappings. Linux gives a process 65,530 of them, and XLA crashes when they run out. So
# a long-lived process keeps only the most recently used programs.
MOST_PROGRAMS = 64


class Programs:
    """The compiled functions behind every answer.

    Attributes:
        int8_blocks: what matmuls may do with activations, see `activations.rounding`.
        cache_dtype: of keys and values; by default that of activations. int8 and float8_e4m3fn are `Coded`.
        runs_ahead: whether calls may return before their results are computed, see the function `runs_ahead`.
        tracks: which statistics of the activations of prompts are collected; None: none.
        seen: the statistics so far, by the parameters' names; on the mesh, as they lie there.
        compile_seconds: time spent on compiling (or on reading the compilation cache) so far.
        compiled: the programs by key: what they were compiled for.
        version: another object whenever the parameters have changed.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        dtype: jax.typing.DTypeLike,
        int8_blocks: bool = False,
        cache_dtype: jax.typing.DTypeLike | None = None,
    ) -> None:
        self.mesh, self.dtype, self._model, self.int8_blocks = mesh, jnp.dtype(dtype), model, int8_blocks
        self.cache_dtype = jnp.dtype(cache_dtype or dtype)
        self.tracks: tracking.Kind | None = None
        self.seen: dict[str, tracking.Statistics] = {}
        self.runs_ahead = runs_ahead(mesh)
        self.compile_seconds = 0.0
        self.compiled: dict[Hashable, jax.stages.Compiled] = {}
        self.leaves: list[jax.Array] = []
        self.refresh()

        def merge(leaves: list[jax.Array]) -> Decoder:
            return nnx.merge(self._graph, jax.tree.unflatten(self._tree, leaves))

        def extend(
            leaves: list[jax.Array], cache: KVCache, tokens: jax.Array, counts: jax.Array, window: int
        ) -> tuple[tuple[jax.Array, KVCache], dict[str, tracking.Statistics]]:
            model, real = merge(leaves), jnp.arange(tokens.shape[1]) < counts[:, None]
            with tracking.collecting(model, self.tracks, real) as seen:
                return model(tokens, cache, counts, window, self.dtype), seen

        def head(leaves: list[jax.Array], hidden: jax.Array) -> jax.Array:
            return merge(leaves).logits(hidden)

        def decode_step(
            leaves: list[jax.Array], cache: KVCache, state: State, sampler: Sampler
        ) -> tuple[KVCache, State]:
            model = merge(leaves)
            ones = jnp.ones_like(cache.lengths)
            hidden, cache = model(state.token[:, None], cache, ones, cache.capacity, self.dtype)
            return cache, _draw(model.logits(hidden[:, 0]), state, sampler)

        self._extend, self._head, self._decode_step = extend, head, decode_step
        self._replicated = NamedSharding(mesh, PartitionSpec())

    def refresh(self) -> None:
        """Take over the model's parameters, which may have changed. If only values have, programs stay compiled."""
        self._graph, state = nnx.split(self._model)
        before, (self.leaves, self._tree) = _kinds(self.leaves), jax.tree.flatten(state)
        if _kinds(self.leaves) != before:
            self.compiled.clear()
        self.version = object()

    def replicate(self, value: jax.typing.ArrayLike) -> jax.Array:
        """An array with a copy on every device, from one that every process has."""
        if self._replicated.is_fully_addressable:
            return jax.device_put(value, self._replicated)
        if isinstance(value, jax.Array):
            if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(self.replicate(jax.random.key_data(value)))
            if not value.is_fully_addressable:
                return jax.jit(lambda x: x, out_shardings=self._replicated)(value)
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, self._replicated, lambda index: host[index])

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens."""
        with damaged_entries_removed():
            return self._model.cache(batch, capacity, self.cache_dtype, self.mesh).zeros()

    def extend(self, cache: KVCache, tokens: np.ndarray, counts: np.ndarray, window: int) -> tuple[jax.Array, KVCache]:
        """Hidden states `[batch, time, hidden]` of `tokens[batch, time]`, of which `counts[batch]` are real.

        The cache is donated: only the returned one may be used afterwards.
        """
        key = "extend", tokens.shape, cache.capacity, window, self.tracks
        args = self.leaves, cache, self.replicate(tokens), self.replicate(counts)
        extend = partial(self._extend, window=window)
        shardings = (self._replicated, cache.shardings), self._replicated
        result, seen = self._run(key, extend, *args, outputs=lambda: shardings, donated=1)
        for name, statistics in seen.items():
            self.seen[name] = self.seen[name] + statistics if name in self.seen else statistics
        return result

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 `[..., vocab]`."""
        return self._run(("head", hidden.shape), self._head, self.leaves, self.replicate(hidden))

    def decode_step(self, cache: KVCache, state: State, sampler: Sampler) -> tuple[KVCache, State]:
        """Add the newest token to the cache (which is donated) and draw the next one."""
        key = "decode_step", state.token.shape, cache.capacity, sampler.kind
        # The state is not donated: its token is read while the next step runs.
        outputs, args = (lambda: (cache.shardings, self._replicated)), (self.leaves, cache, state, sampler)
        return self._run(key, self._decode_step, *args, outputs=outputs, donated=1)

    def start(
        self, logits: jax.Array, prompts: Sequence[Sequence[int]], seed: int, first_stream: int, sampler: Sampler
    ) -> State:
        """Draw the first token after each prompt from logits `[batch, vocab]`.

        Each row draws from its own random stream, numbered from `first_stream` on.
        """
        occurred = np.zeros(logits.shape, bool)
        for row, prompt in zip(occurred, prompts, strict=True):
            row[list(prompt)] = True
        streams = first_stream + jnp.arange(len(prompts))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), streams)
        begun = State(jnp.zeros(len(prompts), jnp.int32), jnp.asarray(occurred), keys)
        state = jax.tree.map(self.replicate, begun)
        return self._run(("draw", logits.shape, sampler.kind), _draw, logits, state, sampler)

    def _run[T](
        self,
        key: Hashable,
        function: Callable[..., T],
        *args: object,
        outputs: Callable[[], object] | None = None,
        donated: int | None = None,
    ) -> T:
        """The result of `function`, which is compiled for `key` if it has not been yet.

        Args:
            outputs: returns the shardings of the results; by default they are replicated.
            donated: the number of the argument that is updated in place.
        """
        program = self.compiled.pop(key, None)
        if program is None:
            begun = time.perf_counter()
            shardings = self._replicated if outputs is None else outputs()
            with jax.set_mesh(self.mesh), rounding(self.int8_blocks), damaged_entries_removed():
                jitted = jax.jit(function, out_shardings=shardings, donate_argnums=donated)
                program = jitted.lower(*args).compile()
            self.compile_seconds += time.perf_counter() - begun
        self.compiled[key] = program  # the newest is the last
        if len(self.compiled) > MOST_PROGRAMS:
            del self.compiled[next(iter(self.compiled))]
        result = program(*args)
        return result if self.runs_ahead else jax.block_until_ready(result)


def _kinds(leaves: Sequence[jax.Array]) -> list[tuple]:
    """What programs are compiled for: all but the values."""
    return [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves]


def _draw(logits: jax.Array, state: State, sampler: Sampler) -> State:
    """The state with a next token drawn from `logits[batch, vocab]`."""
    keys = jax.vmap(jax.random.split)(state.keys)
    token = sampler(logits, state.occurred, keys[:, 0])
    occurred = state.occurred.at[jnp.arange(token.shape[0]), token].set(True)
    return State(token, occurred, keys[:, 1])
