"""Names that several families share in Hugging Face checkpoints: stacks of experts, and tensors that we ignore."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.scaled import Scaled
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
