"""OLMo 2's configuration, which has the usual sizes alone."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from jaxllm.entries import Entries
from jaxllm.formats.base import Weight
from jaxllm.models import sizes
from jaxllm.models.config import gguf_entries
from jaxllm.models.sizes import Sizes, gguf_sizes, hf_sizes

MODEL_TYPES = GGUF_ARCHITECTURES = ("olmo2",)

_DEFAULTS = {"rms_norm_eps": 1e-5}


@dataclass(frozen=True)
class Olmo2Config(Sizes):
    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json. Raises InputError as `hf_sizes` does."""
        return cls(**hf_sizes(Entries(_DEFAULTS | dict(config), "config.json"), MODEL_TYPES, tensors))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file. Raises InputError as `gguf_sizes` does."""
        return cls(**gguf_sizes(*gguf_entries(metadata, GGUF_ARCHITECTURES), tensors))


def gguf_metadata(config: Olmo2Config, rotary: Mapping[str, Any]) -> dict[str, Any]:
    return sizes.gguf_metadata(config, rotary, {})


def hf_config(config: Olmo2Config, rotary: Mapping[str, Any]) -> dict[str, Any]:
    return sizes.hf_config(config, rotary, "Olmo2ForCausalLM", {})
