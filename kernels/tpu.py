"""What the Pallas TPU kernels share: one pipeline for all weights that are dequantized on the chip, and its tile sizes.

A grid step handles one block of a matrix's rows and one tile of activations. The grid runs over the tiles innermost, so
a block is copied to VMEM and dequantized there once, then multiplied by all tiles that need it. Dequantizing for each
tile would cost a prompt more vector work than matrix work; a dequantized copy in HBM would cost a decode step two to
four times the traffic. Blocks hold complete rows (all of `in`): no tail of `in` needs a mask, and a copy is one burst.

A plain matmul is a grouped one with a single expert, so each format needs only one kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
CHUNK = 512  # lanes that are dequantized at once: enough independent work, few enough registers
DECODE_ROWS = 64  # of x: up to here, reading the weight bounds a matmul
BLOCK_BYTES = 2 << 20  # of the weight in a decode step: 1.3 us on v6e. Nothing hides the copy of the first block.
PROMPT_TILE = 512  # rows: the MXU holds a part of the weight for that many pushes
PROMPT_BLOCK = 1024  # rows = FLOP per byte of a tile that is read again: v6e needs 561, so 512 are nearly enough
VMEM_BUDGET = 40 << 20  # what tiles may take; v5p and each core of tpu7x have 64 MiB, v5e and v6e 128 MiB
VMEM_LIMIT = 56 << 20

Interpret = bool | pltpu.InterpretParams


@dataclass(frozen=True)
class Sizes:
    """How much one grid step holds."""

    tile: int  # rows of x
    block: int  # rows of the weight
    vmem_bytes: int


def fitting(found: Sizes | None) -> Sizes:
    """The sizes for a kernel that did not refuse."""
    assert found is not None, "`refuses` is asked first"
    return found


def sizes(
    m: int, n: int, k: int, row_bytes: int, itemsize: int, unit: int = LANES, held_bytes: int = 0
) -> Sizes | None:
    """Tile sizes for `m` rows against `[n, k]`, or None if even the smallest need too much VMEM.

    Args:
        row_bytes: bytes of one row of the weight as it is stored.
        itemsize: bytes of an element of x and of the dequantized weight.
        unit: the number of rows of a block is a multiple of this, itself a multiple of 128 (the output's lanes).
        held_bytes: what a kernel holds of one row beside its dequantized form.
    """
    wanted = PROMPT_BLOCK if m > DECODE_ROWS else min(PROMPT_BLOCK, BLOCK_BYTES // row_bytes)
    tile, block = min(m, PROMPT_TILE), _up(min(max(wanted, unit), n), unit)

    def vmem_bytes() -> int:
        return _vmem_bytes(tile, block, k, row_bytes, itemsize) + block * held_bytes

    while vmem_bytes() > VMEM_BUDGET:
        # Shrink the larger one first: smaller tiles load the MXU more often, smaller blocks read x more often.
        if tile > LANES and (tile >= block or block == unit):
            tile //= 2
        elif block > unit:
            block = _up(block // 2, unit)
        else:
            return None
    # The same number of steps, made as even as possible, so that less of the last one is padding.
    tile = tile if tile == m else min(tile, _up(-(-m // -(-m // tile)), 16))
    block = min(block, _up(-(-n // -(-n // block)), unit))
    return Sizes(tile, block, vmem_bytes())


def _vmem_bytes(tile: int, block: int, k: int, row_bytes: int, itemsize: int) -> int:
    """Bytes of two buffers for everything copied, the dequantized block, and a kernel's results for a tile."""
    copied = tile * k * itemsize + block * row_bytes + tile * block * 4
    return 2 * copied + (block + tile) * k * itemsize


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def spread(values: jax.Array, unit: int, start: int, count: int) -> jax.Array:
    """Columns `start .. start + count - 1` of `values[rows, s]` with each column repeated `unit` times.

    `start` is a multiple of 128; one of 128 and `unit` divides the other. (`jnp.repeat` would compile to ten times as
    many instructions.)
    """
    parts = []
    for first in range(start, start + count, LANES):
        column = first // unit
        if unit % LANES == 0:
            parts.append(jnp.broadcast_to(values[:, column : column + 1], (values.shape[0], LANES)))
        else:
            base = column // LANES * LANES
            source = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) // unit + (column - base)
            parts.append(gather_lanes(values[:, base : base + LANES], source))
    return jnp.concatenate(parts, axis=1)[:, :count]


def gather_lanes(values: jax.Array, source: jax.Array) -> jax.Array:
    """`values[:, source[0]]` for a register's width of columns: `values[rows, <= 128]`, int32 `source[1, 128]`."""
    rows = len(values)
    # JAX simplifies a gather from a single row to one that Mosaic does not support.
    values = jnp.broadcast_to(values, (8, values.shape[1])) if rows == 1 else values
    index = jnp.broadcast_to(source, (len(values), LANES))
    return jnp.take_along_axis(values, index, axis=1, mode="promise_in_bounds")[:rows]


def chunks(k: int) -> list[tuple[int, int]]:
    """`(start, count)` of the parts of `k` lanes that are dequantized together."""
    return [(start, min(CHUNK, k - start)) for start in range(0, k, CHUNK)]


def dot(x: jax.Array, w: jax.Array, axis: int = 1) -> jax.Array:
    """`x[m, k] @ w[n, k].T` in float32, or `x @ w[k, n]` if `axis` is 0; float32 operands are multiplied as float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, w, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def result(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, which varies over the same mesh axes as the operand `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).mat)


class Part(NamedTuple):
    """A leaf `[experts, ...]` of a weight, and what of it a grid step reads.

    Attributes:
        block: the shape of that, without the experts; None drops an axis.
        axis: which of its axes counts the blocks of rows; None: every step reads the same.
    """

    leaf: jax.Array
    block: tuple[int | None, ...]
    axis: int | None

    def spec(self, expert: jax.Array, j: jax.Array) -> tuple[jax.Array | int, ...]:
        """The block of an expert's rows `j`."""
        return expert, *(j if axis == self.axis else 0 for axis in range(len(self.block)))


def rows(leaf: jax.Array, block: int) -> Part:
    """Blocks of rows of a leaf `[experts, n, columns]`."""
    return Part(leaf, (block, leaf.shape[2]), 0)


def columns(leaf: jax.Array, block: int) -> Part:
    """Blocks of columns of a leaf `[experts, ..., n]`, one for each row of the weight."""
    return Part(leaf, (*leaf.shape[1:-1], block), leaf.ndim - 2)


def blocks(leaf: jax.Array) -> Part:
    """The blocks of a leaf `[experts, blocks, ...]`."""
    return Part(leaf, (None, *leaf.shape[2:]), 0)


def whole(leaf: jax.Array) -> Part:
    """All of a leaf `[experts, ...]` that does not run along rows."""
    return Part(leaf, leaf.shape[1:], None)


def tiles_of(x: jax.Array, tile: int) -> jax.Array:
    """`x[rows, ...]` as `[tiles, tile, ...]`, zeros appended."""
    pad = -len(x) % tile
    if pad:
        x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, tile, *x.shape[1:])


def multiply(
    tiles: Sequence[jax.Array],
    leaves: Sequence[Part],
    expert: jax.Array,
    n: int,
    block: int,
    scratch: tuple[jax.ShapeDtypeStruct, ...],
    decode: Callable[..., None],
    product: Callable[..., jax.Array],
    name: str,
    interpret: Interpret,
) -> jax.Array:
    """Run the pipeline.

    Args:
        tiles: the activations, each `[tiles, ..., tile, columns]`.
        leaves: the weight.
        expert: int32 `[tiles]`, see `dense.grouped_matmul`.
        block: rows of the weight in a grid step.
        scratch: buffers that stay in VMEM from step to step; the first holds a block's dequantized form.
        decode: `(*leaf_refs, *scratch_refs)`, writes the dequantized block.
        product: `(*tile_refs, *leaf_refs, *scratch_refs) -> [tile, block]`; refs come without their leading axes.

    Returns:
        float32 `[tiles, tile, n]`.
    """
    count = jnp.sum(expert >= 0, dtype=jnp.int32)
    # Unused tiles point to the block that the last tile in use has in VMEM, so nothing is copied for them.
    source = jnp.maximum(jnp.where(expert >= 0, expert, expert[jnp.maximum(count - 1, 0)]), 0)
    tile = tiles[0].shape[-2]

    def of_tile(j: jax.Array, t: jax.Array, source: jax.Array, count: jax.Array) -> jax.Array:
        return jnp.minimum(t, jnp.maximum(count[0] - 1, 0))

    def of_block(j: jax.Array, t: jax.Array, source: jax.Array, count: jax.Array) -> jax.Array:
        return jnp.where(count[0] > 0, j, 0)

    def tile_spec(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda *at: (of_tile(*at), *[0] * (x.ndim - 1)))

    def leaf_spec(part: Part) -> pl.BlockSpec:
        return pl.BlockSpec((None, *part.block), lambda j, t, source, count: part.spec(
            source[t], of_block(j, t, source, count)
        ))  # fmt: skip

    def kernel(source: jax.Ref, count: jax.Ref, *refs: jax.Ref) -> None:
        operands, (y, *held) = refs[: len(tiles) + len(leaves)], refs[len(tiles) + len(leaves) :]
        t = pl.program_id(1)

        @pl.when(t < count[0])
        def _() -> None:
            @pl.when((t == 0) | (source[t] != source[jnp.maximum(t - 1, 0)]))
            def _() -> None:
                decode(*operands[len(tiles) :], *held)

            y[...] = product(*operands, *held)

    m, k, steps = len(expert) * tile, tiles[0].shape[-1], pl.cdiv(n, block)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(steps, len(expert)),
        in_specs=[*map(tile_spec, tiles), *map(leaf_spec, leaves)],
        out_specs=pl.BlockSpec((None, tile, block), lambda j, *at: (of_tile(j, *at), 0, j)),
        scratch_shapes=[pltpu.VMEM(part.shape, part.dtype) for part in scratch],
    )
    arrays = [part.leaf for part in leaves]
    read = sum(leaf.nbytes // len(leaf) for leaf in arrays) * min(len(arrays[0]), len(expert))
    return pl.pallas_call(
        kernel,
        grid_spec=spec,
        out_shape=result((len(expert), tile, n), jnp.float32, tiles[0]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * n * k,
            bytes_accessed=read + sum(x.nbytes for x in tiles) * steps + 4 * m * n,
            transcendentals=0,
        ),
        name=name,
        interpret=interpret,
    )(source, count[None], *tiles, *arrays)
