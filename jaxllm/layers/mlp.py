"""The gated feed-forward block."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm import tracking
from jaxllm.formats.base import padded_index
from jaxllm.kernels.experts import Activation
from jaxllm.layers.linear import Linear, together
from jaxllm.parallel import COLUMN, ROW


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Gemma's activation, with the tanh approximation of GELU."""
    return jax.nn.gelu(gate, approximate=True) * up


@dataclass(frozen=True)
class ClampedSwiGLU:
    """GPT-OSS's activation: `(up + 1) * gate * sigmoid(alpha * gate)`. `limit` bounds the gate from above and `up` on
    both sides."""

    alpha: float
    limit: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


class MLP(nnx.Module):
    """`down(activation(gate(x), up(x)))` (Shazeer, 2020), with the intermediate dimension sharded over the mesh.

    That dimension is padded to a multiple of `multiple`, so that every device holds complete blocks of `down`. A padded
    position meets zero columns of `down`, so the activation's value there does not matter.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        multiple: int,
        bias: bool = False,
        activation: Activation = swiglu,
        column: PartitionSpec = COLUMN,
        row: PartitionSpec = ROW,
    ) -> None:
        self.activation = activation
        places = padded_index(intermediate_size, multiple)
        self.gate_proj = Linear((intermediate_size, hidden_size), column, rows=places, bias=bias)
        self.up_proj = Linear((intermediate_size, hidden_size), column, rows=places, bias=bias)
        self.down_proj = Linear((hidden_size, intermediate_size), row, cols=places, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.activation(*together(x, self.gate_proj, self.up_proj)))

    def record(self, x: jax.Array) -> None:
        """Note what the matrices are multiplied by, if that is tracked, where others multiply."""
        if tracking.kind_of(self.down_proj.weight) is not None:
            tracking.record(self.down_proj.weight, self.activation(*together(x, self.gate_proj, self.up_proj)))
