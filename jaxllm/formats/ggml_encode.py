"""Encoders for llama.cpp's block types: float32 weights to the bytes that `ggml_blocks` decodes.

An encoder takes blocks as float32 `[..., block_size]`, and their importance (likewise, with a maximum of 1 in each
block) or None. It returns uint8 `[..., block_bytes]`, the mirror of a decoder; `encode` applies one to a complete
matrix. A block of zeros decodes to zeros. The encoders are plain jnp over many blocks, so they run on any device.

Types without a search (see `ggml_encode_legacy`) come out as llama.cpp's, bit for bit. The others run llama.cpp's
searches, or (IQ1 to IQ3) better ones; their errors are as small.

Source: `ggml-quants.c` of llama.cpp; the tables of fallbacks and of types that need importance are
`tensor_type_fallback` and `tensor_requires_imatrix` in its `llama-quant.cpp`.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.errors import InputError
from jaxllm.formats import ggml_encode_iq, ggml_encode_iq1, ggml_encode_iq4, ggml_encode_k, ggml_encode_legacy
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.ggml_search import F32, divide

Encoder = Callable[[jax.Array, jax.Array | None], jax.Array]
U8 = jnp.uint8

ENCODERS: dict[str, Encoder] = {
    "Q1_0": ggml_encode_legacy.q1_0,
    "Q4_0": ggml_encode_legacy.q4_0,
    "Q4_1": ggml_encode_legacy.q4_1,
    "Q5_0": ggml_encode_legacy.q5_0,
    "Q5_1": ggml_encode_legacy.q5_1,
    "Q8_0": ggml_encode_legacy.q8_0,
    "Q8_1": ggml_encode_legacy.q8_1,
    "Q2_K": ggml_encode_k.q2_k,
    "Q3_K": ggml_encode_k.q3_k,
    "Q4_K": ggml_encode_k.q4_k,
    "Q5_K": ggml_encode_k.q5_k,
    "Q6_K": ggml_encode_k.q6_k,
    "Q8_K": ggml_encode_legacy.q8_k,
    "TQ1_0": ggml_encode_legacy.tq1_0,
    "TQ2_0": ggml_encode_legacy.tq2_0,
    "MXFP4": ggml_encode_legacy.mxfp4,
    "NVFP4": ggml_encode_legacy.nvfp4,
    "IQ1_S": ggml_encode_iq1.iq1_s,
    "IQ1_M": ggml_encode_iq1.iq1_m,
    "IQ2_XXS": ggml_encode_iq.iq2_xxs,
    "IQ2_XS": ggml_encode_iq.iq2_xs,
    "IQ2_S": ggml_encode_iq.iq2_s,
    "IQ3_XXS": ggml_encode_iq.iq3_xxs,
    "IQ3_S": ggml_encode_iq.iq3_s,
    "IQ4_NL": ggml_encode_iq4.iq4_nl,
    "IQ4_XS": ggml_encode_iq4.iq4_xs,
}

# The types that llama.cpp does not quantize to without an importance matrix (other than embeddings and the head).
# `encode` does, with weights that depend on the matrix alone.
NEEDS_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})

# The 32-block type that llama.cpp uses for rows that are not a whole number of 256-blocks.
FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "Q8_K": "Q8_0",
}

LIMIT = float(np.finfo(np.float16).max)
CODEBOOKS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
# Weights encoded at a time: what a search needs stays in the processor's caches. A chunk is never smaller. So XLA
# compiles the same loop for every matrix, and a block's encoding depends on nothing but the block: not on the order of
# a sum that suits the shape of a matrix, or of a shard.
CHUNK, CODEBOOK_CHUNK = 2**16, 2**11


def fitting_type(type: str, in_features: int) -> str:
    """`type`, or llama.cpp's fallback when rows of `in_features` are not a whole number of its blocks.

    The fallback is `FALLBACK[type]` for 256-blocks, and "F16" if 32-blocks do not fit either. (There llama.cpp stops if
    the original type had 32-blocks.)

    Raises:
        InputError: `type` has no encoder.
    """
    if type not in ENCODERS:
        raise InputError(f"cannot quantize to {type}; known are {', '.join(ENCODERS)}")
    for name in (type, FALLBACK.get(type)):
        if name and in_features % BLOCK_TYPES[name].size == 0:
            return name
    return "F16"


def encode(w: jax.Array, type: str, importance: jax.Array | None = None) -> jax.Array:
    """Weights of any floating dtype `[*batch, out, n]` as blocks of `type`, uint8 `[..., n / block_size, block_bytes]`.

    `importance`, float32 `[n]` or `[*batch, n]`, says how much an error in each column costs: the mean square of what
    it is multiplied by (an "importance matrix"). A block whose importance is all zero is encoded as if all its columns
    were equally important. Types without a search ignore it.

    Converts to float32 first. Encodes `CHUNK` weights at a time, so that peak memory is the matrix, its blocks and some
    20 MB. It checks the values, so it cannot run under `jit`; `encode_blocks` can.

    Raises:
        InputError: `type` has no encoder; rows are not whole blocks; a weight is NaN, infinite or over 65504, the
            largest float16 (undefined behaviour in llama.cpp); or an importance is of another shape, negative or not
            finite.
    """
    n = w.shape[-1]
    if (fitting := fitting_type(type, n)) != type:
        size = BLOCK_TYPES[type].size
        raise InputError(f"rows of {n} weights are not whole {type} blocks of {size}; {fitting} fits")
    check_finite(w, type)
    if importance is not None:
        importance = jnp.asarray(importance, F32)
        check_importance(importance, w.shape)
    return encode_blocks(w, type, importance)


def check_finite(w: jax.Array, type: str) -> None:
    """Raises InputError if a weight is NaN, infinite or over 65504."""
    if not within(w, LIMIT):
        raise InputError(f"weights that are NaN, infinite or over {LIMIT:.0f} have no {type} blocks")


def check_importance(importance: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises InputError if this cannot be the importance of a matrix `[*batch, out, n]`."""
    *batch, _, n = (1, *shape) if len(shape) == 1 else shape
    if importance.shape not in ((n,), (*batch, n)):
        raise InputError(
            f"importance of shape {importance.shape} does not fit weights {shape}; it has to be {(n,)} or {(*batch, n)}"
        )
    if not (jnp.isfinite(importance) & (importance >= 0)).all():
        raise InputError("importance that is negative, NaN or infinite; calibrate again")


@jax.jit
def within(w: jax.Array, limit: float) -> jax.Array:
    """Whether all magnitudes are at most `limit`; NaN is not. (XLA's maximum on CPUs leaves NaN out.)"""
    return jnp.all(jnp.abs(w.astype(F32)) <= limit)


@partial(jax.jit, static_argnames="type")
def encode_blocks(w: jax.Array, type: str, importance: jax.Array | None = None) -> jax.Array:
    """Like `encode`, but without checking the values: for use under `jit`."""
    size, nbytes = BLOCK_TYPES[type].size, BLOCK_TYPES[type].nbytes
    per_row = w.shape[-1] // size
    blocks = w.reshape(-1, size)
    count = len(blocks)
    step = (CODEBOOK_CHUNK if type in CODEBOOKS else CHUNK) // size
    blocks = jnp.pad(blocks, ((0, max(0, step - count)), (0, 0)))
    costs = None if importance is None else _costs(importance, size)
    sharing = count // (1 if costs is None else len(costs))  # consecutive blocks that share a row of importance

    def chunk(i: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(i * step, len(blocks) - step)  # the last starts earlier, to end with the matrix
        part = lax.dynamic_slice_in_dim(blocks, start, step).astype(F32)
        number = start + jnp.arange(step)
        cost = None if costs is None else costs[number // sharing, number % per_row]
        return lax.dynamic_update_slice_in_dim(out, ENCODERS[type](part, cost), start, axis=0)

    out = lax.fori_loop(0, math.ceil(count / step), chunk, jnp.zeros((len(blocks), nbytes), U8))
    return out[:count].reshape(*w.shape[:-1], per_row, nbytes)


def _costs(importance: jax.Array, size: int) -> jax.Array:
    """Importance `[*batch, n]` as `[batch, n / size, size]` with a maximum of 1: only proportions in a block matter."""
    blocks = importance.astype(F32).reshape(-1, importance.shape[-1] // size, size)
    top = jnp.max(blocks, axis=-1, keepdims=True)
    return jnp.where(top > 0, divide(blocks, top), F32(1))
