"""DeepSeek-V2 and V3: latent attention, and experts chosen within groups."""

from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxllm.layers.decoder import Block, Decoder
from jaxllm.layers.experts import MoE, grouped_top_k
from jaxllm.layers.heads import place_heads
from jaxllm.layers.mla import LatentAttention
from jaxllm.layers.mlp import MLP
from jaxllm.models.deepseek.config import DeepseekConfig
from jaxllm.parallel import CACHE, EP, TP


def deepseek(config: DeepseekConfig, mesh: Mesh, block: int = 1, per_head_cache: bool = False) -> Decoder:
    """A model of this family, its parameters declared.

    Args:
        mesh: what it is cut over.
        block: positions of a ROW matrix's columns that cannot be cut apart, from the formats of the checkpoint.
        per_head_cache: whether the cache holds every head's keys and values instead of latents.
    """
    c = config
    blocks = [
        Block(c.hidden_size, c.rms_norm_eps, attention(c, mesh, block, per_head_cache), mlp(c, i, mesh, block))
        for i in range(c.num_hidden_layers)
    ]
    return Decoder(c, blocks, mesh, CACHE if per_head_cache else PartitionSpec())


def attention(config: DeepseekConfig, mesh: Mesh, block: int, per_head_cache: bool) -> LatentAttention:
    c = config
    return LatentAttention(
        c.hidden_size,
        c.num_attention_heads,
        c.q_lora_rank,
        c.kv_lora_rank,
        c.qk_nope_head_dim,
        c.qk_rope_head_dim,
        c.v_head_dim,
        c.softmax_scale,
        place_heads(c.num_attention_heads, c.num_attention_heads, mesh.shape[TP], c.v_head_dim, block),
        bias=c.attention_bias,
        per_head_cache=per_head_cache,
        split_kv_b=c.split_kv_b,
    )


def mlp(config: DeepseekConfig, index: int, mesh: Mesh, block: int) -> nnx.Module:
    c, tp = config, mesh.shape[TP]
    if index < c.first_k_dense_replace:
        return MLP(c.hidden_size, c.intermediate_size, block * tp)
    route = grouped_top_k(
        c.num_experts_per_tok,
        c.scoring_func,
        c.norm_topk_prob,
        c.n_group,
        c.topk_group,
        c.group_score,
        c.routed_scaling_factor,
    )
    shared = c.n_shared_experts * c.moe_intermediate_size or None
    sizes = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    return MoE(*sizes, route, block, tp, mesh.shape[EP], shared, correction_bias=c.has_correction_bias)
