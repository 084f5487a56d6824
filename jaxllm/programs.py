"""A model as compiled programs over flat arrays.

The model's state is flattened once, because flattening NNX variables at every step can cost more than the step. Each
program is compiled explicitly, once for each shape it is called with. So nothing is retraced unnoticed, compile time
can be told from run time, and the compiled text can be inspected.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm import tracking
from jaxllm.compilation_cache import damaged_entries_removed
from jaxllm.device_memory import device_bytes, room_for
from jaxllm.drawing import Asked, Drawn, Lines, Progress, begin, draw
from jaxllm.executables import Executables
from jaxllm.kernels.activations import rounding
from jaxllm.layers.cache import KVCache
from jaxllm.layers.decoder import Decoder
from jaxllm.parallel import DP


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What `Programs.advance` does with some of the cached sequences.

    Attributes:
        rows: int32 `[rows]`, which sequences. One may occur twice with the same contents, to fill up.
        tokens: int32 `[rows, time]`; where the first of them is negative, the sequence's newest token.
        counts: int32 `[rows]`, how many of them are real; the rest is padding.
        starts: int32 `[rows]`, where they stand in their sequences; negative: at the end.
        drafted: int32 `[rows]`, how many of them, the last ones, are drafts that are to be checked.
    """

    rows: jax.Array
    tokens: jax.Array
    counts: jax.Array
    starts: jax.Array
    drafted: jax.Array


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
        whole_batches: whether `advance` has to be given all sequences, in order: where they lie on different devices.
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
        self.vocab_size = model.config.vocab_size
        self.runs_ahead, self.whole_batches = runs_ahead(mesh), mesh.shape[DP] > 1
        self._short_contexts = {rope.short_context for layer in model.layers if (rope := layer.rope) and rope.long}
        self.compile_seconds = 0.0
        self.compiled: dict[Hashable, jax.stages.Compiled] = {}
        self.leaves: list[jax.Array] = []
        self.refresh()

        def merge(leaves: list[jax.Array]) -> Decoder:
            return nnx.merge(self._graph, jax.tree.unflatten(self._tree, leaves))

        def extend(
            leaves: list[jax.Array], cache: KVCache, tokens: jax.Array, counts: jax.Array, window: int
        ) -> tuple[tuple[jax.Array, KVCache], dict[str, tracking.Statistics]]:
            model = merge(leaves)
            with tracking.collecting(model, self.tracks, jnp.arange(tokens.shape[1]) < counts[:, None]) as seen:
                return model(tokens, cache, counts, window, self.dtype), seen

        def head(leaves: list[jax.Array], hidden: jax.Array) -> jax.Array:
            return merge(leaves).logits(hidden)

        def advance(
            leaves: list[jax.Array], cache: KVCache, newest: jax.Array, batch: Batch, *, window: int, most: int
        ) -> tuple[tuple[KVCache, jax.Array], dict[str, tracking.Statistics]]:
            model, rows = merge(leaves), batch.rows
            starts = jnp.where(batch.starts < 0, cache.lengths[rows], batch.starts)
            cache = replace(cache, lengths=cache.lengths.at[rows].set(starts))
            first = jnp.where(batch.tokens[:, 0] < 0, newest[rows], batch.tokens[:, 0])
            tokens = batch.tokens.at[:, 0].set(first)
            with tracking.collecting(model, self._tracked(batch, most), _real(batch)) as seen:
                held = None if self.whole_batches or len(cache.lengths) == 1 else rows
                hidden, cache = model(tokens, cache, batch.counts, window, self.dtype, held)
            last = (batch.counts - 1 - batch.drafted)[:, None] + jnp.arange(most)
            last = jnp.clip(last, 0, tokens.shape[1] - 1)[..., None]
            return (cache, model.logits(jnp.take_along_axis(hidden, last, axis=1))), seen

        self._extend, self._head, self._advance = extend, head, advance
        self._replicated = NamedSharding(mesh, PartitionSpec())

    def refresh(self) -> None:
        """Take over the model's parameters, which may have changed. If only values have, programs stay compiled."""
        self._graph, state = nnx.split(self._model)
        before, (self.leaves, self._tree) = _kinds(self.leaves), jax.tree.flatten(state)
        if _kinds(self.leaves) != before:
            self.compiled.clear()
        made_of = self._graph, self.mesh, self.dtype, self.cache_dtype, self.int8_blocks
        self._executables = Executables(self.mesh, made_of, state)
        self.version = object()

    def frequencies(self, limit: int) -> Hashable:
        """Which rotary frequencies a sequence gets that may grow to `limit` tokens: equal where these are equal."""
        return tuple(limit > short for short in sorted(self._short_contexts))

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
        cache = self._model.cache(batch, capacity, self.cache_dtype, self.mesh)

        def advise(times: float) -> str:
            narrow = "" if self.cache_dtype.itemsize == 1 else ", or cache keys and values in 8 bits (cache_dtype)"
            most = int(capacity / times) if times else 0
            return f"use fewer sequences or positions ({most:,} of these would fit), more devices (tp){narrow}"

        what = f"a cache of {batch} x {capacity:,} positions"
        with room_for(what, self.mesh, lambda: device_bytes(cache), advise):
            key = "zeros", batch, capacity
            return self._compiled(key, _zeros(cache), outputs=lambda: cache.shardings, donated=None)

    def extend(self, cache: KVCache, tokens: np.ndarray, counts: np.ndarray, window: int) -> tuple[jax.Array, KVCache]:
        """Hidden states `[batch, time, hidden]` of `tokens[batch, time]`, of which `counts[batch]` are real.

        The cache is donated: only the returned one may be used afterwards.
        """
        key = "extend", tokens.shape, cache.capacity, window, self.tracks
        args = self.leaves, cache, self.replicate(tokens), self.replicate(counts)
        extend = partial(self._extend, window=window)
        shardings = (self._replicated, cache.shardings), self._replicated
        result, seen = self._run(key, extend, *args, outputs=lambda: shardings, donated=1)
        self._keep(seen)
        return result

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 `[..., vocab]`."""
        return self._run(("head", hidden.shape), self._head, self.leaves, self.replicate(hidden))

    def advance(
        self, cache: KVCache, newest: jax.Array, batch: Batch, window: int, most: int
    ) -> tuple[KVCache, jax.Array]:
        """Add tokens to some sequences of the cache, which is donated. Returns it, and logits float32
        `[rows, most, vocab]` after the last token of each row that is no draft, and after its drafts.

        Args:
            newest: int32 `[sequences]`, what negative tokens stand for.
            window: see `Context`.
            most: one more than there are drafts, at most. With drafts, `batch.tokens` has as many columns.
        """
        key = "advance", batch.tokens.shape, most, len(cache.lengths), cache.capacity, window, self.tracks
        outputs = lambda: ((cache.shardings, self._replicated), self._replicated)  # noqa: E731
        program = partial(self._advance, window=window, most=most)
        result, seen = self._run(key, program, self.leaves, cache, newest, batch, outputs=outputs, donated=1)
        self._keep(seen)
        return result

    def draw(self, logits: jax.Array, lines: Lines, asked: Asked, at: Progress) -> tuple[Progress, Drawn]:
        """Draw the next tokens from what `advance` returned, see `drawing.draw`. `at` is donated."""
        return self._run(("draw", logits.shape, len(at.newest)), draw, logits, lines, asked, at, donated=3)

    def begin(self, at: Progress, row: int, drawn: int, prompted: jax.typing.ArrayLike) -> Progress:
        """Progress (donated) where the answer of a sequence has `drawn` tokens, after a prompt of tokens bool
        `[vocab]`."""
        args = at, self.replicate(np.int32(row)), self.replicate(np.int32(drawn)), self.replicate(prompted)
        return self._run(("begin", at.answered.shape), begin, *args, donated=0)

    def copy(self, cache: KVCache, source: int, target: int) -> KVCache:
        """The cache (donated) with what it holds of one sequence copied to another; lengths and limits stay."""
        args = cache, self.replicate(np.int32(source)), self.replicate(np.int32(target))
        key = "copy", len(cache.lengths), cache.capacity
        return self._run(key, KVCache.copied, *args, outputs=lambda: cache.shardings, donated=0)

    def _tracked(self, batch: Batch, most: int) -> tracking.Kind | None:
        """Only tokens of prompts are tracked."""
        return self.tracks if most == 1 and batch.tokens.shape[1] > 1 else None

    def _keep(self, seen: dict[str, tracking.Statistics]) -> None:
        self.seen = tracking.added(self.seen, seen)

    def _run[T](
        self,
        key: Hashable,
        function: Callable[..., T],
        *args: object,
        outputs: Callable[[], object] | None = None,
        donated: int | tuple[int, ...] | None = None,
    ) -> T:
        """The result of `function`, which is compiled for `key` if it has not been yet.

        Args:
            outputs: returns the shardings of the results; by default they are replicated.
            donated: the numbers of the arguments that are updated in place.
        """
        with room_for("a step of the model", self.mesh, lambda: 0, _advise_step):
            return self._compiled(key, function, *args, outputs=outputs, donated=donated)

    def _compiled[T](
        self,
        key: Hashable,
        function: Callable[..., T],
        *args: object,
        outputs: Callable[[], object] | None,
        donated: int | tuple[int, ...] | None,
    ) -> T:
        program = self.compiled.pop(key, None)
        if program is None:
            jax.block_until_ready(args)  # what still runs does not count as compiling
            begun = time.perf_counter()
            shardings = self._replicated if outputs is None else outputs()

            def compile() -> jax.stages.Compiled:
                with jax.set_mesh(self.mesh), rounding(self.int8_blocks), damaged_entries_removed():
                    jitted = jax.jit(function, out_shardings=shardings, donate_argnums=donated)
                    return jitted.lower(*args).compile()

            program = self._executables.get((key, donated), args, compile)
            self.compile_seconds += time.perf_counter() - begun
        self.compiled[key] = program  # the newest is the last
        if len(self.compiled) > MOST_PROGRAMS:
            del self.compiled[next(iter(self.compiled))]
        result = program(*args)
        return result if self.runs_ahead else jax.block_until_ready(result)


@lru_cache(MOST_PROGRAMS)
def _zeros(cache: KVCache) -> Callable[[], KVCache]:
    """The same function for equal caches: JAX compiles it once for all models of a process, as it does `draw`."""
    return cache.zeros


def _advise_step(times: float) -> str:
    return "use more devices (tp), fewer sequences or positions, or cache keys and values in 8 bits (cache_dtype)"


def _kinds(leaves: Sequence[jax.Array]) -> list[tuple]:
    """What programs are compiled for: all but the values."""
    return [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves]


def _real(batch: Batch) -> jax.Array:
    return jnp.arange(batch.tokens.shape[1]) < batch.counts[:, None]
