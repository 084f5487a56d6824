"""Tensor names of the Llama family in GGUF files and in Hugging Face checkpoints."""

import re
from collections.abc import Mapping

import numpy as np

from jaxllm.formats.base import Weight
from jaxllm.layers.rope import half_split_rows
from jaxllm.models import names
from jaxllm.models.llama.config import LlamaConfig
from jaxllm.models.rule import Rows, Rule, Written, inverted


def _attention_rows(part: str, fused: bool, half_split: bool = False) -> Rows:
    """Rows of q, k or v: a part of a fused tensor, reordered to half-split order where neighbours are paired."""

    def rows(config: LlamaConfig, m: re.Match) -> np.ndarray:
        layer = config.layers[int(m[1])]
        heads = {"q": layer.num_attention_heads, "k": layer.num_key_value_heads, "v": layer.num_key_value_heads}
        sizes = {p: n * (config.v_head_dim if p == "v" else config.head_dim) for p, n in heads.items()}
        index = np.arange(sizes[part])
        if half_split and part != "v":
            index = half_split_rows(heads[part], config.head_dim, config.rope.rotary_dim)
        before = {"q": 0, "k": sizes["q"], "v": sizes["q"] + sizes["k"]}[part]
        return index + before if fused else index

    return rows


def _half(which: int, expert: bool = False) -> Rows:
    """The gate (0) or up (1) half of a fused tensor's rows."""

    def rows(config: LlamaConfig, m: re.Match) -> np.ndarray:
        size = config.moe.moe_intermediate_size if expert and config.moe else config.layers[int(m[1])].intermediate_size
        return np.arange(size) + which * size

    return rows


_A, _L = r"layers.\1.self_attn.", r"layers.\1."
_G = r"blk\.(\d+)\."

_GGUF = [
    *names.GGUF_COMMON,
    names.GGUF_V,
    names.GGUF_O,
    names.GGUF_QK_NORMS,
    names.GGUF_FFN_NORM,
    Rule(_G + r"ffn_gate_inp\.weight", _L + "mlp.gate.weight"),
    Rule(_G + r"ffn_(gate|up|down)_exps\.weight", _L + r"mlp.experts.\2_proj"),
    Rule(_G + r"ffn_gate_up_exps\.weight", _L + "mlp.experts.gate_proj", _half(0, expert=True)),
    Rule(_G + r"ffn_gate_up_exps\.weight", _L + "mlp.experts.up_proj", _half(1, expert=True)),
    Rule(_G + r"ffn_(gate|up|down)\.(?P<expert>\d+)\.weight", _L + r"mlp.experts.\2_proj"),
    Rule(_G + r"ffn_(gate|up|down)_shexp\.weight", _L + r"mlp.shared_expert.\2_proj.weight"),
    Rule(_G + r"ffn_gate_inp_shexp\.weight", _L + "mlp.shared_expert_gate.weight"),
]
_GGUF_FUSED = [
    *(Rule(_G + r"attn_qkv\.(weight|bias)", _A + rf"{p}_proj.\2", _attention_rows(p, True)) for p in "qkv"),
    Rule(_G + r"ffn_up\.weight", _L + "mlp.gate_proj.weight", _half(0)),
    Rule(_G + r"ffn_up\.weight", _L + "mlp.up_proj.weight", _half(1)),
    Rule(_G + r"ffn_down\.weight", _L + "mlp.down_proj.weight"),
]


def _gguf_qk(paired: bool) -> list[Rule]:
    return [
        Rule(_G + rf"attn_{p}\.(weight|bias)", _A + rf"{p}_proj.\2", _attention_rows(p, False, paired)) for p in "qk"
    ]


def gguf_rules(config: LlamaConfig, tensors: Mapping[str, Weight]) -> list[Rule]:
    """Files of architecture `llama` pair neighbours in q and k; those of `phi3` fuse matrices."""
    if config.model_type == "phi3":
        return [*_GGUF, *_GGUF_FUSED]
    return [*_GGUF, *_gguf_qk(paired=config.model_type == "llama"), names.GGUF_MLP]


def gguf_written(config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Written]:
    """The tensors that llama.cpp has for a model of this architecture."""
    preferred = _GGUF_FUSED if config.model_type == "phi3" else []
    return inverted([*preferred, *gguf_rules(config, {})], shapes, config)


_M = r"model\.layers\.(\d+)\."
_SPARSE = _M + r"(?:mlp|block_sparse_moe)\."

_HF_FUSED = [
    *(Rule(_M + r"self_attn\.qkv_proj\.weight", _A + f"{p}_proj.weight", _attention_rows(p, True)) for p in "qkv"),
    Rule(_M + r"mlp\.gate_up_proj\.weight", _L + "mlp.gate_proj.weight", _half(0)),
    Rule(_M + r"mlp\.gate_up_proj\.weight", _L + "mlp.up_proj.weight", _half(1)),
]
_HF = [
    *names.HF_LLAMA,
    names.HF_QK_NORMS,
    *_HF_FUSED,
    Rule(_SPARSE + r"gate\.weight", _L + "mlp.gate.weight"),
    Rule(_SPARSE + r"experts\.(?P<expert>\d+)\.(gate|up|down)_proj\.weight", _L + r"mlp.experts.\3_proj"),
    Rule(_SPARSE + r"experts\.(?P<expert>\d+)\.w1\.weight", _L + "mlp.experts.gate_proj"),
    Rule(_SPARSE + r"experts\.(?P<expert>\d+)\.w3\.weight", _L + "mlp.experts.up_proj"),
    Rule(_SPARSE + r"experts\.(?P<expert>\d+)\.w2\.weight", _L + "mlp.experts.down_proj"),
    Rule(_M + r"mlp\.shared_expert\.(gate|up|down)_proj\.weight", _L + r"mlp.shared_expert.\2_proj.weight"),
    Rule(_M + r"mlp\.shared_expert_gate\.weight", _L + "mlp.shared_expert_gate.weight"),
]


def hf_rules(config: LlamaConfig, tensors: Mapping[str, Weight]) -> list[Rule]:
    if config.moe is None:
        return _HF
    return [*_HF, *names.expert_rules(_SPARSE, config.hidden_size, config.moe.moe_intermediate_size, tensors)]


_MIXTRAL = _M + r"block_sparse_moe\."
_HF_MIXTRAL = [
    Rule(_MIXTRAL + r"gate\.weight", _L + "mlp.gate.weight"),
    *(
        Rule(_MIXTRAL + rf"experts\.(?P<expert>\d+)\.{w}\.weight", _L + f"mlp.experts.{name}_proj")
        for w, name in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    ),
]


def hf_written(config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Written]:
    """The tensors that transformers has for a model of this type."""
    preferred = {"mixtral": _HF_MIXTRAL, "phi3": _HF_FUSED}.get(config.model_type, [])
    return inverted([*preferred, *_HF], shapes, config)
