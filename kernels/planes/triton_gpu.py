"""Matmuls of codes in planes on NVIDIA GPUs, in Triton. DRAFT."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import lax
from triton.language.extra import libdevice

from jaxllm.formats import planes_of
from jaxllm.formats.base import Weight
from jaxllm.formats.planes import GROUP, SLAB, Planes, chunk
from jaxllm.kernels import gpu
from jaxllm.kernels.gpu import Tile

TILES = (
    Tile(8, 64, 256, 4, 4),
    Tile(16, 32, 256, 2, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(64, 128, 128, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(256, 128, 64, 8, 4),
)
TILES_FLOAT32 = (Tile(16, 32, 64, 4, 3), Tile(64, 32, 64, 8, 3))


def refuses(op: str, x: jax.Array, weight: Weight) -> str | None:
    """Why `op` ("matmul" or "grouped_matmul") cannot be served here, or None."""
    return gpu.refuses(x) or planes_of.refuses(weight)


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`."""
    rows = x.reshape(-1, x.shape[-1])
    return _matmul(rows, weight, None).reshape(*x.shape[:-1], weight.shape[-2])


def grouped_matmul(x: jax.Array, stack: Weight, expert: jax.Array) -> jax.Array:
    """`matmul` for tiles of rows, each with its own matrix, see `dense.grouped_matmul`."""
    return _matmul(x, stack, expert)


def _matmul(x: jax.Array, weight: Weight, expert: jax.Array | None) -> jax.Array:
    """`x[rows, in]` times one matrix, or tiles of rows times the matrices `expert[tiles]` of a stack."""
    w = planes_of.planes_of(weight, transposed=False)
    tiles = 1 if expert is None else expert.shape[0]
    rows, (n, k) = x.shape[0] // tiles, w.shape[-2:]
    if w.order is not None:
        x = _ordered(x, w.order, expert)
    tile = gpu.tile_for(rows, TILES_FLOAT32 if x.dtype == jnp.float32 else TILES)
    alike = math.gcd(tile.k, w.group, 128)
    factored = tile.m <= alike
    has_constant = w.zeros is not None or w.offsets is not None
    sums = jnp.sum(x.astype(jnp.float32).reshape(x.shape[0], -1, w.group), -1) if factored and has_constant else None
    work = gpu.Work.of(rows, n, k, tile, tiles)
    offsets = w.offsets
    y = gpu.launch(
        _matmul_kernel,
        x,
        sums,
        w.codes,
        w.table,
        _floats(w.scales.fine),
        _floats(w.scales.coarse),
        _floats(w.zeros),
        None if offsets is None else _floats(offsets.fine),
        None if offsets is None else _floats(offsets.coarse),
        expert,
        out_type=work.out_type,
        grid=work.grid,
        warps=tile.warps,
        stages=tile.stages,
        BITS=w.bits,
        ZERO=w.zero if w.zeros is None else 0,
        GROUP=w.group,
        COARSE=w.coarse_group,
        DIVIDES=w.scales.divides,
        ALIKE=alike,
        FACTORED=factored,
        **work.constants,
    )
    y = jnp.sum(y, axis=0)
    return y if w.factor == 1 else y * w.factor


def _ordered(x: jax.Array, order: jax.Array, expert: jax.Array | None) -> jax.Array:
    if expert is None:
        return x[:, order]
    tiles = x.reshape(expert.shape[0], -1, x.shape[-1])
    return jnp.take_along_axis(tiles, order[expert][:, None, :], axis=-1).reshape(x.shape)


def _floats(leaf: jax.Array | None) -> jax.Array | None:
    """An array of `Levels` in a dtype that Triton has: the bits of float16 as that."""
    is_bits = leaf is not None and leaf.dtype == jnp.uint16
    return lax.bitcast_convert_type(leaf, jnp.float16) if is_bits else leaf


@triton.jit
def _fields(w: tl.tensor, mask: tl.tensor, slab, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """What the plane of `WIDTH` bits holds of a slab's codes, see `_pairs`."""
    CHUNK: tl.constexpr = 16 // (BITS & -BITS)  # slabs
    WORDS: tl.constexpr = CHUNK // 2  # of a plane of one bit; planes of more bits come first
    first = slab // CHUNK * (BITS * WORDS) + (BITS & -2 * WIDTH) * WORDS + slab % CHUNK * WIDTH // 16 * 8
    words = tl.load(w + first, mask=mask, other=0)
    return words >> slab % (16 // WIDTH) * WIDTH & ((1 << WIDTH) - 1) * 0x10001


@triton.jit
def _pairs(w: tl.tensor, mask: tl.tensor, slab, BITS: tl.constexpr):
    """The codes of a slab, two in each word, as they are neighbours: uint32 `[N, 8]`."""
    pairs = tl.full(w.shape, 0, tl.uint32)
    for i in tl.static_range(4):
        if BITS & 8 >> i:
            pairs = pairs << (8 >> i) | _fields(w, mask, slab, BITS, 8 >> i)
    return pairs


@triton.jit
def _neighbours(low: tl.tensor, high: tl.tensor):
    """Even and odd columns `[N, 8]`, together."""
    return tl.join(low, high).reshape(low.shape[0], 2 * low.shape[1])


@triton.jit
def _halves(words: tl.tensor):
    """Both halves of words: uint16 `[N, 16]`."""
    return _neighbours((words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16))


@triton.jit
def _bfloat16(words: tl.tensor):
    return _halves(words).to(tl.bfloat16, bitcast=True)


@triton.jit
def _bytes(table: tl.tensor, FIRST: tl.constexpr, SHIFT: tl.constexpr):
    """A byte of each of four entries rounded to bfloat16, as one int32."""
    word = tl.full((1, 1), 0, tl.uint32)
    for i in tl.static_range(4):
        # Loaded as a tensor, because Triton does not move a dot's layout across a scalar that becomes one.
        entry = tl.load(table + tl.full((1, 1), FIRST + i, tl.int32)).to(tl.bfloat16)
        word |= (entry.to(tl.uint16, bitcast=True).to(tl.uint32) >> SHIFT & 0xFF) << 8 * i
    return word.to(tl.int32, bitcast=True)


@triton.jit
def _entries(table: tl.tensor, words: tl.tensor, SHIFT: tl.constexpr):
    """A byte of the entries of the four codes in the lower half of each word."""
    codes = (words & 0x7777).to(tl.int32, bitcast=True)
    low = libdevice.byte_perm(_bytes(table, 0, SHIFT), _bytes(table, 4, SHIFT), codes)
    high = libdevice.byte_perm(_bytes(table, 8, SHIFT), _bytes(table, 12, SHIFT), codes)
    is_high = (words >> 1 & 0x4444 | 0x3210).to(tl.int32, bitcast=True)
    return libdevice.byte_perm(low, high, is_high)


@triton.jit
def _entry(table: tl.tensor, words: tl.tensor, FIELD: tl.constexpr):
    """The entry of one of those codes, as bfloat16."""
    TWO: tl.constexpr = 0x7362 if FIELD >= 2 else 0x5140
    two = libdevice.byte_perm(_entries(table, words, 0), _entries(table, words, 8), TWO)
    return (two >> FIELD % 2 * 16 & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _slab(w: tl.tensor, mask: tl.tensor, table, slab, FIELD: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, dtype: tl.constexpr):
    """Values `[N, 16]` of neighbouring columns: entries of the table, or codes less `ZERO`, exactly."""
    if table is None:
        pairs = _pairs(w, mask, slab, BITS)
        if BITS == 8:
            low = _bfloat16(pairs & 0x7F007F | 0x43004300)  # 128 + the lower seven bits
            values = low - _bfloat16(pairs & 0x800080 ^ 0x43804380)  # 256, or 128 if the highest bit is set
            values += tl.full((1, 1), 128 - ZERO, tl.bfloat16)
        elif ZERO % 1 == 0:
            values = _bfloat16(pairs | 0x43004300) - tl.full((1, 1), 128 + ZERO, tl.bfloat16)
        else:
            values = _bfloat16(pairs | 0x43004300) - tl.full((1, 1), 128, tl.bfloat16)
            values -= tl.full((1, 1), ZERO, tl.bfloat16)
        return values.to(dtype)
    elif dtype == tl.bfloat16:
        words = tl.load(w + slab // 4 * 8, mask=mask, other=0)
        return _neighbours(_entry(table, words, FIELD), _entry(table, words >> 16, FIELD))
    else:
        return tl.load(table + _halves(_pairs(w, mask, slab, BITS)).to(tl.int32))


@triton.jit
def _beside(left: tl.tensor, right: tl.tensor):
    """Two `[N, columns]` as one."""
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def _values(
    w: tl.tensor,
    mask: tl.tensor,
    table,
    slab,
    FIRST: tl.constexpr,
    SLABS: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    dtype: tl.constexpr,
):
    """`_slab` for several neighbours from `slab + FIRST` on: `[N, 16 * SLABS]`."""
    if SLABS == 1:
        return _slab(w, mask, table, slab + FIRST, FIRST % 4, BITS, ZERO, dtype)
    else:
        HALF: tl.constexpr = SLABS // 2
        left = _values(w, mask, table, slab, FIRST, HALF, BITS, ZERO, dtype)
        return _beside(left, _values(w, mask, table, slab, FIRST + HALF, HALF, BITS, ZERO, dtype))


@triton.jit
def _group(step: tl.tensor, COLUMN: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The group of `SIZE` columns that a step's column is in, written so that what is constant in a loop shows."""
    if SIZE % BLOCK_K == 0:
        return step // (SIZE // BLOCK_K)
    elif BLOCK_K % SIZE == 0:
        return step * (BLOCK_K // SIZE) + COLUMN // SIZE
    else:
        return (step * BLOCK_K + COLUMN) // SIZE


@triton.jit
def _levels(fine: tl.tensor, coarse, fine_at: tl.tensor, coarse_at: tl.tensor, mask: tl.tensor, DIVIDES: tl.constexpr):
    """One of the `Levels` for each row: float32 `[N, 1]`."""
    levels = tl.load(fine + fine_at, mask=mask, other=0.0).to(tl.float32)
    if coarse is not None:
        shared = tl.load(coarse + coarse_at, mask=mask, other=1.0).to(tl.float32)
        levels = tl.div_rn(levels, shared) if DIVIDES else levels * shared
    return levels


@triton.jit
def _scaling(leaves, row, step, COLUMN: tl.constexpr, mask, BLOCK_K: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, COARSE: tl.constexpr, DIVIDES: tl.constexpr):
    """Scale, zero and offset of a step's column for each row: float32 `[N, 1]` or None."""
    scales, coarse_scales, zeros, offsets, coarse_offsets = leaves
    n, e = row
    at = n * (K // GROUP) + _group(step, COLUMN, GROUP, BLOCK_K)
    if COARSE == 0:
        coarse_at = e + tl.zeros_like(n)
    else:
        coarse_at = n * (K // COARSE) + _group(step, COLUMN, COARSE, BLOCK_K)
    scale, zero, offset = _levels(scales, coarse_scales, at, coarse_at, mask, DIVIDES), None, None
    if zeros is not None:
        zero = _levels(zeros, None, at, coarse_at, mask, False)
    if offsets is not None:
        offset = _levels(offsets, coarse_offsets, at, coarse_at, mask, False)
    return scale, zero, offset


@triton.jit
def _weights(
    w: tl.tensor,
    mask: tl.tensor,
    table,
    slab,
    FIRST: tl.constexpr,
    SLABS: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    dtype: tl.constexpr,
    leaves,
    row,
    step,
    BLOCK_K: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    COARSE: tl.constexpr,
    DIVIDES: tl.constexpr,
    ALIKE: tl.constexpr,
):
    """Dequantized weights `[N, 16 * SLABS]`, computed in float32 and rounded once."""
    if 16 * SLABS == ALIKE:
        values = _values(w, mask, table, slab, FIRST, SLABS, BITS, ZERO, dtype).to(tl.float32)
        scale, zero, offset = _scaling(leaves, row, step, 16 * FIRST, mask, BLOCK_K, K, GROUP, COARSE, DIVIDES)
        if zero is not None:
            values -= zero
        values *= scale
        if offset is not None:
            values += offset
        return values.to(dtype)
    else:
        HALF: tl.constexpr = SLABS // 2
        left = _weights(w, mask, table, slab, FIRST, HALF, BITS, ZERO, dtype, leaves, row, step, BLOCK_K, K, GROUP, COARSE, DIVIDES, ALIKE)
        right = _weights(w, mask, table, slab, FIRST + HALF, HALF, BITS, ZERO, dtype, leaves, row, step, BLOCK_K, K, GROUP, COARSE, DIVIDES, ALIKE)
        return _beside(left, right)


@triton.jit
def _matmul_kernel(
    x: tl.tensor,  # [rows, K]
    sums: tl.tensor,  # float32 [rows, K / GROUP], sums of groups of x; or None
    w: tl.tensor,  # uint32 [experts, N, K * BITS / 32]
    table: tl.tensor,  # float32 [experts, 16] or None
    scales: tl.tensor,  # [experts, N, K / GROUP]
    coarse_scales: tl.tensor,  # [experts, N, K / COARSE], or [experts] if COARSE is 0, or None
    zeros: tl.tensor,  # [experts, N, K / GROUP] or None
    offsets: tl.tensor,  # like scales, or None
    coarse_offsets: tl.tensor,  # like coarse_scales
    expert: tl.tensor,  # int32 [tiles], or None for one tile and one matrix
    y: tl.tensor,  # float32 [splits, rows, N]
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    COARSE: tl.constexpr,
    DIVIDES: tl.constexpr,
    ALIKE: tl.constexpr,  # neighbouring columns that share a scale
    FACTORED: tl.constexpr,  # whether results of dots are scaled, otherwise weights are
    ROWS: tl.constexpr,  # of a tile
    ALL_ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PER_SPLIT: tl.constexpr,  # steps over k
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile, row, first_n = gpu.place(ROWS, BLOCK_M, BLOCK_N)
    n = first_n + tl.arange(0, BLOCK_N)
    in_m, in_n = row < ROWS, (n < N)[:, None]
    e = tl.zeros((), tl.int64)
    if expert is not None:
        e = tl.load(expert + tile).to(tl.int64)
        if e < 0:
            return
        if table is not None:
            table += e * 16
    row_of_all = n[:, None] + e * N
    m = tile * ROWS + row
    WIDTH: tl.constexpr = ALIKE if FACTORED else BLOCK_K
    k = tl.arange(0, WIDTH)
    x += m[:, None] * K + k[None, :]
    w += row_of_all * (K * BITS // 32) + tl.arange(0, 8)[None, :]
    leaves = scales, coarse_scales, zeros, offsets, coarse_offsets

    split = tl.program_id(2)
    first = split * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, tl.cdiv(K, BLOCK_K))
    acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        # Where a step is not whole chunks, shifts are not constants.
        words, slab = w, i * (BLOCK_K // 16)
        if BLOCK_K * (BITS & -BITS) % 256 == 0:
            words, slab = w + i * (BLOCK_K * BITS // 32), 0
        for j in tl.static_range(BLOCK_K // WIDTH):
            start = i * BLOCK_K + j * WIDTH
            x_mask, w_mask = in_m[:, None], in_n
            if K % BLOCK_K != 0:
                x_mask, w_mask = x_mask & (k < K - start)[None, :], w_mask & (start < K)
            xs = tl.load(x + start, mask=x_mask, other=0.0)
            if FACTORED:
                values = _values(words, w_mask, table, slab, j * WIDTH // 16, WIDTH // 16, BITS, ZERO, xs.dtype)
                scale, zero, offset = _scaling(leaves, (row_of_all, e), i, j * WIDTH, w_mask, BLOCK_K, K, GROUP, COARSE, DIVIDES)
                acc += tl.dot(values, xs.T, input_precision="ieee") * scale
                if sums is not None:
                    sum_at = sums + m * (K // GROUP) + _group(i, j * WIDTH, GROUP, BLOCK_K)
                    x_sum = tl.load(sum_at, mask=in_m & (start < K), other=0)[None, :]
                    if zero is not None:
                        acc -= zero * scale * x_sum
                    if offset is not None:
                        acc += offset * x_sum
            else:
                weights = _weights(words, w_mask, table, slab, 0, BLOCK_K // 16, BITS, ZERO, xs.dtype, leaves, (row_of_all, e), i, BLOCK_K, K, GROUP, COARSE, DIVIDES, ALIKE)
                acc = tl.dot(weights, xs.T, acc, input_precision="ieee")

    y += (split.to(tl.int64) * ALL_ROWS + m)[None, :] * N + n[:, None]
    tl.store(y, acc, mask=in_m[None, :] & in_n)
