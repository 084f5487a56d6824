"""Encodes matrices as other types: parameters while they are loaded, and layers that are loaded already.

A matrix is always encoded as a whole, in the order of the checkpoint, on the host. So its groups never restart at the
border of a shard, and the bits are the same on every mesh.
"""

import math
from contextlib import AbstractContextManager
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm.declaration import Declaration
from jaxllm.encodings import ENCODINGS, Encoding, check, encoding, fitting
from jaxllm.errors import InputError
from jaxllm.formats.base import Leaf, Weight
from jaxllm.formats.dense import Dense
from jaxllm.placing import Source, layout, read_part

LAST = "f16"  # the fallback of all others, which fits everywhere


def quantize(w: np.ndarray | jax.Array | Weight, type: str | int, importance: np.ndarray | None = None) -> Weight:
    """A float matrix `[*batch, out, in]`, or a weight of any format, encoded as `type`, for example "q4_k".

    If rows are not whole blocks, a type with smaller blocks is used, or float16; see `encodings`.

    Args:
        importance: mean squares of the activations that each column meets, float32 `[in]` or `[*batch, in]`.

    Raises:
        InputError: there is no such type, it needs an importance and there is none, or the matrix has values that are
            not finite.
    """
    values = _host(w).dequantize() if isinstance(w, Weight) else jnp.asarray(w)
    return encoded(values, fitting(encoding(type), values.shape[-1]), importance)


def encoded(values: jax.Array, type: Encoding, importance: np.ndarray | None = None) -> Weight:
    """A float matrix `[*batch, out, in]` whose rows are whole blocks, encoded. Raises InputError as `quantize` does."""
    if type.needs_importance and importance is None:
        raise InputError(f"{type.name} needs an importance matrix; jaxllm calibrate makes one")
    check(values, type)
    return _encode(values, None if importance is None else jnp.asarray(importance, jnp.float32), type)


@partial(jax.jit, static_argnums=2)
def _encode(values: jax.Array, importance: jax.Array | None, type: Encoding) -> Weight:
    return type.encode(values.astype(jnp.float32), importance)


@cache
def planned(shape: tuple[int, ...], type: Encoding) -> Weight:
    """The shapes of a matrix of this shape when it is encoded. Encoders take long to trace, and layers are alike."""
    values = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda w: type.encode(w, None), values)


def encode_source(source: Source, type: Encoding, importance: np.ndarray | None = None) -> Source:
    """What a parameter comes from, encoded on the host. Only one matrix at a time is held as floats.

    Args:
        importance: float32 `[in]`, or `[experts, in]` for a stack; a row of zeros says nothing.
    """
    *lead, _, width = source.shape
    rows = None if importance is None else np.broadcast_to(importance, (*lead, width)).reshape(-1, width)
    made = []
    for i in range(math.prod(lead)):
        with on_host():
            made.append(_host(encoded(floats(source, i), type, None if rows is None else rows[i])))
    return Source(source.name, tuple(made), stacked=bool(lead))


def on_host() -> AbstractContextManager:
    """Computations inside use the CPU."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def floats(source: Source, number: int = 0) -> jax.Array:
    """One matrix of a parameter, or its vector: float32 `[out, in]` or `[out]`, on the host.

    Args:
        number: which matrix of a stack.
    """
    one = _host(source.parts[number] if source.stacked else one_matrix(source.parts[0], number))
    exact = isinstance(one, Dense) and one.values.dtype == np.float32  # as it is, without a program
    with on_host():
        values = jnp.asarray(one.leaf("values")) if exact else _dequantized(one)
        # Rows are picked by numpy, for which nothing has to be compiled.
        return values if source.rows is None else jnp.asarray(np.asarray(values)[source.rows])


def one_matrix(weight: Weight, number: int) -> Weight:
    """A matrix `[out, in]` of a stack, read; of what is no stack, everything."""
    lead = weight.shape[:-2]
    part = tuple(slice(int(i), int(i) + 1) for i in np.unravel_index(number, lead)) if lead else ()

    def read(leaf: Leaf) -> np.ndarray:
        return np.asarray(read_part(leaf, part)).reshape(leaf.shape[len(lead) :])

    return weight.with_leaves({name: read(weight.leaf(name)) for name in weight.axes})


@jax.jit
def _dequantized(weight: Weight) -> jax.Array:
    return weight.dequantize()


def _host(weight: Weight) -> Weight:
    return jax.tree.map(np.asarray, weight)


def fitting_shards(type: Encoding, declaration: Declaration, mesh: Mesh) -> Encoding:
    """`type`, or the first of its fallbacks whose blocks the shards of a parameter do not split."""
    while type.name != LAST:
        if declaration.shape[-1] % type.block == 0:
            try:
                layout(Source("", (planned(declaration.shape, type),)), declaration, mesh)
            except InputError:
                pass
            else:
                return type
        type = ENCODINGS[type.fallback or LAST]
    return type
