"""Tensor names of Gemma 3n in Hugging Face checkpoints and in GGUF files."""

from collections.abc import Mapping

from jaxllm.formats.base import Weight
from jaxllm.models.gemma3n.config import Gemma3nConfig
from jaxllm.models.names import GGUF_COMMON
from jaxllm.models.rule import Rule

_P = r"(?:model|model\.language_model|language_model\.model)\."  # text alone; beside vision and audio; the same in MLX
_M = _P + r"layers\.(\d+)\."
_L, _A = r"layers.\1.", r"layers.\1.self_attn."

_HF = [
    Rule(_P + r"embed_tokens\.weight", "embed_tokens.weight"),
    Rule(_P + r"norm\.weight", "norm.weight"),
    Rule(r"(?:lm_head|language_model\.lm_head)\.weight", "lm_head.weight"),
    Rule(
        _P + r"(embed_tokens_per_layer|per_layer_model_projection|per_layer_projection_norm)\.weight",
        r"ends.\1.weight",
    ),
    Rule(_P + r"(altup_projections|altup_unembed_projections)\.(?P<expert>\d+)\.weight", r"ends.\1"),
    Rule(
        _M + r"(input_layernorm|post_attention_layernorm|pre_feedforward_layernorm|post_feedforward_layernorm)\.weight",
        _L + r"\2.weight",
    ),
    Rule(_M + r"(per_layer_input_gate|per_layer_projection|post_per_layer_input_norm)\.weight", _L + r"\2.weight"),
    Rule(_M + r"self_attn\.(q|k|v|o)_proj\.weight", _A + r"\2_proj.weight"),
    Rule(_M + r"self_attn\.(q|k)_norm\.weight", _A + r"\2_norm.weight"),
    Rule(_M + r"mlp\.(gate|up|down)_proj\.weight", _L + r"mlp.\2_proj.weight"),
    Rule(_M + r"altup\.correct_output_scale", _L + "altup.correct_output_scale"),
    Rule(
        _M + r"altup\.(correction_coefs|prediction_coefs|modality_router|router_norm)\.weight",
        _L + r"altup.\2.weight",
    ),
    Rule(_M + r"laurel\.(linear_left|linear_right|post_laurel_norm)\.weight", _L + r"laurel.\2.weight"),
]

_G = r"blk\.(\d+)\."

_GGUF = [
    *GGUF_COMMON,
    Rule(r"per_layer_token_embd\.weight", "ends.embed_tokens_per_layer.weight"),
    Rule(r"per_layer_model_proj\.weight", "ends.per_layer_model_projection.weight"),
    Rule(r"per_layer_proj_norm\.weight", "ends.per_layer_projection_norm.weight"),
    Rule(r"altup_proj\.weight", "ends.altup_projections"),
    Rule(r"altup_unembd_proj\.weight", "ends.altup_unembed_projections"),
    Rule(_G + r"attn_(q|k|v)\.weight", _A + r"\2_proj.weight"),
    Rule(_G + r"attn_output\.weight", _A + "o_proj.weight"),
    Rule(_G + r"attn_(q|k)_norm\.weight", _A + r"\2_norm.weight"),
    Rule(_G + r"post_attention_norm\.weight", _L + "post_attention_layernorm.weight"),
    Rule(_G + r"ffn_norm\.weight", _L + "pre_feedforward_layernorm.weight"),
    Rule(_G + r"post_ffw_norm\.weight", _L + "post_feedforward_layernorm.weight"),
    Rule(_G + r"ffn_(gate|up|down)\.weight", _L + r"mlp.\2_proj.weight"),
    Rule(_G + r"inp_gate\.weight", _L + "per_layer_input_gate.weight"),
    Rule(_G + r"proj\.weight", _L + "per_layer_projection.weight"),
    Rule(_G + r"post_norm\.weight", _L + "post_per_layer_input_norm.weight"),
    Rule(_G + r"altup_correct_scale\.weight", _L + "altup.correct_output_scale"),
    Rule(_G + r"altup_correct_coef\.weight", _L + "altup.correction_coefs.weight"),
    Rule(_G + r"altup_predict_coef\.weight", _L + "altup.prediction_coefs.weight"),
    Rule(_G + r"altup_router\.weight", _L + "altup.modality_router.weight"),
    Rule(_G + r"altup_router_norm\.weight", _L + "altup.router_norm.weight"),
    Rule(_G + r"laurel_l\.weight", _L + "laurel.linear_left.weight"),
    Rule(_G + r"laurel_r\.weight", _L + "laurel.linear_right.weight"),
    Rule(_G + r"laurel_post_norm\.weight", _L + "laurel.post_laurel_norm.weight"),
]


def hf_rules(config: Gemma3nConfig, tensors: Mapping[str, Weight]) -> list[Rule]:
    return _HF


def gguf_rules(config: Gemma3nConfig, tensors: Mapping[str, Weight]) -> list[Rule]:
    return _GGUF


def _sharing(config: Gemma3nConfig) -> str:
    """A pattern for the numbers of the layers that have no use for the keys and values that files have for them."""
    return "|".join(map(str, range(config.first_shared, len(config.layers)))) or "none"


def hf_ignored(config: Gemma3nConfig) -> tuple[str, ...]:
    """Besides those, what sees and hears."""
    return (
        _P + rf"layers\.(?:{_sharing(config)})\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\..*",
        r"(?:model\.)?(?:vision_tower|audio_tower|embed_vision|embed_audio)\..*",
    )


def gguf_ignored(config: Gemma3nConfig) -> tuple[str, ...]:
    return (rf"blk\.(?:{_sharing(config)})\.attn_(?:k|v|k_norm)\.weight",)
