"""Tensor names of Gemma 2 and 3 in Hugging Face checkpoints and in GGUF files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxllm.models.gemma.config import GemmaConfig
from jaxllm.models.names import GGUF_COMMON, GGUF_MLP, GGUF_O, GGUF_QK, GGUF_QK_NORMS, GGUF_V, HF_IGNORED
from jaxllm.models.rule import Rule, Written, fixed, inverted

# Models of text and images have a prefix, in transformers 5 another than before.
_MODEL = r"(?:model|language_model\.model|model\.language_model)\."
_M, _G = _MODEL + r"layers\.(\d+)\.", r"blk\.(\d+)\."
_A, _L = r"layers.\1.self_attn.", r"layers.\1."
_HALF = r"(input|post_attention|pre_feedforward|post_feedforward)"

_HF = (
    Rule(_MODEL + r"embed_tokens\.weight", "embed_tokens.weight"),
    Rule(_MODEL + r"norm\.weight", "norm.weight"),
    Rule(r"(?:lm_head|language_model\.lm_head)\.weight", "lm_head.weight"),
    Rule(_M + _HALF + r"_layernorm\.weight", _L + r"\2_layernorm.weight"),
    Rule(_M + r"self_attn\.(q|k|v|o)_proj\.(weight|bias)", _A + r"\2_proj.\3"),
    Rule(_M + r"self_attn\.(q|k)_norm\.weight", _A + r"\2_norm.weight"),
    Rule(_M + r"mlp\.(gate|up|down)_proj\.weight", _L + r"mlp.\2_proj.weight"),
)
_HF_IMAGES = (r"(?:model\.)?vision_tower\..*", r"(?:model\.)?multi_modal_projector\..*")
_GGUF = (
    *GGUF_COMMON,
    GGUF_QK,
    GGUF_V,
    GGUF_O,
    GGUF_QK_NORMS,
    GGUF_MLP,
    Rule(_G + r"post_attention_norm\.weight", _L + "post_attention_layernorm.weight"),
    Rule(_G + r"ffn_norm\.weight", _L + "pre_feedforward_layernorm.weight"),
    Rule(_G + r"post_ffw_norm\.weight", _L + "post_feedforward_layernorm.weight"),
)
hf_rules, gguf_rules = fixed(*_HF), fixed(*_GGUF)


def hf_ignored(config: GemmaConfig) -> tuple[str, ...]:
    return HF_IGNORED + _HF_IMAGES


def hf_written(config: GemmaConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Written]:
    """The tensors that transformers has, whose norms are smaller by 1 than what they multiply by."""
    return _shifted(inverted(_HF, shapes, config), config.norm_offset - 1.0)


def gguf_written(config: GemmaConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Written]:
    """The tensors that llama.cpp has, whose norms are what they multiply by."""
    return _shifted(inverted(_GGUF, shapes, config), config.norm_offset)


def _shifted(tensors: Sequence[Written], shift: float) -> list[Written]:
    return [replace(w, shift=shift) if w.name.endswith("norm.weight") else w for w in tensors]
