"""GPT-OSS: attention sinks, every other layer with a sliding window, and experts with biases and a clamped SwiGLU."""

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxllm.layers.attention import Attention
from jaxllm.layers.cache import LayerCache
from jaxllm.layers.context import Context
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.experts import MoE, TopKRouter
from jaxllm.layers.heads import place_heads
from jaxllm.layers.mlp import ClampedSwiGLU
from jaxllm.layers.norm import RMSNorm
from jaxllm.models.gpt_oss.config import GptOssConfig
from jaxllm.parallel import EP, TP


def gpt_oss(config: GptOssConfig, mesh: Mesh, block: int = 1) -> Decoder:
    """A model of this family with its parameters declared.

    Args:
        mesh: the mesh that it is sharded over.
        block: how many columns of a ROW matrix belong to one block, from the formats of the checkpoint.
    """
    blocks = [GptOssBlock(config, window, mesh, block) for window in config.sliding_windows]
    return Decoder(config, blocks, RMSNorm(config.hidden_size, config.rms_norm_eps), mesh)


class GptOssBlock(nnx.Module):
    """Attention, then experts. Each reads the normalised residual stream and adds to it."""

    cache_of: int | None = None

    def __init__(self, config: GptOssConfig, window: int | None, mesh: Mesh, block: int) -> None:
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
            o_bias=c.attention_bias,
            sliding_window=window,
            sinks=True,
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MoE(
            c.hidden_size,
            c.num_local_experts,
            c.intermediate_size,
            TopKRouter(c.num_experts_per_tok, normalize=True),  # equals a softmax over only the chosen experts
            block,
            mesh.shape[TP],
            mesh.shape[EP],
            bias=True,
            activation=ClampedSwiGLU(c.swiglu_alpha, c.swiglu_limit),
        )
        self.cache_shape = self.self_attn.cache_shape

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        y, cache = self.self_attn(self.input_layernorm(x), cache, context)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache
