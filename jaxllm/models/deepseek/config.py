"""Sizes and constants of DeepSeek-V2 and V3, from a config.json, the demo's ModelArgs, or a GGUF file's metadata."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.layers import rope
from jaxllm.layers.rope import Rope
from jaxllm.models.config import (
    GGUF_ROUTING,
    HF_ROUTING,
    MANY,
    POSITIONS,
    WIDEST,
    check_activation,
    gguf_entries,
    gguf_vocab_size,
    layer_count,
    routing,
)
from jaxllm.models.rope_config import MSCALE, gguf_rope, hf_rope, hf_rope_entries

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")
GGUF_ARCHITECTURES = ("deepseek2",)
DEMO_TYPE = "deepseek_demo"
SCORING = ("softmax", "sigmoid")
GGUF_SCORING = dict(enumerate(SCORING, 1))
# The names of the entries for `routing`, where they are not the usual ones.
DEMO_ROUTING = "n_routed_experts", "n_activated_experts", "n_expert_groups", "n_limited_groups"
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")

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
PRESETS: dict[str, dict[str, object]] = {
    "deepseek-v2-lite-16b": {"mscale": 0.707},
    "deepseek-v2-236b": _236B
    | {"n_routed_experts": 160, "n_expert_groups": 8, "n_limited_groups": 3, "route_scale": 16.0},
    "deepseek-v3-671b": _671B
    | _V3
    | {"n_routed_experts": 256, "n_activated_experts": 8, "n_expert_groups": 8, "n_limited_groups": 4, "dtype": "fp8"},
}


@dataclass(frozen=True)
class DeepseekConfig:
    """A model's configuration, with Hugging Face's names where these exist.

    rope: rotary frequencies; `interleaved` means that the checkpoint pairs neighbours.
    softmax_scale: what scores are multiplied by, YaRN's temperature included.
    split_kv_b: whether the checkpoint stores kv_b as two stacks, see `LatentAttention`.
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
            tensors: names of the checkpoint's tensors. They show what the config does not say: whether routers have a
                correction bias. Without names, V3's routers are taken to have one.

        Raises:
            InputError: a key is missing, or asks for something that is not supported.
        """

        given = Entries(config, "config.json")
        kind = given.choice("model_type", MODEL_TYPES)
        check_activation(given)
        given.integer("moe_layer_freq", 1, most=1)  # other values would put dense layers between sparse ones
        v3 = kind == "deepseek_v3"
        method = given.choice("topk_method", TOPK_METHODS, "noaux_tc" if v3 else "greedy")
        heads = given.integer("num_attention_heads", most=MANY)
        nope, rotary, value = _head_dims(given, heads)
        frequencies, scale = _hf_yarn(given, rotary)
        names = HF_ROUTING if v3 or method == "group_limited_greedy" else (*HF_ROUTING[:2], "", "")
        return cls(
            model_type=kind,
            vocab_size=given.integer("vocab_size"),
            hidden_size=given.integer("hidden_size"),
            intermediate_size=given.integer("intermediate_size"),
            moe_intermediate_size=given.integer("moe_intermediate_size"),
            num_hidden_layers=layer_count(given, "num_hidden_layers", tensors),
            first_k_dense_replace=given.integer("first_k_dense_replace", 0, 0, MANY),
            num_attention_heads=heads,
            n_shared_experts=given.integer("n_shared_experts", 0, 0, MANY),
            **routing(given, *names, least=2 if v3 else 1),
            scoring_func=given.choice("scoring_func", SCORING, "sigmoid" if v3 else "softmax"),
            group_score="top2" if v3 else "max",
            norm_topk_prob=given.flag("norm_topk_prob", v3),
            routed_scaling_factor=given.number("routed_scaling_factor", 1.0),
            has_correction_bias=any(name.endswith("e_score_correction_bias") for name in tensors) if tensors else v3,
            q_lora_rank=given.integer("q_lora_rank", 0, 0) or None,
            kv_lora_rank=given.integer("kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rotary,
            v_head_dim=value,
            rms_norm_eps=given.number("rms_norm_eps", 1e-6, most=1.0),
            max_position_embeddings=given.integer("max_position_embeddings", 2048, most=POSITIONS),
            tie_word_embeddings=given.flag("tie_word_embeddings") and "lm_head.weight" not in tensors,
            attention_bias=given.flag("attention_bias"),
            rope=frequencies,
            interleaved=given.flag("rope_interleave", True),
            softmax_scale=(nope + rotary) ** -0.5 * scale,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file of one of GGUF_ARCHITECTURES.

        Raises:
            InputError: a key is missing, has an impossible value, or asks for something that is not supported.
        """
        arch, given = gguf_entries(metadata, GGUF_ARCHITECTURES)
        if given.number("attention.temperature_scale", 0.0, above=-math.inf):
            raise InputError(f"{given.where}: 'attention.temperature_scale' is not supported")

        def head(key: str) -> int:
            """A head's size. In files with kv_b in two stacks, `key` itself is the size of a latent key or value."""
            key = f"{key}_mla" if f"{key}_mla" in given else key
            return given.integer(key, most=min(MANY, WIDEST // heads))

        heads = given.integer("attention.head_count", most=MANY)
        key, value = head("attention.key_length"), head("attention.value_length")
        rotary = given.integer("rope.dimension_count", most=key - 1)
        biased = any(name.endswith("exp_probs_b.bias") for name in tensors)
        frequencies, scale = _gguf_yarn(given, tensors, rotary)
        return cls(
            model_type=arch,
            vocab_size=gguf_vocab_size(given, tensors),
            hidden_size=given.integer("embedding_length"),
            intermediate_size=given.integer("feed_forward_length"),
            moe_intermediate_size=given.integer("expert_feed_forward_length"),
            num_hidden_layers=min([layer_count(given, "block_count", tensors), *_predicting_layers(tensors)]),
            first_k_dense_replace=given.integer("leading_dense_block_count", 0, 0, MANY),
            num_attention_heads=heads,
            n_shared_experts=given.integer("expert_shared_count", 0, 0, MANY),
            **routing(given, *GGUF_ROUTING, least=2 if biased else 1),
            scoring_func=_gguf_scoring(given, biased),
            group_score="top2" if biased else "max",
            norm_topk_prob=given.flag("expert_weights_norm"),
            routed_scaling_factor=given.number("expert_weights_scale", 0.0, least=0.0) or 1.0,
            has_correction_bias=biased,
            q_lora_rank=given.integer("attention.q_lora_rank", 0, 0) or None,
            kv_lora_rank=given.integer("attention.kv_lora_rank"),
            qk_nope_head_dim=key - rotary,
            qk_rope_head_dim=rotary,
            v_head_dim=value,
            rms_norm_eps=given.number("attention.layer_norm_rms_epsilon", most=1.0),
            max_position_embeddings=given.integer("context_length", most=POSITIONS),
            tie_word_embeddings="output.weight" not in tensors,
            attention_bias=False,
            rope=frequencies,
            interleaved=True,
            softmax_scale=key**-0.5 * scale,
            split_kv_b="blk.0.attn_kv_b.weight" not in tensors,
        )

    @classmethod
    def from_demo(cls, args: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration from `ModelArgs` of DeepSeek's inference demo; missing fields have the demo's defaults.

        Args:
            tensors: names of the tensors in the files. They show whether there is a correction bias; the demo decides
                this by the model's width alone.

        Raises:
            InputError: `ModelArgs` does not have the field, or the field has an impossible value.
        """
        given = Entries(demo_args(args), "ModelArgs")
        sigmoid = given.values["score_func"] == "sigmoid"
        biased = any(name.endswith(".gate.bias") for name in tensors) if tensors else sigmoid
        heads, positions = given.integer("n_heads", most=MANY), given.integer("max_seq_len", most=POSITIONS)
        nope, rotary, value = _head_dims(given, heads)
        frequencies, scale = _demo_yarn(given, rotary)
        return cls(
            model_type=DEMO_TYPE,
            vocab_size=given.integer("vocab_size"),
            hidden_size=given.integer("dim"),
            intermediate_size=given.integer("inter_dim"),
            moe_intermediate_size=given.integer("moe_inter_dim"),
            num_hidden_layers=layer_count(given, "n_layers", tensors),
            first_k_dense_replace=given.integer("n_dense_layers", least=0, most=MANY),
            num_attention_heads=heads,
            n_shared_experts=given.integer("n_shared_experts", least=0, most=MANY),
            **routing(given, *DEMO_ROUTING, least=2 if biased else 1),
            scoring_func=given.choice("score_func", SCORING),
            group_score="top2" if biased else "max",
            norm_topk_prob=sigmoid,
            routed_scaling_factor=given.number("route_scale"),
            has_correction_bias=biased,
            q_lora_rank=given.integer("q_lora_rank", least=0) or None,
            kv_lora_rank=given.integer("kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rotary,
            v_head_dim=value,
            rms_norm_eps=1e-6,
            max_position_embeddings=positions,
            tie_word_embeddings=False,
            attention_bias=False,
            rope=frequencies,
            interleaved=True,
            softmax_scale=(nope + rotary) ** -0.5 * scale,
        )


def demo_args(args: Mapping[str, object]) -> dict[str, Any]:
    """All fields of the demo's `ModelArgs`. Fields that `args` lacks (or gives as null) have the demo's defaults.

    Raises:
        InputError: `ModelArgs` does not have the field, or a field that does not become part of a `DeepseekConfig` has
            an impossible value. `DeepseekConfig.from_demo` checks the other fields.
    """
    for key in args:
        if key not in DEMO_DEFAULTS:
            raise InputError(f"{key!r} is not a field of the demo's ModelArgs")
    given = Entries(DEMO_DEFAULTS | {key: value for key, value in args.items() if value is not None}, "ModelArgs")
    given.choice("dtype", ("bf16", "fp8"))
    given.choice("scale_fmt", ("ue8m0", "float"), "float")
    given.integer("max_batch_size")
    return dict(given.values)


def _head_dims(config: Entries, heads: int) -> tuple[int, int, int]:
    """Dimensions of a head: without position, rotary, and of values. A config.json and ModelArgs share these keys."""
    most = min(MANY, WIDEST // heads)
    nope, rotary = config.integer("qk_nope_head_dim", 128, most=most), config.integer("qk_rope_head_dim", 64, most=most)
    return nope, rotary, config.integer("v_head_dim", 128, most=most)


def _hf_yarn(config: Entries, dim: int) -> tuple[Rope, float]:
    """Rotary frequencies, and what YaRN multiplies scores by: its temperature, squared (once for q and once for k)."""
    frequencies = hf_rope(config, dim, "qk_rope_head_dim", ("default", "yarn"))
    if frequencies.rotary_dim != dim:
        raise InputError(f"{config.where}: 'partial_rotary_factor' is not supported for this model")
    kind, given = hf_rope_entries(config)
    if kind == "default":
        return frequencies, 1.0
    return frequencies, rope.yarn_scale(given.number("factor"), given.number("mscale_all_dim", 0.0, least=0.0)) ** 2


def _demo_yarn(given: Entries, dim: int) -> tuple[Rope, float]:
    """Like `_hf_yarn`."""
    return _hf_yarn(Entries({"rope_parameters": demo_rotary(given)}, given.where), dim)


def demo_rotary(given: Entries) -> dict[str, Any]:
    """Rotary settings of all fields of ModelArgs, as a config.json says them. The demo applies YaRN to contexts longer
    than the original, and has only one temperature."""
    mscale = given.number("mscale", most=MSCALE)
    values: dict[str, Any] = {
        "rope_theta": given.number("rope_theta", above=1.0),
        "factor": given.number("rope_factor"),
        "original_max_position_embeddings": given.integer("original_seq_len", least=2, most=POSITIONS),
        "beta_fast": given.number("beta_fast"),
        "beta_slow": given.number("beta_slow"),
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }
    stretched = given.integer("max_seq_len", most=POSITIONS) > values["original_max_position_embeddings"]
    return values | {"rope_type": "yarn" if stretched else "default"}


def _gguf_yarn(given: Entries, tensors: Mapping[str, Weight], dim: int) -> tuple[Rope, float]:
    """Like `_hf_yarn`. A file has a tenth of mscale_all_dim and no mscale; llama.cpp takes the two to be equal."""
    frequencies = gguf_rope(given, tensors, dim, supported=("none", "yarn"))
    mscale = given.number("rope.scaling.yarn_log_multiplier", 0.0, least=0.0, most=MSCALE) / 0.1
    if not mscale or given.values.get("rope.scaling.type") != "yarn":
        return frequencies, 1.0
    return replace(frequencies, scale=1.0), rope.yarn_scale(given.number("rope.scaling.factor", 1.0), mscale) ** 2


def _gguf_scoring(given: Entries, biased: bool) -> str:
    """The scoring function. Files without the key are V2, or V3 from before the key; only V3 has the bias."""
    number = given.integer("expert_gating_func", 0, 0) or (2 if biased else 1)
    if number not in GGUF_SCORING:
        raise InputError(f"{given.where}: 'expert_gating_func' {number} is not supported; 1 and 2 are")
    return GGUF_SCORING[number]


def _predicting_layers(tensors: Mapping[str, Weight]) -> set[int]:
    """Layers for multi-token prediction, which come after the others."""
    return {int(m[1]) for name in tensors if (m := re.match(r"blk\.([1-9]\d{0,5})\.nextn\.", name))}
