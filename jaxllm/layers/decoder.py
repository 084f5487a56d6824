"""The frame that decoder-only models share: an embedding table, blocks, a norm, and a head.

Each model defines its own block, in its own file. The frame knows what no single block can: which layers there are,
which rotary angles they need, and which cache each of them uses.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxllm import tracking
from jaxllm.kernels.activations import rounding, rounds_int8_blocks
from jaxllm.layers.cache import CacheShape, KVCache, LayerCache
from jaxllm.layers.context import Context
from jaxllm.layers.linear import Embedding
from jaxllm.layers.rope import Rope
from jaxllm.parallel import CACHE, TP


class Block(Protocol):
    """What the frame requires of a layer.

    Attributes:
        rope: its rotary embedding, if it has one.
        cache_shape: what it caches.
        cache_of: the layer whose cache it reads; None: it has its own.
    """

    rope: Rope | None
    cache_shape: CacheShape
    cache_of: int | None

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        """`x[batch, time, hidden]` after this layer, and the cache with the new tokens added."""


class Ends(Protocol):
    """What some models do before their first layer and after their last one.

    Between the two, x has the shape that the model's blocks expect.
    """

    def begin(self, tokens: jax.Array, x: jax.Array) -> tuple[jax.Array, Sequence[jax.Array]]:
        """The first layer's input, from `tokens[batch, time]` and their embeddings `x[batch, time, hidden]`; and what
        each layer finds in its context as `per_layer`."""

    def end(self, x: jax.Array) -> jax.Array:
        """The last layer's output as `[batch, time, hidden]`."""


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
        config: has vocab_size, hidden_size and tie_word_embeddings.
        blocks: the layers, each a module and a `Block`.
        norm: the norm after the last layer.
        mesh: the mesh that the model is sharded over.
        cache_spec: how the cache is sharded.
        embedding_scale: what embeddings are multiplied by.
        logit_scale: what logits are multiplied by.
        logit_cap: c in `c tanh(logits / c)`, which keeps logits within c; None: no cap.
        ends: what the model does before its first layer and after its last one, a module and `Ends`; None: nothing.
    """

    def __init__(
        self,
        config: Any,
        blocks: Sequence[Any],
        norm: nnx.Module,
        mesh: Mesh,
        *,
        cache_spec: PartitionSpec = CACHE,
        embedding_scale: float = 1.0,
        logit_scale: float = 1.0,
        logit_cap: float | None = None,
        ends: Any | None = None,
    ) -> None:
        vocabulary, tp = (config.vocab_size, config.hidden_size), mesh.shape[TP]
        self.config, self.cache_spec = config, cache_spec
        self.embedding_scale, self.logit_scale, self.logit_cap = embedding_scale, logit_scale, logit_cap
        self.embed_tokens = Embedding(vocabulary, tp)
        self.ends = ends
        self.layers = nnx.List(blocks)
        self.norm = norm
        self.lm_head = None if config.tie_word_embeddings else Embedding(vocabulary, tp)

    def cache(self, batch: int, capacity: int, dtype: jax.typing.DTypeLike, mesh: Mesh) -> KVCache:
        """The shapes of a cache for `batch` sequences of up to `capacity` positions."""
        shapes = tuple(layer.cache_shape for layer in self.layers if layer.cache_of is None)
        return KVCache.abstract(shapes, batch, capacity, dtype, mesh, self.cache_spec)

    def __call__(
        self,
        tokens: jax.Array,
        cache: KVCache,
        counts: jax.Array,
        window: int,
        dtype: jax.typing.DTypeLike,
        segments: jax.Array | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, KVCache]:
        """Append `tokens[batch, time]` to the cached sequences.

        Args:
            counts: `[batch]`, how many of each row's tokens are real; the rest is padding on the right.
            window: see `Context`.
            dtype: the dtype of the activations.
            segments: see `Context`.
            remat: whether a backward pass computes what is inside a layer again, instead of keeping it.

        Returns:
            The last layer's normalised output `[batch, time, hidden]` and the cache, longer by `counts`.
        """
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        ropes = dict.fromkeys(layer.rope for layer in self.layers)  # each once: layers of a kind share angles
        angles = {rope: rope.angles(positions, cache.limits) if rope else None for rope in ropes}
        x = self.embed_tokens(tokens, dtype) * jnp.asarray(self.embedding_scale, dtype)
        x, inputs = (x, [None] * len(self.layers)) if self.ends is None else self.ends.begin(tokens, x)
        run = jax.checkpoint(apply, static_argnums=4) if remat else apply
        own, caches = iter(zip(cache.keys, cache.values, strict=True)), dict[int, LayerCache]()
        for i, layer in enumerate(self.layers):
            slot = i if layer.cache_of is None else layer.cache_of
            held = next(own) if layer.cache_of is None else caches[slot]
            context = Context(positions, counts, angles[layer.rope], window, rounds_int8_blocks(), inputs[i], segments)
            with jax.named_scope(f"layers.{i}"):
                x, caches[slot], seen = run(layer, x, held, context, tracking.tracked())
            tracking.pass_on(f"layers.{i}", seen)
        x = x if self.ends is None else self.ends.end(x)
        keys, values = zip(*(caches[i] for i in sorted(caches)), strict=True)
        return self.norm(x), replace(cache, keys=keys, values=values, lengths=cache.lengths + counts)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`hidden[..., hidden]` -> float32 `[..., vocab]`. A tied head uses the embedding table's parameter."""
        logits = (self.lm_head or self.embed_tokens).attend(hidden) * self.logit_scale
        return logits if self.logit_cap is None else self.logit_cap * jnp.tanh(logits / self.logit_cap)


@partial(jax.jit, static_argnums=4)
def apply(
    layer: Any, x: jax.Array, cache: LayerCache, context: Context, kind: tracking.Kind | None
) -> tuple[jax.Array, LayerCache, dict[str, tracking.Statistics]]:
    """Apply a layer. Because this is jitted, layers of one kind are traced and lowered only once.

    What is set around it (`int8_blocks`, `kind`) are arguments, because jit knows traces by their arguments.
    """
    real = None if kind is None else jnp.arange(context.positions.shape[1]) < context.counts[:, None]
    with rounding(context.int8_blocks), tracking.collecting(layer, kind, real) as seen:
        return *layer(x, cache, context), seen
