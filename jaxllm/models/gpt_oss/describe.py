"""GPT-OSS's configurations as a config.json or as GGUF metadata: the inverse of config.py."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxllm.formats.base import Weight
from jaxllm.models import sizes
from jaxllm.models.gpt_oss.config import GptOssConfig, with_defaults
from jaxllm.models.rope_describing import gguf_rotary, hf_rotary


def as_gguf(config: GptOssConfig) -> GptOssConfig:
    return replace(config, model_type="gpt-oss")


def as_hf(config: GptOssConfig) -> GptOssConfig:
    return replace(config, model_type="gpt_oss")


def rotary_of_hf(description: Mapping[str, object], tensors: Collection[str] = ()) -> dict[str, Any]:
    return hf_rotary(with_defaults(description))


def rotary_of_gguf(metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> dict[str, Any]:
    """GGUF has no key for it, but the models were trained without rounding the ends of YaRN's ramp."""
    settings = gguf_rotary(metadata, tensors)
    return settings | ({"truncate": False} if settings["rope_type"] == "yarn" else {})


def gguf_metadata(config: GptOssConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata from a configuration that `as_gguf` gave."""
    c = config
    entries = {
        "attention.sliding_window": next(filter(None, c.sliding_windows), 1),
        "expert_count": c.num_local_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_feed_forward_length": c.intermediate_size,
    }
    return sizes.gguf_metadata(c, rotary, entries)


def hf_config(config: GptOssConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json from a configuration that `as_hf` gave."""
    c = config
    entries = {
        "num_local_experts": c.num_local_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "sliding_window": next(filter(None, c.sliding_windows), 1),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in c.sliding_windows],
        "swiglu_alpha": c.swiglu_alpha,
        "swiglu_limit": c.swiglu_limit,
    }
    return sizes.hf_config(c, rotary, "GptOssForCausalLM", entries)
