"""GLM-4's configuration (GLM-4-0414), which has the usual sizes alone."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from jaxllm.entries import Entries
from jaxllm.formats.base import Weight
from jaxllm.models import sizes
from jaxllm.models.config import gguf_entries
from jaxllm.models.rope_describing import hf_rotary
from jaxllm.models.sizes import Sizes, gguf_sizes, hf_sizes

MODEL_TYPES = GGUF_ARCHITECTURES = ("glm4",)

_DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "max_position_embeddings": 131072,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}


@dataclass(frozen=True)
class Glm4Config(Sizes):
    """`attention_bias` is that of queries, keys and values; the output projection has none."""

    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json. Raises InputError as `hf_sizes` does."""
        return cls(**hf_sizes(Entries(_DEFAULTS | dict(config), "config.json"), MODEL_TYPES, tensors))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file. Raises InputError as `gguf_sizes` does."""
        return cls(**gguf_sizes(*gguf_entries(metadata, GGUF_ARCHITECTURES), tensors))


def rotary_of_hf(description: Mapping[str, object], tensors: Collection[str] = ()) -> dict[str, Any]:
    return hf_rotary(_DEFAULTS | dict(description))


def gguf_metadata(config: Glm4Config, rotary: Mapping[str, Any]) -> dict[str, Any]:
    return sizes.gguf_metadata(config, rotary, {})


def hf_config(config: Glm4Config, rotary: Mapping[str, Any]) -> dict[str, Any]:
    return sizes.hf_config(config, rotary, "Glm4ForCausalLM", {})
