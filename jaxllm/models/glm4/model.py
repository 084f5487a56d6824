"""GLM-4 (GLM-4-0414): norms before and after each block, and half of each head rotated."""

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
from jaxllm.models.glm4.config import Glm4Config
from jaxllm.parallel import TP


def glm4(config: Glm4Config, mesh: Mesh, block: int = 1) -> Decoder:
    """A model of this family with its parameters declared.

    Args:
        mesh: the mesh that it is sharded over.
        block: how many columns of a ROW matrix belong to one block, from the formats of the checkpoint.
    """
    c = config
    blocks = [Glm4Block(c, mesh, block) for _ in range(c.num_hidden_layers)]
    return Decoder(c, blocks, RMSNorm(c.hidden_size, c.rms_norm_eps), mesh)


class Glm4Block(nnx.Module):
    """Attention, then a feed-forward block. What each reads of the residual stream and adds to it is normalised."""

    cache_of: int | None = None

    def __init__(self, config: Glm4Config, mesh: Mesh, block: int) -> None:
        c, heads = config, (config.num_attention_heads, config.num_key_value_heads)
        self.rope = c.rope
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(
            c.hidden_size,
            *heads,
            c.head_dim,
            c.head_dim,
            place_heads(*heads, mesh.shape[TP], c.head_dim, block),
            qkv_bias=c.attention_bias,
        )
        self.post_self_attn_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, block * mesh.shape[TP])
        self.post_mlp_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.cache_shape = self.self_attn.cache_shape

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        y, cache = self.self_attn(self.input_layernorm(x), cache, context)
        x = x + self.post_self_attn_layernorm(y)
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x))), cache
