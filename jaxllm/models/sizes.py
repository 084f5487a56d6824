"""The sizes that most models have, read from either kind of file and written for it. A family adds what is its own."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    gguf_vocab_size,
    layer_count,
)
from jaxllm.models.rope_config import gguf_rope, hf_rope
from jaxllm.models.rope_describing import gguf_rope_settings, hf_rope_settings


@dataclass(frozen=True)
class Sizes:
    """Sizes and constants of a model whose layers are all of one size, with Hugging Face's names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: Rope


def hf_sizes(config: Entries, kinds: Sequence[str], tensors: Collection[str]) -> dict[str, Any]:
    """The fields of `Sizes` from a config.json.

    Args:
        kinds: the model types that it may have.
        tensors: names of the checkpoint's tensors. If there is a head, it overrides `tie_word_embeddings`.

    Raises:
        InputError: a key is missing, has an impossible value, or asks for something that is not supported.
    """
    kind = config.choice("model_type", kinds)
    check_activation(config)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads", most=MANY)
    kv_heads = config.integer("num_key_value_heads", heads, most=MANY)
    check_shared(config, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
    head_dim = config.integer("head_dim", hidden // heads, most=min(MANY, WIDEST // heads))
    return {
        "model_type": kind,
        "vocab_size": config.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.integer("intermediate_size"),
        "num_hidden_layers": layer_count(config, "num_hidden_layers", tensors),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": config.number("rms_norm_eps", 1e-6, most=1.0),
        "max_position_embeddings": config.integer("max_position_embeddings", 2048, most=POSITIONS),
        "tie_word_embeddings": config.flag("tie_word_embeddings") and "lm_head.weight" not in tensors,
        "attention_bias": config.flag("attention_bias"),
        "mlp_bias": config.flag("mlp_bias"),
        "rope": hf_rope(config, head_dim),
    }


def gguf_sizes(arch: str, given: Entries, tensors: Mapping[str, Weight]) -> dict[str, Any]:
    """The fields of `Sizes` from a GGUF file's metadata, without the architecture's prefix.

    Raises:
        InputError: a key is missing, has an impossible value, or asks for something that is not supported.
    """
    hidden, heads = given.integer("embedding_length"), given.integer("attention.head_count", most=MANY)
    kv_heads = given.integer("attention.head_count_kv", heads, most=MANY)
    check_shared(given, "attention.head_count", heads, "attention.head_count_kv", kv_heads)
    head_dim = given.integer("attention.key_length", hidden // heads, most=min(MANY, WIDEST // heads))
    if (value_dim := given.integer("attention.value_length", head_dim)) != head_dim:
        raise InputError(
            f"{given.where}: 'attention.value_length' {value_dim} is not supported for {arch}, only {head_dim} as "
            "'attention.key_length'"
        )
    return {
        "model_type": arch,
        "vocab_size": gguf_vocab_size(given, tensors),
        "hidden_size": hidden,
        "intermediate_size": given.integer("feed_forward_length"),
        "num_hidden_layers": layer_count(given, "block_count", tensors),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": given.number("attention.layer_norm_rms_epsilon", most=1.0),
        "max_position_embeddings": given.integer("context_length", most=POSITIONS),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "rope": gguf_rope(given, tensors, head_dim),
    }


def gguf_metadata(sizes: Sizes, rotary: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF metadata that `gguf_sizes` reads as these sizes, with a family's own entries beside it.

    Args:
        sizes: its `model_type` is the name of the architecture.
        rotary: rotary settings, see `rope_describing`.
        more: entries without the architecture's prefix.
    """
    c = sizes
    entries: dict[str, Any] = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }
    entries |= {**gguf_rope_settings(rotary, c.rope), **more}
    return {"general.architecture": c.model_type} | {f"{c.model_type}.{key}": value for key, value in entries.items()}


def hf_config(sizes: Sizes, rotary: Mapping[str, Any], name: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that `hf_sizes` reads as these sizes, with a family's own entries beside it.

    Args:
        rotary: rotary settings, see `rope_describing`.
        name: of transformers' class.
        more: entries.
    """
    c = sizes
    entries: dict[str, Any] = {
        "architectures": [name],
        "model_type": c.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
    }
    return entries | hf_rope_settings(rotary, c.rope, c.head_dim) | dict(more)
