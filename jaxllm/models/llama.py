"""Llama and the models that share its architecture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxllm.checkpoint.rules import Rule
from jaxllm.errors import InputError
from jaxllm.layers import rope
from jaxllm.layers.attention import Attention
from jaxllm.layers.cache import KVCache
from jaxllm.layers.heads import place_heads
from jaxllm.layers.linear import Embedding
from jaxllm.layers.mlp import MLP
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.parameter import declare
from jaxllm.parallel import TP


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants, by their Hugging Face names where there is one."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    rotary_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_freqs: bool
    """Whether the checkpoint brings a vector that its rotary frequencies are divided by (Llama 3.1 and later)."""

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, object]) -> Self:
        """The configuration that a GGUF file of architecture `llama` states.

        Raises:
            InputError: a key is missing, or the file uses a part of the architecture that is not supported.
        """

        def get(key: str, *default: object) -> object:
            value = metadata.get(f"llama.{key}", *default)
            if value is None:
                raise InputError(f"metadata key 'llama.{key}' is missing")
            if isinstance(value, list):
                raise InputError(f"metadata key 'llama.{key}' differs from layer to layer, which is not supported")
            return value

        if metadata.get("llama.expert_count"):
            raise InputError("mixtures of experts (llama.expert_count) are not supported in GGUF files yet")
        scaling = metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise InputError(f"rope scaling '{scaling}' is not supported in GGUF files yet")
        heads, hidden = get("attention.head_count"), get("embedding_length")
        head_dim = get("attention.key_length", hidden // heads if heads else 0)
        return cls(
            vocab_size=tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else get("vocab_size"),
            hidden_size=hidden,
            intermediate_size=get("feed_forward_length"),
            num_hidden_layers=get("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            v_head_dim=get("attention.value_length", head_dim),
            rotary_dim=get("rope.dimension_count", head_dim),
            rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
            rope_theta=get("rope.freq_base", 10000.0),
            max_position_embeddings=get("context_length"),
            tie_word_embeddings="output.weight" not in tensors,
            rope_freqs="rope_freqs.weight" in tensors,
        )


class Block(nnx.Module):
    """One layer: attention, then the feed-forward block, each on a normalised copy and added to the stream."""

    def __init__(self, config: LlamaConfig, tp: int, block: int) -> None:
        c = config
        heads = place_heads(c.num_attention_heads, c.num_key_value_heads, tp, c.v_head_dim, block)
        self.kv_shape = (len(heads.kv), c.head_dim, c.v_head_dim)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(
            c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.v_head_dim, heads
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, block * tp)

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
        tp = mesh.shape[TP]
        self.config = config
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embed_tokens = Embedding(vocabulary, tp)
        self.layers = nnx.List([Block(config, tp, block) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope_freqs = declare((config.rotary_dim // 2,), PartitionSpec(None)) if config.rope_freqs else None
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
        inv_freq = rope.inverse_frequencies(self.config.rotary_dim, self.config.rope_theta)
        if self.rope_freqs is not None:
            inv_freq = inv_freq / self.rope_freqs.get_value()
        angles = rope.angles(positions, inv_freq)

        x = self.embed_tokens(tokens, dtype)
        updated = []
        for layer, *old in zip(self.layers, cache.keys, cache.values, strict=True):
            x, new = layer(x, angles, tuple(old), positions, window)
            updated.append(new)
        keys, values = zip(*updated, strict=True)
        return self.norm(x), KVCache(keys, values, cache.lengths + counts)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`hidden[..., hidden]` -> float32 `[..., vocab]`. A tied head is the same parameter used again."""
        return (self.lm_head or self.embed_tokens).attend(hidden)


def _half_split(heads: str) -> Callable[[LlamaConfig], np.ndarray]:
    """GGUF files of this architecture pair neighbours in q and k: put their rows in the half-split order."""

    def rows(config: LlamaConfig) -> np.ndarray:
        return rope.half_split_rows(getattr(config, heads), config.head_dim, config.rotary_dim)

    return rows


GGUF_RULES = [
    Rule(r"token_embd\.weight", "embed_tokens.weight"),
    Rule(r"output_norm\.weight", "norm.weight"),
    Rule(r"output\.weight", "lm_head.weight"),
    Rule(r"rope_freqs\.weight", "rope_freqs"),
    Rule(r"blk\.(\d+)\.attn_norm\.weight", r"layers.\1.input_layernorm.weight"),
    Rule(r"blk\.(\d+)\.attn_q\.weight", r"layers.\1.self_attn.q_proj.weight", _half_split("num_attention_heads")),
    Rule(r"blk\.(\d+)\.attn_k\.weight", r"layers.\1.self_attn.k_proj.weight", _half_split("num_key_value_heads")),
    Rule(r"blk\.(\d+)\.attn_v\.weight", r"layers.\1.self_attn.v_proj.weight"),
    Rule(r"blk\.(\d+)\.attn_output\.weight", r"layers.\1.self_attn.o_proj.weight"),
    Rule(r"blk\.(\d+)\.ffn_norm\.weight", r"layers.\1.post_attention_layernorm.weight"),
    Rule(r"blk\.(\d+)\.ffn_(gate|up|down)\.weight", r"layers.\1.mlp.\2_proj.weight"),
]
