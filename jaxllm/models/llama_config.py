"""Sizes and constants of the Llama family, from a GGUF file's metadata or a Hugging Face config.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.layers import rope
from jaxllm.layers.rope import Rope

GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3")
MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3")


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer. `sliding_window` is None where a layer sees everything."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    sliding_window: int | None
    sparse: bool


@dataclass(frozen=True)
class MoEConfig:
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    shared_expert_intermediate_size: int | None


@dataclass(frozen=True)
class LlamaConfig:
    """A model, by Hugging Face's names where there are some; `layers` has one entry for each."""

    model_type: str
    vocab_size: int
    hidden_size: int
    head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: Rope
    layers: tuple[LayerConfig, ...]
    moe: MoEConfig | None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensors: Mapping[str, Weight]) -> Self:
        """The configuration of a GGUF file of one of GGUF_ARCHITECTURES.

        Raises:
            InputError: a key is missing or has no sensible value.
        """
        arch = str(metadata.get("general.architecture"))

        def get(key: str, default: object = None) -> object:
            value = metadata.get(f"{arch}.{key}", default)
            if value is None:
                raise InputError(f"metadata key '{arch}.{key}' is missing")
            return value

        def has(name: str) -> bool:
            return any(f"blk.{i}.{name}" in tensors for i in range(count))

        count, hidden = get("block_count"), get("embedding_length")
        heads = _per_layer(get("attention.head_count"), count, "attention.head_count")
        kv_heads = _per_layer(get("attention.head_count_kv", heads), count, "attention.head_count_kv")
        widths = _per_layer(get("feed_forward_length", 0), count, "feed_forward_length")
        head_dim = get("attention.key_length", hidden // heads[0])
        window = get("attention.sliding_window", 0) or None
        experts = get("expert_count", 0)
        layers = tuple(
            LayerConfig(h, kv, width, window, sparse=f"blk.{i}.ffn_gate_inp.weight" in tensors)
            for i, (h, kv, width) in enumerate(zip(heads, kv_heads, widths, strict=True))
        )
        return cls(
            model_type=arch,
            vocab_size=tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else get("vocab_size"),
            hidden_size=hidden,
            head_dim=head_dim,
            v_head_dim=get("attention.value_length", head_dim),
            rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
            max_position_embeddings=get("context_length"),
            tie_word_embeddings="output.weight" not in tensors,
            qkv_bias=has("attn_q.bias") or has("attn_qkv.bias"),
            o_bias=has("attn_output.bias"),
            mlp_bias=has("ffn_down.bias"),
            qk_norm=has("attn_q_norm.weight"),
            rope=_gguf_rope(get, tensors, head_dim),
            layers=layers,
            moe=None
            if not experts
            else MoEConfig(
                num_experts=experts,
                num_experts_per_tok=get("expert_used_count"),
                moe_intermediate_size=get("expert_feed_forward_length", widths[0]),
                norm_topk_prob=bool(get("expert_weights_norm", arch != "qwen2moe")),
                shared_expert_intermediate_size=_shared_size(tensors),
            ),
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, object]) -> Self:
        """The configuration in a config.json whose model_type is one of MODEL_TYPES.

        Raises:
            InputError: a key is missing, or asks for something that is not supported.
        """
        kind = config["model_type"]

        def get(key: str, default: object = None) -> object:
            value = config.get(key)
            value = default if value is None else value
            if value is None:
                raise InputError(f"'{key}' is missing")
            return value

        if (activation := get("hidden_act", "silu")) not in ("silu", "swish"):
            raise InputError(f"hidden_act '{activation}' is not supported, only silu")
        count, hidden, heads = get("num_hidden_layers"), get("hidden_size"), get("num_attention_heads")
        head_dim, bias = get("head_dim", hidden // heads), get("attention_bias", False)
        experts = get("num_local_experts", 0) or get("num_experts", 0) if kind.endswith(("moe", "mixtral")) else 0
        windows = _hf_windows(config, count)
        dense = set(get("mlp_only_layers", []))
        step = get("decoder_sparse_step", 1)
        layer = get("num_key_value_heads", heads), get("intermediate_size")
        return cls(
            model_type=kind,
            vocab_size=get("vocab_size"),
            hidden_size=hidden,
            head_dim=head_dim,
            v_head_dim=head_dim,
            rms_norm_eps=get("rms_norm_eps", 1e-6),
            max_position_embeddings=get("max_position_embeddings", 2048),
            tie_word_embeddings=get("tie_word_embeddings", False),
            qkv_bias=bias or kind in ("qwen2", "qwen2_moe"),
            o_bias=bias,
            mlp_bias=get("mlp_bias", False),
            qk_norm=kind in ("qwen3", "qwen3_moe"),
            rope=_hf_rope(config, head_dim),
            layers=tuple(
                LayerConfig(heads, *layer, windows[i], bool(experts) and i not in dense and (i + 1) % step == 0)
                for i in range(count)
            ),
            moe=None
            if not experts
            else MoEConfig(
                num_experts=experts,
                num_experts_per_tok=get("num_experts_per_tok", 2),
                moe_intermediate_size=get("moe_intermediate_size", get("intermediate_size")),
                norm_topk_prob=kind == "mixtral" or get("norm_topk_prob", False),
                shared_expert_intermediate_size=get("shared_expert_intermediate_size") if kind == "qwen2_moe" else None,
            ),
        )


def _per_layer(value: object, count: int, key: str) -> Sequence[int]:
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count or min(values, default=0) < 0:
        raise InputError(f"metadata key '{key}' has {len(values)} values for {count} layers")
    return values


def _shared_size(tensors: Mapping[str, Weight]) -> int | None:
    return next((w.shape[0] for name, w in tensors.items() if name.endswith("ffn_gate_shexp.weight")), None)


def _gguf_rope(get: object, tensors: Mapping[str, Weight], head_dim: int) -> Rope:
    theta, dim = get("rope.freq_base", 10000.0), get("rope.dimension_count", head_dim)
    base = rope.frequencies(dim, theta)

    def factors(name: str) -> np.ndarray | None:
        return np.asarray(tensors[name].dequantize(), np.float64) if name in tensors else None

    if (short := factors("rope_factors_short.weight")) is not None:
        long, original = factors("rope_factors_long.weight"), get("rope.scaling.original_context_length")
        scale = get("rope.scaling.attn_factor", rope.longrope_scale(get("context_length") / original, original))
        stretched = Rope(_fixed(rope.divided(base, long)), scale)
        return Rope(_fixed(rope.divided(base, short)), scale, stretched, original)
    if (given := factors("rope_freqs.weight")) is not None:
        base = rope.divided(base, given)
    kind, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", 1.0)
    if kind == "linear":
        return Rope(_fixed(rope.divided(base, factor)))
    if kind == "yarn":
        original = get("rope.scaling.original_context_length", get("context_length"))
        ramp = get("rope.scaling.yarn_beta_fast", 32.0), get("rope.scaling.yarn_beta_slow", 1.0)
        scale = get("rope.scaling.attn_factor", 1.0) * rope.yarn_scale(factor)
        return Rope(_fixed(rope.yarn(base, factor, theta, original, *ramp)), scale)
    if kind not in ("none", "longrope"):
        raise InputError(f"rope scaling '{kind}' is not supported")
    return Rope(_fixed(base))


def _hf_rope(config: Mapping[str, object], head_dim: int) -> Rope:
    """Both spellings: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling`."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    base = rope.frequencies(int(head_dim * partial), theta)
    context = config.get("max_position_embeddings", 2048)
    original = given.get("original_max_position_embeddings", config.get("original_max_position_embeddings", context))

    def need(key: str) -> object:
        if given.get(key) is None:
            raise InputError(f"rope scaling '{kind}' without '{key}'")
        return given[key]

    if kind == "default":
        return Rope(_fixed(base))
    if kind == "linear":
        return Rope(_fixed(rope.divided(base, need("factor"))))
    if kind == "llama3":
        turns = need("low_freq_factor"), need("high_freq_factor")
        return Rope(_fixed(rope.llama3(base, need("factor"), *turns, original)))
    if kind == "yarn":
        factor, ramp = need("factor"), (given.get("beta_fast") or 32, given.get("beta_slow") or 1)
        scale = given.get("attention_factor")
        if scale is None:
            mscale, over = given.get("mscale"), given.get("mscale_all_dim")
            scale = rope.yarn_scale(factor, mscale or 1)
            scale = scale / rope.yarn_scale(factor, over) if mscale and over else rope.yarn_scale(factor)
        return Rope(_fixed(rope.yarn(base, factor, theta, original, *ramp, given.get("truncate", True))), scale)
    if kind in ("longrope", "su"):
        factor = (
            context / original if "original_max_position_embeddings" in {*given, *config} else given.get("factor", 1)
        )
        scale = given.get("attention_factor") or rope.longrope_scale(factor, original)
        stretched = Rope(_fixed(rope.divided(base, need("long_factor"))), scale)
        return Rope(_fixed(rope.divided(base, need("short_factor"))), scale, stretched, original)
    raise InputError(f"rope scaling '{kind}' is not supported")


def _fixed(inv_freq: np.ndarray) -> tuple[float, ...]:
    if not all(map(math.isfinite, inv_freq)):
        raise InputError("rotary frequencies are not finite: factors of zero?")
    return tuple(inv_freq.tolist())


def _hf_windows(config: Mapping[str, object], count: int) -> list[int | None]:
    """Sliding windows by layer: `layer_types` says which layers have one; older configs say it in other ways."""
    window = config.get("sliding_window")
    if not window or not config.get("use_sliding_window", True):
        return [None] * count
    if types := config.get("layer_types"):
        return [window if kind == "sliding_attention" else None for kind in types]
    first = config.get("max_window_layers", 0) if str(config["model_type"]).startswith("qwen") else 0
    return [window if i >= first else None for i in range(count)]
