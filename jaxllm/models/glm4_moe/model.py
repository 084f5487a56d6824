"""GLM-4.5: dense layers, then DeepSeek-V3's experts; half of each head is rotated."""

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxllm.layers.attention import Attention
from jaxllm.layers.cache import LayerCache
from jaxllm.layers.context import Context
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.experts import MoE, TopKRouter
from jaxllm.layers.heads import place_heads
from jaxllm.layers.mlp import MLP
from jaxllm.layers.norm import RMSNorm
from jaxllm.models.glm4_moe.config import Glm4MoeConfig
from jaxllm.parallel import EP, TP


def glm4_moe(config: Glm4MoeConfig, mesh: Mesh, block: int = 1) -> Decoder:
    """A model of this family with its parameters declared.

    Args:
        mesh: the mesh that it is sharded over.
        block: how many columns of a ROW matrix belong to one block, from the formats of the checkpoint.
    """
    c = config
    blocks = [Glm4MoeBlock(c, i, mesh, block) for i in range(c.num_hidden_layers)]
    return Decoder(c, blocks, RMSNorm(c.hidden_size, c.rms_norm_eps), mesh)


class Glm4MoeBlock(nnx.Module):
    """Attention, then a feed-forward block. Each reads the normalised residual stream and adds to it."""

    cache_of: int | None = None

    def __init__(self, config: Glm4MoeConfig, index: int, mesh: Mesh, block: int) -> None:
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
            q_norm=RMSNorm(c.head_dim, c.rms_norm_eps) if c.use_qk_norm else None,
            k_norm=RMSNorm(c.head_dim, c.rms_norm_eps) if c.use_qk_norm else None,
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = feed_forward(c, index, mesh, block)
        self.cache_shape = self.self_attn.cache_shape

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        y, cache = self.self_attn(self.input_layernorm(x), cache, context)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


def feed_forward(config: Glm4MoeConfig, index: int, mesh: Mesh, block: int) -> nnx.Module:
    c, tp = config, mesh.shape[TP]
    if index < c.first_k_dense_replace:
        return MLP(c.hidden_size, c.intermediate_size, block * tp)
    groups, scale = (c.n_group, c.topk_group), c.routed_scaling_factor
    route = TopKRouter(c.num_experts_per_tok, c.norm_topk_prob, "sigmoid", *groups, "top2", scale)
    shared = c.n_shared_experts * c.moe_intermediate_size or None
    sizes = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    return MoE(*sizes, route, block, tp, mesh.shape[EP], shared, correction_bias=True)
