"""Sizes and constants of the Llama family, from a GGUF file's metadata or a Hugging Face config.json."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from jaxllm.entries import Entries
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.layers.rope import Rope
from jaxllm.models.config import MANY, POSITIONS, typed_windows
from jaxllm.models.rope_config import gguf_rope, hf_rope

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
            rope=gguf_rope(get, tensors, head_dim),
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
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> Self:
        """The configuration in a config.json whose model_type is one of MODEL_TYPES.

        Args:
            tensors: names of the checkpoint's tensors. Older GPTQ files have biases (of zeros) everywhere; and a head
                that is there counts more than being tied, as in transformers.

        Raises:
            InputError: a key is missing or has no sensible value, or asks for something that is not supported.
        """
        kind, entries = config["model_type"], Entries(config, "config.json")
        if (activation := config.get("hidden_act") or "silu") not in ("silu", "swish"):
            raise InputError(f"config.json: hidden_act {activation!r} is not supported, only silu")
        hidden, heads = entries.whole("hidden_size"), entries.whole("num_attention_heads", most=MANY)
        head_dim = entries.whole("head_dim", 128 if kind == "qwen3" else hidden // heads, most=MANY)
        width, bias = entries.whole("intermediate_size"), entries.flag("attention_bias")
        layer = entries.whole("num_key_value_heads", heads, most=MANY), width
        sparse, moe = _hf_experts(entries, kind, width)

        def has(name: str) -> bool:
            return f"model.layers.0.{name}.bias" in tensors

        return cls(
            model_type=kind,
            vocab_size=entries.whole("vocab_size"),
            hidden_size=hidden,
            head_dim=head_dim,
            v_head_dim=head_dim,
            rms_norm_eps=entries.number("rms_norm_eps", 1e-6),
            max_position_embeddings=entries.whole("max_position_embeddings", 2048, most=POSITIONS),
            tie_word_embeddings=entries.flag("tie_word_embeddings") and "lm_head.weight" not in tensors,
            qkv_bias=bias or kind in ("qwen2", "qwen2_moe") or has("self_attn.q_proj"),
            o_bias=bias or has("self_attn.o_proj"),
            mlp_bias=entries.flag("mlp_bias") or has("mlp.down_proj"),
            qk_norm=kind in ("qwen3", "qwen3_moe"),
            rope=hf_rope(entries, head_dim),
            layers=tuple(
                LayerConfig(heads, *layer, window, sparse(i)) for i, window in enumerate(_hf_windows(entries, kind))
            ),
            moe=moe,
        )


def _per_layer(value: object, count: int, key: str) -> Sequence[int]:
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count or min(values, default=0) < 0:
        raise InputError(f"metadata key '{key}' has {len(values)} values for {count} layers")
    return values


def _shared_size(tensors: Mapping[str, Weight]) -> int | None:
    return next((w.shape[0] for name, w in tensors.items() if name.endswith("ffn_gate_shexp.weight")), None)


def _hf_windows(config: Entries, kind: str) -> list[int | None]:
    """The sliding window of each layer. Every architecture has its own way to say which layers have one."""
    count, window = config.whole("num_hidden_layers", most=MANY), config.whole("sliding_window", 0, 0, POSITIONS)
    qwen = kind.startswith("qwen")
    if not window or kind == "llama" or not config.flag("use_sliding_window", default=not qwen):
        return [None] * count
    if "layer_types" in config and kind != "qwen3_moe":
        return typed_windows(config, count, window)
    if not qwen or kind == "qwen3_moe":
        return [window] * count
    bound = config.whole("max_window_layers", 28, 0)
    if kind == "qwen2_moe":
        return [window if i % 2 == 0 and i < bound else None for i in range(count)]
    return [window if i >= bound else None for i in range(count)]


def _hf_experts(config: Entries, kind: str, width: int) -> tuple[Callable[[int], bool], MoEConfig | None]:
    """Which layers are sparse, and what those have in common."""
    name = "num_local_experts" if "num_local_experts" in config else "num_experts"
    if kind not in ("mixtral", "qwen2_moe", "qwen3_moe") or not (experts := config.whole(name, 0, 0, MANY)):
        return lambda i: False, None
    dense = config.get("mlp_only_layers", [], lambda value: isinstance(value, list), "a list")
    step = config.whole("decoder_sparse_step", 1)
    shared = config.whole("shared_expert_intermediate_size") if kind == "qwen2_moe" else None
    moe = MoEConfig(
        num_experts=experts,
        num_experts_per_tok=config.whole("num_experts_per_tok", 2, most=experts),
        moe_intermediate_size=config.whole("moe_intermediate_size", width),
        norm_topk_prob=kind == "mixtral" or config.flag("norm_topk_prob"),
        shared_expert_intermediate_size=shared,
    )
    return lambda i: i not in dense and (i + 1) % step == 0, moe
