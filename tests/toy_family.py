"""A family of models that the package does not know: the worked example of docs/add_model.md.

"Ripple" exists nowhere. It has what the families in the package lack, so that the frame is tested for it: a norm after
each block as well as before it, norms that store their distance from 1, a scaled embedding, capped scores and logits,
residuals that are scaled, layers with other rotary frequencies or none, a sliding window, and a layer that reads the
keys and values of another one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxllm.entries import Entries
from jaxllm.formats.base import Weight
from jaxllm.layers import rope
from jaxllm.layers.attention import Attention
from jaxllm.layers.cache import LayerCache
from jaxllm.layers.context import Context
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.heads import place_heads
from jaxllm.layers.mlp import MLP
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.rope import Rope
from jaxllm.models.family import HUGGING_FACE, Dialect, Family
from jaxllm.models.rule import Rule
from jaxllm.parallel import TP

# ---- 1. The configuration: what a config.json says, checked. -------------------------------------------------------


@dataclass(frozen=True)
class RippleConfig:
    """`layers` has a letter for each: "f" sees everything, "s" a window, "n" has no rotary positions, "r" reads the
    cache of the last "f" before it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layers: str
    sliding_window: int
    residual_scale: float
    score_cap: float
    logit_cap: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, object], tensors: Collection[str] = ()) -> "RippleConfig":
        given = Entries(config, "config.json")
        sizes = "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"
        return cls(
            **{key: given.integer(key) for key in (*sizes, "head_dim", "sliding_window", "max_position_embeddings")},
            layers=given.get("layers", None, lambda v: isinstance(v, str) and set(v) <= set("fsnr"), "letters of fsnr"),
            **{key: given.number(key) for key in ("residual_scale", "score_cap", "logit_cap", "rms_norm_eps")},
            tie_word_embeddings=given.flag("tie_word_embeddings", True),
        )


# ---- 2. The model: one block that reads from top to bottom, and the frame. -----------------------------------------


def gelu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.gelu(gate, approximate=True) * up


class RippleBlock(nnx.Module):
    def __init__(self, config: RippleConfig, index: int, mesh: Mesh, block: int) -> None:
        c, kind, heads = config, config.layers[index], (config.num_attention_heads, config.num_key_value_heads)
        theta = 100.0 if kind == "s" else 1000.0
        self.rope = None if kind == "n" else Rope(tuple(rope.frequencies(c.head_dim, theta).tolist()))
        self.cache_of = c.layers.rindex("f", 0, index) if kind == "r" else None
        self.residual_scale = c.residual_scale
        self.before_attention, self.after_attention, self.before_mlp, self.after_mlp = (
            RMSNorm(c.hidden_size, c.rms_norm_eps, offset=1.0) for _ in range(4)
        )
        self.attention = Attention(
            c.hidden_size,
            *heads,
            c.head_dim,
            c.head_dim,
            place_heads(*heads, mesh.shape[TP], c.head_dim, block),
            scale=0.5,
            score_cap=c.score_cap,
            sliding_window=c.sliding_window if kind == "s" else None,
            own_keys=self.cache_of is None,
            shared=kind == "f",
        )
        self.mlp = MLP(c.hidden_size, c.intermediate_size, block * mesh.shape[TP], activation=gelu)
        self.cache_shape = self.attention.cache_shape

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        y, cache = self.attention(self.before_attention(x), cache, context)
        x = x + self.residual_scale * self.after_attention(y)
        return x + self.residual_scale * self.after_mlp(self.mlp(self.before_mlp(x))), cache


def ripple(config: RippleConfig, mesh: Mesh, block: int = 1) -> Decoder:
    c = config
    blocks = [RippleBlock(c, i, mesh, block) for i in range(len(c.layers))]
    norm = RMSNorm(c.hidden_size, c.rms_norm_eps, offset=1.0)
    return Decoder(c, blocks, norm, mesh, embedding_scale=c.hidden_size**0.5, logit_scale=0.5, logit_cap=c.logit_cap)


# ---- 3. The names of its tensors. ----------------------------------------------------------------------------------

_L = r"ripple\.(\d+)\."
RULES = [
    Rule(r"embedding", "embed_tokens.weight"),
    Rule(r"norm", "norm.weight"),
    Rule(_L + r"(before|after)_(attention|mlp)", r"layers.\1.\2_\3.weight"),
    Rule(_L + r"(q|k|v|o)", r"layers.\1.attention.\2_proj.weight"),
    Rule(_L + r"(gate|up|down)", r"layers.\1.mlp.\2_proj.weight"),
]


def rules(config: RippleConfig, tensors: Mapping[str, Weight]) -> list[Rule]:
    return RULES


# ---- 4. The record that the loader looks for: FAMILIES.append(RIPPLE). ---------------------------------------------

RIPPLE = Family("Ripple", ripple, RippleConfig, {HUGGING_FACE: Dialect(("ripple",), RippleConfig.from_hf, rules)})
