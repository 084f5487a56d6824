"""Mixture of experts: a router, a stack of feed-forward blocks, and perhaps a block that every token goes through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm import parallel, tracking
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight, padded_index
from jaxllm.kernels.experts import Activation, Gated
from jaxllm.layers.held import (
    Matrix,
    as_floating,
    as_weight,
    dequantized,
    fill,
    held,
    replaced,
    requantized,
    with_delta,
)
from jaxllm.layers.linear import Linear
from jaxllm.layers.mlp import MLP, swiglu
from jaxllm.layers.parameter import declare

MATRICES = ("gate_proj", "up_proj", "down_proj")
BIASES = ("gate_bias", "up_bias", "down_bias")

Route = Callable[[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class TopKRouter:
    """The routers of DeepSeek-V2 and V3. With one group this is the plain router, a softmax over all experts.

    Experts are scored (`scoring`) by "softmax" or "sigmoid". Selection adds the correction bias, if any, and only
    considers the `chosen_groups` best groups. A group is ranked (`group_score`) by its best expert ("max") or the sum
    of its two best ("top2"). The scores of the k chosen experts exclude the bias. They are normalised to sum to 1 if
    `normalize`, then multiplied by `scale`.

    This is a value rather than a closure, so that layers with the same routing compare equal.
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
            # -inf rather than the demo's 0: with negative biases, an expert of a masked group could win.
            choice = jnp.where(mask[..., None], grouped, -jnp.inf).reshape(choice.shape)
        best, experts = jax.lax.top_k(choice, self.k)
        scores = best if choice is scores else jnp.take_along_axis(scores, experts, axis=-1)
        if self.normalize:
            scores = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
        return scores * self.scale, experts


class Experts(tracking.Tracked, nnx.Module):
    """A stack of gated feed-forward blocks: experts are sharded over ep, their intermediate dimension over tp.

    That dimension is padded to a multiple of `multiple`, as in `MLP`. The stack is padded to a multiple of ep with
    experts of zeros that no router chooses. Biases are matrices of one column.
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
        self.down_bias = declare(narrow, parallel.EXPERT_REPLICATED, stack=stack, keep=True) if bias else None

    @classmethod
    def from_weight(
        cls,
        gate: Matrix | Sequence[Matrix],
        up: Matrix | Sequence[Matrix],
        down: Matrix | Sequence[Matrix],
        bias: tuple[np.ndarray | jax.Array, ...] | None = None,
    ) -> Self:
        """Experts outside a model, placed on the mesh that `jax.set_mesh` has set. Any sizes work.

        Args:
            gate, up: a stack `[experts, intermediate, hidden]`, or a matrix for each expert.
            down: a stack `[experts, hidden, intermediate]`, or a matrix for each expert.
            bias: the biases of the three, `[experts, intermediate]` twice and `[experts, hidden]`.

        Raises:
            InputError: no mesh is set, shapes do not match, experts have different formats, or values are not
                floating-point numbers.
        """
        mesh = parallel.placing_mesh()
        gate, up, down = (_stack(m, name) for name, m in zip(MATRICES, (gate, up, down), strict=True))
        one = down[0] if isinstance(down, tuple) else down
        count, (hidden, inner) = len(down) if isinstance(down, tuple) else one.shape[0], one.shape[-2:]
        multiple = one.granularity("in") * mesh.shape[parallel.TP]
        experts = cls(count, hidden, inner, multiple, mesh.shape[parallel.EP], bias is not None)
        for name, parts in zip(MATRICES, (gate, up, down), strict=True):
            fill(getattr(experts, name), parts, name)
        for name, values in zip(BIASES, bias or (), strict=bias is not None):
            fill(getattr(experts, name), as_weight(np.asarray(values)[..., None], 3, name), name)
        return experts

    @property
    def weights(self) -> Gated:
        """The placed stacks. Raises InputError if nothing is loaded."""
        gate, up, down = (held(getattr(self, name)) for name in MATRICES)
        if self.gate_bias is None:
            return Gated(gate, up, down)
        gate_bias, up_bias, down_bias = (held(getattr(self, name)) for name in BIASES)
        return Gated(gate, up, down, Gated(gate_bias, up_bias, down_bias))

    def __call__(
        self, x: jax.Array, scores: jax.Array, chosen: jax.Array, activation: Activation = swiglu
    ) -> jax.Array:
        """Send every token through its chosen experts; sum the results, weighted by the scores, over all devices.

        Args:
            x: `[tokens, hidden]`.
            scores, chosen: `[tokens, k]`; expert numbers are int32, and numbers of no expert add nothing.
            activation: a function of an expert's gate and up projections.

        Returns:
            `[tokens, hidden]` in x's dtype.

        Raises:
            InputError: nothing is loaded, no mesh is set, or the arguments do not fit.
        """
        count, hidden, _ = self.down_proj.declared.shape
        stack, x, scores, chosen = self.weights, as_floating(x, hidden), jnp.asarray(scores), jnp.asarray(chosen)
        if x.ndim != 2 or scores.shape != chosen.shape or chosen.ndim != 2 or len(chosen) != len(x):
            raise InputError(
                f"x {[*x.shape]}, scores {[*scores.shape]} and chosen {[*chosen.shape]}: expected [tokens, hidden] and "
                "[tokens, k] twice"
            )
        self.record(x, chosen, activation)
        return parallel.experts(x, scores, chosen, stack, count, activation)

    def record(self, x: jax.Array, chosen: jax.Array, activation: Activation) -> None:
        """Note what the matrices are multiplied by, if that is tracked."""
        kind = tracking.kind_of(self.gate_proj)
        if kind is None:
            return
        real = tracking.real_tokens()
        counted = chosen if real is None else jnp.where(real.reshape(-1, 1), chosen, -1)
        count = self.down_proj.declared.shape[0]
        outer, inner = parallel.expert_sums(x, counted, self.weights, count, activation, kind == "products")
        for param, sums in ((self.gate_proj, outer), (self.up_proj, outer), (self.down_proj, inner)):
            tracking.record_stack(param, tracking.Statistics(*sums))

    def dequantize(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The stacks of gate, up and down in the checkpoint's order and size, float32."""
        return dequantized(self.gate_proj), dequantized(self.up_proj), dequantized(self.down_proj)

    def add_delta(
        self, gate: jax.Array | None = None, up: jax.Array | None = None, down: jax.Array | None = None
    ) -> Self:
        """New experts with each given delta, of its stack's shape, added to that stack; see `Linear.add_delta`."""
        deltas = {name: d for name, d in zip(MATRICES, (gate, up, down), strict=True) if d is not None}
        return replaced(self, **{name: with_delta(getattr(self, name), delta) for name, delta in deltas.items()})

    def requantize(self, type: str) -> Self:
        """New experts with all three stacks encoded as `type`, see `Linear.requantize`."""
        return replaced(self, **{name: requantized(getattr(self, name), type) for name in MATRICES})


def _stack(matrices: Matrix | Sequence[Matrix], name: str) -> Weight | tuple[Weight, ...]:
    if isinstance(matrices, Sequence):
        return tuple(as_weight(m, 2, f"{name} of expert {i}") for i, m in enumerate(matrices))
    return as_weight(matrices, 3, name)


class MoE(nnx.Module):
    """The feed-forward block of a sparse layer.

    Args:
        route: maps router logits float32 `[tokens, experts]` and the correction bias `[experts]`, if there is one, to
            scores and expert numbers `[tokens, k]`.
        block: block size of `down` along its columns; blocks are never split.
        tp, ep: sizes of the mesh.
        shared_size: intermediate size of a block that every token goes through; None: there is no such block. It is
            sharded over all devices, and its result joins the experts' in their one reduce.
        shared_gate: whether that block is weighted by the sigmoid of a gate.
        correction_bias: whether the router has a bias that is used for selection only.
        bias: whether the router and the experts have biases.
        activation: a function of an expert's gate and up projections.
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
        shared = partial(MLP, column=parallel.SHARED_COLUMN, row=parallel.SHARED_ROW)
        self.shared_expert = None if shared_size is None else shared(hidden_size, shared_size, block * tp * ep)
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
            mlp.record(tokens)
            weights = (p.weight.get_value() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
            gate = self.shared_expert_gate
            score = jnp.ones((), jnp.float32) if gate is None else jax.nn.sigmoid(gate(tokens, jnp.float32))
            shared = Gated(*weights), score
        self.experts.record(tokens, experts, self.activation)
        y = parallel.experts(tokens, scores, experts, self.experts.weights, self.num_experts, self.activation, shared)
        return y.reshape(x.shape)
