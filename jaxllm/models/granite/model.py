"""Granite 3: Llama with scaled embeddings, scores, residuals and logits."""

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxllm.layers.attention import Attention
from jaxllm.layers.cache import LayerCache
from jaxllm.layers.context import Context
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.heads import place_heads
from jaxllm.layers.mlp import MLP
from jaxllm.layers.norm import RMSNorm
from jaxllm.models.granite.config import GraniteConfig
from jaxllm.parallel import TP


def granite(config: GraniteConfig, mesh: Mesh, block: int = 1) -> Decoder:
    """A model of this family with its parameters declared.

    Args:
        mesh: the mesh that it is sharded over.
        block: how many columns of a ROW matrix belong to one block, from the formats of the checkpoint.
    """
    c = config
    return Decoder(
        c,
        [GraniteBlock(c, mesh, block) for _ in range(c.num_hidden_layers)],
        RMSNorm(c.hidden_size, c.rms_norm_eps),
        mesh,
        embedding_scale=c.embedding_multiplier,
        logit_scale=1 / c.logits_scaling,
    )


class GraniteBlock(nnx.Module):
    """Attention, then a feed-forward block. Each reads the normalised residual stream; its scaled result is added."""

    cache_of: int | None = None

    def __init__(self, config: GraniteConfig, mesh: Mesh, block: int) -> None:
        c, heads = config, (config.num_attention_heads, config.num_key_value_heads)
        self.rope, self.residual_multiplier = c.rope, c.residual_multiplier
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(
            c.hidden_size,
            *heads,
            c.head_dim,
            c.head_dim,
            place_heads(*heads, mesh.shape[TP], c.head_dim, block),
            scale=c.attention_multiplier,
            qkv_bias=c.attention_bias,
            o_bias=c.attention_bias,
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, block * mesh.shape[TP], c.mlp_bias)
        self.cache_shape = self.self_attn.cache_shape

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        y, cache = self.self_attn(self.input_layernorm(x), cache, context)
        x = x + self.residual_multiplier * y
        return x + self.residual_multiplier * self.mlp(self.post_attention_layernorm(x)), cache
