"""DeepSeek's configurations as a config.json or as GGUF metadata: the inverse of config.py."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxllm.entries import Entries
from jaxllm.layers.rope import yarn_scale
from jaxllm.models.deepseek.config import (
    GGUF_ARCHITECTURES,
    GGUF_SCORING,
    MODEL_TYPES,
    DeepseekConfig,
    demo_args,
    demo_rotary,
)
from jaxllm.models.rope_describing import gguf_rope_settings, hf_rope_settings


def as_gguf(config: DeepseekConfig) -> DeepseekConfig:
    """The same as files of architecture deepseek2 have it: rotary parts pair neighbours, and kv_b is two stacks, except
    in GGUF files from before April 2025."""
    if config.model_type in GGUF_ARCHITECTURES:
        return config
    return replace(config, model_type="deepseek2", interleaved=True, split_kv_b=True)


def as_hf(config: DeepseekConfig) -> DeepseekConfig:
    """The same with the name of its type in a config.json. Only V3's routers have a correction bias."""
    kind = config.model_type
    if kind not in MODEL_TYPES:
        kind = "deepseek_v3" if config.has_correction_bias else "deepseek_v2"
    return replace(config, model_type=kind, split_kv_b=False)


def gguf_metadata(config: DeepseekConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata from a configuration that `as_gguf` gave."""
    c, rank, rope = config, config.kv_lora_rank, config.qk_rope_head_dim
    entries: dict[str, Any] = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_attention_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.kv_lora_rank": rank,
        "attention.key_length": c.qk_nope_head_dim + rope,
        "attention.value_length": c.v_head_dim,
        "leading_dense_block_count": c.first_k_dense_replace,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_group_count": c.n_group,
        "expert_group_used_count": c.topk_group,
        "expert_weights_scale": float(c.routed_scaling_factor),
        "expert_weights_norm": c.norm_topk_prob,
        "expert_gating_func": {name: number for number, name in GGUF_SCORING.items()}[c.scoring_func],
    }
    if c.q_lora_rank is not None:
        entries["attention.q_lora_rank"] = c.q_lora_rank
    if c.split_kv_b:  # one head of latents serves all
        entries |= {f"{key}_mla": entries[key] for key in ("attention.key_length", "attention.value_length")}
        entries |= {"attention.key_length": rank + rope, "attention.value_length": rank, "attention.head_count_kv": 1}
    if mscale := rotary.get("mscale_all_dim"):
        usual = replace(c.rope, scale=yarn_scale(float(rotary["factor"])))  # the softmax has it instead
        entries |= gguf_rope_settings(rotary, usual) | {"rope.scaling.yarn_log_multiplier": 0.1 * mscale}
    else:
        entries |= gguf_rope_settings(rotary, c.rope)
    return {"general.architecture": c.model_type} | {f"{c.model_type}.{key}": value for key, value in entries.items()}


def hf_config(config: DeepseekConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json from a configuration that `as_hf` gave."""
    c, v3 = config, config.model_type == "deepseek_v3"
    grouped = "group_limited_greedy" if c.n_group > 1 else "greedy"
    entries: dict[str, Any] = {
        "architectures": [f"DeepseekV{3 if v3 else 2}ForCausalLM"],
        "model_type": c.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "moe_intermediate_size": c.moe_intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "first_k_dense_replace": c.first_k_dense_replace,
        "moe_layer_freq": 1,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_attention_heads,
        "n_routed_experts": c.n_routed_experts,
        "n_shared_experts": c.n_shared_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "n_group": c.n_group,
        "topk_group": c.topk_group,
        "topk_method": "noaux_tc" if v3 else grouped,
        "scoring_func": c.scoring_func,
        "norm_topk_prob": c.norm_topk_prob,
        "routed_scaling_factor": c.routed_scaling_factor,
        "q_lora_rank": c.q_lora_rank,
        "kv_lora_rank": c.kv_lora_rank,
        "qk_nope_head_dim": c.qk_nope_head_dim,
        "qk_rope_head_dim": c.qk_rope_head_dim,
        "v_head_dim": c.v_head_dim,
        "hidden_act": "silu",
        "attention_bias": c.attention_bias,
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
        "rope_interleave": c.interleaved,
    }
    return entries | hf_rope_settings(rotary, c.rope, c.qk_rope_head_dim)


def demo_rotary_settings(args: Mapping[str, object], tensors: Collection[str] = ()) -> dict[str, Any]:
    """The rotary settings in the demo's ModelArgs."""
    settings = demo_rotary(Entries(demo_args(args), "ModelArgs"))
    kept = ("rope_type", "rope_theta") if settings["rope_type"] == "default" else settings
    return {key: settings[key] for key in kept}
