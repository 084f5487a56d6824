"""GLM-4.5's configuration: the usual sizes, and DeepSeek-V3's experts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from jaxllm.entries import Entries
from jaxllm.formats.base import Weight
from jaxllm.models import sizes
from jaxllm.models.config import GGUF_ROUTING, HF_ROUTING, MANY, gguf_entries, routing
from jaxllm.models.rope_describing import hf_rotary
from jaxllm.models.sizes import Sizes, gguf_sizes, hf_sizes

MODEL_TYPES, GGUF_ARCHITECTURES = ("glm4_moe",), ("glm4moe",)
SIGMOID = 2  # in GGUF files, how experts are scored

_DEFAULTS = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "partial_rotary_factor": 0.5,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
}


@dataclass(frozen=True)
class Glm4MoeConfig(Sizes):
    """The first `first_k_dense_replace` layers are dense. `attention_bias` is that of queries, keys and values."""

    first_k_dense_replace: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    use_qk_norm: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json. Raises InputError as `hf_sizes` does, or if groups are not equal."""
        given = Entries(_DEFAULTS | dict(config), "config.json")
        return cls(
            **hf_sizes(given, MODEL_TYPES, tensors),
            first_k_dense_replace=given.integer("first_k_dense_replace", 1, 0, MANY),
            moe_intermediate_size=given.integer("moe_intermediate_size", 1408),
            n_shared_experts=given.integer("n_shared_experts", 0, 0, MANY),
            **routing(given, *HF_ROUTING, least=2),
            norm_topk_prob=given.flag("norm_topk_prob"),
            routed_scaling_factor=given.number("routed_scaling_factor", 1.0),
            use_qk_norm=given.flag("use_qk_norm"),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file, which counts the layers for multi-token prediction too.

        Raises:
            InputError: as `gguf_sizes` does, or if groups are not equal or experts not scored by a sigmoid.
        """
        arch, given = gguf_entries(metadata, GGUF_ARCHITECTURES)
        usual = gguf_sizes(arch, given, tensors)
        usual["num_hidden_layers"] -= given.integer("nextn_predict_layers", 0, 0, usual["num_hidden_layers"] - 1)
        given.get("expert_gating_func", SIGMOID, lambda value: value in (0, SIGMOID), f"{SIGMOID} (sigmoid)")
        return cls(
            **usual,
            first_k_dense_replace=given.integer("leading_dense_block_count", 0, 0, MANY),
            moe_intermediate_size=given.integer("expert_feed_forward_length"),
            n_shared_experts=given.integer("expert_shared_count", 0, 0, MANY),
            **routing(given, *GGUF_ROUTING, least=2),
            norm_topk_prob=given.flag("expert_weights_norm"),
            routed_scaling_factor=given.number("expert_weights_scale", 0.0, least=0.0) or 1.0,
            use_qk_norm="blk.0.attn_q_norm.weight" in tensors,
        )


def as_gguf(config: Glm4MoeConfig) -> Glm4MoeConfig:
    return replace(config, model_type="glm4moe")


def as_hf(config: Glm4MoeConfig) -> Glm4MoeConfig:
    return replace(config, model_type="glm4_moe")


def rotary_of_hf(description: Mapping[str, object], tensors: Collection[str] = ()) -> dict[str, Any]:
    return hf_rotary(_DEFAULTS | dict(description))


def gguf_metadata(config: Glm4MoeConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata from a configuration that `as_gguf` gave."""
    c = config
    entries = {
        "leading_dense_block_count": c.first_k_dense_replace,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_group_count": c.n_group,
        "expert_group_used_count": c.topk_group,
        "expert_gating_func": SIGMOID,
        "expert_weights_norm": c.norm_topk_prob,
        "expert_weights_scale": float(c.routed_scaling_factor),
        "nextn_predict_layers": 0,
    }
    return sizes.gguf_metadata(c, rotary, entries)


def hf_config(config: Glm4MoeConfig, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json from a configuration that `as_hf` gave."""
    c = config
    entries = {
        "first_k_dense_replace": c.first_k_dense_replace,
        "moe_intermediate_size": c.moe_intermediate_size,
        "n_routed_experts": c.n_routed_experts,
        "n_shared_experts": c.n_shared_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "n_group": c.n_group,
        "topk_group": c.topk_group,
        "norm_topk_prob": c.norm_topk_prob,
        "routed_scaling_factor": c.routed_scaling_factor,
        "use_qk_norm": c.use_qk_norm,
        "num_nextn_predict_layers": 0,
    }
    return sizes.hf_config(c, rotary, "Glm4MoeForCausalLM", entries)
