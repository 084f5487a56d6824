"""The gated feed-forward block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.formats.base import padded_index
from jaxllm.kernels.experts import Activation
from jaxllm.layers.linear import Linear
from jaxllm.parallel import COLUMN, ROW


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (SwiGLU, Shazeer 2020), the intermediate dimension cut over the mesh.

    `multiple` is what that dimension is padded to: whole blocks of `down` on every device. A padded position carries
    silu(0) * 0 = 0 into zero columns.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        multiple: int,
        bias: bool = False,
        column: PartitionSpec = COLUMN,
        row: PartitionSpec = ROW,
    ) -> None:
        places = padded_index(intermediate_size, multiple)
        self.gate_proj = Linear((intermediate_size, hidden_size), column, rows=places, bias=bias)
        self.up_proj = Linear((intermediate_size, hidden_size), column, rows=places, bias=bias)
        self.down_proj = Linear((hidden_size, intermediate_size), row, cols=places, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def clamped_swiglu(alpha: float, limit: float) -> Activation:
    """GPT-OSS's activation: `(up + 1) * gate * sigmoid(alpha * gate)`, the gate bounded above by `limit` and `up` on
    both sides."""

    def activation(gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)

    return activation
