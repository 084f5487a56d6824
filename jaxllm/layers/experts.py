"""Mixtures of experts: a router, a stack of feed-forward blocks, and perhaps one that every token goes through."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm import parallel
from jaxllm.formats.base import padded_index
from jaxllm.kernels.experts import Activation, Gated
from jaxllm.layers.linear import Linear
from jaxllm.layers.mlp import MLP, swiglu
from jaxllm.layers.parameter import declare

Route = Callable[[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class TopKRouter:
    """The routers of DeepSeek-V2 and V3, of which the plain one, a softmax over all experts, is the case of one group.

    Experts are scored by "softmax" or "sigmoid". Selection adds the correction bias, if there is one, and is limited
    to the `chosen_groups` best groups, a group being as good as its best expert ("max") or the sum of its two best
    ("top2"). The scores of the k chosen are without the bias, brought to a sum of 1 if `normalize`, times `scale`.

    A value rather than a closure, so that layers that route alike are alike.
    """

    k: int
    normalize: bool
    scoring: str = "softmax"
    groups: int = 1
    chosen_groups: int = 1
    group_score: str = "max"
    scale: float = 1.0

    def __call__(self, logits: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Scores and expert numbers `[tokens, k]` from float32 `[tokens, experts]`."""
        scores = jax.nn.softmax(logits, axis=-1) if self.scoring == "softmax" else jax.nn.sigmoid(logits)
        choice = scores if bias is None else scores + bias
        if self.groups > 1:
            grouped = choice.reshape(len(choice), self.groups, -1)
            best = jax.lax.top_k(grouped, 1 if self.group_score == "max" else 2)[0].sum(axis=-1)
            kept = jax.lax.top_k(best, self.chosen_groups)[1]
            mask = jnp.any(jnp.arange(self.groups) == kept[..., None], axis=1)
            # -inf, where the demo has 0: with negative biases an expert of a masked group could win.
            choice = jnp.where(mask[..., None], grouped, -jnp.inf).reshape(choice.shape)
        experts = jax.lax.top_k(choice, self.k)[1]
        scores = jnp.take_along_axis(scores, experts, axis=-1)
        if self.normalize:
            scores = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
        return scores * self.scale, experts


class Experts(nnx.Module):
    """A stack of gated feed-forward blocks: whole experts are cut over ep, their intermediate dimension over tp.

    `multiple` is what that dimension is padded to, as in `MLP`. The stack is padded to a multiple of ep with experts of
    zeros that no router chooses. Biases are matrices of one column.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, multiple: int, ep: int, bias: bool = False
    ) -> None:
        places, stack = padded_index(intermediate_size, multiple), padded_index(num_experts, ep)
        wide, narrow = (num_experts, intermediate_size, hidden_size), (num_experts, hidden_size, intermediate_size)
        self.gate_proj = declare(wide, parallel.EXPERT_COLUMN, rows=places, stack=stack)
        self.up_proj = declare(wide, parallel.EXPERT_COLUMN, rows=places, stack=stack)
        self.down_proj = declare(narrow, parallel.EXPERT_ROW, cols=places, stack=stack)
        wide, narrow = (num_experts, intermediate_size, 1), (num_experts, hidden_size, 1)
        self.gate_bias = declare(wide, parallel.EXPERT_COLUMN, rows=places, stack=stack, keep=True) if bias else None
        self.up_bias = declare(wide, parallel.EXPERT_COLUMN, rows=places, stack=stack, keep=True) if bias else None
        self.down_bias = declare(narrow, parallel.EXPERT_WHOLE, stack=stack, keep=True) if bias else None

    @property
    def weights(self) -> Gated:
        matrices = (p.get_value() for p in (self.gate_proj, self.up_proj, self.down_proj))
        if self.gate_bias is None:
            return Gated(*matrices)
        return Gated(*matrices, Gated(*(p.get_value() for p in (self.gate_bias, self.up_bias, self.down_bias))))


class MoE(nnx.Module):
    """The feed-forward block of a sparse layer.

    Args:
        route: from router logits float32 `[tokens, experts]` and the correction bias `[experts]`, if there is one, to
            scores and expert numbers `[tokens, k]`.
        block: columns of `down` that cannot be cut apart.
        tp, ep: sizes of the mesh.
        shared_size: intermediate size of a block that every token goes through; None: there is no such block. It is
            cut over all devices, and its part joins the experts' in their one reduce.
        shared_gate: whether that block is weighed by the sigmoid of a gate.
        correction_bias: whether the router has a bias that only selects.
        bias: whether the router and the experts have biases.
        activation: between an expert's matrices.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        intermediate_size: int,
        route: Route,
        block: int,
        tp: int,
        ep: int,
        shared_size: int | None = None,
        shared_gate: bool = False,
        correction_bias: bool = False,
        bias: bool = False,
        activation: Activation = swiglu,
    ) -> None:
        self.route, self.num_experts, self.activation = route, num_experts, activation
        self.gate = Linear((num_experts, hidden_size), parallel.REPLICATED, bias=bias, keep=True)
        self.experts = Experts(num_experts, hidden_size, intermediate_size, block * tp, ep, bias)
        specs = {"column": parallel.SHARED_COLUMN, "row": parallel.SHARED_ROW}
        has = shared_size is not None
        self.shared_expert = MLP(hidden_size, shared_size, block * tp * ep, **specs) if has else None
        self.shared_expert_gate = Linear((1, hidden_size), parallel.REPLICATED, keep=True) if shared_gate else None
        self.e_score_correction_bias = declare((num_experts,), PartitionSpec(None)) if correction_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[..., hidden]` -> `[..., hidden]`."""
        tokens = x.reshape(-1, x.shape[-1])
        bias = None if self.e_score_correction_bias is None else self.e_score_correction_bias.get_value()
        scores, experts = self.route(self.gate(tokens, jnp.float32), bias)
        shared = None
        if self.shared_expert is not None:
            mlp = self.shared_expert
            weights = (p.weight.get_value() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
            gate = self.shared_expert_gate
            score = jnp.ones((), jnp.float32) if gate is None else jax.nn.sigmoid(gate(tokens, jnp.float32))
            shared = Gated(*weights), score
        y = parallel.experts(tokens, scores, experts, self.experts.weights, self.num_experts, self.activation, shared)
        return y.reshape(x.shape)
