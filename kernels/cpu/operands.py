"""What the native kernels are told about a weight: its format, its sizes, and where its leaves lie.

`Planned` is the struct of the same name in native/ffi.cc, and the numbers are those of native/matrix.h.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxllm.formats.affine import Affine
from jaxllm.formats.base import Leaf, Weight
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.nvfp4 import NVFP4
from jaxllm.formats.scaled import Scaled

LEAVES, PARAMS = 6, 8
FORMATS = (
    *("Dense", "Scaled", "Codebook", "MXFP4", "NVFP4", "Affine"),
    *("Q1_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"),
    *("TQ1_0", "TQ2_0", "GGML_MXFP4", "GGML_NVFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"),
    *("IQ3_S", "IQ4_NL", "IQ4_XS"),
)
TYPES = (
    *("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
    *("int8", "uint8", "int16", "uint16", "int32", "uint32"),
)


@dataclass(frozen=True)
class Planned:
    """A weight as the native kernels see it.

    Attributes:
        format: one of FORMATS.
        leaves: at most LEAVES; None for one that this weight lacks.
        shared: which leaves belong to no single row of the matrix.
        params: at most PARAMS numbers; what they mean depends on the format, see native/decode.h.
    """

    format: str
    leaves: tuple[Leaf | None, ...]
    params: tuple[int, ...] = ()
    shared: frozenset[int] = field(default=frozenset())

    @property
    def operands(self) -> list[Leaf]:
        return [leaf for leaf in self.leaves if leaf is not None]

    def numbers(self, shape: tuple[int, ...]) -> list[int]:
        """The struct's numbers, for a weight of this shape: `[out, in]`, or `[experts, out, in]` for a stack."""
        index, row_bytes, matrix_bytes = ([-1] * LEAVES, [0] * LEAVES, [0] * LEAVES)
        present = 0
        for i, leaf in enumerate(self.leaves):
            if leaf is None:
                continue
            of_one = leaf.shape[len(shape) - 2 :]
            index[i], present = present, present + 1
            matrix_bytes[i] = math.prod(of_one) * leaf.dtype.itemsize
            row_bytes[i] = 0 if i in self.shared else math.prod(of_one[1:]) * leaf.dtype.itemsize
        params = [*self.params, *[0] * (PARAMS - len(self.params))]
        head = [FORMATS.index(self.format), *shape[-2:], present]
        return [*head, *index, *row_bytes, *matrix_bytes, *params]


def _type(leaf: Leaf | None) -> int:
    return 0 if leaf is None else TYPES.index(leaf.dtype.name)


def _ggml(weight: GGML) -> Planned:
    return Planned(weight.type if weight.type in FORMATS[6:] else f"GGML_{weight.type}", (weight.blocks,))


def _dense(weight: Dense) -> Planned:
    return Planned("Dense", (weight.values,), (_type(weight.values),))


def _mxfp4(weight: MXFP4) -> Planned:
    return Planned("MXFP4", (weight.blocks, weight.scales))


def _nvfp4(weight: NVFP4) -> Planned:
    leaves = weight.blocks, weight.scales, weight.global_scale
    return Planned("NVFP4", leaves, (int(weight.divides),), frozenset({2}))


def _codebook(weight: Codebook) -> Planned:
    return Planned("Codebook", (weight.codes, weight.scales, weight.table), (weight.group,), frozenset({2}))


def _scaled(weight: Scaled) -> Planned:
    rows, cols = (n or size for n, size in zip(weight.block, weight.shape[-2:], strict=True))
    scales_row = weight.scales.shape[-1] * weight.scales.dtype.itemsize
    factor = int(np.float32(weight.factor).view(np.int32))
    params = rows, cols, _type(weight.scales), scales_row, factor, _type(weight.values)
    return Planned("Scaled", (weight.values, weight.scales), params, frozenset({1}))


def _affine(weight: Affine) -> Planned:
    leaves = weight.codes, weight.scales, weight.zeros, weight.biases, weight.in_groups, weight.out_groups
    types = _type(weight.scales), _type(weight.zeros), _type(weight.biases)
    return Planned("Affine", leaves, (weight.bits, weight.group, *types, weight.zero), frozenset({4, 5}))


_PLANS: dict[type[Weight], Callable] = {
    GGML: _ggml,
    Dense: _dense,
    MXFP4: _mxfp4,
    NVFP4: _nvfp4,
    Codebook: _codebook,
    Scaled: _scaled,
    Affine: _affine,
}


def planned(weight: Weight) -> Planned:
    """What to tell the kernels about a weight, or about one of shapes only."""
    return _PLANS[type(weight)](weight)


def operands(weights: Sequence[Weight]) -> tuple[list[jax.Array], np.ndarray]:
    """The leaves of some weights, and the operation's `plan`."""
    plans = [planned(weight) for weight in weights]
    numbers = [n for plan, weight in zip(plans, weights, strict=True) for n in plan.numbers(weight.shape)]
    return [leaf for plan in plans for leaf in plan.operands], np.array(numbers, np.int64)
