"""Tensor names of OLMo 2 in Hugging Face checkpoints and in GGUF files, which do not pair neighbours in q and k."""

from jaxllm.models.names import GGUF_COMMON, GGUF_MLP, GGUF_O, GGUF_QK, GGUF_V, HF_LLAMA
from jaxllm.models.rule import Rule, fixed

_M, _G = r"model\.layers\.(\d+)\.", r"blk\.(\d+)\."
_L, _QK = r"layers.\1.", r"layers.\1.self_attn.qk_norm.\2_norm.weight"

hf_rules = fixed(
    *HF_LLAMA,
    Rule(_M + r"self_attn\.(q|k)_norm\.weight", _QK),
    Rule(_M + r"post_feedforward_layernorm\.weight", _L + "post_feedforward_layernorm.weight"),
)
gguf_rules = fixed(
    *GGUF_COMMON,
    GGUF_QK,
    GGUF_V,
    GGUF_O,
    GGUF_MLP,
    Rule(_G + r"attn_(q|k)_norm\.weight", _QK),
    Rule(_G + r"post_attention_norm\.weight", _L + "post_attention_layernorm.weight"),
    Rule(_G + r"post_ffw_norm\.weight", _L + "post_feedforward_layernorm.weight"),
)
