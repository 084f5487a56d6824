"""A feed-forward block whose weights every token chooses for itself, on one device's experts.

Tokens are sorted by expert and multiplied in tiles of rows that share one. The loop runs over the tiles that there
are, so the work grows with tokens x choices, and an expert that nobody chose is never read. (`lax.ragged_dot` says the
same in one line, but XLA:CPU expands it to every expert times every token.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxllm.kernels.dispatch import matmul

from jaxllm.formats.base import Weight

SMALLEST_TILE, LARGEST_TILE = 16, 64  # a few rows cost what one does: reading the expert

Activation = Callable[[jax.Array, jax.Array], jax.Array]


def grouped_mlp(
    x: jax.Array,
    scores: jax.Array,
    experts: jax.Array,
    gate: Weight,
    up: Weight,
    down: Weight,
    tile: int,
    activation: Activation,
) -> jax.Array:
    """`sum_k scores[n, k] * down_e(activation(gate_e(x[n]), up_e(x[n])))` with `e = experts[n, k]`.

    Args:
        x: `[tokens, in]`.
        scores: `[tokens, k]`.
        experts: int32 `[tokens, k]`, numbered from this device's first; those of other devices add nothing.
        gate, up: stacks `[experts, intermediate, in]`.
        down: stack `[experts, in, intermediate]`.
        tile: rows that are multiplied at once.
        activation: of the gate's and the up projection's outputs.

    Returns:
        float32 `[tokens, in]`.
    """
    tokens, choices = experts.shape
    held = gate.shape[0]
    mine = (experts >= 0) & (experts < held)
    expert = jnp.where(mine, experts, held).reshape(-1)  # those of others sort behind the last

    order = jnp.argsort(expert, stable=True)  # sorted position -> slot (token * choices + choice)
    counts = jnp.bincount(expert, length=held + 1)[:held]
    starts = jnp.cumsum(counts) - counts
    tiles = (counts + tile - 1) // tile
    tile_ends = jnp.cumsum(tiles)

    def one_tile(t: jax.Array, y: jax.Array) -> jax.Array:
        e = jnp.searchsorted(tile_ends, t, side="right")
        start = starts[e] + (t - (tile_ends[e] - tiles[e])) * tile
        slots = order[jnp.minimum(start + jnp.arange(tile), order.size - 1)]
        rows = x[slots // choices]
        h = activation(matmul(rows, _one(gate, e)), matmul(rows, _one(up, e)))
        out = matmul(h.astype(x.dtype), _one(down, e))
        # Rows past the expert's last are somebody else's, who writes them later, or nobody's.
        return lax.dynamic_update_slice_in_dim(y, out, start, axis=0)

    y = jnp.zeros((order.size + tile, x.shape[-1]), jnp.float32)
    y = lax.fori_loop(0, tile_ends[-1], one_tile, y)
    by_slot = y[jnp.argsort(order)].reshape(tokens, choices, -1)
    return jnp.sum(jnp.where(mine[..., None], by_slot * scores[..., None].astype(jnp.float32), 0.0), axis=1)


def tile_size(assignments: int, experts: int) -> int:
    """Rows of a tile such that an expert's share of the assignments is about one of them."""
    share = min(max(-(-assignments // experts), SMALLEST_TILE), LARGEST_TILE, assignments)
    return 1 << (share - 1).bit_length()


def _one(stack: Weight, index: jax.Array) -> Weight:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)
