"""Tensor names of GLM-4.5 in Hugging Face checkpoints and in GGUF files."""

from collections.abc import Mapping

from jaxllm.formats.base import Weight
from jaxllm.models.glm4_moe.config import Glm4MoeConfig
from jaxllm.models.names import (
    GGUF_COMMON,
    GGUF_EXPERTS,
    GGUF_IGNORED,
    GGUF_MLP,
    GGUF_O,
    GGUF_QK,
    GGUF_QK_NORMS,
    GGUF_V,
    HF_EXPERTS,
    HF_IGNORED,
    HF_LLAMA,
    HF_QK_NORMS,
    expert_rules,
)
from jaxllm.models.rule import Rule, fixed


def hf_rules(config: Glm4MoeConfig, tensors: Mapping[str, Weight]) -> list[Rule]:
    stacks = expert_rules(r"model\.layers\.(\d+)\.mlp\.", config.hidden_size, config.moe_intermediate_size, tensors)
    return [*HF_LLAMA, HF_QK_NORMS, *HF_EXPERTS, *stacks]


gguf_rules = fixed(
    *GGUF_COMMON,
    GGUF_QK,
    GGUF_V,
    GGUF_O,
    GGUF_QK_NORMS,
    Rule(r"blk\.(\d+)\.post_attention_norm\.weight", r"layers.\1.post_attention_layernorm.weight"),
    GGUF_MLP,
    *GGUF_EXPERTS,
)


# The layer for multi-token prediction comes after the others.
def hf_ignored(config: Glm4MoeConfig) -> list[str]:
    return [rf"model\.layers\.{config.num_hidden_layers}\..*", *HF_IGNORED]


def gguf_ignored(config: Glm4MoeConfig) -> list[str]:
    return [rf"blk\.{config.num_hidden_layers}\..*", *GGUF_IGNORED]
