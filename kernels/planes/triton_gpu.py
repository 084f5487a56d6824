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

TILES = (Tile(16, 64, 256, 4, 3), Tile(32, 64, 256, 4, 3), Tile(64, 128, 128, 8, 3), Tile(128, 128, 128, 8, 3))
TILES_FLOAT32 = (Tile(16, 32, 64, 4, 3), Tile(64, 32, 64, 8, 3))
WIDEST = 64  # columns of one dot


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
    tile = tile._replace(k=max(tile.k, chunk(w.bits)))
    alike = math.gcd(tile.k, w.group, 128)
    factored = tile.m <= alike
    width = alike if factored else min(tile.k, max(alike, WIDEST))
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
        WIDTH=width,
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
def _fields(w: tl.tensor, mask: tl.tensor, AT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """What the plane of `WIDTH` bits holds of a slab's codes, see `_pairs`."""
    CHUNK: tl.constexpr = 256 // (BITS & -BITS)  # columns
    WORDS: tl.constexpr = CHUNK // 32  # of a plane of one bit; planes of more bits come first
    column: tl.constexpr = 16 * AT % CHUNK
    first: tl.constexpr = 16 * AT // CHUNK * BITS * WORDS + (BITS & -2 * WIDTH) * WORDS
    words = tl.load(w + (first + column * WIDTH // 256 * 8), mask=mask, other=0)
    return words >> column % (256 // WIDTH) // 16 * WIDTH & ((1 << WIDTH) - 1) * 0x10001


@triton.jit
def _pairs(w: tl.tensor, mask: tl.tensor, AT: tl.constexpr, BITS: tl.constexpr):
    """The codes of slab `AT` of a step, two in each word, as they are neighbours: uint32 `[N, 8]`."""
    pairs = tl.full(w.shape, 0, tl.uint32)
    for i in tl.static_range(4):
        if BITS & 8 >> i:
            pairs = pairs << (8 >> i) | _fields(w, mask, AT, BITS, 8 >> i)
    return pairs


@triton.jit
def _halves(words: tl.tensor):
    """Both halves of words as neighbours: uint16 `[N, 16]`."""
    both = tl.join((words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16))
    return both.reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def _bfloat16(words: tl.tensor):
    return _halves(words).to(tl.bfloat16, bitcast=True)


@triton.jit
def _bytes(table: tl.tensor, FIRST: tl.constexpr, SHIFT: tl.constexpr):
    """One byte of each of four entries, rounded to bfloat16, as int32."""
    word = tl.full((1, 1), 0, tl.uint32)
    for i in tl.static_range(4):
        bits = tl.load(table + tl.full((1, 1), FIRST + i, tl.int32)).to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        word |= (bits >> SHIFT & 0xFF) << 8 * i
    return word.to(tl.int32, bitcast=True)


@triton.jit
def _entries(table: tl.tensor, words: tl.tensor, SHIFT: tl.constexpr):
    """One byte of the entries of four codes, which the lower half of a word holds."""
    codes = (words & 0x7777).to(tl.int32, bitcast=True)
    low = libdevice.byte_perm(_bytes(table, 0, SHIFT), _bytes(table, 4, SHIFT), codes)
    high = libdevice.byte_perm(_bytes(table, 8, SHIFT), _bytes(table, 12, SHIFT), codes)
    is_high = (words >> 1 & 0x4444 | 0x3210).to(tl.int32, bitcast=True)
    return libdevice.byte_perm(low, high, is_high)


@triton.jit
def _looked_up(w: tl.tensor, mask: tl.tensor, table: tl.tensor, AT: tl.constexpr):
    """Entries of a table as bfloat16 `[N, 16]`, found by the instruction that selects bytes."""
    words = tl.load(w + AT // 4 * 8, mask=mask, other=0)
    SELECTION: tl.constexpr = 0x7362 if AT % 4 >= 2 else 0x5140
    low = libdevice.byte_perm(_entries(table, words, 0), _entries(table, words, 8), SELECTION)
    high = libdevice.byte_perm(_entries(table, words >> 16, 0), _entries(table, words >> 16, 8), SELECTION)
    low, high = low >> AT % 2 * 16 & 0xFFFF, high >> AT % 2 * 16 & 0xFFFF
    low, high = low.to(tl.uint16).to(tl.bfloat16, bitcast=True), high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high).reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def _slab(
    w: tl.tensor,
    mask: tl.tensor,
    table: tl.tensor,
    AT: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    dtype: tl.constexpr,
):
    """Values `[N, 16]` of the neighbouring columns from `16 * AT` of a step on."""
    if table is not None:
        if dtype == tl.bfloat16:
            return _looked_up(w, mask, table, AT)
        else:
            return tl.load(table + _halves(_pairs(w, mask, AT, BITS)).to(tl.int32))
    else:
        pairs = _pairs(w, mask, AT, BITS)
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


@triton.jit
def _values(
    w: tl.tensor,
    mask: tl.tensor,
    table: tl.tensor,
    AT: tl.constexpr,
    SLABS: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    dtype: tl.constexpr,
):
    """`_slab` for several neighbours: `[N, 16 * SLABS]`."""
    if SLABS == 1:
        return _slab(w, mask, table, AT, BITS, ZERO, dtype)
    else:
        first = _values(w, mask, table, AT, SLABS // 2, BITS, ZERO, dtype)
        second = _values(w, mask, table, AT + SLABS // 2, SLABS // 2, BITS, ZERO, dtype)
        return tl.join(first, second).permute(0, 2, 1).reshape(first.shape[0], 2 * first.shape[1])


@triton.jit
def _group(step: tl.tensor, column: tl.tensor, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The group of `SIZE` columns that a step's `column` is in, in a form that shows what is constant in a loop."""
    if SIZE % BLOCK_K == 0:
        return step // (SIZE // BLOCK_K) + column // SIZE
    elif BLOCK_K % SIZE == 0:
        return step * (BLOCK_K // SIZE) + column // SIZE
    else:
        return (step * BLOCK_K + column) // SIZE


@triton.jit
def _levels(
    fine: tl.tensor,
    coarse: tl.tensor,
    row: tl.tensor,
    step: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    COARSE: tl.constexpr,
    DIVIDES: tl.constexpr,
):
    """What `Levels` are for rows and columns `[N, 1]` and `[1, groups]`, as float32."""
    at = row * (K // GROUP) + _group(step, column, GROUP, BLOCK_K)
    levels = tl.load(fine + at, mask=mask, other=0.0).to(tl.float32)
    if coarse is not None:
        if COARSE == 0:
            shared = tl.load(coarse).to(tl.float32)
        else:
            at = row * (K // COARSE) + _group(step, column, COARSE, BLOCK_K)
            shared = tl.load(coarse + at, mask=mask, other=0.0).to(tl.float32)
        levels = tl.div_rn(levels, tl.broadcast_to(shared, levels.shape)) if DIVIDES else levels * shared
    return levels


@triton.jit
def _spread(levels: tl.tensor, SIZE: tl.constexpr):
    rows: tl.constexpr = levels.shape[0]
    groups: tl.constexpr = levels.shape[1]
    return tl.broadcast_to(levels[:, :, None], (rows, groups, SIZE)).reshape(rows, groups * SIZE)


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
    ALIKE: tl.constexpr,  # columns of a step that share a scale
    WIDTH: tl.constexpr,  # columns of one dot
    FACTORED: tl.constexpr,  # whether results of a dot are scaled, otherwise the weights are
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
    n_of_all = n[:, None]
    if expert is not None:
        e = tl.load(expert + tile).to(tl.int64)
        if e < 0:
            return
        n_of_all += e * N
        if table is not None:
            table += e * 16
        if COARSE == 0 and coarse_scales is not None:
            coarse_scales += e
    m = tile * ROWS + row
    k, groups = tl.arange(0, WIDTH), tl.arange(0, WIDTH // ALIKE)[None, :] * ALIKE
    x += m[:, None] * K + k[None, :]
    w += n_of_all * (K * BITS // 32) + tl.arange(0, 8)[None, :]

    split = tl.program_id(2)
    first = split * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, tl.cdiv(K, BLOCK_K))
    acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        for j in tl.static_range(BLOCK_K // WIDTH):
            start = i * BLOCK_K + j * WIDTH
            column = j * WIDTH + groups
            x_mask, w_mask, level_mask = in_m[:, None], in_n, in_n
            if K % BLOCK_K != 0:
                x_mask, level_mask = x_mask & (k < K - start)[None, :], level_mask & (column < K - i * BLOCK_K)
                w_mask = w_mask & (start < K)
            xs = tl.load(x + start, mask=x_mask, other=0.0)
            words = w + i * (BLOCK_K * BITS // 32)
            values = _values(words, w_mask, table, j * WIDTH // 16, WIDTH // 16, BITS, ZERO, xs.dtype)
            scale = _levels(
                scales, coarse_scales, n_of_all, i, column, level_mask, K, BLOCK_K, GROUP, COARSE, DIVIDES
            )
            if offsets is not None:
                offset = _levels(
                    offsets, coarse_offsets, n_of_all, i, column, level_mask, K, BLOCK_K, GROUP, COARSE, False
                )
            if zeros is not None:
                zero = _levels(zeros, None, n_of_all, i, column, level_mask, K, BLOCK_K, GROUP, COARSE, False)
            if FACTORED:
                acc += tl.dot(values, xs.T, input_precision="ieee") * scale
                if sums is not None:
                    sum_at = sums + m * (K // GROUP) + _group(i, j * WIDTH, GROUP, BLOCK_K)
                    x_sum = tl.load(sum_at, mask=in_m & (start < K), other=0)[None, :]
                    if zeros is not None:
                        acc -= zero * scale * x_sum
                    if offsets is not None:
                        acc += offset * x_sum
            else:
                values = values.to(tl.float32)
                if zeros is not None:
                    values -= _spread(zero, ALIKE)
                values *= _spread(scale, ALIKE)
                if offsets is not None:
                    values += _spread(offset, ALIKE)
                acc = tl.dot(values.to(xs.dtype), xs.T, acc, input_precision="ieee")

    y += (split.to(tl.int64) * ALL_ROWS + m)[None, :] * N + n[:, None]
    tl.store(y, acc, mask=in_m[None, :] & in_n)
