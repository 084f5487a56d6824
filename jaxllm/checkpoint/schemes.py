"""Schemes: the names of the tensors that make up a quantized matrix, and how they become a weight.

A scheme knows names and bytes, but neither models nor configurations; `declared` chooses among schemes. The schemes
themselves are in `integer_schemes`, `scaled_schemes` and `fourbit_schemes`. A matrix whose size does not fit our packed
layouts (an odd number of 4-bit codes in a row) is dequantized while it is read: exact, but it takes more memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxllm.checkpoint.repack import derived
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.placing import HostArray

WORDS = frozenset({"int32", "uint32"})
INTEGERS = frozenset({"int32", "int64"})
FLOATS = frozenset({"float16", "bfloat16", "float32"})
ANY = frozenset({"uint8", "int8", "uint32", *INTEGERS, *FLOATS})


@dataclass(frozen=True)
class Part:
    """One of the tensors: the end of its name, after the matrix's name, and the dtypes and numbers of dimensions that
    it may have."""

    suffix: str
    dtypes: frozenset[str]
    least: int = 2
    most: int = 3

    def check(self, array: HostArray) -> HostArray:
        """The array itself. Raises InputError if it cannot be this part."""
        if array.dtype.name not in self.dtypes:
            raise InputError(f"'{self.suffix}' is of {array.dtype.name}, expected {' or '.join(sorted(self.dtypes))}")
        if not self.least <= len(array.shape) <= self.most or 0 in array.shape:
            raise InputError(f"'{self.suffix}' has the impossible shape {[*array.shape]}")
        return array


@dataclass(frozen=True)
class Scheme:
    """The tensors that make up one matrix, and how to build its weight.

    Attributes:
        name: as its users write it.
        parts: for each argument of `build`, its tensor. A matrix in this scheme is recognised by the first one.
        build: makes the weight, raising InputError (without names) if the tensors do not fit together.
        optional: arguments of `build` that may be missing.
        unused: endings of the names of tensors that may exist and are not needed.
        result: the end of the joined weight's name, after the matrix's name.
    """

    name: str
    parts: Mapping[str, Part]
    build: Callable[..., Weight]
    optional: Mapping[str, Part] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    result: str = ".weight"

    @property
    def key(self) -> str:
        return next(iter(self.parts.values())).suffix


def expect(what: str, array: HostArray, *shape: int) -> None:
    if tuple(array.shape) != shape:
        raise InputError(f"{what} has shape {[*array.shape]}, expected {[*shape]}")


def decoded(weight: Callable[[], Weight], shape: tuple[int, ...]) -> Dense:
    """A matrix that is dequantized while it is read."""

    def compute() -> np.ndarray:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.asarray(jax.tree.map(np.asarray, weight()).dequantize())

    return Dense(derived(shape, np.float32, compute))
