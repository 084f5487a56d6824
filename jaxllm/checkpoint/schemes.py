"""What the tensors of one quantized matrix are called in a checkpoint, and the weight that they make.

A scheme knows a naming and its bytes, nothing of models or of configurations: those choose among schemes (`declared`).
The schemes themselves are in `integer_schemes`, `scaled_schemes` and `fourbit_schemes`. Matrices whose sizes no packed
layout of ours fits (an odd number of 4-bit codes in a row) are decoded while they are read: exact, and as large as they
are then.
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
    """One of the tensors: what follows the matrix's name in its name, of which dtype and of how many dimensions it
    may be."""

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
    """A naming of the tensors that make up one matrix.

    Attributes:
        name: as its users write it.
        parts: for each argument of `build`, its tensor. The first is the one by which a matrix in this scheme is
            recognised.
        build: makes the weight, raising InputError (without names) if the tensors do not fit together.
        optional: arguments of `build` that a matrix may do without.
        unused: what follows the names of tensors that may be there and mean nothing for the matrix.
        result: what follows the matrix's name in the name of the whole.
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


def mapped(array: HostArray) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.map()


def decoded(weight: Callable[[], Weight], shape: tuple[int, ...]) -> Dense:
    """A matrix that is decoded while it is read."""

    def compute() -> np.ndarray:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.asarray(jax.tree.map(np.asarray, weight()).dequantize())

    return Dense(derived(shape, np.float32, compute))
