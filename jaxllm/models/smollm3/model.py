"""SmolLM3: Llama with rotary positions in three of four layers."""

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
from jaxllm.models.smollm3.config import SmolLM3Config
from jaxllm.parallel import TP


def smollm3(config: SmolLM3Config, mesh: Mesh, block: int = 1) -> Decoder:
    """A model of this family with its parameters declared.

    Args:
        mesh: the mesh that it is sharded over.
        block: how many columns of a ROW matrix belong to one block, from the formats of the checkpoint.
    """
    c = config
    blocks = [SmolLM3Block(c, rotary, mesh, block) for rotary in c.rotary_layers]
    return Decoder(c, blocks, RMSNorm(c.hidden_size, c.rms_norm_eps), mesh)


class SmolLM3Block(nnx.Module):
    """Attention, then a feed-forward block. Each reads the normalised residual stream and adds to it."""

    cache_of: int | None = None

    def __init__(self, config: SmolLM3Config, rotary: bool, mesh: Mesh, block: int) -> None:
        c, heads = config, (config.num_attention_heads, config.num_key_value_heads)
        self.rope = c.rope if rotary else None
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(
            c.hidden_size,
            *heads,
            c.head_dim,
            c.head_dim,
            place_heads(*heads, mesh.shape[TP], c.head_dim, block),
            qkv_bias=c.attention_bias,
            o_bias=c.attention_bias,
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, block * mesh.shape[TP], c.mlp_bias)
        self.cache_shape = self.self_attn.cache_shape

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        y, cache = self.self_attn(self.input_layernorm(x), cache, context)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache
