"""Sizes and constants of Gemma 3n's text model, from a Hugging Face config.json or a GGUF file's metadata."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Self

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
    per_layer,
    typed_windows,
)
from jaxllm.models.rope_config import FULL, SLIDING, gguf_rope, hf_ropes_by_kind

MODEL_TYPES = ("gemma3n_text", "gemma3n")
GGUF_ARCHITECTURES = ("gemma3n",)

# What transformers takes where a config.json is silent: the sizes of Gemma 3n E4B.
_DEFAULTS: dict[str, object] = {
    "vocab_size": 262400,
    "vocab_size_per_layer_input": 262144,
    "hidden_size": 2048,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "num_kv_shared_layers": 15,
    "final_logit_softcapping": 30.0,
    "altup_num_inputs": 4,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "laurel_rank": 64,
    "tie_word_embeddings": True,
}
_E4B: dict[str, object] = {"model_type": "gemma3n_text"}
_E2B = _E4B | {"num_hidden_layers": 30, "intermediate_size": 8192, "num_kv_shared_layers": 10}
PRESETS = {"gemma-3n-e2b": _E2B, "gemma-3n-e4b": _E4B}
_HEADS = {"lm_head.weight", "language_model.lm_head.weight"}
_PERIOD = 5  # of layer types: the last of each five is full


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer.

    sliding_window: None: the layer attends to all positions.
    sparsity: the share of the gate's values that are cut to zero, were they normally distributed; 0: none are.
    """

    intermediate_size: int
    sliding_window: int | None
    sparsity: float


@dataclass(frozen=True)
class Gemma3nConfig:
    """A model's configuration, with Hugging Face's names where these exist; `layers` has one entry per layer."""

    model_type: str
    vocab_size: int
    vocab_size_per_layer_input: int
    hidden_size: int
    hidden_size_per_layer_input: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    final_logit_softcapping: float
    altup_num_inputs: int
    altup_active_idx: int
    altup_correct_scale: bool
    laurel_rank: int
    num_kv_shared_layers: int
    full_rope: Rope
    sliding_rope: Rope
    layers: tuple[LayerConfig, ...]

    @property
    def first_shared(self) -> int:
        """The first of the layers that have no keys and values of their own."""
        return len(self.layers) - self.num_kv_shared_layers

    def keys_from(self, i: int) -> int | None:
        """The layer whose keys and values layer i reads: the last of its kind that has some. None: it has its own."""
        if i < self.first_shared:
            return None
        kinds = [layer.sliding_window for layer in self.layers[: self.first_shared]]
        return len(kinds) - 1 - kinds[::-1].index(self.layers[i].sliding_window)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json of one of MODEL_TYPES; that of `gemma3n` has the text model's inside.

        Raises:
            InputError: a key is missing, has an impossible value, or asks for something that is not supported.
        """
        given = text_entries(config)
        given.choice("hidden_activation", ("gelu_pytorch_tanh",))
        heads, kv_heads = (given.integer(f"num_{kind}_heads", most=MANY) for kind in ("attention", "key_value"))
        check_shared(given, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
        head_dim = given.integer("head_dim", most=min(MANY, WIDEST // heads))
        count, window = (
            layer_count(given, "num_hidden_layers", tensors),
            given.integer("sliding_window", most=POSITIONS),
        )
        windows = typed_windows(given, count, window) if "layer_types" in given else _by_turns(count, window)
        ropes = hf_ropes_by_kind(given, head_dim)
        streams = given.integer("altup_num_inputs", least=2, most=MANY)
        return cls(
            model_type="gemma3n_text",
            vocab_size=given.integer("vocab_size"),
            vocab_size_per_layer_input=given.integer("vocab_size_per_layer_input"),
            hidden_size=given.integer("hidden_size"),
            hidden_size_per_layer_input=given.integer("hidden_size_per_layer_input", most=MANY),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=given.number("rms_norm_eps", most=1.0),
            max_position_embeddings=given.integer("max_position_embeddings", most=POSITIONS),
            tie_word_embeddings=given.flag("tie_word_embeddings") and not _HEADS.intersection(tensors),
            final_logit_softcapping=given.number("final_logit_softcapping"),
            altup_num_inputs=streams,
            altup_active_idx=given.integer("altup_active_idx", least=0, most=streams - 1),
            altup_correct_scale=given.flag("altup_correct_scale"),
            laurel_rank=given.integer("laurel_rank"),
            num_kv_shared_layers=given.integer("num_kv_shared_layers", least=0, most=count - 1),
            full_rope=ropes[FULL],
            sliding_rope=ropes[SLIDING],
            layers=_layers(per_layer(given, "intermediate_size", count), windows, _hf_sparsity(given, count)),
        ).checked(given.where, "layer_types")

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file of one of GGUF_ARCHITECTURES.

        Raises:
            InputError: a key is missing or has no sensible value.
        """
        arch, given = gguf_entries(metadata, GGUF_ARCHITECTURES)
        count = layer_count(given, "block_count", tensors)
        heads = given.integer("attention.head_count", most=MANY)
        kv_heads = given.integer("attention.head_count_kv", heads, most=MANY)
        check_shared(given, "attention.head_count", heads, "attention.head_count_kv", kv_heads)
        head_dim = given.integer("attention.key_length", most=min(MANY, WIDEST // heads))
        rope, theta = gguf_rope(given, tensors, head_dim), given.number("rope.freq_base_swa", 1e4, above=1.0)
        streams = given.integer("altup.num_inputs", 4, least=2, most=MANY)

        def rows(name: str, default: int) -> int:
            return tensors[name].shape[0] if name in tensors else default

        return cls(
            model_type=arch,
            vocab_size=(vocabulary := gguf_vocab_size(given, tensors)),
            vocab_size_per_layer_input=rows("per_layer_token_embd.weight", vocabulary),
            hidden_size=given.integer("embedding_length"),
            hidden_size_per_layer_input=given.integer("embedding_length_per_layer_input", most=MANY),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=given.number("attention.layer_norm_rms_epsilon", most=1.0),
            max_position_embeddings=given.integer("context_length", most=POSITIONS),
            tie_word_embeddings="output.weight" not in tensors,
            final_logit_softcapping=given.number("final_logit_softcapping", 30.0),
            altup_num_inputs=streams,
            altup_active_idx=given.integer("altup.active_idx", 0, least=0, most=streams - 1),
            altup_correct_scale=True,
            laurel_rank=rows("blk.0.laurel_l.weight", 64),
            num_kv_shared_layers=given.integer("attention.shared_kv_layers", least=0, most=count - 1),
            full_rope=rope,
            sliding_rope=Rope(tuple(frequencies(rope.rotary_dim, theta).tolist())),
            layers=_layers(
                per_layer(given, "feed_forward_length", count),
                _gguf_windows(given, count),
                _gguf_sparsity(given, count),
            ),
        ).checked(given.where, "attention.sliding_window_pattern")

    def checked(self, where: str, key: str) -> Self:
        """The same. Raises InputError if a layer is to read keys and values that no layer has; `key` names the entry
        for the layers' types."""
        own = {layer.sliding_window for layer in self.layers[: self.first_shared]}
        if lacking := [i for i, layer in enumerate(self.layers) if layer.sliding_window not in own]:
            raise InputError(
                f"{where}: layer {lacking[0]} shares keys and values, but no layer of its type ('{key}') is before "
                f"layer {self.first_shared}, the first that shares"
            )
        return self


def text_entries(config: Mapping[str, Any]) -> Entries:
    """The entries for text, with transformers' defaults: all, or, for `gemma3n`, an object of their own."""
    entries = Entries(config, "config.json")
    if entries.choice("model_type", MODEL_TYPES) == "gemma3n":
        text = entries.get("text_config", None, lambda value: isinstance(value, dict), "a JSON object")
        entries = Entries(text, "config.json: text_config")
    return Entries(_DEFAULTS | {k: v for k, v in entries.values.items() if v is not None}, entries.where)


def _layers(widths: list[int], windows: list[int | None], sparsity: list[float]) -> tuple[LayerConfig, ...]:
    return tuple(map(LayerConfig, widths, windows, sparsity))


def _by_turns(count: int, window: int, period: int = _PERIOD) -> list[int | None]:
    return [None if (i + 1) % period == 0 else window for i in range(count)]


def _hf_sparsity(config: Entries, count: int) -> list[float]:
    def good(value: Any) -> bool:
        numbers = isinstance(value, list) and all(type(n) in (int, float) and 0 <= n < 1 for n in value)
        return numbers and len(value) == count

    sparse = 10 if count > 10 else 0  # transformers' default
    what = f"a list of {count} numbers from 0 to below 1"
    return config.get("activation_sparsity_pattern", [0.95] * sparse + [0.0] * (count - sparse), good, what)


def _gguf_windows(given: Entries, count: int) -> list[int | None]:
    """The key for which layers have a window is a list of bools, or a period."""
    window, key = given.integer("attention.sliding_window", most=POSITIONS), "attention.sliding_window_pattern"
    if not isinstance(given.values.get(key), list):
        return _by_turns(count, window, given.integer(key, _PERIOD, most=MANY))

    def good(value: list) -> bool:
        return len(value) == count and all(isinstance(flag, bool) for flag in value)

    return [window if flag else None for flag in given.get(key, None, good, f"a list of {count} bools")]


def _gguf_sparsity(given: Entries, count: int) -> list[float]:
    """GGUF has, for each layer, how many standard deviations above the mean the cut is; -inf cuts nothing."""

    def good(value: object) -> bool:
        numbers = isinstance(value, list) and all(isinstance(n, float) and not math.isnan(n) for n in value)
        return numbers and len(value) == count  # type: ignore[arg-type]

    deviations = given.get("activation_sparsity_scale", None, good, f"a list of {count} numbers")
    return [NormalDist().cdf(n) for n in deviations]
