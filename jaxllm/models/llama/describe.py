"""The Llama family's configurations as a config.json or as GGUF metadata: the inverse of config.py."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxllm.errors import InputError
from jaxllm.models.llama.config import GGUF_ARCHITECTURES, MODEL_TYPES, LlamaConfig
from jaxllm.models.rope_describing import gguf_rope_settings, hf_rope_settings

_GGUF_KINDS = {"mistral": "llama", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
_HF_KINDS = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
_CLASSES = {kind: "".join(map(str.capitalize, kind.split("_"))) + "ForCausalLM" for kind in MODEL_TYPES}


def as_gguf(config: LlamaConfig) -> LlamaConfig:
    """The same with the name of its architecture in GGUF files."""
    return replace(config, model_type=_GGUF_KINDS.get(config.model_type, config.model_type))


def as_hf(config: LlamaConfig) -> LlamaConfig:
    """The same with the name of its type in a config.json. What is llama in GGUF files may be Mistral or Mixtral. The
    size of a dense block, of which a config.json has one, is also given to layers that have none."""
    if config.model_type in MODEL_TYPES and config.model_type not in GGUF_ARCHITECTURES:
        return config
    kind, moe = _HF_KINDS.get(config.model_type, config.model_type), config.moe
    if kind == "llama" and moe is not None:
        kind = "mixtral"
    elif kind == "llama" and any(layer.sliding_window for layer in config.layers):
        kind = "mistral"
    if moe is not None:
        sizes = [layer.intermediate_size for layer in config.layers if not layer.sparse]
        sizes += [layer.intermediate_size or moe.moe_intermediate_size for layer in config.layers]
        width = moe.moe_intermediate_size if kind == "mixtral" else sizes[0]
        layers = (replace(layer, intermediate_size=width) if layer.sparse else layer for layer in config.layers)
        config = replace(config, layers=tuple(layers))
    return replace(config, model_type=kind)


def gguf_metadata(config: LlamaConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata from a configuration that `as_gguf` gave."""
    c, layers, moe = config, config.layers, config.moe
    entries: dict[str, Any] = {
        "block_count": len(layers),
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": _one_or_each([layer.intermediate_size for layer in layers]),
        "attention.head_count": _one_or_each([layer.num_attention_heads for layer in layers]),
        "attention.head_count_kv": _one_or_each([layer.num_key_value_heads for layer in layers]),
        "attention.key_length": c.head_dim,
        "attention.value_length": c.v_head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "vocab_size": c.vocab_size,
    }
    if windows := [layer.sliding_window for layer in layers if layer.sliding_window]:
        entries["attention.sliding_window"] = windows[0]
    if moe is not None:
        entries |= {"expert_count": moe.num_experts, "expert_used_count": moe.num_experts_per_tok}
        entries["expert_feed_forward_length"] = moe.moe_intermediate_size
        if moe.shared_expert_intermediate_size is not None:
            entries["expert_shared_feed_forward_length"] = moe.shared_expert_intermediate_size
        if moe.norm_topk_prob == (c.model_type == "qwen2moe"):  # each architecture has its own default
            entries["expert_weights_norm"] = moe.norm_topk_prob
    entries |= gguf_rope_settings(rotary, c.rope)
    return {"general.architecture": c.model_type} | {f"{c.model_type}.{key}": value for key, value in entries.items()}


def hf_config(config: LlamaConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json from a configuration that `as_hf` gave."""
    c, first, kind = config, config.layers[0], config.model_type
    if c.rope.rotary_dim != c.head_dim and kind != "phi3":
        raise InputError(f"only {c.rope.rotary_dim} of {c.head_dim} dimensions are rotary, which {kind} cannot have")
    entries: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": first.intermediate_size,
        "num_hidden_layers": len(c.layers),
        "num_attention_heads": first.num_attention_heads,
        "num_key_value_heads": first.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
    }
    if kind in ("llama", "qwen3", "qwen3_moe"):
        entries["attention_bias"] = c.o_bias
    if kind == "llama":
        entries["mlp_bias"] = c.mlp_bias
    return entries | _hf_windows(c) | _hf_experts(c) | hf_rope_settings(rotary, c.rope, c.head_dim)


def _hf_windows(config: LlamaConfig) -> dict[str, Any]:
    windows, kind = [layer.sliding_window for layer in config.layers], config.model_type
    window = next(filter(None, windows), None)
    if kind == "llama":
        return {}
    if not kind.startswith("qwen"):
        return {"sliding_window": window}
    entries = {"sliding_window": window, "use_sliding_window": window is not None}
    if window is None or kind == "qwen3_moe":
        return entries
    types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    return entries | {"layer_types": types, "max_window_layers": windows.index(window)}


def _hf_experts(config: LlamaConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    entries: dict[str, Any] = {"num_experts_per_tok": moe.num_experts_per_tok}
    if config.model_type == "mixtral":
        return entries | {"num_local_experts": moe.num_experts}
    entries |= {"num_experts": moe.num_experts, "moe_intermediate_size": moe.moe_intermediate_size}
    entries |= {"norm_topk_prob": moe.norm_topk_prob, "decoder_sparse_step": 1}
    entries["mlp_only_layers"] = [i for i, layer in enumerate(config.layers) if not layer.sparse]
    if moe.shared_expert_intermediate_size is not None:
        entries["shared_expert_intermediate_size"] = moe.shared_expert_intermediate_size
    return entries


def _one_or_each(values: list[int]) -> int | list[int]:
    return values if len(set(values)) > 1 else values[0]
