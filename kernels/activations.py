"""Activations, for weights that require them to be rounded to the weight's own dtype (W8A8).

Kernels round groups of neighbours themselves. Entire rows are rounded here, before the kernel, since a row's scale may
depend on parts of the row that other devices hold, and the outliers of LLM.int8 on other rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.formats.base import Weight, static_field
from jaxllm.formats.scaled import E4M3_MAX, Scaled, quotient, scale_for

LIMITS = {"float8_e4m3fn": E4M3_MAX, "int8": 127.0}

_int8_blocks: ContextVar[bool] = ContextVar("int8_blocks", default=False)


@contextmanager
def rounding(int8_blocks: bool) -> Iterator[None]:
    """In code that is traced inside, kernels may round activations to int8 with a scale for every 32 neighbours.

    llama.cpp does so on CPUs. Only kernels that say so (`native_cpu`) do it, and only for weights that are small
    integers with scales.
    """
    token = _int8_blocks.set(int8_blocks)
    try:
        yield
    finally:
        _int8_blocks.reset(token)


def rounds_int8_blocks() -> bool:
    """Whether `rounding` allows it here."""
    return _int8_blocks.get()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounded:
    """Rows that were rounded as a weight requires, dequantized again: float32 `[..., in]`."""

    values: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """Rows as codes with a scale for each `group` neighbours, as `act_quant` returns them.

    codes: `[..., in]`, in the dtype of the weight's values.
    scales: float32 `[..., ceil(in / group)]`.
    """

    codes: jax.Array
    scales: jax.Array
    group: int = static_field()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.codes.dtype

    @property
    def size(self) -> int:
        return self.codes.size

    def dequantize(self) -> jax.Array:
        """The numbers that the codes stand for: float32 `[..., in]`."""
        return self.codes.astype(jnp.float32) * jnp.repeat(self.scales, self.group, -1)[..., : self.codes.shape[-1]]


Rows = jax.Array | Rounded | Quantized  # what a matmul takes: it rounds floats if the weight requires that
Peak = Callable[[jax.Array], jax.Array]


def unchanged(values: jax.Array) -> jax.Array:
    return values


def of_whole_rows(weight: Weight) -> bool:
    """Whether the weight requires entire rows to be rounded."""
    return isinstance(weight, Scaled) and weight.activations is not None and weight.activations.group is None


def group_of(weight: Scaled) -> int | None:
    """How many neighbours a kernel rounds with one scale; None: it does not round."""
    return None if weight.activations is None else weight.activations.group


def rounds_to_powers(weight: Scaled) -> bool:
    """Whether scales of activations are rounded up to powers of two."""
    return weight.activations is not None and weight.activations.power_of_two


def not_rounding(weight: Weight) -> Weight:
    """The same matrix without the requirement to round activations."""
    return replace(weight, activations=None) if isinstance(weight, Scaled) else weight


def rounded(
    x: jax.Array, weight: Weight, peak: Peak = unchanged, of_rows: Peak = unchanged, columns: Peak | None = None
) -> jax.Array | Rounded:
    """`x[..., in]`, rounded to the weight's dtype if the weight requires entire rows to be rounded, else unchanged.

    The result times the dequantized weight equals the scaled product of codes. LLM.int8 (Dettmers et al., 2022) does
    not round columns in which any value reaches the threshold; a row's scale then comes from its other values.
    Gradients pass as if nothing had been rounded.

    Args:
        peak: maps the peaks of this device's parts of the rows to the peaks of the complete rows.
        of_rows: maps a stack's `Activations.scale` to the scales of the rows of x.
        columns: given which values reach the threshold, tells for each whether any value of its column does, among the
            rows that are multiplied by the same matrix; by default among all rows.
    """
    if not of_whole_rows(weight):
        return x
    assert isinstance(weight, Scaled) and weight.activations is not None
    asked = weight.activations
    given, limit = x.astype(jnp.float32), LIMITS[weight.values.dtype.name]
    wide = lax.stop_gradient(given)
    size = jnp.abs(wide)
    outlier = size >= asked.threshold if asked.threshold else jnp.zeros(wide.shape, bool)
    if asked.scale is not None:
        scale = of_rows(asked.scale)
    else:
        largest = peak(jnp.max(jnp.where(outlier, 0.0, size), axis=-1, keepdims=True))
        scale = scale_for(largest, limit, asked.power_of_two)
    codes = jnp.clip(quotient(wide, scale), -limit, limit)
    codes = jnp.round(codes) if weight.values.dtype == jnp.int8 else codes.astype(weight.values.dtype)
    alone = columns(outlier) if columns else jnp.any(outlier, axis=tuple(range(x.ndim - 1)), keepdims=True)
    return Rounded(jnp.where(alone, wide, codes.astype(jnp.float32) * scale) + (given - wide))


def rounded_tiles(
    x: jax.Array, stack: Weight, expert: jax.Array, peak: Peak = unchanged, real: jax.Array | None = None
) -> jax.Array | Rounded:
    """`rounded` for tiles of rows, each with its own matrix, see `dense.grouped_matmul`.

    Args:
        real: bool `[tiles * tile]`, which rows count in the search for outliers; by default all do.
    """
    tiles, experts = len(expert), stack.shape[0]

    def columns(outlier: jax.Array) -> jax.Array:
        """Whether a column has an outlier in any of an expert's rows, for each row."""
        counted = outlier if real is None else outlier & real[:, None]
        of_tile = jnp.any(counted.reshape(tiles, -1, x.shape[1]), axis=1)
        index = jnp.where(expert < 0, experts, expert)
        return each_row(jnp.zeros((experts, x.shape[1]), bool).at[index].max(of_tile, mode="drop"), expert, len(x))

    return rounded(x, stack, peak, lambda scales: each_row(scales, expert, len(x)), columns)


def each_row(values: jax.Array, expert: jax.Array, rows: int) -> jax.Array:
    """Values per expert, `[experts, ...]`, repeated for each row of the expert's tiles: `[rows, ...]`."""
    return jnp.repeat(values[jnp.maximum(expert, 0)], rows // len(expert), axis=0)
