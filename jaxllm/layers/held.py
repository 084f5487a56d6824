"""Operations on the matrix that a layer holds: restore the checkpoint's order, add a delta, requantize.

`requantize` gathers the matrix on the host and encodes it there as a whole, so that the result does not depend on the
mesh. `add_delta` encodes the matrix in one computation, for which XLA may gather it meanwhile; the result is sharded as
before.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxllm.declaration import Declaration
from jaxllm.encodings import Encoding, encoding
from jaxllm.errors import InputError
from jaxllm.formats.adapted import Adapted, base_of
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.parallel import placing_mesh
from jaxllm.placing import Source, place
from jaxllm.requantize import encode_source, fitting_shards

Matrix = Weight | np.ndarray | jax.Array


def as_weight(matrix: Matrix, ndim: int, name: str) -> Weight:
    """A weight or array as a `Weight`, in the host's memory or in a file.

    Raises:
        InputError: the number of dimensions is not `ndim`, or the array does not hold floating-point numbers.
    """
    if isinstance(matrix, Weight):
        weight = jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, matrix)
    else:
        values = np.asarray(matrix)
        weight = Dense(values.astype(np.float32) if values.dtype == np.float64 else values)
    if len(weight.shape) != ndim:
        raise InputError(f"{name} has shape {[*weight.shape]}, expected {ndim} dimensions")
    if isinstance(weight, Dense) and not jax.dtypes.issubdtype(weight.values.dtype, np.floating):
        raise InputError(f"{name} is of {weight.format}, not of floating-point numbers")
    return weight


def fill(param: nnx.Param, parts: Weight | tuple[Weight, ...], name: str) -> None:
    """Place a weight, or one for each matrix of a stack, on the ambient mesh as the parameter's declaration says.

    Raises:
        InputError: the shape is not the declared one, or no mesh is set.
    """
    declared = param.declared
    stacked = isinstance(parts, tuple)
    source = Source(name, parts if isinstance(parts, tuple) else (parts,), stacked)
    if source.shape != declared.shape:
        raise InputError(f"{name} has shape {[*source.shape]}, expected {[*declared.shape]}")
    weight = place(source, declared, placing_mesh())
    param.set_value(weight.dequantize() if len(declared.shape) == 1 else weight)


def held(param: nnx.Param) -> Weight:
    """The parameter's weight. Raises InputError if nothing was loaded."""
    weight = param.get_value()
    if isinstance(weight, Declaration):
        raise InputError(
            f"nothing is loaded, this layer's matrix {[*weight.shape]} is only declared: make the layer with "
            "from_weight(), or its model with jaxllm.load()"
        )
    return weight


def dequantized(param: nnx.Param) -> jax.Array:
    """The checkpoint's matrix, float32, in its own order and size."""
    return _restored(held(param), param.declared)


@partial(jax.jit, static_argnums=1)
def _restored(weight: Weight, declared: Declaration) -> jax.Array:
    return declared.restore(weight.dequantize())


def with_delta(param: nnx.Param, delta: np.ndarray | jax.Array) -> Weight:
    """The parameter's weight plus a delta in the checkpoint's order and size. Sharding and format stay the same.

    Raises:
        InputError: the delta has another shape, or the format has no encoder.
    """
    weight, declared = held(param), param.declared
    mesh = jax.tree.leaves(weight)[0].sharding.mesh
    arranged = _arranged(jnp.asarray(delta, jnp.float32), declared)
    arranged = jax.device_put(arranged, NamedSharding(mesh, declared.spec))
    changed = weight.add_delta(arranged)
    specs = changed.shard_specs(declared.spec, mesh)
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), changed, specs)


@partial(jax.jit, static_argnums=1)
def _arranged(delta: jax.Array, declared: Declaration) -> jax.Array:
    return declared.arrange(delta)


def requantized(param: nnx.Param, type: str | int) -> Weight:
    """The parameter's weight encoded as `type`, or as the first of its fallbacks whose blocks the shards do not split.

    Raises:
        InputError: there is no such type, or values are not finite.
    """
    mesh = jax.tree.leaves(held(param))[0].sharding.mesh
    return encoded_anew(param, fitting_shards(encoding(type), param.declared, mesh))


def encoded_anew(param: nnx.Param, type: Encoding, importance: np.ndarray | None = None) -> Weight:
    """The parameter's weight encoded as `type`, and placed as it was, see `encode_source`. What adapters add stays."""
    weight = held(param)
    mesh = jax.tree.leaves(weight)[0].sharding.mesh
    values = Dense(np.asarray(_restored(base_of(weight), param.declared)))
    encoded = place(encode_source(Source("matrix", (values,)), type, importance), param.declared, mesh)
    return replace(weight, base=encoded) if isinstance(weight, Adapted) else encoded


def replaced[M: nnx.Module](module: M, **weights: Weight) -> M:
    """A copy of the layer with new weights for the named parameters; the given layer is unchanged."""
    copy = nnx.clone(module)
    for name, weight in weights.items():
        getattr(copy, name).set_value(weight)
    return copy


def as_floating(x: jax.Array, features: int) -> jax.Array:
    """Activations `[..., features]`. Raises InputError for anything else."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"x is of {x.dtype}, not of floating-point numbers")
    if x.ndim == 0 or x.shape[-1] != features:
        raise InputError(f"x has shape {[*x.shape]}, but this layer takes [..., {features}]")
    return x
