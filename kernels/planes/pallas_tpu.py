"""Matmuls of codes in planes on TPUs, where the matrix lies transposed: `out` along lanes, columns along sublanes.

Words of eight sublanes give 16 neighbouring columns by one shift and one mask, two in each word, as registers pack
bfloat16. There are two ways on from there.

Few rows. Dequantizing in float32 takes 6 to 8 vector instructions for 1024 weights, and memory delivers that many in
two to four cycles' worth of instructions. So single weights are never scaled: one more instruction makes two codes two
bfloat16 numbers, 128 + code, which the MXU multiplies as they are, and what it sums, a group at a time, is scaled
afterwards, in float32. To sum each group alone, a row of x becomes one row for each of several groups, zero elsewhere
(the MXU takes eight rows in the time of one). Codes of 8 bits are two of 4, the high ones times 16.

Many rows. Then the MXU's work outweighs the decoder's, but rows for each group would multiply it. So a block is
dequantized once into VMEM, as `dequantize` does it, and serves all tiles.

Scales become float32 once for each block, in VMEM; float16's bits by integer arithmetic, since TPUs have no float16.

An infinite x makes NaNs of its row's results, where the definition has infinities.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxllm.formats.base import Weight
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.parts import Levels
from jaxllm.formats.planes import GROUP, SLAB, WORD, Planes, chunk, widths
from jaxllm.formats.planes_of import planes_of
from jaxllm.formats.planes_of import refuses as not_planes
from jaxllm.formats.scaled import quotient
from jaxllm.kernels import tpu

SEGMENT = 256  # lanes that are multiplied at once: the MXU's width
TOGETHER = 32  # groups whose scales are converted at once: as many as a register of bytes holds
ROWS = 128  # rows that the MXU takes in the time that memory needs for the weights they meet, roughly
UNROLLED = 512  # columns that are multiplied without a branch between
LONGEST = 1024  # columns of one product
BIAS, BIAS_BITS = 128, 0x43004300  # bfloat16's 128, twice in a word; seven bits more make it 128 + code


def refuses(op: str, x: jax.Array, weight: Weight) -> str | None:
    """Why `op` cannot be done here, in words for the user; None: it can."""
    if (reason := not_planes(weight)) is not None:
        return reason
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"activations of {x.dtype.name}, the kernel multiplies float32 and bfloat16"
    planes = jax.eval_shape(partial(planes_of, transposed=True), weight)
    if tile_sizes(min(x.size // x.shape[-1], tpu.LANES), planes, x.dtype) is None:
        return f"rows of {x.shape[-1]} columns do not fit into the chip's vector memory"
    return None


def matmul(x: jax.Array, weight: Any, *, interpret: tpu.Interpret = False) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`."""
    weight = planes_of(weight, transposed=True)
    rows = x.reshape(-1, x.shape[-1])
    tile = tpu.fitting(tile_sizes(len(rows), weight, x.dtype)).tile
    stack = jax.tree.map(lambda leaf: leaf[None], weight)
    tiles = tpu.tiles_of(rows, tile)
    y = _multiply(tiles, stack, jnp.zeros(len(tiles), jnp.int32), "planes_matmul", interpret)
    return y.reshape(-1, y.shape[-1])[: len(rows)].reshape(*x.shape[:-1], y.shape[-1])


def grouped_matmul(x: jax.Array, stack: Any, expert: jax.Array, *, interpret: tpu.Interpret = False) -> jax.Array:
    """Tiles of rows, each times its own matrix, see `dense.grouped_matmul`."""
    tiles = x.reshape(len(expert), -1, x.shape[-1])
    y = _multiply(tiles, planes_of(stack, transposed=True), expert, "planes_grouped_matmul", interpret)
    return y.reshape(-1, y.shape[-1])


def tile_sizes(m: int, weight: Planes, dtype: jax.typing.DTypeLike) -> tpu.Sizes | None:
    """What a grid step holds for `m` rows of `dtype`; None: it does not fit."""
    *_, n, k = weight.shape
    row_bytes = -(-weight.nbytes // math.prod(weight.shape[:-1]))
    levels = 1 + (weight.zeros is not None) + (weight.offsets is not None)
    held = 4 * levels * weight.scales.fine.shape[-2]
    itemsize = jnp.dtype(dtype).itemsize
    # Mosaic loads a row of 128 lanes from arrays of exactly that width alone, and one of 256 from all wider ones.
    units = [tpu.LANES] if n <= tpu.LANES else [SEGMENT, tpu.LANES]
    return next(filter(None, (tpu.sizes(m, n, k, row_bytes, itemsize, unit, held) for unit in units)), None)


class Held(NamedTuple):
    """What stays in VMEM from step to step: for a block `[..., block]` of out, float32 but for `decoded`.

    Attributes:
        decoded: `[in, block]`, where many rows are multiplied.
        rows, sums: `[tile, in]`, a tile of x, and `[tile * groups, block]`, what is summed, where few are.
        scales, zeros, offsets: `[in / group, block]`.
        coarse: `[in / coarse_group, block]`.
    """

    decoded: Any
    rows: Any
    sums: Any
    scales: Any
    zeros: Any
    offsets: Any
    coarse: Any


def _multiply(tiles: jax.Array, stack: Planes, expert: jax.Array, name: str, interpret: tpu.Interpret) -> jax.Array:
    """`tiles[tiles, tile, in]` times their experts: `[tiles, tile, out]`."""
    experts, n, k = stack.shape
    _, tile, _ = tiles.shape
    if stack.order is not None:
        tiles = jnp.take_along_axis(tiles, stack.order[jnp.maximum(expert, 0)][:, None], axis=-1)
    if tiles.dtype == jnp.float32:  # as `_dequantize` leaves columns
        tiles = tiles.reshape(len(tiles), tile, -1, GROUP, 2).swapaxes(-1, -2).reshape(tiles.shape)
    block = tpu.fitting(tile_sizes(tile, stack, tiles.dtype)).block
    stack = replace(
        stack,
        order=None,
        scales=_of_groups(stack.scales, stack, n),
        offsets=None if stack.offsets is None else _of_groups(stack.offsets, stack, n),
        table=None if stack.table is None else jnp.broadcast_to(stack.table[..., None], (experts, 16, tpu.LANES)),
    )
    leaves, structure = jax.tree.flatten(stack)
    parts = [tpu.columns(leaf, block) for leaf in leaves]
    if stack.table is not None:  # the last leaf
        parts[-1] = tpu.whole(leaves[-1])
    groups = groups_at_once(tile, stack, tiles.dtype)

    def held(rows: int, columns: int = block, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, columns), dtype)

    fine, coarse = held(stack.scales.fine.shape[1]), stack.scales.coarse
    scratch = Held(
        held(k, dtype=tiles.dtype) if groups is None else None,
        None if groups is None else held(tile, k),
        None if groups is None else held(tile * groups),
        fine,
        None if stack.zeros is None else fine,
        None if stack.offsets is None else fine,
        None if coarse is None else held(coarse.shape[1]),
    )
    buffers, scratch_structure = jax.tree.flatten(scratch)

    def given(refs: tuple[jax.Ref, ...]) -> tuple[Planes, Held]:
        weight, rest = refs[: len(leaves)], refs[len(leaves) :]
        return jax.tree.unflatten(structure, weight), jax.tree.unflatten(scratch_structure, rest)

    def decode(*refs: jax.Ref) -> None:
        weight, kept = given(refs)
        _widen(weight, kept)
        if groups is None:
            _dequantize(weight, kept)

    def product(x: jax.Ref, *refs: jax.Ref) -> jax.Array:
        weight, kept = given(refs)
        if groups is None:
            return tpu.dot(x[...], kept.decoded[...], axis=0)
        return _scaled_sums(x, weight, kept, groups)

    return tpu.multiply((tiles,), parts, expert, n, block, tuple(buffers), decode, product, name, interpret)


def _of_groups(levels: Levels, stack: Planes, n: int) -> Levels:
    """The levels, where one coarse number of the entire matrix stands once for each row."""
    if levels.coarse is None or stack.coarse_group:
        return levels
    coarse = jnp.broadcast_to(levels.coarse.reshape(-1, 1, 1), (len(levels.fine), 1, n))
    return replace(levels, coarse=coarse)


def groups_at_once(rows: int, weight: Planes, dtype: jax.typing.DTypeLike) -> int | None:
    """How many groups a product of few rows sums side by side; None: the weights are dequantized.

    Best are 8, as many as a register has rows, and products as wide as the MXU.
    """
    if dtype != jnp.bfloat16 or isinstance(weight.origin, Codebook):  # whose tables bfloat16 cannot hold
        return None
    for unit, groups in itertools.product((SEGMENT, tpu.LANES), (8, 16, 1)):
        width = _width(groups, weight.group)
        fits = width % math.lcm(unit, chunk(weight.bits)) == 0 and width <= LONGEST and weight.shape[-1] % width == 0
        if fits and rows * groups <= ROWS:
            return groups
    return None


def _width(groups: int, group: int) -> int:
    """The columns of one product."""
    return groups * group if groups > 1 else math.gcd(group, LONGEST)


def _widen(weight: Planes, kept: Held) -> None:
    """Scales, zeros and offsets of a block as float32."""
    _widen_levels(weight.scales, kept.scales, kept.coarse)
    if weight.zeros is not None:
        _widen_levels(Levels(weight.zeros), kept.zeros, None)
    if weight.offsets is not None:
        _widen_levels(weight.offsets, kept.offsets, kept.coarse)


def _widen_levels(levels: Levels, wide: jax.Ref, coarse: jax.Ref | None) -> None:
    """`levels.fine[groups, block]` times `levels.coarse[some, block]` -> `wide[groups, block]`."""
    count, held = wide.shape[0], levels.coarse
    if coarse is not None and held is not None:
        _each(coarse.shape[0], TOGETHER, lambda at: coarse.__setitem__(at, _float32(held[at])))
    shared = 1 if coarse is None else count // coarse.shape[0]

    def some(at: pl.Slice) -> None:
        fine = _float32(levels.fine[at])
        if coarse is not None:
            repeats = min(shared, at.size)
            assert at.size % repeats == 0, "8, 16 or all scales share another, in all formats"
            first = at.start // shared
            over = [coarse[pl.ds(first + i, 1), :] for i in range(at.size // repeats)]
            over = [jnp.broadcast_to(row, (repeats, fine.shape[1])) for row in over]
            spread = jnp.concatenate(over) if len(over) > 1 else over[0]
            fine = quotient(fine, spread) if levels.divides else fine * spread
        wide[at] = fine

    _each(count, TOGETHER, some)


def _each(size: int, step: int, f: Callable[[pl.Slice], None]) -> None:
    """`f(slice)` for each `step` of `size` rows, and for what is left."""
    lax.fori_loop(0, size // step, lambda i, _: f(pl.ds(pl.multiple_of(i * step, step), step)), None)
    if size % step:
        f(pl.ds(size - size % step, size % step))


def _float32(values: jax.Array) -> jax.Array:
    """Numbers as `Levels` hold them."""
    if values.dtype in (jnp.uint8, jnp.int8):
        return values.astype(jnp.int32).astype(jnp.float32)
    if values.dtype != jnp.uint16:
        return values.astype(jnp.float32)
    half = values.astype(jnp.int32)
    size = half & 0x7FFF
    bits = (size << 13) + (112 << 23)  # exponents count from -127 instead of -15
    bits = jnp.where(size >= 0x7C00, bits + (112 << 23), bits)  # infinity, or no number
    small = lax.bitcast_convert_type(size.astype(jnp.float32) * 2.0**-24, jnp.int32)
    bits = jnp.where(size < 0x0400, small, bits)
    return lax.bitcast_convert_type(bits | (half & 0x8000) << 16, jnp.float32)


def _words(codes: jax.Ref, bits: int, part: jax.Array | int, slab: int, lanes: pl.Slice) -> jax.Array:
    """The codes of a slab of chunk `part`, two in each word: int32 `[8, lanes]`."""
    words, begin = None, 0
    for width in widths(bits):
        group, field = divmod(slab, SLAB // width)
        plane = codes[part, begin + GROUP * group : begin + GROUP * (group + 1), lanes].astype(jnp.int32)
        plane = (plane >> width * field if field else plane) & (2**width - 1) * 0x10001
        words = plane if words is None else words << width | plane
        begin += chunk(bits) * width // WORD
    assert words is not None
    return words


def _dequantize(weight: Planes, kept: Held) -> None:
    """A block's codes `[in / chunk, words, block]` -> `decoded[in, block]`; in float32, of every 16 columns the even
    ones come first."""
    slabs, (k, block) = chunk(weight.bits) // SLAB, kept.decoded.shape
    segment = math.gcd(block, SEGMENT)

    def one_chunk(part: jax.Array, lanes: pl.Slice) -> None:
        for slab in range(slabs):
            group = lax.div(part * chunk(weight.bits) + slab * SLAB, weight.group)
            row = pl.ds(group, 1), lanes
            words = _words(weight.codes, weight.bits, part, slab, lanes)
            even, odd = (_value(half, weight, kept, row) for half in (words & 0xFFFF, words >> 16))
            if kept.decoded.dtype == jnp.float32:
                both = jnp.concatenate([even, odd])
            else:
                both = pltpu.bitcast(pltpu.pack_elementwise([even, odd], packed_dtype=jnp.bfloat16), jnp.bfloat16)
            first = pl.multiple_of(part * chunk(weight.bits) + slab * SLAB, SLAB)
            kept.decoded[pl.ds(first, SLAB), lanes] = both

    for start in range(0, block, segment):
        lanes = pl.ds(start, segment)
        lax.fori_loop(0, k // chunk(weight.bits), lambda part, _, lanes=lanes: one_chunk(part, lanes), None)


def _value(codes: jax.Array, weight: Planes, kept: Held, at: Any) -> jax.Array:
    """Dequantized codes of one group, in float32."""
    if weight.table is not None:
        values = _looked_up(weight.table[...], codes)
    elif kept.zeros is not None:
        values = codes.astype(jnp.float32) - kept.zeros[at]
    else:
        values = codes.astype(jnp.float32)
        values = values - jnp.float32(weight.zero) if weight.zero else values
    return _scaled(values, weight, kept, at)


def _scaled(values: jax.Array, weight: Planes, kept: Held, at: Any, times: jax.Array | None = None) -> jax.Array:
    """Values, or sums of them, scaled; offsets are multiplied by `times`."""
    values = values * kept.scales[at]
    values = values if weight.factor == 1 else values * jnp.float32(weight.factor)
    if kept.offsets is not None:
        values = values + (kept.offsets[at] if times is None else kept.offsets[at] * times)
    return values


def _looked_up(table: jax.Array, codes: jax.Array) -> jax.Array:
    """`table[16, 128]`, the same in all lanes, at the low four bits of `codes[8, lanes]`.

    Registers are permuted along their eight rows: four in a cycle, where permuting lanes takes several cycles for one.
    """
    low, high = (jnp.concatenate([half] * (codes.shape[1] // tpu.LANES), axis=1) for half in (table[:8], table[8:]))
    low, high = (jnp.take_along_axis(half, codes & 7, axis=0, mode="promise_in_bounds") for half in (low, high))
    return jnp.where(codes & 8 != 0, high, low)


def _scaled_sums(x: jax.Ref, weight: Planes, kept: Held, groups: int) -> jax.Array:
    """`x[tile, in]` times a block, where single weights are not scaled: `[tile, block]`."""
    (tile, k), block = x.shape, kept.sums.shape[1]
    width, segment = _width(groups, weight.group), math.gcd(block, SEGMENT)
    own = lax.broadcasted_iota(jnp.int32, (groups, width), 1) // weight.group
    own = own == lax.broadcasted_iota(jnp.int32, (groups, width), 0)
    kept.rows[...] = x[...].astype(jnp.float32)
    kept.sums[...] = jnp.zeros(kept.sums.shape, jnp.float32)

    def one_width(i: jax.Array) -> None:
        columns = pl.ds(pl.multiple_of(i * width, width), width)
        if groups == 1:
            rows = kept.rows[:, columns]
        else:
            rows = jnp.concatenate([jnp.where(own, kept.rows[pl.ds(r, 1), columns], 0.0) for r in range(tile)])
        totals = jnp.sum(rows, axis=1, keepdims=True)
        rows = rows.astype(jnp.bfloat16)
        first = i * groups if groups > 1 else lax.div(i * width, weight.group)
        for start in range(0, block, segment):
            lanes = pl.ds(start, segment)
            sums, bias = _products(rows, weight, i * (width // chunk(weight.bits)), lanes)
            kept.sums[:, lanes] += _of_rows(sums, bias, totals, weight, kept, (pl.ds(first, groups), lanes), tile)

    def many(i: jax.Array, _: None) -> None:
        for j in range(count):
            one_width(i * count + j)

    count = math.gcd(k // width, max(1, UNROLLED // width))
    lax.fori_loop(0, k // width // count, many, None)
    sums = kept.sums[...]
    return sums if groups == 1 else jnp.sum(sums.reshape(tile, groups, block), axis=1)


def _products(rows: jax.Array, weight: Planes, part: jax.Array, lanes: pl.Slice) -> tuple[jax.Array, int]:
    """Rows times the values of as many columns, from chunk `part` on, to which a bias was added; and the bias."""
    slabs = chunk(weight.bits) // SLAB
    words = [
        _words(weight.codes, weight.bits, part + c, slab, lanes)
        for c in range(rows.shape[1] // chunk(weight.bits))
        for slab in range(slabs)
    ]

    def times(parts: list[jax.Array]) -> jax.Array:
        return tpu.dot(rows, jnp.concatenate([pltpu.bitcast(part, jnp.bfloat16) for part in parts]), axis=0)

    if weight.table is not None:
        table = lax.bitcast_convert_type(weight.table[...], jnp.int32)
        low = lax.shift_right_logical(table, 16)  # exact: the other bits are zero
        return times([_looked_up(low, w) | _looked_up(table, w >> 16) for w in words]), 0
    if weight.bits < 8:
        return times([w | BIAS_BITS for w in words]), BIAS
    high, low = (times([w >> shift & 0x000F000F | BIAS_BITS for w in words]) for shift in (4, 0))
    return 16 * high + low, 17 * BIAS


def _of_rows(
    sums: jax.Array, bias: int, totals: jax.Array, weight: Planes, kept: Held, at: Any, tile: int
) -> jax.Array:
    """Sums `[tile * groups, lanes]` of biased values, without the bias and scaled; `totals` are those of x."""
    groups = len(sums) // tile
    sums, totals = (part.reshape(tile, groups, part.shape[1]) if groups > 1 else part for part in (sums, totals))
    if kept.zeros is not None:
        sums = sums - (kept.zeros[at] + jnp.float32(bias)) * totals
    elif bias + weight.zero:
        sums = sums - jnp.float32(bias + weight.zero) * totals
    return _scaled(sums, weight, kept, at, totals).reshape(tile * groups, -1)
