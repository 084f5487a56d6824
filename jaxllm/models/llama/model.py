"""Llama and the models that share its architecture: Mistral, Mixtral, Qwen2, Qwen3 (and their MoE), Phi-3."""

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
from jaxllm.models.llama.config import LayerConfig, LlamaConfig
from jaxllm.parallel import EP, TP


def llama(config: LlamaConfig, mesh: Mesh, block: int = 1) -> Decoder:
    """A model of this family with its parameters declared.

    Args:
        mesh: the mesh that it is sharded over.
        block: how many columns of a ROW matrix belong to one block, from the formats of the checkpoint.
    """
    blocks = [LlamaBlock(config, layer, mesh, block) for layer in config.layers]
    return Decoder(config, blocks, RMSNorm(config.hidden_size, config.rms_norm_eps), mesh)


class LlamaBlock(nnx.Module):
    """Attention, then a feed-forward block. Each reads the normalised residual stream and adds to it."""

    cache_of: int | None = None

    def __init__(self, config: LlamaConfig, layer: LayerConfig, mesh: Mesh, block: int) -> None:
        c, heads = config, (layer.num_attention_heads, layer.num_key_value_heads)
        self.rope = c.rope
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(
            c.hidden_size,
            *heads,
            c.head_dim,
            c.v_head_dim,
            place_heads(*heads, mesh.shape[TP], c.v_head_dim, block),
            qkv_bias=c.qkv_bias,
            o_bias=c.o_bias,
            q_norm=RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None,
            k_norm=RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None,
            sliding_window=layer.sliding_window,
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = feed_forward(c, layer, mesh, block)
        self.cache_shape = self.self_attn.cache_shape

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        y, cache = self.self_attn(self.input_layernorm(x), cache, context)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


def feed_forward(config: LlamaConfig, layer: LayerConfig, mesh: Mesh, block: int) -> nnx.Module:
    tp, moe = mesh.shape[TP], config.moe
    if not layer.sparse or moe is None:
        return MLP(config.hidden_size, layer.intermediate_size, block * tp, config.mlp_bias)
    return MoE(
        config.hidden_size,
        moe.num_experts,
        moe.moe_intermediate_size,
        TopKRouter(moe.num_experts_per_tok, moe.norm_topk_prob),
        block,
        tp,
        mesh.shape[EP],
        moe.shared_expert_intermediate_size,
        shared_gate=moe.shared_expert_intermediate_size is not None,
    )
