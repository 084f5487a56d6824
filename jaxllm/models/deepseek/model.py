"""DeepSeek-V2 and V3: latent attention, and experts chosen within groups."""

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxllm.layers.cache import LayerCache
from jaxllm.layers.context import Context
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.experts import MoE, TopKRouter
from jaxllm.layers.heads import place_heads
from jaxllm.layers.mla import LatentAttention, LatentSizes
from jaxllm.layers.mlp import MLP
from jaxllm.layers.norm import RMSNorm
from jaxllm.models.deepseek.config import DeepseekConfig
from jaxllm.parallel import CACHE, EP, ROWS, TP


def deepseek(config: DeepseekConfig, mesh: Mesh, block: int = 1, per_head_cache: bool = False) -> Decoder:
    """A model of this family with its parameters declared.

    Args:
        mesh: the mesh that it is sharded over.
        block: how many columns of a ROW matrix belong to one block, from the formats of the checkpoint.
        per_head_cache: whether the cache holds every head's keys and values instead of latents.
    """
    blocks = [DeepseekBlock(config, i, mesh, block, per_head_cache) for i in range(config.num_hidden_layers)]
    spec = CACHE if per_head_cache else ROWS
    return Decoder(config, blocks, RMSNorm(config.hidden_size, config.rms_norm_eps), mesh, cache_spec=spec)


class DeepseekBlock(nnx.Module):
    """Latent attention, then a feed-forward block. Each reads the normalised residual stream and adds to it."""

    cache_of: int | None = None

    def __init__(self, config: DeepseekConfig, index: int, mesh: Mesh, block: int, per_head_cache: bool) -> None:
        c, heads = config, config.num_attention_heads
        self.rope = c.rope
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = LatentAttention(
            LatentSizes(
                c.hidden_size,
                heads,
                c.q_lora_rank,
                c.kv_lora_rank,
                c.qk_nope_head_dim,
                c.qk_rope_head_dim,
                c.v_head_dim,
            ),
            c.softmax_scale,
            place_heads(heads, heads, mesh.shape[TP], c.v_head_dim, block),
            bias=c.attention_bias,
            per_head_cache=per_head_cache,
            split_kv_b=c.split_kv_b,
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = feed_forward(c, index, mesh, block)
        self.cache_shape = self.self_attn.cache_shape

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        y, cache = self.self_attn(self.input_layernorm(x), cache, context)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


def feed_forward(config: DeepseekConfig, index: int, mesh: Mesh, block: int) -> nnx.Module:
    c, tp = config, mesh.shape[TP]
    if index < c.first_k_dense_replace:
        return MLP(c.hidden_size, c.intermediate_size, block * tp)
    route = TopKRouter(
        c.num_experts_per_tok,
        c.norm_topk_prob,
        c.scoring_func,
        c.n_group,
        c.topk_group,
        c.group_score,
        c.routed_scaling_factor,
    )
    shared = c.n_shared_experts * c.moe_intermediate_size or None
    sizes = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    return MoE(*sizes, route, block, tp, mesh.shape[EP], shared, correction_bias=c.has_correction_bias)
