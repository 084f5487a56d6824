"""Sizes and constants of GPT-OSS, from a Hugging Face config.json or a GGUF file's metadata."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

from jaxllm.entries import Entries
from jaxllm.formats.base import Weight
from jaxllm.layers.rope import Rope
from jaxllm.models.config import (
    MANY,
    POSITIONS,
    WIDEST,
    check_activation,
    check_shared,
    gguf_entries,
    gguf_vocab_size,
    layer_count,
    typed_windows,
)
from jaxllm.models.rope_config import gguf_rope, hf_rope

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
PRESETS: dict[str, dict[str, object]] = {
    "gpt-oss-20b": _PUBLISHED | {"num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": _PUBLISHED | {"num_hidden_layers": 36, "num_local_experts": 128},
}


@dataclass(frozen=True)
class GptOssConfig:
    """A model's configuration, with Hugging Face's names. `sliding_windows` has an entry per layer; None: no window."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    sliding_windows: tuple[int | None, ...]
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    swiglu_alpha: float
    swiglu_limit: float
    rope: Rope

    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json of one of MODEL_TYPES.

        Raises:
            InputError: a key is missing, has an impossible value, or asks for something that is not supported.
        """
        entries = Entries(with_rope(config), "config.json")
        kind = entries.choice("model_type", MODEL_TYPES)
        check_activation(entries)
        heads, hidden = entries.integer("num_attention_heads", most=MANY), entries.integer("hidden_size")
        kv_heads = entries.integer("num_key_value_heads", heads, most=MANY)
        check_shared(entries, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
        head_dim = entries.integer("head_dim", 64, most=min(MANY, WIDEST // heads))
        count = layer_count(entries, "num_hidden_layers", tensors)
        window = entries.integer("sliding_window", 128, 1, POSITIONS)
        windows = typed_windows(entries, count, window) if "layer_types" in entries else _by_turns(count, window)
        experts = entries.integer("num_local_experts", most=MANY)
        return cls(
            model_type=kind,
            vocab_size=entries.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=entries.integer("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            num_local_experts=experts,
            num_experts_per_tok=entries.integer_up_to("num_experts_per_tok", experts, "num_local_experts", 4),
            sliding_windows=tuple(windows),
            rms_norm_eps=entries.number("rms_norm_eps", 1e-5, most=1.0),
            max_position_embeddings=entries.integer("max_position_embeddings", 131072, most=POSITIONS),
            tie_word_embeddings=entries.flag("tie_word_embeddings") and "lm_head.weight" not in tensors,
            attention_bias=entries.flag("attention_bias", True),
            swiglu_alpha=entries.number("swiglu_alpha", SWIGLU_ALPHA),
            swiglu_limit=entries.number("swiglu_limit", SWIGLU_LIMIT),
            rope=hf_rope(entries, head_dim),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file of one of GGUF_ARCHITECTURES.

        Raises:
            InputError: a key is missing or has no sensible value.
        """
        arch, given = gguf_entries(metadata, GGUF_ARCHITECTURES)
        count = layer_count(given, "block_count", tensors)
        window = given.integer("attention.sliding_window", 128, 1, POSITIONS)
        heads = given.integer("attention.head_count", most=MANY)
        kv_heads = given.integer("attention.head_count_kv", heads, most=MANY)
        check_shared(given, "attention.head_count", heads, "attention.head_count_kv", kv_heads)
        head_dim = given.integer("attention.key_length", most=min(MANY, WIDEST // heads))
        experts = given.integer("expert_count", most=MANY)
        return cls(
            model_type=arch,
            vocab_size=gguf_vocab_size(given, tensors),
            hidden_size=given.integer("embedding_length"),
            intermediate_size=given.integer("expert_feed_forward_length"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            num_local_experts=experts,
            num_experts_per_tok=given.integer_up_to("expert_used_count", experts, "expert_count"),
            sliding_windows=tuple(_by_turns(count, window)),
            rms_norm_eps=given.number("attention.layer_norm_rms_epsilon", most=1.0),
            max_position_embeddings=given.integer("context_length", most=POSITIONS),
            tie_word_embeddings="output.weight" not in tensors,
            attention_bias="blk.0.attn_q.bias" in tensors,
            swiglu_alpha=SWIGLU_ALPHA,
            swiglu_limit=SWIGLU_LIMIT,
            # The models were trained without rounding the ends of YaRN's ramp; llama.cpp rounds them.
            rope=gguf_rope(given, tensors, head_dim, truncate=False),
        )


def with_rope(config: Mapping[str, object]) -> dict[str, object]:
    """A config.json's entries with transformers' defaults for rotary frequencies, where it does not give them."""
    given = {"rope_theta": 150000.0} | {key: value for key, value in config.items() if value is not None}
    missing = all(given.get(key, {}) == {} for key in ("rope_parameters", "rope_scaling"))
    return given | {"rope_scaling": _ROPE} if missing else given


def _by_turns(count: int, window: int) -> list[int | None]:
    return [window if i % 2 == 0 else None for i in range(count)]
