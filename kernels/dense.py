"""The definition of every matmul here: the weight is dequantized to the activations' dtype, products sum in float32.

This serves all formats. `dispatch` prefers a format's own kernel if the platform has one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.formats.base import Weight


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`."""
    return product(x, weight.dequantize(x.dtype), 1)


def weight_dequant(weight: Weight, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
    """The matrix `[*batch, out, in]`: dequantized in float32, then rounded once."""
    return weight.dequantize(dtype)


def product(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """Contract the last axis of `x` with `axis` of the matrix `w`: float32 `[..., n]`."""
    rows = x.reshape(-1, x.shape[-1])
    # XLA:CPU multiplies a single 2-byte row in scalar code, 30 times slower than two rows.
    alone = rows.shape[0] == 1 and x.dtype.itemsize == 2
    if alone:
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    # float32 means float32: TPUs would otherwise round its operands to bfloat16.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    y = lax.dot_general(rows, w, dims, precision=precision, preferred_element_type=jnp.float32)
    return y[: 1 if alone else None].reshape(*x.shape[:-1], y.shape[-1])


@jax.custom_vjp
def tall(w: jax.Array) -> jax.Array:
    """`w[out, in]` as it is, but with a gradient that is computed as its transpose. Of tall, narrow matrices, such as
    LoRA's factors, XLA:CPU computes that up to ten times as fast; the barrier keeps it from exchanging the two."""
    return w


tall.defvjp(lambda w: (w, None), lambda _, g: (lax.optimization_barrier(g.T).T,))


def grouped_matmul(x: jax.Array, stack: Weight, expert: jax.Array) -> jax.Array:
    """Tiles of rows, each times its own matrix: `x[tile t] @ stack[expert[t]].T`.

    Only the experts in `expert` are read and dequantized, one at a time, so the work grows with the tiles in use.
    (`lax.ragged_dot` does nearly the same in one line, but XLA:CPU expands it to every expert times every row.)

    Args:
        x: `[tiles * tile, in]`.
        stack: `[experts, out, in]`.
        expert: int32 `[tiles]`, each tile's matrix; -1 marks tiles that are not in use, which cost
            nothing where they come last.

    Returns:
        float32 `[tiles * tile, out]`; rows of unused tiles are undefined.
    """
    return each_tile(x, stack, expert, matmul)


def outer_products(g: jax.Array, x: jax.Array, expert: jax.Array, experts: int) -> jax.Array:
    """The gradient of `grouped_matmul` by a stack of plain matrices: of each expert's tiles, the sum of `g.T @ x`.

    Args:
        g, x: `[tiles * tile, out]` and `[tiles * tile, in]`; g is zero in rows that are padding.
        expert: see `grouped_matmul`.

    Returns:
        float32 `[experts, out, in]`.
    """
    tile = x.shape[0] // expert.shape[0]

    def one_tile(t: jax.Array, total: jax.Array) -> jax.Array:
        g_rows, x_rows = (lax.dynamic_slice_in_dim(rows, t * tile, tile) for rows in (g, x))
        return total.at[expert[t]].add(product(g_rows.T, x_rows.astype(g.dtype), 0))

    shape = experts, g.shape[1], x.shape[1]
    return lax.fori_loop(0, jnp.sum(expert >= 0), one_tile, jnp.zeros(shape, jnp.float32))


def each_tile(x: jax.Array, stack: Weight, expert: jax.Array, f: Callable[[jax.Array, Weight], jax.Array]) -> jax.Array:
    """`f(rows, weight)` for each tile and its expert's weight, float32, stored at the tile's rows; undefined for tiles
    that are not in use."""
    tile = x.shape[0] // expert.shape[0]

    def weight_of(index: jax.Array) -> Weight:
        return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)

    def one_tile(t: jax.Array, y: jax.Array) -> jax.Array:
        rows = f(lax.dynamic_slice_in_dim(x, t * tile, tile), weight_of(expert[t]))
        return lax.dynamic_update_slice_in_dim(y, rows, t * tile, axis=0)

    result = jax.eval_shape(lambda: f(x[:tile], weight_of(expert[0])))
    y = jnp.zeros((x.shape[0], result.shape[1]), jnp.float32)
    return lax.fori_loop(0, jnp.max(jnp.where(expert < 0, 0, jnp.arange(1, len(expert) + 1))), one_tile, y)
