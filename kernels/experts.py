"""Mixture-of-experts feed-forward blocks, on one device's experts.

The rows for one expert are laid out together in tiles, so that a kernel sees tiles of rows with one matrix each
(`Tiles`). An expert that no token chose is never read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from jaxllm.formats.base import Weight
from jaxllm.kernels.activations import Peak, each_row, unchanged
from jaxllm.kernels.adapted import grouped_products
from jaxllm.kernels.dispatch import few_rows

LARGEST_TILE = 64

Activation = Callable[[jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gated:
    """The matrices of a gated feed-forward block, or stacks of them.

    `bias` holds their biases, if there are any, as matrices of one column: `[..., out, 1]`.
    """

    gate: Weight
    up: Weight
    down: Weight
    bias: Self | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """A layout of the tokens' choices in rows, where each tile of rows belongs to one expert.

    Attributes:
        expert: int32 `[tiles]`, each tile's expert; -1 marks tiles that are not in use. They come last, except of one
            token in tiles of one row.
        choice: int32 `[tiles * tile]`, the choice (token * k + its number) in each row; arbitrary in padding rows.
        row: int32 `[tokens, k]`, the row of each choice; undefined where `held` is false.
        held: bool `[tokens, k]`, whether the chosen expert is on this device.
    """

    expert: jax.Array
    choice: jax.Array
    row: jax.Array
    held: jax.Array

    @classmethod
    def of(cls, chosen: jax.Array, experts: int, tile: int) -> Self:
        """Lay out `chosen[tokens, k]`; this device holds the experts `0 .. experts - 1`."""
        held, count = (chosen >= 0) & (chosen < experts), chosen.size
        if tile == 1 and len(chosen) == 1:  # a decode step: its experts differ, and nothing is gained by sorting them
            each = jnp.arange(count, dtype=jnp.int32)
            return cls(jnp.where(held[0], chosen[0], -1).astype(jnp.int32), each, each[None], held)
        expert = jnp.where(held, chosen, experts).reshape(-1)  # choices of other devices' experts sort last
        order = jnp.argsort(expert, stable=True)
        sizes = jnp.bincount(expert, length=experts + 1)
        tiles = (sizes + tile - 1) // tile
        tiles = tiles.at[-1].set(0)
        # An expert's first row, minus the position of its first choice in the sorted order.
        offset = (jnp.cumsum(tiles) - tiles) * tile - (jnp.cumsum(sizes) - sizes)
        row = jnp.zeros(count, jnp.int32).at[order].set(offset[expert[order]] + jnp.arange(count))

        most = count // tile + min(experts, count)
        row = jnp.where(held.reshape(-1), row, most * tile).astype(jnp.int32)
        choice = jnp.zeros(most * tile, jnp.int32).at[row].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
        ends, number = jnp.cumsum(tiles), jnp.arange(most)
        of_tile = jnp.searchsorted(ends, number, side="right")
        of_tile = jnp.where(number < ends[-1], of_tile, -1).astype(jnp.int32)
        return cls(of_tile, choice, row.reshape(chosen.shape), held)

    def spread(self, x: jax.Array) -> jax.Array:
        """A row for each choice, from `x[tokens, ...]`, or from `x[tokens, k, ...]` with a row per choice."""
        tokens, k = self.row.shape
        return x[self.choice // k] if x.ndim == 2 else x.reshape(tokens * k, -1)[self.choice]

    def collect(self, rows: jax.Array) -> jax.Array:
        """`[tokens, k, ...]` from the rows; zeros for experts of other devices."""
        taken = rows[jnp.minimum(self.row, len(rows) - 1)]
        return jnp.where(self.held[..., None], taken, jnp.zeros((), rows.dtype))

    @property
    def real(self) -> jax.Array:
        """bool `[rows]`, which rows are not padding."""
        return jnp.zeros(len(self.choice), bool).at[self.row.reshape(-1)].set(True, mode="drop")

    def sums(self, rows: jax.Array, experts: int, products: bool) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Of each expert's rows: the sums of squares `[experts, n]`, how many they are, and, if asked for, the sums of
        their outer products `[experts, n, n]`."""
        real, index = self.real, jnp.where(self.expert < 0, experts, self.expert)
        tiles = jnp.where(real[:, None], rows, 0).astype(jnp.float32).reshape(len(self.expert), -1, rows.shape[1])

        def add(into: jax.Array, of_tile: jax.Array) -> jax.Array:
            return into.at[index].add(of_tile, mode="drop")

        squares = add(jnp.zeros((experts, rows.shape[1])), jnp.sum(tiles * tiles, axis=1))
        of_tiles = jnp.sum(real.reshape(len(self.expert), -1), axis=1, dtype=jnp.int32)
        counts = add(jnp.zeros(experts, jnp.int32), of_tiles)
        if not products:
            return squares, counts, None

        def one(i: jax.Array, into: jax.Array) -> jax.Array:
            return into.at[index[i]].add(jnp.matmul(tiles[i].T, tiles[i], precision="highest"), mode="drop")

        width = rows.shape[1]
        return squares, counts, jax.lax.fori_loop(0, len(tiles), one, jnp.zeros((experts, width, width)))

    def matmul(self, rows: jax.Array, stack: Weight, bias: Weight | None, peak: Peak = unchanged) -> jax.Array:
        """Every row times its expert's matrix, plus its expert's bias: float32 `[rows, out]`. `peak`: see `rounded`."""
        return self.matmuls(rows, [(stack, bias)], peak)[0]

    def matmuls(
        self, rows: jax.Array, stacks: Sequence[tuple[Weight, Weight | None]], peak: Peak = unchanged
    ) -> list[jax.Array]:
        """`matmul` with several stacks and their biases."""
        ys = grouped_products(rows, [stack for stack, _ in stacks], self.expert, peak, self.real)
        return [
            y if bias is None else y + each_row(bias.dequantize()[..., 0], self.expert, len(rows))
            for y, (_, bias) in zip(ys, stacks, strict=True)
        ]


def grouped_mlp(
    x: jax.Array,
    scores: jax.Array,
    chosen: jax.Array,
    stack: Gated,
    tile: int,
    activation: Activation,
    peak: Peak = unchanged,
) -> jax.Array:
    """`sum_k scores[n, k] * down_e(activation(gate_e(x[n]), up_e(x[n])))` with `e = chosen[n, k]`.

    Args:
        x: `[tokens, in]`.
        scores: `[tokens, k]`.
        chosen: int32 `[tokens, k]`, numbered from this device's first expert; other devices' experts add nothing.
        stack: gate and up `[experts, intermediate, in]`, down `[experts, in, intermediate]`.
        tile: rows that are multiplied at once.
        activation: a function of the gate and up projections.
        peak: for `rounded`, for rows of the intermediate dimension.

    Returns:
        float32 `[tokens, in]`.
    """
    tiles = Tiles.of(chosen, stack.gate.shape[0], tile)
    h = hidden(tiles, tiles.spread(x), stack, activation)
    y = tiles.collect(tiles.matmul(h, stack.down, None if stack.bias is None else stack.bias.down, peak))
    return jnp.sum(y * scores[..., None].astype(jnp.float32), axis=1)


def hidden(tiles: Tiles, rows: jax.Array, stack: Gated, activation: Activation) -> jax.Array:
    """What down is multiplied by: `[rows, intermediate]` in the dtype of the rows."""
    gate, up = (None, None) if stack.bias is None else (stack.bias.gate, stack.bias.up)
    return activation(*tiles.matmuls(rows, [(stack.gate, gate), (stack.up, up)])).astype(rows.dtype)


def gather_forward(x: jax.Array, stack: Weight, indices: jax.Array, bias: Weight | None = None) -> jax.Array:
    """Each token times its chosen matrices, without summing: `x[n] @ stack[indices[n, k]].T + bias`.

    Only the chosen matrices are read, and they are dequantized one at a time.

    Args:
        x: `[tokens, in]`, or `[tokens, k, in]` with a row for every choice.
        stack: `[experts, out, in]`.
        indices: int32 `[tokens, k]`. An index outside `0 .. experts - 1` gives zeros; under `checkify` it is an error.
        bias: `[experts, out, 1]`.

    Returns:
        float32 `[tokens, k, out]`.
    """
    experts = stack.shape[0]
    good = jnp.all((indices >= 0) & (indices < experts))
    checkify.debug_check(good, f"an expert index is not one of the {experts} experts")
    tiles = Tiles.of(indices, experts, tile_size(indices.size, experts, few_rows(x, stack)))
    return tiles.collect(tiles.matmul(tiles.spread(x), stack, bias))


def tile_size(assignments: int, experts: int, few: int = 16) -> int:
    """The number of rows per tile such that an expert's average share of the assignments fills about one tile.

    Args:
        few: how many rows cost hardly more than one.
    """
    share = min(max(-(-assignments // experts), few), LARGEST_TILE, assignments)
    return 1 << (share - 1).bit_length()
