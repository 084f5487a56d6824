"""Matrices as layers. None of them knows the format of the weight it holds."""

from collections.abc import Sequence
from typing import Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm import parallel
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight, padded_index, shards
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
from jaxllm.layers.parameter import declare


class Linear(nnx.Module):
    """`y = x @ weight.T + bias`, cut over the mesh as `spec` says.

    Made by its constructor, a layer is part of a model: its matrix is declared and loaded later, and x and y have the
    order and the sizes of what lies on the mesh, where the model has padded and placed heads. Made by `from_weight`, it
    stands alone: x and y have the checkpoint's sizes.

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
        self.spec, self.stands_alone = spec, False
        self.weight = declare(shape, spec, rows, cols, keep)
        self.bias = declare(shape[:1], PartitionSpec(spec[0]), rows) if bias else None

    @overload
    @classmethod
    def from_weight(cls, weight: Matrix, spec: PartitionSpec, bias: np.ndarray | jax.Array | None = None) -> Self: ...

    @overload
    @classmethod
    def from_weight(
        cls,
        weight: Sequence[Matrix],
        spec: PartitionSpec,
        bias: Sequence[np.ndarray | jax.Array | None] | None = None,
    ) -> "Merged": ...

    @classmethod
    def from_weight(cls, weight, spec, bias=None):  # noqa: ANN001, ANN206
        """A layer that stands alone, its matrix placed on the mesh that `jax.set_mesh` has set.

        Sizes that the mesh does not divide are padded with zeros, in whole blocks, and scales are repeated where a cut
        would tear their block. A COLUMN layer whose `out` divides communicates nothing; where it was padded, bringing
        the result back to `out` moves it between devices.

        Args:
            weight: `[out, in]`, a `Weight` of any format or a floating-point array; or several, see `Merged`.
            spec: COLUMN, ROW or REPLICATED.
            bias: `[out]`, or one (or None) for each matrix.

        Raises:
            InputError: no mesh, not a matrix of floating-point numbers, or a bias of another size.
        """
        if isinstance(weight, Sequence):
            biases = [None] * len(weight) if bias is None else bias
            if len(biases) != len(weight):
                raise InputError(f"{len(biases)} biases for {len(weight)} matrices; None stands for no bias")
            return Merged([cls.from_weight(*each) for each in zip(weight, [spec] * len(weight), biases, strict=True)])
        mesh = parallel.placing_mesh()
        if not isinstance(spec, PartitionSpec) or len(spec) != 2:
            raise InputError(f"spec {spec!r}: choose COLUMN, ROW or REPLICATED of jaxllm.layers")
        weight = as_weight(weight, 2, "weight")
        rows, cols = (
            _places(weight, axis, dim, shards(entry, mesh))
            for axis, (dim, entry) in enumerate(zip(("out", "in"), spec, strict=True))
        )
        layer = cls(weight.shape, spec, rows=rows, cols=cols, bias=bias is not None)
        layer.stands_alone = True
        fill(layer.weight, weight, "weight")
        if bias is not None:
            assert layer.bias is not None
            fill(layer.bias, as_weight(bias, 1, "bias"), "bias")
        return layer

    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """`x[..., in]` -> `[..., out]` in `dtype`, x's by default.

        Raises:
            InputError: nothing is loaded, no mesh is set, or an x that does not fit.
        """
        weight = held(self.weight)
        out, in_ = self.weight.declared.shape if self.stands_alone else weight.shape
        x = as_floating(x, in_)
        if padding := weight.shape[1] - in_:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
        y = parallel.linear(x, weight, self.spec, dtype)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(y.dtype)
        return y[..., :out]

    def dequantize(self) -> jax.Array:
        """The matrix as the checkpoint has it: float32 `[out, in]`, whatever order and padding it is placed with."""
        return dequantized(self.weight)

    def add_delta(self, delta: np.ndarray | jax.Array) -> Self:
        """A new layer, whose matrix has `delta[out, in]`, in the checkpoint's order, added to it. It is encoded and
        sharded as this one, which stays as it is.

        Raises:
            InputError: a delta of another shape, or a format that cannot be encoded (then `requantize` first).
        """
        return replaced(self, weight=with_delta(self.weight, delta))

    def requantize(self, type: str) -> Self:
        """A new layer, whose matrix is encoded as `type`, for example "q4_k", and sharded as that of this one, which
        stays as it is. Where a device's columns are not whole blocks, llama.cpp's fallback is taken, see `quantize`.

        Raises:
            InputError: there is no encoder for `type`, or the matrix has values that are not finite.
        """
        return replaced(self, weight=requantized(self.weight, type))


def _places(weight: Weight, axis: int, dim: str, count: int) -> np.ndarray | None:
    """Where the positions of a dimension go if it is cut into `count` parts; None: in order, without padding."""
    size, multiple = weight.shape[axis], weight.granularity(dim) * count
    return None if size % multiple == 0 or count == 1 else padded_index(size, multiple)


class Merged(nnx.Module):
    """Matrices that take the same x: queries, keys and values, or gate and up (mistral.rs: merged column layers).

    Their results are a tuple, one for each, and each may have its own format and size. Concatenated, they would have
    to move: what one device holds of q, of k and of v does not lie together in a `[q, k, v]` that is cut over devices.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> tuple[jax.Array, ...]:
        """`x[..., in]` -> `[..., out]` of each matrix, see `Linear`."""
        return tuple(layer(x, dtype) for layer in self.layers)

    def dequantize(self) -> tuple[jax.Array, ...]:
        return tuple(layer.dequantize() for layer in self.layers)

    def add_delta(self, deltas: Sequence[np.ndarray | jax.Array]) -> Self:
        """With a delta for each matrix, see `Linear`."""
        return type(self)([layer.add_delta(delta) for layer, delta in zip(self.layers, deltas, strict=True)])

    def requantize(self, type: str) -> Self:
        """With each matrix encoded as `type`, see `Linear`."""
        return self.__class__([layer.requantize(type) for layer in self.layers])


class Embedding(nnx.Module):
    """A table `[vocab, hidden]` with the vocabulary cut over tp: looked up at the input, attended to at the output."""

    def __init__(self, shape: tuple[int, int], tp: int) -> None:
        self.vocab_size = shape[0]
        self.weight = declare(shape, parallel.COLUMN, rows=padded_index(shape[0], tp))

    @classmethod
    def from_weight(cls, weight: Matrix) -> Self:
        """A table that stands alone, placed on the mesh that `jax.set_mesh` has set; the vocabulary may have any size.

        Raises:
            InputError: no mesh, or not a matrix of floating-point numbers.
        """
        tp = parallel.placing_mesh().shape[parallel.TP]
        weight = as_weight(weight, 2, "weight")
        vocab, hidden = weight.shape
        table = cls((vocab, hidden), tp)
        fill(table.weight, weight, "weight")
        return table

    def __call__(self, ids: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """`ids[...]`, int32 -> `[..., hidden]`. Raises InputError as `Linear` does."""
        ids = jnp.asarray(ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise InputError(f"ids are of {ids.dtype}, not of integers")
        return parallel.lookup(ids, held(self.weight), dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """`x[..., hidden]` -> logits, float32 `[..., vocab]`, whole on every device."""
        weight = held(self.weight)
        logits = parallel.linear(as_floating(x, weight.shape[1]), weight, parallel.COLUMN, jnp.float32)
        return parallel.gather(logits)[..., : self.vocab_size]

    def dequantize(self) -> jax.Array:
        """The table as the checkpoint has it: float32 `[vocab, hidden]`."""
        return dequantized(self.weight)

    def add_delta(self, delta: np.ndarray | jax.Array) -> Self:
        """As `Linear.add_delta`."""
        return replaced(self, weight=with_delta(self.weight, delta))

    def requantize(self, type: str) -> Self:
        """As `Linear.requantize`."""
        return replaced(self, weight=requantized(self.weight, type))
