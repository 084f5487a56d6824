"""Encoding matrices while they are loaded, whatever format they come in."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.ggml_encode import ENCODERS, fitting_type

# Tables of tokens are looked up and, as heads, decide the answer: they get the better type of the two (mistral.rs).
SENSITIVE = ("embed_tokens.weight", "lm_head.weight")
LOW = ("Q2_K", "Q3_K", "Q4_K", "Q4_0", "Q4_1", "IQ4_NL", "MXFP4")


def quantize(w: jax.Array | Weight, type: str) -> Weight:
    """A float matrix `[*batch, out, in]`, or a weight of any format, encoded as `type`, for example "q4_k".

    Rows that are not whole blocks get what llama.cpp takes instead: a type with smaller blocks, or float16.

    Raises:
        InputError: `type` has no encoder, or the matrix has values that are not finite.
    """
    values = jax.tree.map(np.asarray, w).dequantize() if isinstance(w, Weight) else jnp.asarray(w)
    type = fitting_type(block_type(type), values.shape[-1])
    return Dense.from_dense(values, jnp.float16) if type == "F16" else GGML.from_dense(values, type)


def block_type(text: str) -> str:
    """A block type's own name from the ways in which people write it: "q4k", "Q4_K" and "q4_k" are one.

    Raises:
        InputError: there is no encoder of that name.
    """
    squeezed = {name.replace("_", ""): name for name in ENCODERS}
    name = text.upper().replace("_", "").replace("-", "")
    if name not in squeezed:
        raise InputError(f"cannot quantize to '{text}'; known are {', '.join(n.lower() for n in ENCODERS)}")
    return squeezed[name]


class Requantize:
    """What `load(quantize=type)` does to each matrix, and what will become of it (`planned`)."""

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
