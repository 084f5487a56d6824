"""Granite's configuration: the usual sizes and four multipliers."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from jaxllm.entries import Entries
from jaxllm.formats.base import Weight
from jaxllm.models import sizes
from jaxllm.models.config import gguf_entries
from jaxllm.models.sizes import Sizes, gguf_sizes, hf_sizes

MODEL_TYPES = GGUF_ARCHITECTURES = ("granite",)

_GGUF_NAMES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}


@dataclass(frozen=True)
class GraniteConfig(Sizes):
    """`attention_multiplier` is what scores are multiplied by, `logits_scaling` what logits are divided by."""

    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    logits_scaling: float

    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json. Raises InputError as `hf_sizes` does."""
        given = Entries(config, "config.json")
        multipliers: dict[str, Any] = {name: given.number(name, 1.0) for name in _GGUF_NAMES}
        return cls(**hf_sizes(given, MODEL_TYPES, tensors), **multipliers)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file. Raises InputError as `gguf_sizes` does."""
        arch, given = gguf_entries(metadata, GGUF_ARCHITECTURES)
        usual = gguf_sizes(arch, given, tensors)
        multipliers: dict[str, Any] = {
            name: given.number(key, usual["head_dim"] ** -0.5 if key == "attention.scale" else 1.0)
            for name, key in _GGUF_NAMES.items()
        }
        return cls(**usual, **multipliers)


def gguf_metadata(config: GraniteConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    return sizes.gguf_metadata(config, rotary, {key: float(getattr(config, name)) for name, key in _GGUF_NAMES.items()})


def hf_config(config: GraniteConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    multipliers = {name: getattr(config, name) for name in _GGUF_NAMES}
    return sizes.hf_config(config, rotary, "GraniteForCausalLM", multipliers)
