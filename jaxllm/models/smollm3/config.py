"""SmolLM3's configuration: the usual sizes, and which layers have no rotary positions."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.models import sizes
from jaxllm.models.config import POSITIONS, gguf_entries
from jaxllm.models.rope_describing import hf_rotary
from jaxllm.models.sizes import Sizes, gguf_sizes, hf_sizes

MODEL_TYPES = GGUF_ARCHITECTURES = ("smollm3",)
INTERVAL = 4  # every so many layers, one has no rotary positions; GGUF files have no key for it

_DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_theta": 2000000.0,
}


@dataclass(frozen=True)
class SmolLM3Config(Sizes):
    """`rotary_layers` says of each layer whether it has rotary positions."""

    rotary_layers: tuple[bool, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json. Raises InputError as `hf_sizes` does."""
        given = Entries(_DEFAULTS | dict(config), "config.json")
        window = given.integer("sliding_window", 0, 0, POSITIONS)
        if given.flag("use_sliding_window") and window:
            raise InputError(f"{given.where}: 'use_sliding_window' is not supported for models of type smollm3")
        usual = hf_sizes(given, MODEL_TYPES, tensors)
        count, interval = usual["num_hidden_layers"], given.integer("no_rope_layer_interval", INTERVAL)

        def good(value: object) -> bool:
            return (
                isinstance(value, list) and len(value) >= count and all(type(n) is int and n in (0, 1) for n in value)
            )

        rotary = given.get("no_rope_layers", _by_turns(count, interval), good, f"a list of {count} times 0 or 1")
        return cls(**usual, rotary_layers=tuple(map(bool, rotary[:count])))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file. Raises InputError as `gguf_sizes` does."""
        arch, given = gguf_entries(metadata, GGUF_ARCHITECTURES)
        usual = gguf_sizes(arch, given, tensors)
        return cls(**usual, rotary_layers=tuple(map(bool, _by_turns(usual["num_hidden_layers"], INTERVAL))))


def _by_turns(count: int, interval: int) -> list[int]:
    return [int((i + 1) % interval != 0) for i in range(count)]


def rotary_of_hf(description: Mapping[str, object], tensors: Collection[str] = ()) -> dict[str, Any]:
    return hf_rotary(_DEFAULTS | dict(description))


def gguf_metadata(config: SmolLM3Config, rotary: Mapping[str, Any]) -> dict[str, Any]:
    return sizes.gguf_metadata(config, rotary, {})


def hf_config(config: SmolLM3Config, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """`no_rope_layers` has a 1 for each layer that is rotary."""
    layers = {"no_rope_layers": [int(rotary) for rotary in config.rotary_layers], "use_sliding_window": False}
    return sizes.hf_config(config, rotary, "SmolLM3ForCausalLM", layers)
