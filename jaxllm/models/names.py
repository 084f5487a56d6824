"""Names that several families share: rules for what most models have, stacks of experts, and tensors that we ignore."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.scaled import Scaled
from jaxllm.layers.rope import half_split_rows
from jaxllm.models.rule import Rule, transposed

# Frequencies, which we compute from the configuration, and some quantizers' scales for an FP8 cache, which ours is
# not.
HF_IGNORED = (
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"model\.rotary_emb\.inv_freq",
    r"model\.layers\.\d+\.self_attn\.(?:[kv]_scale|[kv]_proj\.(?:[kv]|output)_scale)",
)

# Both ends of a model, and the norms before its blocks.
HF_COMMON = (
    Rule(r"model\.embed_tokens\.weight", "embed_tokens.weight"),
    Rule(r"model\.norm\.weight", "norm.weight"),
    Rule(r"lm_head\.weight", "lm_head.weight"),
    Rule(r"model\.layers\.(\d+)\.(input_layernorm|post_attention_layernorm)\.weight", r"layers.\1.\2.weight"),
)
GGUF_COMMON = (
    Rule(r"token_embd\.weight", "embed_tokens.weight"),
    Rule(r"output_norm\.weight", "norm.weight"),
    Rule(r"output\.weight", "lm_head.weight"),
    Rule(r"blk\.(\d+)\.attn_norm\.weight", r"layers.\1.input_layernorm.weight"),
)
# Frequencies that are read with the configuration.
GGUF_IGNORED = (r"rope_freqs\.weight", r"rope_factors_(long|short)\.weight", r"blk\.\d+\.attn_rot_embd")


def paired_rows(config: Any, m: re.Match) -> np.ndarray:
    """Rows of q or k (group 2) in half-split order, where the file pairs neighbours; config is a `Sizes`."""
    heads = config.num_attention_heads if m[2] == "q" else config.num_key_value_heads
    return half_split_rows(heads, config.head_dim, config.rope.rotary_dim)


# The matrices of grouped-query attention and of a gated feed-forward block.
_HF, _GGUF, _A, _MLP = r"model\.layers\.(\d+)\.", r"blk\.(\d+)\.", r"layers.\1.self_attn.", r"layers.\1.mlp."
HF_ATTENTION = Rule(_HF + r"self_attn\.(q|k|v|o)_proj\.(weight|bias)", _A + r"\2_proj.\3")
HF_QK_PAIRED = Rule(_HF + r"self_attn\.(q|k)_proj\.(weight|bias)", _A + r"\2_proj.\3", paired_rows)
HF_VO = Rule(_HF + r"self_attn\.(v|o)_proj\.(weight|bias)", _A + r"\2_proj.\3")
HF_QK_NORMS = Rule(_HF + r"self_attn\.(q|k)_norm\.weight", _A + r"\2_norm.weight")
HF_MLP = Rule(_HF + r"mlp\.(gate|up|down)_proj\.(weight|bias)", _MLP + r"\2_proj.\3")
GGUF_QK = Rule(_GGUF + r"attn_(q|k)\.(weight|bias)", _A + r"\2_proj.\3")
GGUF_QK_PAIRED = Rule(_GGUF + r"attn_(q|k)\.(weight|bias)", _A + r"\2_proj.\3", paired_rows)
GGUF_V = Rule(_GGUF + r"attn_v\.(weight|bias)", _A + r"v_proj.\2")
GGUF_O = Rule(_GGUF + r"attn_output\.(weight|bias)", _A + r"o_proj.\2")
GGUF_QK_NORMS = Rule(_GGUF + r"attn_(q|k)_norm\.weight", _A + r"\2_norm.weight")
GGUF_FFN_NORM = Rule(_GGUF + r"ffn_norm\.weight", r"layers.\1.post_attention_layernorm.weight")
GGUF_MLP = Rule(_GGUF + r"ffn_(gate|up|down)\.(weight|bias)", _MLP + r"\2_proj.\3")
# DeepSeek's experts and router, which others have taken over; transformers' stacks are in `expert_rules`.
HF_EXPERTS = (
    Rule(_HF + r"mlp\.gate\.weight", _MLP + "gate.weight"),
    Rule(_HF + r"mlp\.gate\.e_score_correction_bias", _MLP + "e_score_correction_bias"),
    Rule(_HF + r"mlp\.experts\.(?P<expert>\d+)\.(gate|up|down)_proj\.weight", _MLP + r"experts.\3_proj"),
    Rule(_HF + r"mlp\.shared_experts\.(gate|up|down)_proj\.weight", _MLP + r"shared_expert.\2_proj.weight"),
)
GGUF_EXPERTS = (
    Rule(_GGUF + r"ffn_gate_inp\.weight", _MLP + "gate.weight"),
    Rule(_GGUF + r"exp_probs_b\.bias", _MLP + "e_score_correction_bias"),
    Rule(_GGUF + r"ffn_(gate|up|down)_exps\.weight", _MLP + r"experts.\2_proj"),
    Rule(_GGUF + r"ffn_(gate|up|down)_shexp\.weight", _MLP + r"shared_expert.\2_proj.weight"),
)
# All of a model whose tensors are called as Llama's are.
HF_LLAMA = (*HF_COMMON, HF_ATTENTION, HF_MLP)
GGUF_LLAMA = (*GGUF_COMMON, GGUF_QK_PAIRED, GGUF_V, GGUF_O, GGUF_FFN_NORM, GGUF_MLP)


def gguf_ignored(config: Any) -> tuple[str, ...]:
    return GGUF_IGNORED


def hf_ignored(config: Any) -> tuple[str, ...]:
    return HF_IGNORED


def expert_rules(block: str, hidden_size: int, width: int, tensors: Mapping[str, Weight]) -> list[Rule]:
    """Rules for the stacks of experts in a sparse layer, for every name they have in Hugging Face checkpoints.

    MLX calls a stack `switch_mlp.gate_proj`; mistral.rs writes MXFP4 and AFQ as `experts.gate_proj`. Both are
    `[experts, out, in]`. Transformers joins gate and up, gate first, in `experts.gate_up_proj`. Some models store it
    as `[experts, out, in]`, others as `[experts, in, out]`.

    Args:
        block: pattern for the name of the sparse block; group 1 is the layer's number.
        hidden_size, width: the model's hidden size, and an expert's intermediate size.

    Raises:
        InputError: the shapes of a layer's stacks imply different orientations.
    """
    swapped = _transposed_layers(block, hidden_size, width, tensors)

    def as_out_in(weight: Weight, m: re.Match) -> Weight:
        return transposed(weight) if int(m[1]) in swapped else weight

    def half(which: int) -> Callable[[Any, re.Match], np.ndarray]:
        return lambda config, m: np.arange(width) + which * width

    target = r"layers.\1.mlp.experts."
    return [
        Rule(block + r"(?:experts|switch_mlp)\.(gate|up|down)_proj\.weight", target + r"\2_proj"),
        Rule(block + r"experts\.gate_up_proj", target + "gate_proj", half(0), as_out_in),
        Rule(block + r"experts\.gate_up_proj", target + "up_proj", half(1), as_out_in),
        Rule(block + r"experts\.down_proj", target + "down_proj", present=as_out_in),
    ]


def _transposed_layers(block: str, hidden: int, width: int, tensors: Mapping[str, Weight]) -> set[int]:
    """The layers whose stacks are `[experts, in, out]`.

    A square stack could have either orientation. But a layer's two stacks are never both square: `gate_up_proj` is if
    hidden = 2 width, `down_proj` if hidden = width. So the stack that is not square decides for the layer.
    """
    votes: dict[int, dict[bool, str]] = {}
    for name, weight in tensors.items():
        if not (m := re.fullmatch(block + r"experts\.(gate_up|down)_proj", name)) or len(weight.shape) != 3:
            continue
        want = (2 * width, hidden) if m[2] == "gate_up" else (hidden, width)
        packed = not isinstance(weight, Dense | Scaled)
        fits = {way for way, shape in ((False, want), (True, want[::-1])) if weight.shape[1:] == shape}
        if packed or len(fits) == 1:
            votes.setdefault(int(m[1]), {})[False if packed else fits.pop()] = name
    for layer, names in votes.items():
        if len(names) > 1:
            raise InputError(
                f"layer {layer}: '{names[False]}' is stored as [experts, out, in], but '{names[True]}' as "
                f"[experts, in, out]; store both alike, or each expert on its own (experts.0.gate_proj.weight)"
            )
    return {layer for layer, names in votes.items() if True in names}
