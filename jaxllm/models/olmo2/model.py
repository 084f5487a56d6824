"""OLMo 2: each block's result is normalised instead of its input, and queries and keys are, over all heads together."""

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxllm.layers.attention import Attention
from jaxllm.layers.cache import LayerCache
from jaxllm.layers.context import Context
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.heads import place_heads
from jaxllm.layers.mlp import MLP
from jaxllm.layers.norm import QKNorm, RMSNorm
from jaxllm.models.olmo2.config import Olmo2Config
from jaxllm.parallel import TP


def olmo2(config: Olmo2Config, mesh: Mesh, block: int = 1) -> Decoder:
    """A model of this family with its parameters declared.

    Args:
        mesh: the mesh that it is sharded over.
        block: how many columns of a ROW matrix belong to one block, from the formats of the checkpoint.
    """
    c = config
    blocks = [Olmo2Block(c, mesh, block) for _ in range(c.num_hidden_layers)]
    return Decoder(c, blocks, RMSNorm(c.hidden_size, c.rms_norm_eps), mesh)


class Olmo2Block(nnx.Module):
    """Attention, then a feed-forward block. Each reads the residual stream; its normalised result is added."""

    cache_of: int | None = None

    def __init__(self, config: Olmo2Config, mesh: Mesh, block: int) -> None:
        c, heads = config, (config.num_attention_heads, config.num_key_value_heads)
        placed = place_heads(*heads, mesh.shape[TP], c.head_dim, block)
        self.rope = c.rope
        self.self_attn = Attention(
            c.hidden_size,
            *heads,
            c.head_dim,
            c.head_dim,
            placed,
            qkv_bias=c.attention_bias,
            o_bias=c.attention_bias,
            qk_norm=QKNorm(*heads, c.head_dim, placed, c.rms_norm_eps),
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, block * mesh.shape[TP], c.mlp_bias)
        self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.cache_shape = self.self_attn.cache_shape

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        y, cache = self.self_attn(x, cache, context)
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(x)), cache
