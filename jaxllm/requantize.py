"""Encodes matrices of any format into a block type: while they are loaded, or later on their devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight, shards
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.ggml_encode import ENCODERS, check_finite, encode_blocks, fitting_type
from jaxllm.parallel import local

# Embedding tables also serve as heads, which decide the answer, so they get a better type (as in mistral.rs).
SENSITIVE = ("embed_tokens.weight", "lm_head.weight")
LOW = ("Q2_K", "Q3_K", "Q4_K", "Q4_0", "Q4_1", "IQ4_NL", "MXFP4")


def quantize(w: jax.Array | Weight, type: str) -> Weight:
    """A float matrix `[*batch, out, in]`, or a weight of any format, encoded as `type`, for example "q4_k".

    If rows are not whole blocks, llama.cpp's fallback is used: a type with smaller blocks, or float16.

    Raises:
        InputError: `type` has no encoder, or the matrix has values that are not finite.
    """
    values = jax.tree.map(np.asarray, w).dequantize() if isinstance(w, Weight) else jnp.asarray(w)
    type = fitting_type(block_type(type), values.shape[-1])
    return Dense.from_dense(values, jnp.float16) if type == "F16" else GGML.from_dense(values, type)


def requantize(weight: Weight, spec: PartitionSpec, type: str) -> Weight:
    """Encode a weight that is placed on a mesh, sharded by `spec`, as `type`; the result is sharded the same way.

    Every device encodes its own shard; nothing is communicated. So the columns of one device must be whole blocks.
    Otherwise the fallback of `quantize` is used. Not for use under `jit`.

    Raises:
        InputError: as `quantize`.
    """
    mesh = jax.tree.leaves(weight)[0].sharding.mesh
    values = _dequantized(weight, NamedSharding(mesh, spec))
    type = fitting_type(block_type(type), values.shape[-1] // shards(spec[-1], mesh))
    if type == "F16":
        return Dense.from_dense(values, jnp.float16)
    check_finite(values, type)
    with jax.set_mesh(mesh):
        encode = local(partial(encode_blocks, type=type), spec, PartitionSpec(*spec, None), check_vma=False)
        return GGML(jax.jit(encode)(values), type)


@partial(jax.jit, static_argnums=1)
def _dequantized(weight: Weight, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight.dequantize(), sharding)


def block_type(text: str) -> str:
    """The standard name of a block type, for any common spelling: "q4k", "Q4_K" and "q4_k" are the same.

    Raises:
        InputError: there is no encoder with this name.
    """
    squeezed = {name.replace("_", ""): name for name in ENCODERS}
    name = text.upper().replace("_", "").replace("-", "")
    if name not in squeezed:
        raise InputError(f"cannot quantize to '{text}'; known are {', '.join(n.lower() for n in ENCODERS)}")
    return squeezed[name]


class Requantize:
    """What `load(quantize=type)` does to each matrix; `planned` gives the resulting shapes in advance."""

    def __init__(self, type: str) -> None:
        self.type = block_type(type)

    def __call__(self, name: str, weight: Weight) -> Weight:
        return quantize(weight, self._type_for(name))

    def planned(self, name: str, weight: Weight) -> Weight:
        """The shapes of the result, without computing it."""
        *lead, n = weight.shape
        type = fitting_type(self._type_for(name), n)
        if type == "F16":
            return Dense(jax.ShapeDtypeStruct(weight.shape, jnp.float16))
        size, nbytes, _ = BLOCK_TYPES[type]
        return GGML(jax.ShapeDtypeStruct((*lead, n // size, nbytes), jnp.uint8), type)

    def _type_for(self, name: str) -> str:
        if name in SENSITIVE:
            return "Q6_K" if self.type in LOW else "Q8_0"
        return self.type
