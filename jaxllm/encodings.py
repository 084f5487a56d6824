"""The list of types that a float matrix can be encoded in: what `quantize=` takes.

A type has a name as users write it, and a pure function from floats to a `Weight`. Everything that depends on the type
only is here: which rows fit, what to do with those that do not, and which type embedding tables get instead. Which
matrices are encoded, and where, is `requantize`'s.

The names are mistral.rs's, and so is the choice of promoted types; what fits other rows is llama.cpp's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError
from jaxllm.formats import hqq
from jaxllm.formats.affine import Affine, word_values
from jaxllm.formats.base import Weight
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.ggml_encode import ENCODERS, FALLBACK, NEEDS_IMPORTANCE, encode_blocks, within
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.nvfp4 import NVFP4
from jaxllm.formats.scaled import Scaled

Importance = jax.Array | None
Encode = Callable[[jax.Array, Importance], Weight]
# Types of GGML that are encoded without a search, so that no importance changes them.
ROUNDED = frozenset({"Q8_0", "Q8_1", "Q8_K", "Q1_0", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"})
FLOAT16_MAX = float(np.finfo(np.float16).max)
FAR = 2.0**100  # for types with scales that reach as far as float32, whose products must not overflow


@dataclass(frozen=True)
class Encoding:
    """A type that matrices can be encoded in.

    Attributes:
        name: as users write it.
        block: columns that are encoded together; rows must be multiples of it.
        encode: float32 `[*batch, out, in]`, and how much each column matters, float32 `[in]` or `[*batch, in]` or None,
            to a weight of the same shape. A pure function of complete matrices that can be traced.
        uses_importance: whether `encode` heeds its second argument.
        needs_importance: whether it must not be None.
        fallback: the type to try if rows are not whole blocks; None: float16.
        promoted: the type for embedding tables and heads; None: this one.
        limit: the largest magnitude that it can hold.
    """

    name: str
    block: int
    encode: Encode
    uses_importance: bool = False
    needs_importance: bool = False
    fallback: str | None = None
    promoted: str | None = None
    limit: float = FLOAT16_MAX


def _ggml(type: str) -> Encoding:
    size, nbytes = BLOCK_TYPES[type][:2]
    fallback = FALLBACK.get(type)
    return Encoding(
        type.lower(),
        size,
        lambda w, importance: GGML(encode_blocks(w, type, importance), type),
        uses_importance=type not in ROUNDED,
        needs_importance=type in NEEDS_IMPORTANCE,
        fallback=fallback and fallback.lower(),
        promoted="q6_k" if 8 * nbytes <= 5 * size else "q8_0",
    )


def _plain(
    name: str, block: int, encode: Callable[[jax.Array], Weight], promoted: str | None, limit: float = FLOAT16_MAX
) -> Encoding:
    """A type whose encoder knows no importance."""
    return Encoding(name, block, lambda w, importance: encode(w), promoted=promoted, limit=limit)


def _widest(in_features: int, *groups: int) -> int:
    """The first of `groups` that divides the columns."""
    return next(group for group in groups if in_features % group == 0)


def _hqq(bits: int) -> Encoding:
    return _plain(f"hqq{bits}", word_values(bits), partial(hqq.encode, bits=bits), "q8_0")


def _afq(bits: int) -> Encoding:
    def encode(w: jax.Array) -> Weight:
        return Affine.from_dense(w, bits, _widest(w.shape[-1], 64, 32), jnp.float16)

    return _plain(f"afq{bits}", 32, encode, "afq6" if bits < 6 else "afq8")


def _int4(w: jax.Array, importance: Importance) -> Weight:
    return Affine.symmetric(w, 4, _widest(w.shape[-1], 128, 64, 32), importance)


def _nibbles(name: str) -> Encoding:
    def encode(w: jax.Array) -> Weight:
        return Codebook.from_dense(w, name, _widest(w.shape[-1], 64, 32))

    return _plain(name.lower(), 32, encode, "q8_0", FAR)


def _fp8(name: str, block: tuple[int | None, int | None]) -> Encoding:
    return _plain(name, 1, partial(Scaled.from_dense, block=block), "q8_0", FAR)


def _dense(name: str, dtype: jax.typing.DTypeLike) -> Encoding:
    return _plain(name, 1, partial(Dense.from_dense, dtype=dtype), None, float(jnp.finfo(dtype).max))


def _listed() -> tuple[Encoding, ...]:
    own = (
        *map(_hqq, (2, 3, 4, 8)),
        *map(_afq, (2, 3, 4, 5, 6, 8)),
        _plain("mxfp4", 32, MXFP4.encoded, "q6_k", FAR),
        _plain("nvfp4", 16, NVFP4.from_dense, "q8_0", FAR),
        _plain("nvfp4_mlx", 16, partial(NVFP4.from_dense, overall=False), "q8_0", 6 * 448.0),
        _plain("mxfp8", 32, Scaled.mxfp8, "q8_0", FAR),
        _fp8("fp8", (None, None)),
        _fp8("fp8_block", (128, 128)),
        _plain("f8q8", 32, Scaled.f8q8, "q8_0", 127.0),
        _nibbles("NF4"),
        _nibbles("FP4"),
        _plain("int8", 1, Scaled.int8, "q8_0", FAR),
        Encoding("int4", 32, _int4, uses_importance=True, promoted="q8_0"),
        _dense("f16", jnp.float16),
        _dense("bf16", jnp.bfloat16),
        _dense("f32", jnp.float32),
    )
    names = {encoding.name for encoding in own}
    return *(_ggml(type) for type in ENCODERS if type.lower() not in names), *own


ENCODINGS: dict[str, Encoding] = {encoding.name: encoding for encoding in _listed()}
NUMBERS = {"2": "q2_k", "3": "q3_k", "4": "q4_k", "5": "q5_k", "6": "q6_k", "8": "q8_0"}
OTHER_NAMES = {"f8e4m3": "fp8", "float16": "f16", "bfloat16": "bf16", "float32": "f32"}


def _squeezed(text: str) -> str:
    return text.lower().replace("_", "").replace("-", "")


_KNOWN = {_squeezed(name): name for name in ENCODINGS} | NUMBERS | OTHER_NAMES


def encoding(text: str | int) -> Encoding:
    """The type with this name, however it is spelled ("Q4K", "q4_k", "Q4-K"), or for this number of bits.

    Raises:
        InputError: there is none.
    """
    name = _KNOWN.get(_squeezed(str(text)))
    if name is None:
        raise InputError(f"cannot quantize to '{text}'; known are {', '.join(ENCODINGS)}, and {', '.join(NUMBERS)}")
    return ENCODINGS[name]


def fitting(e: Encoding, in_features: int) -> Encoding:
    """`e`, or the first of its fallbacks of whose blocks rows of `in_features` are a whole number; at last float16."""
    while in_features % e.block:
        e = ENCODINGS[e.fallback or "f16"]
    return e


def check(values: jax.Array, e: Encoding) -> None:
    """Raises InputError if a value is NaN, infinite or larger than `e` can hold. Not for use under `jit`."""
    if not within(values, e.limit):
        raise InputError(f"values that are NaN, or beyond {e.limit:.5g}, cannot be encoded as {e.name}")
