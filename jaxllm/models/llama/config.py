"""Sizes and constants of the Llama family, from a GGUF file's metadata or a Hugging Face config.json."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.layers.rope import Rope
from jaxllm.models.config import (
    MANY,
    POSITIONS,
    WIDEST,
    check_activation,
    check_shared,
    gguf_entries,
    gguf_vocab_size,
    layer_count,
    per_layer,
    typed_windows,
)
from jaxllm.models.rope_config import gguf_rope, hf_rope

GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3")
MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3")

_LLAMA_3_1 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
PRESETS: dict[str, dict[str, object]] = {"llama-3.1-8b": _LLAMA_3_1 | _8B, "llama-3.1-70b": _LLAMA_3_1 | _70B}


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer. `sliding_window` is None if the layer attends to all positions."""

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
    """A model's configuration, with Hugging Face's names where these exist; `layers` has one entry per layer."""

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
        arch, given = gguf_entries(metadata, GGUF_ARCHITECTURES)
        count, hidden = layer_count(given, "block_count", tensors), given.integer("embedding_length")

        def has(name: str) -> bool:
            return any(f"blk.{i}.{name}" in tensors for i in range(count))

        layers, moe = _gguf_layers(given, count, tensors), _gguf_experts(given, arch, tensors)
        if moe is None and any(layer.sparse for layer in layers):
            raise InputError(f"{given.where}: there are layers with a router, but 'expert_count' is missing or 0")
        heads = max(layer.num_attention_heads for layer in layers)
        head_dim = given.integer("attention.key_length", hidden // heads, most=min(MANY, WIDEST // heads))
        return cls(
            model_type=arch,
            vocab_size=gguf_vocab_size(given, tensors),
            hidden_size=hidden,
            head_dim=head_dim,
            v_head_dim=given.integer("attention.value_length", head_dim, most=min(MANY, WIDEST // heads)),
            rms_norm_eps=given.number("attention.layer_norm_rms_epsilon", most=1.0),
            max_position_embeddings=given.integer("context_length", most=POSITIONS),
            tie_word_embeddings="output.weight" not in tensors,
            qkv_bias=has("attn_q.bias") or has("attn_qkv.bias"),
            o_bias=has("attn_output.bias"),
            mlp_bias=has("ffn_down.bias"),
            qk_norm=has("attn_q_norm.weight"),
            rope=gguf_rope(given, tensors, head_dim),
            layers=layers,
            moe=moe,
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json whose model_type is one of MODEL_TYPES.

        Args:
            tensors: names of the checkpoint's tensors. They show the biases (of zeros) that older GPTQ files have
                everywhere, and a head: if there is one, it overrides `tie_word_embeddings`, as in transformers.

        Raises:
            InputError: a key is missing, has an impossible value, or asks for something that is not supported.
        """
        entries = Entries(config, "config.json")
        kind = entries.choice("model_type", MODEL_TYPES)
        check_activation(entries)
        hidden, heads = entries.integer("hidden_size"), entries.integer("num_attention_heads", most=MANY)
        kv_heads = entries.integer("num_key_value_heads", heads, most=MANY)
        check_shared(entries, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
        head_dim = entries.integer(
            "head_dim", 128 if kind == "qwen3" else hidden // heads, most=min(MANY, WIDEST // heads)
        )
        width, bias = entries.integer("intermediate_size"), entries.flag("attention_bias")
        windows = _hf_windows(entries, kind, layer_count(entries, "num_hidden_layers", tensors))
        sparse, moe = _hf_experts(entries, kind, width)

        def has(name: str) -> bool:
            return f"model.layers.0.{name}.bias" in tensors

        return cls(
            model_type=kind,
            vocab_size=entries.integer("vocab_size"),
            hidden_size=hidden,
            head_dim=head_dim,
            v_head_dim=head_dim,
            rms_norm_eps=entries.number("rms_norm_eps", 1e-6, most=1.0),
            max_position_embeddings=entries.integer("max_position_embeddings", 2048, most=POSITIONS),
            tie_word_embeddings=entries.flag("tie_word_embeddings") and "lm_head.weight" not in tensors,
            qkv_bias=bias or kind in ("qwen2", "qwen2_moe") or has("self_attn.q_proj"),
            o_bias=bias or has("self_attn.o_proj"),
            mlp_bias=entries.flag("mlp_bias") or has("mlp.down_proj"),
            qk_norm=kind in ("qwen3", "qwen3_moe"),
            rope=hf_rope(entries, head_dim),
            layers=tuple(LayerConfig(heads, kv_heads, width, window, sparse(i)) for i, window in enumerate(windows)),
            moe=moe,
        )


def _gguf_layers(given: Entries, count: int, tensors: Mapping[str, Weight]) -> tuple[LayerConfig, ...]:
    heads_key, kv_key, width_key = "attention.head_count", "attention.head_count_kv", "feed_forward_length"
    heads = per_layer(given, heads_key, count)
    kv_heads = per_layer(given, kv_key, count, heads)
    widths = per_layer(given, width_key, count, 0, least=0)  # not needed for sparse layers
    window = given.integer("attention.sliding_window", 0, 0, POSITIONS) or None
    layers = []
    for i, (h, kv, width) in enumerate(zip(heads, kv_heads, widths, strict=True)):
        check_shared(given, heads_key, h, kv_key, kv)
        sparse = f"blk.{i}.ffn_gate_inp.weight" in tensors
        if not sparse and not width:
            raise InputError(f"{given.where}: '{width_key}' of layer {i} is missing or 0")
        layers.append(LayerConfig(h, kv, width, window, sparse))
    return tuple(layers)


def _gguf_experts(given: Entries, arch: str, tensors: Mapping[str, Weight]) -> MoEConfig | None:
    if not (experts := given.integer("expert_count", 0, 0, MANY)):
        return None
    width: Any = given.values.get("feed_forward_length")
    return MoEConfig(
        num_experts=experts,
        num_experts_per_tok=given.integer_up_to("expert_used_count", experts, "expert_count"),
        moe_intermediate_size=given.integer(
            "expert_feed_forward_length", width[0] if isinstance(width, list) else width
        ),
        norm_topk_prob=given.flag("expert_weights_norm", arch != "qwen2moe"),
        shared_expert_intermediate_size=_shared_size(tensors),
    )


def _shared_size(tensors: Mapping[str, Weight]) -> int | None:
    return next((w.shape[0] for name, w in tensors.items() if name.endswith("ffn_gate_shexp.weight")), None)


def _hf_windows(config: Entries, kind: str, count: int) -> list[int | None]:
    """The sliding window of each layer. Each architecture says in its own way which layers have one."""
    window = config.integer("sliding_window", 0, 0, POSITIONS)
    qwen = kind.startswith("qwen")
    used = config.flag("use_sliding_window", default=not qwen)
    if not window or kind == "llama" or not used:
        return [None] * count
    if "layer_types" in config and kind != "qwen3_moe":
        return typed_windows(config, count, window)
    if not qwen or kind == "qwen3_moe":
        return [window] * count
    bound = config.integer("max_window_layers", 28, 0)
    if kind == "qwen2_moe":
        return [window if i % 2 == 0 and i < bound else None for i in range(count)]
    return [window if i >= bound else None for i in range(count)]


def _hf_experts(config: Entries, kind: str, width: int) -> tuple[Callable[[int], bool], MoEConfig | None]:
    """Which layers are sparse, and the configuration that they share."""
    name = "num_local_experts" if "num_local_experts" in config else "num_experts"
    if kind not in ("mixtral", "qwen2_moe", "qwen3_moe") or not (experts := config.integer(name, 0, 0, MANY)):
        return lambda i: False, None
    dense = config.get(
        "mlp_only_layers",
        [],
        lambda value: isinstance(value, list) and all(type(i) is int and i >= 0 for i in value),
        "a list of whole numbers",
    )
    step = config.integer("decoder_sparse_step", 1)
    shared = config.integer("shared_expert_intermediate_size") if kind == "qwen2_moe" else None
    moe = MoEConfig(
        num_experts=experts,
        num_experts_per_tok=config.integer_up_to("num_experts_per_tok", experts, name, 2),
        moe_intermediate_size=config.integer("moe_intermediate_size", width),
        norm_topk_prob=kind == "mixtral" or config.flag("norm_topk_prob"),
        shared_expert_intermediate_size=shared,
    )
    return lambda i: i not in dense and (i + 1) % step == 0, moe
