"""Sizes and constants of DeepSeek-V2 and V3, from a config.json, the demo's ModelArgs, or a GGUF file's metadata."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.layers import rope
from jaxllm.layers.rope import Rope
from jaxllm.models.config import MANY, POSITIONS

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")
GGUF_ARCHITECTURES = ("deepseek2",)
DEMO_TYPE = "deepseek_demo"
GGUF_SCORING = {1: "softmax", 2: "sigmoid"}

DEMO_DEFAULTS = {
    "max_batch_size": 8,
    "max_seq_len": 4096 * 4,
    "dtype": "bf16",
    "vocab_size": 102400,
    "dim": 2048,
    "inter_dim": 10944,
    "moe_inter_dim": 1408,
    "n_layers": 27,
    "n_dense_layers": 1,
    "n_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "n_expert_groups": 1,
    "n_limited_groups": 1,
    "score_func": "softmax",
    "route_scale": 1.0,
    "q_lora_rank": 0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "original_seq_len": 4096,
    "rope_theta": 10000.0,
    "rope_factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "scale_fmt": None,
}

_V3 = {"vocab_size": 129280, "n_dense_layers": 3, "n_shared_experts": 1, "score_func": "sigmoid", "route_scale": 2.5}
_236B = {"dim": 5120, "inter_dim": 12288, "moe_inter_dim": 1536, "n_layers": 60, "n_heads": 128, "q_lora_rank": 1536}
_671B = {"dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61, "n_heads": 128, "q_lora_rank": 1536}
PRESETS = {
    "deepseek-v2-lite-16b": {"mscale": 0.707},
    "deepseek-v2-236b": _236B
    | {"n_routed_experts": 160, "n_expert_groups": 8, "n_limited_groups": 3, "route_scale": 16.0},
    "deepseek-v3-671b": _671B
    | _V3
    | {"n_routed_experts": 256, "n_activated_experts": 8, "n_expert_groups": 8, "n_limited_groups": 4, "dtype": "fp8"},
}


@dataclass(frozen=True)
class DeepseekConfig:
    """A model, by Hugging Face's names where there are some.

    rope: rotary frequencies; `interleaved` says that the checkpoint pairs neighbours.
    softmax_scale: what scores are multiplied by, YaRN's temperature included.
    split_kv_b: whether the checkpoint has kv_b in two stacks, see `LatentAttention`.
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
    split_kv_b: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json of one of MODEL_TYPES.

        Args:
            tensors: names of the checkpoint's tensors, which say what the config does not: whether routers have a
                correction bias. Without them, those of V3 do.

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
            has_correction_bias=any(name.endswith("e_score_correction_bias") for name in tensors) if tensors else v3,
            q_lora_rank=config.get("q_lora_rank"),
            qk_nope_head_dim=head[0],
            qk_rope_head_dim=head[1],
            v_head_dim=get("v_head_dim", 128),
            rms_norm_eps=get("rms_norm_eps", 1e-6),
            max_position_embeddings=get("max_position_embeddings", 2048),
            tie_word_embeddings=get("tie_word_embeddings", False) and "lm_head.weight" not in tensors,
            attention_bias=get("attention_bias", False),
            rope=frequencies,
            interleaved=get("rope_interleave", True),
            softmax_scale=sum(head) ** -0.5 * scale,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file of one of GGUF_ARCHITECTURES.

        Raises:
            InputError: a key is missing or has no sensible value, or asks for something that is not supported.
        """
        arch = metadata["general.architecture"]
        prefix = f"{arch}."
        own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        given = Entries(own, f"metadata {prefix}*")
        if given.number("attention.temperature_scale", 0.0, above=-math.inf):
            raise InputError(f"{given.where}: 'attention.temperature_scale' is not supported")

        def head(key: str) -> int:
            """Of files with kv_b in two stacks, `key` is the size of a latent key or value."""
            return given.whole(f"{key}_mla" if f"{key}_mla" in given else key, most=MANY)

        key = head("attention.key_length")
        rotary = given.whole("rope.dimension_count", most=key - 1)
        biased = any(name.endswith("exp_probs_b.bias") for name in tensors)
        frequencies, scale = _gguf_yarn(given, rotary)
        return cls(
            model_type=arch,
            vocab_size=tensors["token_embd.weight"].shape[0]
            if "token_embd.weight" in tensors
            else given.whole("vocab_size"),
            hidden_size=given.whole("embedding_length"),
            intermediate_size=given.whole("feed_forward_length"),
            moe_intermediate_size=given.whole("expert_feed_forward_length"),
            num_hidden_layers=min([given.whole("block_count", most=MANY), *_predicting_layers(tensors)]),
            first_k_dense_replace=given.whole("leading_dense_block_count", 0, 0),
            num_attention_heads=given.whole("attention.head_count", most=MANY),
            n_routed_experts=given.whole("expert_count", most=MANY),
            n_shared_experts=given.whole("expert_shared_count", 0, 0, MANY),
            num_experts_per_tok=given.whole("expert_used_count", most=MANY),
            n_group=given.whole("expert_group_count", 1, most=MANY),
            topk_group=given.whole("expert_group_used_count", 1, most=MANY),
            scoring_func=_gguf_scoring(given, biased),
            group_score="top2" if biased else "max",
            norm_topk_prob=given.flag("expert_weights_norm"),
            routed_scaling_factor=given.number("expert_weights_scale", 0.0, above=-math.inf) or 1.0,
            has_correction_bias=biased,
            q_lora_rank=given.whole("attention.q_lora_rank", 0, 0) or None,
            kv_lora_rank=given.whole("attention.kv_lora_rank"),
            qk_nope_head_dim=key - rotary,
            qk_rope_head_dim=rotary,
            v_head_dim=head("attention.value_length"),
            rms_norm_eps=given.number("attention.layer_norm_rms_epsilon"),
            max_position_embeddings=given.whole("context_length", most=POSITIONS),
            tie_word_embeddings="output.weight" not in tensors,
            attention_bias=False,
            rope=frequencies,
            interleaved=True,
            softmax_scale=key**-0.5 * scale,
            split_kv_b="blk.0.attn_kv_b.weight" not in tensors,
        )

    @classmethod
    def from_demo(cls, args: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration of DeepSeek's own inference demo: the fields of its `ModelArgs`, missing ones as there.

        Args:
            tensors: names of what is in the files. The demo has the correction bias by the model's width alone; here
                the files decide.

        Raises:
            InputError: a field that `ModelArgs` does not have.
        """
        if unknown := sorted(args.keys() - DEMO_DEFAULTS.keys()):
            raise InputError(f"'{unknown[0]}' is not a field of ModelArgs")
        a = DEMO_DEFAULTS | dict(args)
        sigmoid, head = a["score_func"] == "sigmoid", a["qk_nope_head_dim"] + a["qk_rope_head_dim"]
        biased = any(name.endswith(".gate.bias") for name in tensors) if tensors else sigmoid
        base, theta = rope.frequencies(a["qk_rope_head_dim"], a["rope_theta"]), a["rope_theta"]
        scale = head**-0.5
        if a["max_seq_len"] > a["original_seq_len"]:
            ramp = a["beta_fast"], a["beta_slow"]
            base = rope.yarn(base, a["rope_factor"], theta, a["original_seq_len"], *ramp)
            scale *= rope.yarn_scale(a["rope_factor"], a["mscale"]) ** 2
        return cls(
            model_type=DEMO_TYPE,
            vocab_size=a["vocab_size"],
            hidden_size=a["dim"],
            intermediate_size=a["inter_dim"],
            moe_intermediate_size=a["moe_inter_dim"],
            num_hidden_layers=a["n_layers"],
            first_k_dense_replace=a["n_dense_layers"],
            num_attention_heads=a["n_heads"],
            n_routed_experts=a["n_routed_experts"],
            n_shared_experts=a["n_shared_experts"],
            num_experts_per_tok=a["n_activated_experts"],
            n_group=a["n_expert_groups"],
            topk_group=a["n_limited_groups"],
            scoring_func=a["score_func"],
            group_score="top2" if biased else "max",
            norm_topk_prob=sigmoid,
            routed_scaling_factor=a["route_scale"],
            has_correction_bias=biased,
            q_lora_rank=a["q_lora_rank"] or None,
            kv_lora_rank=a["kv_lora_rank"],
            qk_nope_head_dim=a["qk_nope_head_dim"],
            qk_rope_head_dim=a["qk_rope_head_dim"],
            v_head_dim=a["v_head_dim"],
            rms_norm_eps=1e-6,
            max_position_embeddings=a["max_seq_len"],
            tie_word_embeddings=False,
            attention_bias=False,
            rope=Rope(tuple(base.tolist())),
            interleaved=True,
            softmax_scale=scale,
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


def _gguf_yarn(given: Entries, dim: int) -> tuple[Rope, float]:
    """As `_yarn`. A file has a tenth of mscale_all_dim and no mscale, which llama.cpp takes to be the same."""
    kinds = ("none", "linear", "yarn", "longrope")
    kind = given.get("rope.scaling.type", "none", lambda value: value in kinds, f"one of {', '.join(kinds)}")
    factor = given.number("rope.scaling.factor", 1.0)
    mscale = given.number("rope.scaling.yarn_log_multiplier", 0.0, above=-math.inf) / 0.1
    values = {
        "rope_theta": given.number("rope.freq_base", 10000.0, above=1.0),
        "rope_type": "default" if factor == 1 else kind.replace("none", "default"),
        "factor": factor,
        "original_max_position_embeddings": given.whole(
            "rope.scaling.original_context_length", given.whole("context_length", most=POSITIONS), most=POSITIONS
        ),
        "beta_fast": given.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": given.number("rope.scaling.yarn_beta_slow", 1.0),
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }
    return _yarn({"rope_parameters": values}, dim)


def _gguf_scoring(given: Entries, biased: bool) -> str:
    """Files that do not say it are of V2, or of models like V3 that came before the key: only those have the bias."""
    number = given.whole("expert_gating_func", 0, 0) or (2 if biased else 1)
    if number not in GGUF_SCORING:
        raise InputError(f"{given.where}: 'expert_gating_func' {number} is not supported; 1 and 2 are")
    return GGUF_SCORING[number]


def _predicting_layers(tensors: Mapping[str, Weight]) -> set[int]:
    """Layers for multi-token prediction, which stand after the others."""
    return {int(m[1]) for name in tensors if (m := re.match(r"blk\.(\d+)\.nextn\.", name))}
