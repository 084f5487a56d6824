"""The configurations of Gemma 2 and 3: the usual sizes, windows, caps and a second rotary embedding."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Self

from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.layers.rope import Rope, frequencies
from jaxllm.models.config import POSITIONS, gguf_entries, typed_windows
from jaxllm.models.rope_config import FULL, SLIDING, hf_ropes_by_kind
from jaxllm.models.sizes import Sizes, gguf_sizes, hf_sizes

MODEL_TYPES = ("gemma2", "gemma3_text", "gemma3")  # the last has text and images
GGUF_ARCHITECTURES = ("gemma2", "gemma3")

PERIODS = {"gemma2": 2, "gemma3": 6}  # the last layer of as many attends to all positions, where a file does not say
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models

# Transformers' defaults.
_SHARED: dict[str, object] = {"hidden_size": 2304, "intermediate_size": 9216, "head_dim": 256}
_SHARED |= {"num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256}
_SHARED |= {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "tie_word_embeddings": True}
_DEFAULTS = {
    "gemma2": _SHARED | {"vocab_size": 256000, "max_position_embeddings": 8192},
    "gemma3_text": _SHARED | {"vocab_size": 262208, "max_position_embeddings": 131072},
}
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # Gemma 2's


@dataclass(frozen=True)
class GemmaConfig(Sizes):
    """A model's configuration, with Hugging Face's names.

    Attributes:
        attn_logit_softcapping: None for Gemma 3, whose files have the entry, but whose models do not use it.
        sliding_windows: an entry per layer; None: no window.
        local_rope: the rotary embedding of layers with a window.
        norm_offset: what the norms' weights lack. Hugging Face directories store `weight - 1`, GGUF files do not. The
            parameters are as stored; so this is a property of the file, and not of the model.
    """

    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    sliding_windows: tuple[int | None, ...]
    local_rope: Rope
    norm_offset: float = field(compare=False)

    @property
    def qk_norm(self) -> bool:
        return self.model_type != "gemma2"

    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json of one of MODEL_TYPES, with transformers' defaults.

        Raises:
            InputError: as `hf_sizes` does.
        """
        entries = text_entries(config)
        old = entries.choice("model_type", MODEL_TYPES) == "gemma2"
        entries.choice("hidden_activation", ("gelu_pytorch_tanh",))
        if entries.flag("use_bidirectional_attention"):
            raise InputError(f"{entries.where}: 'use_bidirectional_attention' is not supported")
        # The ropes of Gemma 3 are two, and what some files of Gemma 2 say of `hidden_act` does not count.
        other = ("hidden_act",) if old else ("hidden_act", "rope_parameters", "rope_scaling")
        plain = Entries({key: value for key, value in entries.values.items() if key not in other}, entries.where)
        usual = hf_sizes(plain, MODEL_TYPES, tensors)
        ropes = dict.fromkeys((FULL, SLIDING), usual["rope"]) if old else hf_ropes_by_kind(entries, usual["head_dim"])
        usual["rope"] = ropes[FULL]
        usual["tie_word_embeddings"] &= "language_model.lm_head.weight" not in tensors
        return cls(
            **usual,
            query_pre_attn_scalar=entries.number("query_pre_attn_scalar"),
            attn_logit_softcapping=_cap(entries, "attn_logit_softcapping", old) if old else None,
            final_logit_softcapping=_cap(entries, "final_logit_softcapping", old),
            sliding_windows=_hf_windows(entries, usual["num_hidden_layers"]),
            local_rope=ropes[SLIDING],
            norm_offset=1.0,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file of one of GGUF_ARCHITECTURES. What it cannot say is as in llama.cpp.

        Raises:
            InputError: as `gguf_sizes` does.
        """
        arch, given = gguf_entries(metadata, GGUF_ARCHITECTURES)
        usual, old = gguf_sizes(arch, given, tensors), arch == "gemma2"
        count, head_dim, local = usual["num_hidden_layers"], usual["head_dim"], usual["rope"]
        if not old:
            theta = given.number("rope.freq_base_swa", 10000.0, above=1.0)
            local = Rope(tuple(frequencies(local.rotary_dim, theta).tolist()))
        largest = usual["hidden_size"] // usual["num_attention_heads"]
        window = given.integer("attention.sliding_window", 4096 if old else 0, 0, POSITIONS)
        return cls(
            **usual,
            query_pre_attn_scalar=largest if count == _LARGEST[arch] else head_dim,
            attn_logit_softcapping=_cap(given, "attn_logit_softcapping", old) if old else None,
            final_logit_softcapping=_cap(given, "final_logit_softcapping", old),
            sliding_windows=by_turns(
                count, window or None, given.integer("attention.sliding_window_pattern", PERIODS[arch])
            ),
            local_rope=local,
            norm_offset=0.0,
        )


def text_entries(config: Mapping[str, object]) -> Entries:
    """The entries for text: all, or an object of their own beside that for images; with transformers' defaults.

    Raises:
        InputError: that is no object, or of no kind that we know.
    """
    entries = Entries(config, "config.json")
    if "text_config" in entries:
        text = entries.get("text_config", None, lambda value: isinstance(value, dict), "a JSON object")
        entries = Entries({"model_type": "gemma3_text"} | text, "config.json: text_config")
    kind = entries.choice("model_type", MODEL_TYPES)
    defaults: Mapping[str, object] = _DEFAULTS["gemma2" if kind == "gemma2" else "gemma3_text"]
    missing = {key: value for key, value in defaults.items() if key not in entries}
    return Entries({**entries.values, **missing}, entries.where)


def by_turns(count: int, window: int | None, period: int) -> tuple[int | None, ...]:
    """The sliding window of each of `count` layers, of which every `period`-th has none."""
    return tuple(None if (i + 1) % period == 0 else window for i in range(count))


def _hf_windows(entries: Entries, count: int) -> tuple[int | None, ...]:
    window = entries.integer("sliding_window", None, 1, POSITIONS)
    if "layer_types" in entries:
        return tuple(typed_windows(entries, count, window))
    old = entries.text("model_type") == "gemma2"
    return by_turns(count, window, 2 if old else entries.integer("sliding_window_pattern", 6))


def _cap(given: Entries, key: str, old: bool) -> float | None:
    """A cap, by default Gemma 2's for `old` models; a null is a value, and means none."""
    if key in given or (old and key not in given.values):
        return given.number(key, _CAPS[key])
    return None
