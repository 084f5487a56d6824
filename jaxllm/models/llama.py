"""Llama and the models that share its architecture: Mistral, Mixtral, Qwen2, Qwen3 (and their MoE), Phi-3."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxllm.layers.attention import Attention
from jaxllm.layers.cache import KVCache
from jaxllm.layers.experts import MoE, softmax_top_k
from jaxllm.layers.heads import place_heads
from jaxllm.layers.linear import Embedding
from jaxllm.layers.mlp import MLP
from jaxllm.layers.norm import RMSNorm
from jaxllm.models.llama_config import LayerConfig, LlamaConfig
from jaxllm.parallel import EP, TP


class Block(nnx.Module):
    """One layer: attention, then the feed-forward block, each on a normalised copy and added to the stream."""

    def __init__(self, config: LlamaConfig, layer: LayerConfig, mesh: Mesh, block: int) -> None:
        c, tp = config, mesh.shape[TP]
        heads = place_heads(layer.num_attention_heads, layer.num_key_value_heads, tp, c.v_head_dim, block)
        self.kv_shape = (len(heads.kv), c.head_dim, c.v_head_dim)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(
            c.hidden_size,
            layer.num_attention_heads,
            layer.num_key_value_heads,
            c.head_dim,
            c.v_head_dim,
            heads,
            qkv_bias=c.qkv_bias,
            o_bias=c.o_bias,
            norm_eps=c.rms_norm_eps if c.qk_norm else None,
            sliding_window=layer.sliding_window,
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if layer.sparse:
            route = softmax_top_k(c.moe.num_experts_per_tok, c.moe.norm_topk_prob)
            sizes = c.hidden_size, c.moe.num_experts, c.moe.moe_intermediate_size
            shared = c.moe.shared_expert_intermediate_size
            self.mlp = MoE(*sizes, route, block, tp, mesh.shape[EP], shared, shared_gate=shared is not None)
        else:
            self.mlp = MLP(c.hidden_size, layer.intermediate_size, block * tp, c.mlp_bias)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        cache: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        window: int,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        y, cache = self.self_attn(self.input_layernorm(x), rope, cache, positions, window)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nnx.Module):
    """A decoder of `Block`s.

    Args:
        config: sizes.
        mesh: what the model is cut over.
        block: positions of a ROW matrix's columns that cannot be cut apart, from the formats of the checkpoint.
    """

    def __init__(self, config: LlamaConfig, mesh: Mesh, block: int = 1) -> None:
        vocabulary, tp = (config.vocab_size, config.hidden_size), mesh.shape[TP]
        self.config = config
        self.embed_tokens = Embedding(vocabulary, tp)
        self.layers = nnx.List([Block(config, layer, mesh, block) for layer in config.layers])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Embedding(vocabulary, tp)

    def empty_cache(self, batch: int, capacity: int, dtype: jax.typing.DTypeLike, mesh: Mesh) -> KVCache:
        return KVCache.zeros([layer.kv_shape for layer in self.layers], batch, capacity, dtype, mesh)

    def cache_shardings(self, mesh: Mesh) -> KVCache:
        return KVCache.shardings(len(self.layers), mesh)

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
