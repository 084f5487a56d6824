"""The frame that decoder-only models share: a table of tokens, blocks, a norm, and a head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxllm.layers.cache import KVCache
from jaxllm.layers.linear import Embedding
from jaxllm.layers.norm import RMSNorm
from jaxllm.parallel import CACHE, TP


class Block(nnx.Module):
    """One layer: attention, then a feed-forward block, each on a normalised copy and added to the stream."""

    def __init__(self, hidden_size: int, eps: float, attention: nnx.Module, mlp: nnx.Module) -> None:
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        self.mlp = mlp

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        cache: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        window: int,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """See `Attention`, whose arguments and results these are."""
        y, cache = self.self_attn(self.input_layernorm(x), rope, cache, positions, window)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Decoder(nnx.Module):
    """A model.

    Args:
        config: has vocab_size, hidden_size, rms_norm_eps, tie_word_embeddings and rope.
        blocks: the layers; `cache_shape` of their attention is `(heads, key_dim, value_dim)` as placed on the mesh.
        mesh: what the model is cut over.
        cache_spec: how the cache is.
    """

    def __init__(self, config: object, blocks: list[Block], mesh: Mesh, cache_spec: PartitionSpec = CACHE) -> None:
        vocabulary, tp = (config.vocab_size, config.hidden_size), mesh.shape[TP]
        self.config, self.cache_spec = config, cache_spec
        self.embed_tokens = Embedding(vocabulary, tp)
        self.layers = nnx.List(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Embedding(vocabulary, tp)

    def empty_cache(self, batch: int, capacity: int, dtype: jax.typing.DTypeLike, mesh: Mesh) -> KVCache:
        shapes = [layer.self_attn.cache_shape for layer in self.layers]
        return KVCache.zeros(shapes, batch, capacity, dtype, mesh, self.cache_spec)

    def cache_shardings(self, mesh: Mesh) -> KVCache:
        return KVCache.shardings(len(self.layers), mesh, self.cache_spec)

    def __call__(
        self, tokens: jax.Array, cache: KVCache, counts: jax.Array, window: int, dtype: jax.typing.DTypeLike
    ) -> tuple[jax.Array, KVCache]:
        """Append `tokens[batch, time]` to the cached sequences.

        Args:
            counts: `[batch]`, how many of each row's tokens are real; the rest is padding on the right.
            window: see `Attention`.
            dtype: of the activations.

        Returns:
            The last layer's normalised output `[batch, time, hidden]` and the cache, longer by `counts`.
        """
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        angles = self.config.rope.angles(positions, cache.limits)
        x = self.embed_tokens(tokens, dtype)
        updated = []
        for layer, *old in zip(self.layers, cache.keys, cache.values, strict=True):
            x, new = layer(x, angles, tuple(old), positions, window)
            updated.append(new)
        keys, values = zip(*updated, strict=True)
        return self.norm(x), KVCache(keys, values, cache.lengths + counts, cache.limits)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`hidden[..., hidden]` -> float32 `[..., vocab]`. A tied head is the same parameter used again."""
        return (self.lm_head or self.embed_tokens).attend(hidden)
