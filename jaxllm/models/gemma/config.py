"""Sizes and constants of Gemma 2 and 3, from a Hugging Face config.json or a GGUF file's metadata."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Self

from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.layers.rope import Rope, frequencies
from jaxllm.models.config import (
    MANY,
    POSITIONS,
    WIDEST,
    check_shared,
    gguf_entries,
    gguf_vocab_size,
    layer_count,
    typed_windows,
)
from jaxllm.models.rope_config import FULL, SLIDING, gguf_rope, hf_rope, hf_ropes_by_kind

MODEL_TYPES = ("gemma2", "gemma3_text", "gemma3")  # the last has text and images
GGUF_ARCHITECTURES = ("gemma2", "gemma3")

PERIODS = {"gemma2": 2, "gemma3": 6}  # the last layer of as many attends to all positions, where a file does not say
_VOCABULARIES = {"gemma2": 256000, "gemma3_text": 262208}
_CONTEXTS = {"gemma2": 8192, "gemma3_text": 131072}
_HEADS = {"lm_head.weight", "language_model.lm_head.weight"}
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models


@dataclass(frozen=True)
class GemmaConfig:
    """A model's configuration, with Hugging Face's names.

    Attributes:
        attn_logit_softcapping: None for Gemma 3, whose files have the entry, but whose models do not use it.
        sliding_windows: an entry per layer; None: no window.
        local_rope: the rotary embedding of layers with a window.
        norm_offset: what the norms' weights lack. Hugging Face directories store `weight - 1`, GGUF files do not. The
            parameters are as stored; so this is a property of the file, and not of the model.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    sliding_windows: tuple[int | None, ...]
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    rope: Rope
    local_rope: Rope
    norm_offset: float = field(compare=False)

    @property
    def qk_norm(self) -> bool:
        return self.model_type != "gemma2"

    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json of one of MODEL_TYPES, with transformers' defaults.

        Raises:
            InputError: a key is missing, has an impossible value, or asks for something that is not supported.
        """
        entries = text_entries(config)
        kind = "gemma2" if entries.choice("model_type", MODEL_TYPES) == "gemma2" else "gemma3_text"
        entries.choice("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
        if entries.flag("use_bidirectional_attention"):
            raise InputError(f"{entries.where}: 'use_bidirectional_attention' is not supported")
        heads = entries.integer("num_attention_heads", 8, most=MANY)
        kv_heads = entries.integer("num_key_value_heads", 4, most=MANY)
        check_shared(entries, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
        head_dim = entries.integer("head_dim", 256, most=min(MANY, WIDEST // heads))
        if kind == "gemma2":
            ropes = dict.fromkeys((FULL, SLIDING), hf_rope(entries, head_dim))
        else:
            ropes = hf_ropes_by_kind(entries, head_dim)
        return cls(
            model_type=kind,
            vocab_size=entries.integer("vocab_size", _VOCABULARIES[kind]),
            hidden_size=entries.integer("hidden_size", 2304),
            intermediate_size=entries.integer("intermediate_size", 9216),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            query_pre_attn_scalar=entries.number("query_pre_attn_scalar", 256),
            attn_logit_softcapping=_cap(entries, "attn_logit_softcapping", 50.0) if kind == "gemma2" else None,
            final_logit_softcapping=_cap(entries, "final_logit_softcapping", 30.0 if kind == "gemma2" else None),
            sliding_windows=_hf_windows(entries, kind, tensors),
            rms_norm_eps=entries.number("rms_norm_eps", 1e-6, most=1.0),
            max_position_embeddings=entries.integer("max_position_embeddings", _CONTEXTS[kind], most=POSITIONS),
            tie_word_embeddings=entries.flag("tie_word_embeddings", True) and not _HEADS.intersection(tensors),
            attention_bias=entries.flag("attention_bias"),
            rope=ropes[FULL],
            local_rope=ropes[SLIDING],
            norm_offset=1.0,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file of one of GGUF_ARCHITECTURES. What it cannot say is as in llama.cpp.

        Raises:
            InputError: a key is missing or has no sensible value.
        """
        arch, given = gguf_entries(metadata, GGUF_ARCHITECTURES)
        count, hidden = layer_count(given, "block_count", tensors), given.integer("embedding_length")
        heads = given.integer("attention.head_count", most=MANY)
        kv_heads = given.integer("attention.head_count_kv", heads, most=MANY)
        check_shared(given, "attention.head_count", heads, "attention.head_count_kv", kv_heads)
        head_dim = given.integer("attention.key_length", hidden // heads, most=min(MANY, WIDEST // heads))
        window = given.integer("attention.sliding_window", 4096 if arch == "gemma2" else 0, 0, POSITIONS)
        period = given.integer("attention.sliding_window_pattern", PERIODS[arch])
        rope = local = gguf_rope(given, tensors, head_dim)
        if arch == "gemma3":
            theta = given.number("rope.freq_base_swa", 10000.0, above=1.0)
            local = Rope(tuple(frequencies(rope.rotary_dim, theta).tolist()))
        return cls(
            model_type=arch,
            vocab_size=gguf_vocab_size(given, tensors),
            hidden_size=hidden,
            intermediate_size=given.integer("feed_forward_length"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            query_pre_attn_scalar=hidden // heads if count == _LARGEST[arch] else head_dim,
            attn_logit_softcapping=_cap(given, "attn_logit_softcapping", 50.0) if arch == "gemma2" else None,
            final_logit_softcapping=_cap(given, "final_logit_softcapping", 30.0 if arch == "gemma2" else None),
            sliding_windows=by_turns(count, window or None, period),
            rms_norm_eps=given.number("attention.layer_norm_rms_epsilon", most=1.0),
            max_position_embeddings=given.integer("context_length", most=POSITIONS),
            tie_word_embeddings="output.weight" not in tensors,
            attention_bias="blk.0.attn_q.bias" in tensors,
            rope=rope,
            local_rope=local,
            norm_offset=0.0,
        )


def text_entries(config: Mapping[str, object]) -> Entries:
    """The entries for text: all, or an object of their own beside that for images."""
    entries = Entries(config, "config.json")
    if "text_config" not in entries:
        return entries
    text = entries.get("text_config", None, lambda value: isinstance(value, dict), "a JSON object")
    return Entries({"model_type": "gemma3_text"} | text, "config.json: text_config")


def by_turns(count: int, window: int | None, period: int) -> tuple[int | None, ...]:
    """The sliding window of each of `count` layers, of which every `period`-th has none."""
    return tuple(None if (i + 1) % period == 0 else window for i in range(count))


def _hf_windows(entries: Entries, kind: str, tensors: Collection[str]) -> tuple[int | None, ...]:
    count = layer_count(entries, "num_hidden_layers", tensors)
    window = entries.integer("sliding_window", 4096, 1, POSITIONS)
    if "layer_types" in entries:
        return tuple(typed_windows(entries, count, window))
    period = 2 if kind == "gemma2" else entries.integer("sliding_window_pattern", 6)
    return by_turns(count, window, period)


def _cap(given: Entries, key: str, default: float | None) -> float | None:
    """A null is a value here: no cap."""
    return given.number(key) if key in given else None if key in given.values else default
