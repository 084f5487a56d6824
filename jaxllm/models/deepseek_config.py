"""Sizes and constants of DeepSeek-V2 and V3, from a config.json, the demo's ModelArgs, or a GGUF file's metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.layers import rope
from jaxllm.layers.rope import Rope

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")
GGUF_ARCHITECTURES = ("deepseek2",)


@dataclass(frozen=True)
class DeepseekConfig:
    """A model, by Hugging Face's names where there are some.

    rope: rotary frequencies; `interleaved` says that the checkpoint pairs neighbours.
    softmax_scale: what scores are multiplied by, YaRN's temperature included.
    scoring_func: "softmax" or "sigmoid"; `group_score`: "max", or "top2" for the sum of a group's two best.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    scoring_func: str
    group_score: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    has_correction_bias: bool
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    rope: Rope
    interleaved: bool
    softmax_scale: float

    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration in a config.json of one of MODEL_TYPES.

        Raises:
            InputError: a key is missing, or asks for something that is not supported.
        """

        def get(key: str, default: object = None) -> object:
            value = config.get(key)
            value = default if value is None else value
            if value is None:
                raise InputError(f"'{key}' is missing")
            return value

        v3 = config["model_type"] == "deepseek_v3"
        head = get("qk_nope_head_dim", 128), get("qk_rope_head_dim", 64)
        grouped = v3 or config.get("topk_method", "greedy") == "group_limited_greedy"
        frequencies, scale = _yarn(config, head[1])
        return cls(
            model_type=config["model_type"],
            **{
                key: get(key)
                for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "kv_lora_rank")
            },
            moe_intermediate_size=get("moe_intermediate_size"),
            first_k_dense_replace=get("first_k_dense_replace", 0),
            num_attention_heads=get("num_attention_heads"),
            n_routed_experts=get("n_routed_experts"),
            n_shared_experts=get("n_shared_experts", 0),
            num_experts_per_tok=get("num_experts_per_tok"),
            n_group=get("n_group", 1) if grouped else 1,
            topk_group=get("topk_group", 1) if grouped else 1,
            scoring_func=get("scoring_func", "sigmoid" if v3 else "softmax"),
            group_score="top2" if v3 else "max",
            norm_topk_prob=get("norm_topk_prob", v3),
            routed_scaling_factor=get("routed_scaling_factor", 1.0),
            has_correction_bias=any(name.endswith("e_score_correction_bias") for name in tensors),
            q_lora_rank=config.get("q_lora_rank"),
            qk_nope_head_dim=head[0],
            qk_rope_head_dim=head[1],
            v_head_dim=get("v_head_dim", 128),
            rms_norm_eps=get("rms_norm_eps", 1e-6),
            max_position_embeddings=get("max_position_embeddings", 2048),
            tie_word_embeddings=get("tie_word_embeddings", False),
            attention_bias=get("attention_bias", False),
            rope=frequencies,
            interleaved=get("rope_interleave", True),
            softmax_scale=sum(head) ** -0.5 * scale,
        )


def _yarn(config: Mapping[str, object], dim: int) -> tuple[Rope, float]:
    """Rotary frequencies and what YaRN multiplies scores by."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
    base, kind = rope.frequencies(dim, theta), given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return Rope(tuple(base.tolist())), 1.0
    if kind != "yarn":
        raise InputError(f"rope scaling '{kind}' is not supported for this model")
    factor, original = given.get("factor"), given.get("original_max_position_embeddings")
    if factor is None or original is None:
        raise InputError("rope scaling 'yarn' without 'factor' and 'original_max_position_embeddings'")
    mscale, over = given.get("mscale"), given.get("mscale_all_dim")
    scale = given.get("attention_factor")
    if scale is None:
        both = mscale and over
        scale = rope.yarn_scale(factor, mscale) / rope.yarn_scale(factor, over) if both else rope.yarn_scale(factor)
    ramp = given.get("beta_fast") or 32, given.get("beta_slow") or 1
    frequencies: np.ndarray = rope.yarn(base, factor, theta, original, *ramp, given.get("truncate", True))
    return Rope(tuple(frequencies.tolist()), scale), rope.yarn_scale(factor, over) ** 2 if over else 1.0
