"""What the tensors of DeepSeek-V2 and V3 are called in Hugging Face checkpoints."""

import re

import numpy as np

from jaxllm.checkpoint.rules import Rule
from jaxllm.layers.rope import half_split_rows
from jaxllm.models.deepseek_config import DeepseekConfig


def _query_rows(config: DeepseekConfig, m: re.Match) -> np.ndarray:
    """Each head's rotary part, which comes after the other, in the half-split order."""
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    within = np.concatenate([np.arange(nope), nope + _rotary(config)])
    return (np.arange(heads)[:, None] * (nope + rope) + within).reshape(-1)


def _latent_rows(config: DeepseekConfig, m: re.Match) -> np.ndarray:
    """The latent, then the rotary key in the half-split order."""
    return np.concatenate([np.arange(config.kv_lora_rank), config.kv_lora_rank + _rotary(config)])


def _rotary(config: DeepseekConfig) -> np.ndarray:
    size = config.qk_rope_head_dim
    return half_split_rows(1, size, size) if config.interleaved else np.arange(size)


_M, _L, _A = r"model\.layers\.(\d+)\.", r"layers.\1.", r"layers.\1.self_attn."

HF_RULES = [
    Rule(r"model\.embed_tokens\.weight", "embed_tokens.weight"),
    Rule(r"model\.norm\.weight", "norm.weight"),
    Rule(r"lm_head\.weight", "lm_head.weight"),
    Rule(_M + r"(input_layernorm|post_attention_layernorm)\.weight", _L + r"\2.weight"),
    Rule(_M + r"self_attn\.(q_proj|q_b_proj)\.weight", _A + r"\2.weight", _query_rows),
    Rule(_M + r"self_attn\.kv_a_proj_with_mqa\.(weight|bias)", _A + r"kv_a_proj_with_mqa.\2", _latent_rows),
    Rule(_M + r"self_attn\.(q_a_proj|kv_b_proj|o_proj)\.(weight|bias)", _A + r"\2.\3"),
    Rule(_M + r"self_attn\.(q_a_layernorm|kv_a_layernorm)\.weight", _A + r"\2.weight"),
    Rule(_M + r"mlp\.(gate|up|down)_proj\.weight", _L + r"mlp.\2_proj.weight"),
    Rule(_M + r"mlp\.gate\.weight", _L + "mlp.gate.weight"),
    Rule(_M + r"mlp\.gate\.e_score_correction_bias", _L + "mlp.e_score_correction_bias"),
    Rule(_M + r"mlp\.experts\.(?P<expert>\d+)\.(gate|up|down)_proj\.weight", _L + r"mlp.experts.\3_proj"),
    Rule(_M + r"mlp\.shared_experts\.(gate|up|down)_proj\.weight", _L + r"mlp.shared_expert.\2_proj.weight"),
]


def hf_ignored(config: DeepseekConfig) -> list[str]:
    """The layer after the last, which predicts a second token (MTP), and buffers that older checkpoints hold."""
    return [rf"model\.layers\.{config.num_hidden_layers}\..*", r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]
