"""Tensor names of GPT-OSS in Hugging Face checkpoints, in MLX's, and in GGUF files."""

from collections.abc import Mapping

import numpy as np

from jaxllm.formats.base import Weight
from jaxllm.models.gpt_oss.config import GptOssConfig
from jaxllm.models.names import GGUF_COMMON, GGUF_O, GGUF_QK, GGUF_V, HF_ATTENTION, HF_COMMON
from jaxllm.models.rule import Rows, Rule, column, transposed


def _every_other(first: int) -> Rows:
    """Rows of the gate (0) or the up projection (1), which alternate in `gate_up_proj`."""
    return lambda config, m: np.arange(first, 2 * config.intermediate_size, 2)


_M, _E = r"model\.layers\.(\d+)\.", r"model\.layers\.(\d+)\.mlp\.experts\."
_A, _L, _X = r"layers.\1.self_attn.", r"layers.\1.", r"layers.\1.mlp.experts."

_HF = [
    *HF_COMMON,
    HF_ATTENTION,
    Rule(_M + r"self_attn\.sinks", _A + "sinks"),
    Rule(_M + r"mlp\.router\.(weight|bias)", _L + r"mlp.gate.\2"),
    Rule(_E + "gate_up_proj", _X + "gate_proj", _every_other(0), transposed),
    Rule(_E + "gate_up_proj", _X + "up_proj", _every_other(1), transposed),
    Rule(_E + "down_proj", _X + "down_proj", present=transposed),
    Rule(_E + "gate_up_proj_bias", _X + "gate_bias", _every_other(0), column),
    Rule(_E + "gate_up_proj_bias", _X + "up_bias", _every_other(1), column),
    Rule(_E + "down_proj_bias", _X + "down_bias", present=column),
    # MLX stores gate and up separately.
    Rule(_E + r"(gate|up|down)_proj\.weight", _X + r"\2_proj"),
    Rule(_E + r"(gate|up|down)_proj\.bias", _X + r"\2_bias", present=column),
    # UQFF has them joined, like transformers, but as [experts, out, in].
    Rule(_E + r"gate_up_proj\.weight", _X + "gate_proj", _every_other(0)),
    Rule(_E + r"gate_up_proj\.weight", _X + "up_proj", _every_other(1)),
    Rule(_E + r"gate_up_proj\.bias", _X + "gate_bias", _every_other(0), column),
    Rule(_E + r"gate_up_proj\.bias", _X + "up_bias", _every_other(1), column),
]

_G = r"blk\.(\d+)\."

_GGUF = [
    *GGUF_COMMON,
    GGUF_QK,
    GGUF_V,
    GGUF_O,
    Rule(_G + r"attn_sinks\.weight", _A + "sinks"),
    Rule(_G + r"post_attention_norm\.weight", _L + "post_attention_layernorm.weight"),
    Rule(_G + r"ffn_gate_inp\.(weight|bias)", _L + r"mlp.gate.\2"),
    Rule(_G + r"ffn_(gate|up|down)_exps\.weight", _X + r"\2_proj"),
    Rule(_G + r"ffn_(gate|up|down)_exps\.bias", _X + r"\2_bias", present=column),
]


def hf_rules(config: GptOssConfig, tensors: Mapping[str, Weight]) -> list[Rule]:
    return _HF


def gguf_rules(config: GptOssConfig, tensors: Mapping[str, Weight]) -> list[Rule]:
    return _GGUF
