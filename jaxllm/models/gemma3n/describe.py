"""Gemma 3n's configurations as a config.json: the inverse of config.py.

GGUF files are not written: llama.cpp wants keys and values of the layers that have no use for any, and takes the first
20 layers for those that have.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxllm.formats.base import Weight
from jaxllm.models.config import gguf_entries
from jaxllm.models.gemma3n.config import GGUF_ARCHITECTURES, Gemma3nConfig, text_entries
from jaxllm.models.rope_config import hf_entries_by_kind
from jaxllm.models.rope_describing import gguf_rotary, hf_rope_settings, hf_rotary

_LOCAL = "local_theta"  # among rotary settings, the base of layers with a window


def as_hf(config: Gemma3nConfig) -> Gemma3nConfig:
    return replace(config, model_type="gemma3n_text")


def rotary_of_hf(description: Mapping[str, object], tensors: Collection[str] = ()) -> dict[str, Any]:
    full, sliding = (hf_rotary(own.values) for own in hf_entries_by_kind(text_entries(description)).values())
    return full | {_LOCAL: sliding["rope_theta"]}


def rotary_of_gguf(metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> dict[str, Any]:
    _, given = gguf_entries(metadata, GGUF_ARCHITECTURES)
    return gguf_rotary(metadata, tensors) | {_LOCAL: given.number("rope.freq_base_swa", 1e4)}


def hf_config(config: Gemma3nConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json from a configuration that `as_hf` gave."""
    c = config
    same = (
        *("model_type", "vocab_size", "vocab_size_per_layer_input", "hidden_size", "hidden_size_per_layer_input"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"),
        *("tie_word_embeddings", "final_logit_softcapping", "altup_num_inputs", "altup_active_idx"),
        *("altup_correct_scale", "laurel_rank"),
    )
    entries = {
        "architectures": ["Gemma3nForCausalLM"],
        **{name: getattr(c, name) for name in same},
        **_of_layers(c),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "rope_local_base_freq": rotary[_LOCAL],
    }
    full = {key: value for key, value in rotary.items() if key != _LOCAL}
    return entries | hf_rope_settings(full, c.full_rope, c.head_dim)


def resized(description: Mapping[str, Any], config: Gemma3nConfig) -> dict[str, Any]:
    """A config.json with everything that it says of layers replaced by what `config` says of them."""
    if "text_config" in description:
        return {**description, "text_config": {**description["text_config"], **_of_layers(config)}}
    return {**description, **_of_layers(config)}


def _of_layers(config: Gemma3nConfig) -> dict[str, Any]:
    layers = config.layers
    return {
        "num_hidden_layers": len(layers),
        "num_kv_shared_layers": config.num_kv_shared_layers,
        "intermediate_size": [layer.intermediate_size for layer in layers],
        "sliding_window": next((layer.sliding_window for layer in layers if layer.sliding_window), 1),
        "layer_types": ["full_attention" if layer.sliding_window is None else "sliding_attention" for layer in layers],
        # GGUF files hold a function of it, in float32.
        "activation_sparsity_pattern": [round(layer.sparsity, 6) for layer in layers],
    }
