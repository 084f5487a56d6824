"""Sizes and constants of GPT-OSS, from a Hugging Face config.json or a GGUF file's metadata."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

from jaxllm.entries import Entries
from jaxllm.formats.base import Weight
from jaxllm.models.config import MANY, POSITIONS, gguf_entries, typed_windows
from jaxllm.models.rope_config import gguf_rope
from jaxllm.models.sizes import Sizes, gguf_sizes, hf_sizes

MODEL_TYPES = ("gpt_oss",)
GGUF_ARCHITECTURES = ("gpt-oss",)

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # the published models' values; GGUF files have no key for them

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_PUBLISHED = {"model_type": "gpt_oss", "rope_theta": 150000.0, "rope_scaling": _ROPE, "max_position_embeddings": 131072}
_PUBLISHED |= {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64}
_PUBLISHED |= {"quantization_config": {"quant_method": "mxfp4"}}
_PUBLISHED |= {"num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "num_experts_per_tok": 4}
_DEFAULTS = {
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "attention_bias": True,
    "rope_theta": 150000.0,
}
PRESETS: dict[str, dict[str, object]] = {
    "gpt-oss-20b": _PUBLISHED | {"num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": _PUBLISHED | {"num_hidden_layers": 36, "num_local_experts": 128},
}


@dataclass(frozen=True)
class GptOssConfig(Sizes):
    """A model's configuration, with Hugging Face's names. `sliding_windows` has an entry per layer; None: no window."""

    num_local_experts: int
    num_experts_per_tok: int
    sliding_windows: tuple[int | None, ...]
    swiglu_alpha: float
    swiglu_limit: float

    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json. Raises InputError as `hf_sizes` does."""
        entries = Entries(with_defaults(config), "config.json")
        usual = hf_sizes(entries, MODEL_TYPES, tensors)
        count, window = usual["num_hidden_layers"], entries.integer("sliding_window", 128, 1, POSITIONS)
        windows = typed_windows(entries, count, window) if "layer_types" in entries else _by_turns(count, window)
        experts = entries.integer("num_local_experts", most=MANY)
        return cls(
            **usual,
            num_local_experts=experts,
            num_experts_per_tok=entries.integer_up_to("num_experts_per_tok", experts, "num_local_experts", 4),
            sliding_windows=tuple(windows),
            swiglu_alpha=entries.number("swiglu_alpha", SWIGLU_ALPHA),
            swiglu_limit=entries.number("swiglu_limit", SWIGLU_LIMIT),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file. Raises InputError as `gguf_sizes` does."""
        arch, given = gguf_entries(metadata, GGUF_ARCHITECTURES)
        usual = gguf_sizes(arch, given, tensors)
        usual["intermediate_size"] = given.integer("expert_feed_forward_length")
        # The models were trained without rounding the ends of YaRN's ramp; llama.cpp rounds them.
        usual["rope"] = gguf_rope(given, tensors, usual["head_dim"], truncate=False)
        window, experts = (
            given.integer("attention.sliding_window", 128, 1, POSITIONS),
            given.integer("expert_count", most=MANY),
        )
        return cls(
            **usual,
            num_local_experts=experts,
            num_experts_per_tok=given.integer_up_to("expert_used_count", experts, "expert_count"),
            sliding_windows=tuple(_by_turns(usual["num_hidden_layers"], window)),
            swiglu_alpha=SWIGLU_ALPHA,
            swiglu_limit=SWIGLU_LIMIT,
        )


def with_defaults(config: Mapping[str, object]) -> dict[str, object]:
    """A config.json's entries with transformers' defaults, where it does not give them."""
    given = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
    missing = all(given.get(key, {}) == {} for key in ("rope_parameters", "rope_scaling"))
    return given | {"rope_scaling": _ROPE} if missing else given


def _by_turns(count: int, window: int) -> list[int | None]:
    return [window if i % 2 == 0 else None for i in range(count)]
