"""Tensor names of GLM-4 in Hugging Face checkpoints and in GGUF files. Both fuse gate and up, and pair neighbours."""

import re

import numpy as np

from jaxllm.models.glm4.config import Glm4Config
from jaxllm.models.names import (
    GGUF_COMMON,
    GGUF_FFN_NORM,
    GGUF_O,
    GGUF_QK_PAIRED,
    GGUF_V,
    HF_COMMON,
    HF_QK_PAIRED,
    HF_VO,
)
from jaxllm.models.rule import Rows, Rule, fixed

_M, _G = r"model\.layers\.(\d+)\.", r"blk\.(\d+)\."
_L, _MLP = r"layers.\1.", r"layers.\1.mlp."


def _half(which: int) -> Rows:
    """The gate (0) or up (1) half of a fused tensor's rows."""

    def rows(config: Glm4Config, m: re.Match) -> np.ndarray:
        return np.arange(config.intermediate_size) + which * config.intermediate_size

    return rows


hf_rules = fixed(
    *HF_COMMON,
    HF_QK_PAIRED,
    HF_VO,
    Rule(_M + r"(post_self_attn|post_mlp)_layernorm\.weight", _L + r"\2_layernorm.weight"),
    Rule(_M + r"mlp\.gate_up_proj\.weight", _MLP + "gate_proj.weight", _half(0)),
    Rule(_M + r"mlp\.gate_up_proj\.weight", _MLP + "up_proj.weight", _half(1)),
    Rule(_M + r"mlp\.down_proj\.weight", _MLP + "down_proj.weight"),
)
gguf_rules = fixed(
    *GGUF_COMMON,
    GGUF_QK_PAIRED,
    GGUF_V,
    GGUF_O,
    Rule(_G + r"post_attention_norm\.weight", _L + "post_self_attn_layernorm.weight"),
    GGUF_FFN_NORM,
    Rule(_G + r"ffn_up\.weight", _MLP + "gate_proj.weight", _half(0)),
    Rule(_G + r"ffn_up\.weight", _MLP + "up_proj.weight", _half(1)),
    Rule(_G + r"ffn_down\.weight", _MLP + "down_proj.weight"),
    Rule(_G + r"post_ffw_norm\.weight", _L + "post_mlp_layernorm.weight"),
)
