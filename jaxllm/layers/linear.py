"""Matrices as layers. None of them knows the format of the weight it holds."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm import parallel
from jaxllm.formats.base import padded_index
from jaxllm.layers.parameter import declare


class Linear(nnx.Module):
    """`y = x @ weight.T + bias`, cut over the mesh as `spec` says.

    Args:
        shape: `(out, in)` as in the checkpoint.
        spec: COLUMN, ROW or REPLICATED.
        rows, cols: arrangement of the matrix, see `Declaration`.
        bias: whether there is one. That of a ROW layer is added once, after the reduce.
        keep: whether the matrix stays in the checkpoint's format, see `Declaration`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        spec: PartitionSpec,
        *,
        rows: np.ndarray | None = None,
        cols: np.ndarray | None = None,
        bias: bool = False,
        keep: bool = False,
    ) -> None:
        self.spec = spec
        self.weight = declare(shape, spec, rows, cols, keep)
        self.bias = declare(shape[:1], PartitionSpec(spec[0]), rows) if bias else None

    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """`x[..., in]` -> `[..., out]` in `dtype`, x's by default."""
        y = parallel.linear(x, self.weight.get_value(), self.spec, dtype)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class Embedding(nnx.Module):
    """A table `[vocab, hidden]` with the vocabulary cut over tp: looked up at the input, attended to at the output."""

    def __init__(self, shape: tuple[int, int], tp: int) -> None:
        self.vocab_size = shape[0]
        self.weight = declare(shape, parallel.COLUMN, rows=padded_index(shape[0], tp))

    def __call__(self, ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """`ids[...]` -> `[..., hidden]`."""
        return parallel.lookup(ids, self.weight.get_value(), dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """`x[..., hidden]` -> logits, float32 `[..., vocab]`, whole on every device."""
        logits = parallel.linear(x, self.weight.get_value(), parallel.COLUMN, jnp.float32)
        return parallel.gather(logits)[..., : self.vocab_size]
