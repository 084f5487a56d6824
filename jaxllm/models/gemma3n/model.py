"""Gemma 3n's text model: layers that read and correct several streams, and an embedding for each layer.

The activations between layers are `[streams, batch, time, hidden]`. A layer works on one of the streams, the active
one, and predicts and corrects the others with a few coefficients (AltUp; Baykal et al., 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxllm.formats.base import Weight
from jaxllm.kernels.experts import Activation
from jaxllm.layers.attention import Attention
from jaxllm.layers.cache import LayerCache
from jaxllm.layers.context import Context
from jaxllm.layers.decoder import Decoder
from jaxllm.layers.heads import place_heads
from jaxllm.layers.linear import Embedding, Linear
from jaxllm.layers.mlp import MLP, geglu
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.parameter import declare
from jaxllm.models.gemma3n.config import Gemma3nConfig
from jaxllm.parallel import REPLICATED, TP, linear

_LEAST = 1e-5  # of a stream's mean square, where it is divided by its root


def gemma3n(config: Gemma3nConfig, mesh: Mesh, block: int = 1) -> Decoder:
    """A model of this family with its parameters declared.

    Args:
        mesh: the mesh that it is sharded over.
        block: how many columns of a ROW matrix belong to one block, from the formats of the checkpoint.
    """
    return Decoder(
        config,
        [Gemma3nBlock(config, i, mesh, block) for i in range(len(config.layers))],
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        mesh,
        embedding_scale=config.hidden_size**0.5,
        logit_cap=config.final_logit_softcapping,
        ends=Gemma3nEnds(config, mesh),
    )


class Gemma3nEnds(nnx.Module):
    """From embeddings to streams and per-layer inputs, and from streams to one output."""

    def __init__(self, config: Gemma3nConfig, mesh: Mesh) -> None:
        c, width = config, len(config.layers) * config.hidden_size_per_layer_input
        stack = (c.altup_num_inputs - 1, c.hidden_size, c.hidden_size)
        self.count, self.scale = len(c.layers), c.hidden_size_per_layer_input**0.5
        self.embed_tokens_per_layer = Embedding((c.vocab_size_per_layer_input, width), mesh.shape[TP])
        self.per_layer_model_projection = Linear((width, c.hidden_size), REPLICATED)
        self.per_layer_projection_norm = RMSNorm(c.hidden_size_per_layer_input, c.rms_norm_eps)
        self.altup_projections = declare(stack, PartitionSpec(), keep=True)
        self.altup_unembed_projections = declare(stack, PartitionSpec(), keep=True)

    def begin(self, tokens: jax.Array, x: jax.Array) -> tuple[jax.Array, Sequence[jax.Array]]:
        """See `decoder.Ends`; `[streams, batch, time, hidden]`, and for each layer `[batch, time, width]`."""
        table = self.embed_tokens_per_layer
        known = jnp.where(tokens < table.vocab_size, tokens, 0)  # ids of images and sounds are beyond the table
        embedded = self._by_layer(table(known, x.dtype)) * jnp.asarray(self.scale, x.dtype)
        projected = self._by_layer(self.per_layer_model_projection(x) * x.shape[-1] ** -0.5)
        inputs = (self.per_layer_projection_norm(projected) + embedded) * 2**-0.5
        others = (_as_large(_times(self.altup_projections, i, x), x) for i in self._others())
        return jnp.stack([x, *others]), [inputs[:, :, i] for i in range(self.count)]

    def end(self, x: jax.Array) -> jax.Array:
        """See `decoder.Ends`: the mean of the streams, after each but the first was projected."""
        others = (_as_large(_times(self.altup_unembed_projections, i, x[i + 1]), x[0]) for i in self._others())
        return jnp.mean(jnp.stack([x[0], *others]), axis=0)

    def _others(self) -> range:
        return range(self.altup_projections.declared.shape[0])

    def _by_layer(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.count, -1)


def _times(stack: nnx.Param, i: int, x: jax.Array) -> jax.Array:
    """x times matrix i of a stack."""
    weight: Weight = jax.tree.map(lambda leaf: leaf[i], stack.get_value())
    return linear(x, weight, REPLICATED)


def _as_large(x: jax.Array, like: jax.Array) -> jax.Array:
    """x with the root mean square that `like` has over the last axis."""

    def mean_square(y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(y.astype(jnp.float32)), axis=-1, keepdims=True)

    scale = jnp.sqrt(mean_square(like)) * jax.lax.rsqrt(jnp.maximum(mean_square(x), _LEAST))
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


class Gemma3nBlock(nnx.Module):
    """Attention and a feed-forward block on the active stream, beside a low-rank residual (LAuReL); the other streams
    follow, and are told of the layer's own embedding of the token."""

    def __init__(self, config: Gemma3nConfig, i: int, mesh: Mesh, block: int) -> None:
        c, layer, eps = config, config.layers[i], config.rms_norm_eps
        heads, tp = (config.num_attention_heads, config.num_key_value_heads), mesh.shape[TP]
        self.rope = c.full_rope if layer.sliding_window is None else c.sliding_rope
        self.cache_of = c.keys_from(i)
        own_keys = self.cache_of is None
        self.active, self.correct_scale = c.altup_active_idx, c.altup_correct_scale
        self.altup = AltUp(c.hidden_size, c.altup_num_inputs, c.altup_active_idx, eps)
        self.input_layernorm = RMSNorm(c.hidden_size, eps)
        self.laurel = Laurel(c.hidden_size, c.laurel_rank, eps)
        self.self_attn = Attention(
            c.hidden_size,
            *heads,
            c.head_dim,
            c.head_dim,
            place_heads(*heads, tp, c.head_dim, block),
            scale=1.0,
            q_norm=RMSNorm(c.head_dim, eps),
            k_norm=RMSNorm(c.head_dim, eps) if own_keys else None,
            v_norm=RMSNorm(c.head_dim, eps, learned=False) if own_keys else None,
            sliding_window=layer.sliding_window,
            own_keys=own_keys,
            shared=i in map(c.keys_from, range(len(c.layers))),
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, eps)
        self.pre_feedforward_layernorm = RMSNorm(c.hidden_size, eps)
        sparse = SparseGeGLU(layer.intermediate_size, layer.sparsity)
        activation: Activation = sparse if layer.sparsity else geglu
        self.mlp = MLP(c.hidden_size, layer.intermediate_size, block * tp, activation=activation)
        self.post_feedforward_layernorm = RMSNorm(c.hidden_size, eps)
        narrow = (c.hidden_size_per_layer_input, c.hidden_size)
        self.per_layer_input_gate = Linear(narrow, REPLICATED)
        self.per_layer_projection = Linear(narrow[::-1], REPLICATED)
        self.post_per_layer_input_norm = RMSNorm(c.hidden_size, eps)
        self.cache_shape = self.self_attn.cache_shape

    def __call__(self, x: jax.Array, cache: LayerCache, context: Context) -> tuple[jax.Array, LayerCache]:
        """See `decoder.Block`; x is `[streams, batch, time, hidden]`."""
        predicted = self.altup.predict(x)
        active = predicted[self.active]
        normed = self.input_layernorm(active)
        attended, cache = self.self_attn(normed, cache, context)
        y = (active + self.post_attention_layernorm(attended) + self.laurel(normed)) * 0.5**0.5
        y = y + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(y)))
        corrected = self.altup.correct(predicted, y)
        return corrected.at[1:].add(self._told(corrected[self.active], context.per_layer)), cache

    def _told(self, y: jax.Array, own: jax.Array | None) -> jax.Array:
        """What the other streams learn of the layer's own embedding."""
        assert own is not None  # `Gemma3nEnds` gives one to each layer
        y = self.altup.scaled(y) if self.correct_scale else y
        return self.post_per_layer_input_norm(self.per_layer_projection(geglu(self.per_layer_input_gate(y), own)))


class AltUp(nnx.Module):
    """Coefficients, computed from the active stream, by which a layer predicts and corrects all streams.

    Its matrices have few rows or columns, and stay in the checkpoint's format.
    """

    def __init__(self, hidden_size: int, streams: int, active: int, eps: float) -> None:
        self.streams, self.active = streams, active
        self.correct_output_scale = declare((hidden_size,), PartitionSpec(None))
        self.correction_coefs = Linear((streams, streams), REPLICATED, keep=True)
        self.prediction_coefs = Linear((streams**2, streams), REPLICATED, keep=True)
        self.modality_router = Linear((streams, hidden_size), REPLICATED, keep=True)
        self.router_norm = RMSNorm(hidden_size, eps)

    def predict(self, x: jax.Array) -> jax.Array:
        """Each stream plus a mixture of all: `[streams, batch, time, hidden]` -> the same."""
        mix = self.prediction_coefs(self._modalities(x[self.active]))
        mix = mix.reshape(*mix.shape[:-1], self.streams, self.streams)  # [batch, time, to, from]
        return x + jnp.einsum("btji,ibth->jbth", mix, x, precision="highest")

    def correct(self, predicted: jax.Array, y: jax.Array) -> jax.Array:
        """All streams moved by what the layer's output `y[batch, time, hidden]` differs from its prediction."""
        by = self.correction_coefs(self._modalities(y)) + 1
        return predicted + (y - predicted[self.active]) * jnp.moveaxis(by, -1, 0)[..., None]

    def scaled(self, y: jax.Array) -> jax.Array:
        return (y.astype(jnp.float32) * self.correct_output_scale.get_value()).astype(y.dtype)

    def _modalities(self, y: jax.Array) -> jax.Array:
        """`[batch, time, hidden]` -> `[batch, time, streams]`."""
        routed = self.modality_router(self.router_norm(y) / y.shape[-1])
        return jnp.tanh(routed.astype(jnp.float32)).astype(y.dtype)


class Laurel(nnx.Module):
    """A learned low-rank residual (Menghani et al., 2024)."""

    def __init__(self, hidden_size: int, rank: int, eps: float) -> None:
        self.linear_left = Linear((rank, hidden_size), REPLICATED, keep=True)
        self.linear_right = Linear((hidden_size, rank), REPLICATED, keep=True)
        self.post_laurel_norm = RMSNorm(hidden_size, eps)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.post_laurel_norm(self.linear_right(self.linear_left(x)))


@dataclass(frozen=True)
class SparseGeGLU:
    """GeGLU after only the largest values of the gate are kept, and lowered by the smallest of them.

    The threshold is the `sparsity` quantile of a normal distribution with the gate's mean and standard deviation.

    size: the gate's width in the checkpoint. On the mesh it is sharded and padded with zeros, which do not change sums;
        so the sums are taken over devices, and divided by the true width.
    """

    size: int
    sparsity: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        wide = gate.astype(jnp.float32)
        mean, square = (jnp.sum(y, axis=-1, keepdims=True) / self.size for y in (wide, wide * wide))
        deviation = jnp.sqrt(jnp.maximum(square - mean * mean, 0))
        threshold = mean + deviation * NormalDist().inv_cdf(self.sparsity)
        return geglu(jax.nn.relu(wide - threshold).astype(gate.dtype), up)
