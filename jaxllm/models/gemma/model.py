"""Gemma 2 and 3: norms before and after each half of a block, GeGLU, and sliding windows in most layers."""

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxllm.layers.attention import Attention
from jaxllm.layers.cache import LayerCache
from jaxllm.layers.context import Context
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.heads import place_heads
from jaxllm.layers.mlp import MLP, geglu
from jaxllm.layers.norm import RMSNorm
from jaxllm.models.gemma.config import GemmaConfig
from jaxllm.parallel import TP


def gemma(config: GemmaConfig, mesh: Mesh, block: int = 1) -> Decoder:
    """A model of this family with its parameters declared.

    Args:
        mesh: the mesh that it is sharded over.
        block: how many columns of a ROW matrix belong to one block, from the formats of the checkpoint.
    """
    return Decoder(
        config,
        [GemmaBlock(config, window, mesh, block) for window in config.sliding_windows],
        norm(config, config.hidden_size),
        mesh,
        embedding_scale=config.hidden_size**0.5,
        logit_cap=config.final_logit_softcapping,
    )


class GemmaBlock(nnx.Module):
    """Attention, then a feed-forward block. Each reads the normalised residual stream; what it adds is normalised."""

    cache_of: int | None = None

    def __init__(self, config: GemmaConfig, window: int | None, mesh: Mesh, block: int) -> None:
        c, heads = config, (config.num_attention_heads, config.num_key_value_heads)
        self.rope = c.rope if window is None else c.local_rope
        self.input_layernorm = norm(c, c.hidden_size)
        self.self_attn = Attention(
            c.hidden_size,
            *heads,
            c.head_dim,
            c.head_dim,
            place_heads(*heads, mesh.shape[TP], c.head_dim, block),
            scale=c.query_pre_attn_scalar**-0.5,
            score_cap=c.attn_logit_softcapping,
            qkv_bias=c.attention_bias,
            o_bias=c.attention_bias,
            q_norm=norm(c, c.head_dim) if c.qk_norm else None,
            k_norm=norm(c, c.head_dim) if c.qk_norm else None,
            sliding_window=window,
        )
        self.post_attention_layernorm = norm(c, c.hidden_size)
        self.pre_feedforward_layernorm = norm(c, c.hidden_size)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, block * mesh.shape[TP], activation=geglu)
        self.post_feedforward_layernorm = norm(c, c.hidden_size)
        self.cache_shape = self.self_attn.cache_shape

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        y, cache = self.self_attn(self.input_layernorm(x), cache, context)
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), cache


def norm(config: GemmaConfig, size: int) -> RMSNorm:
    return RMSNorm(size, config.rms_norm_eps, config.norm_offset)
