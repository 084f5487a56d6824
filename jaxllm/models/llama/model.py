"""Llama and the models that share its architecture: Mistral, Mixtral, Qwen2, Qwen3 (and their MoE), Phi-3."""

from flax import nnx
from jax.sharding import Mesh

from jaxllm.layers.attention import Attention
from jaxllm.layers.decoder import Block, Decoder
from jaxllm.layers.experts import MoE, softmax_top_k
from jaxllm.layers.heads import place_heads
from jaxllm.layers.mlp import MLP
from jaxllm.models.llama.config import LayerConfig, LlamaConfig
from jaxllm.parallel import EP, TP


def llama(config: LlamaConfig, mesh: Mesh, block: int = 1) -> Decoder:
    """A model of this family, its parameters declared.

    Args:
        mesh: what it is cut over.
        block: positions of a ROW matrix's columns that cannot be cut apart, from the formats of the checkpoint.
    """
    blocks = [
        Block(
            config.hidden_size,
            config.rms_norm_eps,
            attention(config, layer, mesh, block),
            mlp(config, layer, mesh, block),
        )
        for layer in config.layers
    ]
    return Decoder(config, blocks, mesh)


def attention(config: LlamaConfig, layer: LayerConfig, mesh: Mesh, block: int) -> Attention:
    c = config
    num_heads = layer.num_attention_heads, layer.num_key_value_heads
    return Attention(
        c.hidden_size,
        *num_heads,
        c.head_dim,
        c.v_head_dim,
        place_heads(*num_heads, mesh.shape[TP], c.v_head_dim, block),
        qkv_bias=c.qkv_bias,
        o_bias=c.o_bias,
        norm_eps=c.rms_norm_eps if c.qk_norm else None,
        sliding_window=layer.sliding_window,
    )


def mlp(config: LlamaConfig, layer: LayerConfig, mesh: Mesh, block: int) -> nnx.Module:
    tp, moe = mesh.shape[TP], config.moe
    if not layer.sparse:
        return MLP(config.hidden_size, layer.intermediate_size, block * tp, config.mlp_bias)
    return MoE(
        config.hidden_size,
        moe.num_experts,
        moe.moe_intermediate_size,
        softmax_top_k(moe.num_experts_per_tok, moe.norm_topk_prob),
        block,
        tp,
        mesh.shape[EP],
        moe.shared_expert_intermediate_size,
        shared_gate=moe.shared_expert_intermediate_size is not None,
    )
