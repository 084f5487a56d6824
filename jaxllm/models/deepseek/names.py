"""Tensor names of DeepSeek-V2 and V3 in GGUF files, in Hugging Face checkpoints, and in the demo's files."""

import re
from collections.abc import Mapping

import numpy as np

from jaxllm.formats.adapted import LowRank
from jaxllm.formats.base import Weight
from jaxllm.layers.rope import half_split_rows
from jaxllm.models.deepseek.config import DeepseekConfig
from jaxllm.models.names import (
    GGUF_COMMON,
    GGUF_EXPERTS,
    GGUF_FFN_NORM,
    GGUF_MLP,
    HF_COMMON,
    HF_EXPERTS,
    HF_IGNORED,
    HF_MLP,
    expert_rules,
)
from jaxllm.models.rule import Rule, Written, inverted


def _query_rows(config: DeepseekConfig, m: re.Match) -> np.ndarray:
    """Each head's part without position, then its rotary part in half-split order."""
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    within = np.concatenate([np.arange(nope), nope + _rotary(config)])
    return (np.arange(heads)[:, None] * (nope + rope) + within).reshape(-1)


def _latent_rows(config: DeepseekConfig, m: re.Match) -> np.ndarray:
    """The latent, then the rotary key in half-split order."""
    return np.concatenate([np.arange(config.kv_lora_rank), config.kv_lora_rank + _rotary(config)])


def _rotary(config: DeepseekConfig) -> np.ndarray:
    size = config.qk_rope_head_dim
    return half_split_rows(1, size, size) if config.interleaved else np.arange(size)


_L, _A = r"layers.\1.", r"layers.\1.self_attn."
_G = r"blk\.(\d+)\."

# Rotary parts pair neighbours here too: llama.cpp's converter does not reorder these rows.
_GGUF = [
    *GGUF_COMMON,
    GGUF_FFN_NORM,
    Rule(_G + r"attn_q\.weight", _A + "q_proj.weight", _query_rows),
    Rule(_G + r"attn_q_a\.weight", _A + "q_a_proj.weight"),
    Rule(_G + r"attn_(q|kv)_a_norm\.weight", _A + r"\2_a_layernorm.weight"),
    Rule(_G + r"attn_q_b\.weight", _A + "q_b_proj.weight", _query_rows),
    Rule(_G + r"attn_kv_a_mqa\.weight", _A + "kv_a_proj_with_mqa.weight", _latent_rows),
    Rule(_G + r"attn_kv_b\.weight", _A + "kv_b_proj.weight"),
    Rule(_G + r"attn_(k|v)_b\.weight", _A + r"\2_b_proj"),
    Rule(_G + r"attn_output\.weight", _A + "o_proj.weight"),
    GGUF_MLP,
    *GGUF_EXPERTS,
]


def gguf_rules(config: DeepseekConfig, tensors: Mapping[str, Weight]) -> list[Rule]:
    return _GGUF


def gguf_ignored(config: DeepseekConfig) -> list[str]:
    """The extra layer for multi-token prediction, and the parts of kv_b that some forks of llama.cpp add to it."""
    copies = [] if config.split_kv_b else [r"blk\.\d+\.attn_[kv]_b\.weight"]
    return [rf"blk\.{config.num_hidden_layers}\..*", *copies]


_M = r"model\.layers\.(\d+)\."

_HF = [
    *HF_COMMON,
    Rule(_M + r"self_attn\.(q_proj|q_b_proj)\.weight", _A + r"\2.weight", _query_rows),
    Rule(_M + r"self_attn\.kv_a_proj_with_mqa\.(weight|bias)", _A + r"kv_a_proj_with_mqa.\2", _latent_rows),
    Rule(_M + r"self_attn\.(q_a_proj|kv_b_proj|o_proj)\.(weight|bias)", _A + r"\2.\3"),
    Rule(_M + r"self_attn\.(q_a_layernorm|kv_a_layernorm)\.weight", _A + r"\2.weight"),
    HF_MLP,
    *HF_EXPERTS,
]


def hf_rules(config: DeepseekConfig, tensors: Mapping[str, Weight]) -> list[Rule]:
    return [*_HF, *expert_rules(_M + r"mlp\.", config.hidden_size, config.moe_intermediate_size, tensors)]


def hf_ignored(config: DeepseekConfig) -> list[str]:
    """The extra layer for multi-token prediction (MTP), and what all families ignore."""
    return [rf"model\.layers\.{config.num_hidden_layers}\..*", *HF_IGNORED]


def gguf_written(config: DeepseekConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Written]:
    """The tensors of a GGUF file. With `split_kv_b`, a kv_b becomes the two stacks that llama.cpp needs for attention
    on latents: a head's keys, transposed, and its values."""
    whole = [path for path in shapes if path.endswith("kv_b_proj.weight") and config.split_kv_b]
    written = inverted(_GGUF, {path: shape for path, shape in shapes.items() if path not in whole}, config)
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    rows = np.arange(heads * (nope + value)).reshape(heads, -1)
    for path in whole:
        keys, values = (f"blk.{path.split('.')[1]}.attn_{part}_b.weight" for part in "kv")
        parts = ((path, None),)
        written.append(Written(keys, parts, rows[:, :nope].reshape(-1), transposed=True, stack=heads))
        written.append(Written(values, parts, rows[:, nope:].reshape(-1), stack=heads))
    return written


def hf_written(config: DeepseekConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Written]:
    """The tensors of a Hugging Face checkpoint. The two stacks that kv_b is in GGUF files become one matrix: for each
    head, its k_b transposed and its v_b."""
    stacks = {path: shape for path, shape in shapes.items() if path.endswith(("k_b_proj", "v_b_proj"))}
    written = inverted(_HF, {path: shape for path, shape in shapes.items() if path not in stacks}, config)
    for keys in (path for path in stacks if path.endswith("k_b_proj")):
        values, heads = keys.replace("k_b_proj", "v_b_proj"), stacks[keys][0]
        parts = tuple((path, i) for i in range(heads) for path in (keys, values))
        name = "model." + keys.replace("k_b_proj", "kv_b_proj.weight")
        written.append(Written(name, parts, None, turned=(True, False) * heads))
    return written


def divided(config: DeepseekConfig, path: str, change: LowRank) -> dict[str, LowRank]:
    """An adapter's change of a kv_b as changes of the two stacks that it is held as with `split_kv_b`: a head's keys,
    transposed, and its values. Empty if `path` is no such matrix, or the change has other rows."""
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    if not (config.split_kv_b and path.endswith("kv_b_proj.weight") and len(change.b) == heads * (nope + value)):
        return {}
    b = np.reshape(change.b, (heads, nope + value, change.rank))
    a, scale = (np.broadcast_to(leaf, (heads, *leaf.shape)) for leaf in (change.a, change.scale))
    keys, values = (path.replace("kv_b_proj.weight", f"{part}_b_proj") for part in "kv")
    return {
        keys: LowRank(b[:, :nope].swapaxes(1, 2), a.swapaxes(1, 2), scale),
        values: LowRank(a, b[:, nope:], scale),
    }


# DeepSeek's inference demo: for each Hugging Face name, the demo's name, and the axis along which it splits the tensor.
DEMO_NAMES = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
}
DEMO_AXES = dict(DEMO_NAMES.values())
DEMO_EXPERT = re.compile(r"layers\.\d+\.ffn\.experts\.(\d+)\..*")
_HF_NAMES = {demo: hf for hf, (demo, _) in DEMO_NAMES.items()}
_DEMO_KINDS = {"weight": "weight", "weight_scale_inv": "scale", "e_score_correction_bias": "bias"}
_HF_KINDS = {demo: hf for hf, demo in _DEMO_KINDS.items()}
_DEMO_PARENTS = {"self_attn": "attn", "mlp": "ffn"}
_HF_PARENTS = {demo: hf for hf, demo in _DEMO_PARENTS.items()}


def demo_name(name: str) -> str | None:
    """The demo's name for a tensor of a Hugging Face checkpoint; None if the demo does not have it."""
    *parents, key, kind = _split(name.removeprefix("model."))
    if key not in DEMO_NAMES or kind not in _DEMO_KINDS:
        return None
    return ".".join((*(_DEMO_PARENTS.get(p, p) for p in parents), DEMO_NAMES[key][0], _DEMO_KINDS[kind]))


def name_of_demo(name: str) -> str | None:
    """The inverse of `demo_name`."""
    *parents, key, kind = _split(name)
    if key not in _HF_NAMES or kind not in _HF_KINDS:
        return None
    prefix = "" if key == "head" else "model."
    return prefix + ".".join((*(_HF_PARENTS.get(p, p) for p in parents), _HF_NAMES[key], _HF_KINDS[kind]))


def _split(name: str) -> list[str]:
    """The parts of a name; there are at least two."""
    return name.split(".") if "." in name else ["", name]


_D = r"layers\.(\d+)\."
_MATRICES = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))

_DEMO = [
    Rule(r"embed\.weight", "embed_tokens.weight"),
    Rule(r"norm\.weight", "norm.weight"),
    Rule(r"head\.weight", "lm_head.weight"),
    Rule(_D + r"attn_norm\.weight", _L + "input_layernorm.weight"),
    Rule(_D + r"ffn_norm\.weight", _L + "post_attention_layernorm.weight"),
    Rule(_D + r"attn\.wq\.weight", _A + "q_proj.weight", _query_rows),
    Rule(_D + r"attn\.wq_a\.weight", _A + "q_a_proj.weight"),
    Rule(_D + r"attn\.(q|kv)_norm\.weight", _A + r"\2_a_layernorm.weight"),
    Rule(_D + r"attn\.wq_b\.weight", _A + "q_b_proj.weight", _query_rows),
    Rule(_D + r"attn\.wkv_a\.weight", _A + "kv_a_proj_with_mqa.weight", _latent_rows),
    Rule(_D + r"attn\.wkv_b\.weight", _A + "kv_b_proj.weight"),
    Rule(_D + r"attn\.wo\.weight", _A + "o_proj.weight"),
    Rule(_D + r"ffn\.gate\.weight", _L + "mlp.gate.weight"),
    Rule(_D + r"ffn\.gate\.bias", _L + "mlp.e_score_correction_bias"),
    *(Rule(_D + rf"ffn\.{w}\.weight", _L + f"mlp.{name}.weight") for w, name in _MATRICES),
    *(Rule(_D + rf"ffn\.experts\.(?P<expert>\d+)\.{w}\.weight", _L + f"mlp.experts.{n}") for w, n in _MATRICES),
    *(Rule(_D + rf"ffn\.shared_experts\.{w}\.weight", _L + f"mlp.shared_expert.{n}.weight") for w, n in _MATRICES),
]


def demo_rules(config: DeepseekConfig, tensors: Mapping[str, Weight]) -> list[Rule]:
    return _DEMO
