"""Gemma's configurations as a config.json or as GGUF metadata: the inverse of config.py."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from jaxllm.formats.base import Weight
from jaxllm.models import sizes
from jaxllm.models.config import gguf_entries
from jaxllm.models.gemma.config import GGUF_ARCHITECTURES, PERIODS, GemmaConfig, by_turns, text_entries
from jaxllm.models.rope_config import FULL, SLIDING, hf_entries_by_kind
from jaxllm.models.rope_describing import gguf_rotary, hf_rotary

_LOCAL = "local_theta"  # among rotary settings, the base of layers with a window


def as_gguf(config: GemmaConfig) -> GemmaConfig:
    return replace(config, model_type="gemma3" if config.qk_norm else "gemma2")


def as_hf(config: GemmaConfig) -> GemmaConfig:
    return replace(config, model_type="gemma3_text" if config.qk_norm else "gemma2")


def rotary_of_hf(description: Mapping[str, object], tensors: Collection[str] = ()) -> dict[str, Any]:
    entries = text_entries(description)
    if entries.text("model_type") == "gemma2":
        return hf_rotary(entries.values)
    full, sliding = (hf_rotary(own.values) for own in hf_entries_by_kind(entries).values())
    return full | {_LOCAL: sliding["rope_theta"]}


def rotary_of_gguf(metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> dict[str, Any]:
    arch, given = gguf_entries(metadata, GGUF_ARCHITECTURES)
    local = {_LOCAL: given.number("rope.freq_base_swa", 10000.0)} if arch == "gemma3" else {}
    return gguf_rotary(metadata, tensors) | local


def gguf_metadata(config: GemmaConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata from a configuration that `as_gguf` gave."""
    entries: dict[str, Any] = {"attention.sliding_window": _window(config) or 0}
    if (period := _period(config)) != PERIODS[config.model_type]:
        entries["attention.sliding_window_pattern"] = period
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(config, key)) is not None:
            entries[key] = cap
    if _LOCAL in rotary:
        entries["rope.freq_base_swa"] = float(rotary[_LOCAL])
    return sizes.gguf_metadata(config, _full(rotary), entries)


def hf_config(config: GemmaConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json from a configuration that `as_hf` gave."""
    c = config
    entries = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": c.query_pre_attn_scalar,
        "attn_logit_softcapping": c.attn_logit_softcapping,
        "final_logit_softcapping": c.final_logit_softcapping,
        "sliding_window": _window(c) or 1,
        "layer_types": [FULL if window is None else SLIDING for window in c.sliding_windows],
    }
    if _LOCAL in rotary:
        entries["rope_local_base_freq"] = rotary[_LOCAL]
    name = "Gemma3ForCausalLM" if c.qk_norm else "Gemma2ForCausalLM"
    return sizes.hf_config(c, _full(rotary), name, entries)


def _full(rotary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rotary.items() if key != _LOCAL}


def _window(config: GemmaConfig) -> int | None:
    return next(filter(None, config.sliding_windows), None)


def _period(config: GemmaConfig) -> int:
    """Of how many layers one has no window. Where they do not take turns, the usual number, which is then no match."""
    windows, window = config.sliding_windows, _window(config)
    usual = PERIODS[config.model_type]
    candidates = (usual, *range(1, len(windows) + 2))
    return next((n for n in candidates if by_turns(len(windows), window, n) == windows), usual)
