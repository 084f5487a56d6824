"""Layers that hold matrices. None of them knows the format of its weight."""

from collections.abc import Sequence
from typing import Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm import parallel, tracking
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


class Linear(tracking.Tracked, nnx.Module):
    """`y = x @ weight.T + bias`, sharded over the mesh by `spec`.

    The constructor makes a layer for a model: its matrix is declared now and loaded later, and x and y have the order
    and the sizes on the mesh, where the model has padded and placed heads. `from_weight` makes a layer outside a model:
    x and y have the checkpoint's sizes.

    Args:
        shape: `(out, in)` as in the checkpoint.
        spec: COLUMN, ROW or REPLICATED.
        rows, cols: arrangement of the matrix, see `Declaration`.
        bias: whether there is one. The bias of a ROW layer is added once, after the reduce.
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
        """A layer outside a model, with its matrix placed on the mesh that `jax.set_mesh` has set.

        Sizes that the mesh does not divide are padded with zeros, in complete blocks. Scales are repeated where a shard
        boundary would split their block. A COLUMN layer communicates nothing if tp divides `out`. If `out` was padded,
        removing the padding from the result moves it between devices.

        Args:
            weight: `[out, in]`, a `Weight` of any format or a floating-point array; or several, see `Merged`.
            spec: COLUMN, ROW or REPLICATED.
            bias: `[out]`, or one (or None) for each matrix.

        Raises:
            InputError: no mesh is set, the weight is not a floating-point matrix, or the bias has another size.
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
            InputError: nothing is loaded, no mesh is set, or x does not fit.
        """
        return together(x, self, dtype=dtype)[0]

    def _sizes(self) -> tuple[int, int]:
        """The sizes of y and x."""
        out, in_ = self.weight.declared.shape if self.stands_alone else held(self.weight).shape
        return out, in_

    def dequantize(self) -> jax.Array:
        """The matrix in the checkpoint's order and size, without padding: float32 `[out, in]`."""
        return dequantized(self.weight)

    def add_delta(self, delta: np.ndarray | jax.Array) -> Self:
        """A new layer whose matrix is this one's plus `delta[out, in]`, given in the checkpoint's order. Format and
        sharding are the same; this layer is unchanged.

        Raises:
            InputError: the delta has another shape, or the format has no encoder (then `requantize` first).
        """
        return replaced(self, weight=with_delta(self.weight, delta))

    def requantize(self, type: str) -> Self:
        """A new layer whose matrix is encoded as `type`, for example "q4_k". The sharding is the same; this layer is
        unchanged. If a device's columns are not complete blocks, llama.cpp's fallback type is used, see `quantize`.

        Raises:
            InputError: there is no encoder for `type`, or the matrix has values that are not finite.
        """
        return replaced(self, weight=requantized(self.weight, type))


def together(x: jax.Array, *layers: Linear, dtype: jax.typing.DTypeLike | None = None) -> tuple[jax.Array, ...]:
    """The results of several layers that take the same x and are sharded alike, see `Linear`: kernels that can multiply
    by several matrices in one call do so."""
    weights = [held(layer.weight) for layer in layers]
    out, in_ = zip(*(layer._sizes() for layer in layers), strict=True)
    x = as_floating(x, in_[0])
    if padding := weights[0].shape[1] - in_[0]:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    for layer in layers:
        tracking.record(layer.weight, x)
    ys = parallel.linears(x, weights, layers[0].spec, dtype)
    return tuple(
        (y if layer.bias is None else y + layer.bias.get_value().astype(y.dtype))[..., :size]
        for y, layer, size in zip(ys, layers, out, strict=True)
    )


def _places(weight: Weight, axis: int, dim: str, count: int) -> np.ndarray | None:
    """The index that pads a dimension for `count` shards; None: no padding is needed."""
    size, multiple = weight.shape[axis], weight.granularity(dim) * count
    return None if size % multiple == 0 or count == 1 else padded_index(size, multiple)


class Merged(tracking.Tracked, nnx.Module):
    """Matrices that take the same x: queries, keys and values, or gate and up (mistral.rs: merged column layers).

    The result is a tuple with one array per matrix; each matrix may have its own format and size. Concatenating the
    results would move them: one device's shards of q, of k and of v are not adjacent in a sharded `[q, k, v]`.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> tuple[jax.Array, ...]:
        """`x[..., in]` -> `[..., out]` of each matrix, see `Linear`."""
        return together(x, *self.layers, dtype=dtype)

    def dequantize(self) -> tuple[jax.Array, ...]:
        """The matrices in the checkpoint's order and size, float32 `[out, in]` each."""
        return tuple(layer.dequantize() for layer in self.layers)

    def add_delta(self, deltas: Sequence[np.ndarray | jax.Array]) -> Self:
        """New layers with a delta added to each matrix, see `Linear`."""
        return type(self)([layer.add_delta(delta) for layer, delta in zip(self.layers, deltas, strict=True)])

    def requantize(self, type: str) -> Self:
        """New layers with each matrix encoded as `type`, see `Linear`."""
        return self.__class__([layer.requantize(type) for layer in self.layers])


class Embedding(tracking.Tracked, nnx.Module):
    """An embedding table `[vocab, hidden]`, the vocabulary sharded over tp. It can serve as the output head too."""

    def __init__(self, shape: tuple[int, int], tp: int) -> None:
        self.vocab_size = shape[0]
        self.weight = declare(shape, parallel.COLUMN, rows=padded_index(shape[0], tp))

    @classmethod
    def from_weight(cls, weight: Matrix) -> Self:
        """A table outside a model, placed on the mesh that `jax.set_mesh` has set; the vocabulary may have any size.

        Raises:
            InputError: no mesh is set, or the weight is not a floating-point matrix.
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
        """`x[..., hidden]` -> logits, float32 `[..., vocab]`, replicated on every device."""
        weight = held(self.weight)
        tracking.record(self.weight, x)
        logits = parallel.linear(as_floating(x, weight.shape[1]), weight, parallel.COLUMN, jnp.float32)
        return parallel.gather(logits)[..., : self.vocab_size]

    def dequantize(self) -> jax.Array:
        """The table in the checkpoint's order and size: float32 `[vocab, hidden]`."""
        return dequantized(self.weight)

    def add_delta(self, delta: np.ndarray | jax.Array) -> Self:
        """See `Linear.add_delta`."""
        return replaced(self, weight=with_delta(self.weight, delta))

    def requantize(self, type: str) -> Self:
        """See `Linear.requantize`."""
        return replaced(self, weight=requantized(self.weight, type))
