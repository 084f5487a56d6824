"""Mixtures of experts: a router, a stack of feed-forward blocks, and perhaps one that every token goes through."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm import parallel
from jaxllm.formats.base import padded_index
from jaxllm.layers.linear import Linear
from jaxllm.layers.mlp import MLP, swiglu
from jaxllm.layers.parameter import declare

Route = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def softmax_top_k(k: int, normalize: bool) -> Route:
    """Softmax over all experts, the k likeliest, and, if `normalize`, their scores brought to a sum of 1."""

    def route(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), k)
        return scores / jnp.sum(scores, axis=-1, keepdims=True) if normalize else scores, experts

    return route


class Experts(nnx.Module):
    """A stack of gated feed-forward blocks: whole experts are cut over ep, their intermediate dimension over tp.

    `multiple` is what that dimension is padded to, as in `MLP`.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, multiple: int) -> None:
        places = padded_index(intermediate_size, multiple)
        wide, narrow = (num_experts, intermediate_size, hidden_size), (num_experts, hidden_size, intermediate_size)
        self.gate_proj = declare(wide, parallel.EXPERT_COLUMN, rows=places)
        self.up_proj = declare(wide, parallel.EXPERT_COLUMN, rows=places)
        self.down_proj = declare(narrow, parallel.EXPERT_ROW, cols=places)

    @property
    def weights(self) -> parallel.Gated:
        return parallel.Gated(*(p.get_value() for p in (self.gate_proj, self.up_proj, self.down_proj)))


class MoE(nnx.Module):
    """The feed-forward block of a sparse layer.

    Args:
        route: from router logits float32 `[tokens, experts]` to scores and expert numbers `[tokens, k]`.
        block: columns of `down` that cannot be cut apart.
        tp, ep: sizes of the mesh.
        shared_size: intermediate size of a block that every token goes through, weighed by a sigmoid; None: there is
            no such block. It is cut over all devices, and its part joins the experts' in their one reduce.
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
    ) -> None:
        self.route, self.num_experts = route, num_experts
        self.gate = Linear((num_experts, hidden_size), parallel.REPLICATED, keep=True)
        self.experts = Experts(num_experts, hidden_size, intermediate_size, block * tp)
        specs = {"column": parallel.SHARED_COLUMN, "row": parallel.SHARED_ROW}
        has = shared_size is not None
        self.shared_expert = MLP(hidden_size, shared_size, block * tp * ep, **specs) if has else None
        self.shared_expert_gate = Linear((1, hidden_size), parallel.REPLICATED, keep=True) if has else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[..., hidden]` -> `[..., hidden]`."""
        tokens = x.reshape(-1, x.shape[-1])
        scores, experts = self.route(self.gate(tokens, jnp.float32))
        shared = None
        if self.shared_expert is not None:
            mlp = self.shared_expert
            weights = (p.weight.get_value() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
            shared = parallel.Gated(*weights), jax.nn.sigmoid(self.shared_expert_gate(tokens, jnp.float32))
        y = parallel.experts(tokens, scores, experts, self.experts.weights, self.num_experts, swiglu, shared)
        return y.reshape(x.shape)
