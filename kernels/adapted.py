"""Products with weights that adapters add something to: the base's own, and a term of low rank beside it."""

from collections.abc import Sequence

import jax

from jaxllm.formats.adapted import Adapted, base_of
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.kernels import dense
from jaxllm.kernels.activations import Peak, each_row, rounded, rounded_tiles, unchanged
from jaxllm.kernels.dispatch import alike, grouped_matmul, grouped_matmuls, kept, matmul, matmuls


def products(x: jax.Array, weights: Sequence[Weight], peak: Peak = unchanged) -> tuple[jax.Array, ...]:
    """`x[..., in]` times each weight on one device: float32 `[..., out]`.

    x is rounded as a base requires it, see `activations.rounded` for `peak`; the term of an adapter takes it as it is.
    If the columns are sharded, so are the adapter's, and its term is a part of the sum over devices.
    """
    bases = [base_of(weight) for weight in weights]
    ys = matmuls([rounded(x, base, peak) for base in bases], bases)
    return tuple(y + _term(x, w) if isinstance(w, Adapted) else y for y, w in zip(ys, weights, strict=True))


def _term(x: jax.Array, weight: Adapted) -> jax.Array:
    delta = weight.delta
    inner, b = alike(kept(matmul(x, Dense(delta.a))) * delta.scale, delta.b)
    return matmul(inner, Dense(dense.tall(b)))


def grouped_products(
    rows: jax.Array, stacks: Sequence[Weight], expert: jax.Array, peak: Peak, real: jax.Array
) -> tuple[jax.Array, ...]:
    """Tiles of rows, each times its own matrix of each stack, see `dense.grouped_matmul`; see also `rounded_tiles`."""
    bases = [base_of(stack) for stack in stacks]
    ys = grouped_matmuls([rounded_tiles(rows, base, expert, peak, real) for base in bases], bases, expert)
    return tuple(
        kept(y + _grouped_term(rows, stack, expert) if isinstance(stack, Adapted) else y)
        for y, stack in zip(ys, stacks, strict=True)
    )


def _grouped_term(rows: jax.Array, stack: Adapted, expert: jax.Array) -> jax.Array:
    delta = stack.delta
    inner = grouped_matmul(rows, Dense(delta.a), expert) * each_row(delta.scale, expert, len(rows))
    return grouped_matmul(inner, Dense(delta.b), expert)
