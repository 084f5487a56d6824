"""GPT-OSS's configurations as a config.json or as GGUF metadata: the inverse of config.py."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxllm.formats.base import Weight
from jaxllm.models.gpt_oss.config import GptOssConfig, with_rope
from jaxllm.models.rope_describing import gguf_rope_settings, gguf_rotary, hf_rope_settings, hf_rotary


def as_gguf(config: GptOssConfig) -> GptOssConfig:
    return replace(config, model_type="gpt-oss")


def as_hf(config: GptOssConfig) -> GptOssConfig:
    return replace(config, model_type="gpt_oss")


def rotary_of_hf(description: Mapping[str, object], tensors: Collection[str] = ()) -> dict[str, Any]:
    return hf_rotary(with_rope(description))


def rotary_of_gguf(metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> dict[str, Any]:
    """GGUF has no key for it, but the models were trained without rounding the ends of YaRN's ramp."""
    settings = gguf_rotary(metadata, tensors)
    return settings | ({"truncate": False} if settings["rope_type"] == "yarn" else {})


def gguf_metadata(config: GptOssConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata from a configuration that `as_gguf` gave."""
    c = config
    entries: dict[str, Any] = {
        "block_count": len(c.sliding_windows),
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.sliding_window": next(filter(None, c.sliding_windows), 1),
        "expert_count": c.num_local_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_feed_forward_length": c.intermediate_size,
    }
    entries |= gguf_rope_settings(rotary, c.rope)
    return {"general.architecture": c.model_type} | {f"{c.model_type}.{key}": value for key, value in entries.items()}


def hf_config(config: GptOssConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json from a configuration that `as_hf` gave."""
    c = config
    entries: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": c.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": len(c.sliding_windows),
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "num_local_experts": c.num_local_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "sliding_window": next(filter(None, c.sliding_windows), 1),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in c.sliding_windows],
        "hidden_act": "silu",
        "attention_bias": c.attention_bias,
        "swiglu_alpha": c.swiglu_alpha,
        "swiglu_limit": c.swiglu_limit,
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
    }
    return entries | hf_rope_settings(rotary, c.rope, c.head_dim)
