"""GPT-OSS: attention sinks, every other layer with a sliding window, and experts with biases and a clamped SwiGLU."""

from flax import nnx
from jax.sharding import Mesh

from jaxllm.layers.attention import Attention
from jaxllm.layers.decoder import Block, Decoder
from jaxllm.layers.experts import MoE, softmax_top_k
from jaxllm.layers.heads import place_heads
from jaxllm.layers.mlp import clamped_swiglu
from jaxllm.models.gpt_oss.config import GptOssConfig
from jaxllm.parallel import EP, TP


def gpt_oss(config: GptOssConfig, mesh: Mesh, block: int = 1) -> Decoder:
    """A model of this family, its parameters declared.

    Args:
        mesh: what it is cut over.
        block: positions of a ROW matrix's columns that cannot be cut apart, from the formats of the checkpoint.
    """
    c = config
    blocks = [
        Block(c.hidden_size, c.rms_norm_eps, attention(c, window, mesh, block), mlp(c, mesh, block))
        for window in c.sliding_windows
    ]
    return Decoder(c, blocks, mesh)


def attention(config: GptOssConfig, window: int | None, mesh: Mesh, block: int) -> Attention:
    c = config
    num_heads = c.num_attention_heads, c.num_key_value_heads
    return Attention(
        c.hidden_size,
        *num_heads,
        c.head_dim,
        c.head_dim,
        place_heads(*num_heads, mesh.shape[TP], c.head_dim, block),
        qkv_bias=c.attention_bias,
        o_bias=c.attention_bias,
        sliding_window=window,
        sinks=True,
    )


def mlp(config: GptOssConfig, mesh: Mesh, block: int) -> nnx.Module:
    c = config
    return MoE(
        c.hidden_size,
        c.num_local_experts,
        c.intermediate_size,
        softmax_top_k(c.num_experts_per_tok, normalize=True),  # the same as a softmax over the chosen alone
        block,
        mesh.shape[TP],
        mesh.shape[EP],
        bias=True,
        activation=clamped_swiglu(c.swiglu_alpha, c.swiglu_limit),
    )
