"""Matmuls of codes in planes on NVIDIA GPUs, in Triton: one kernel for every format of 1 to 8 bits.

A word of a plane holds two neighbouring columns in its halves. One shift and one mask give both codes; with the bits of
128 they are two bfloat16 numbers 128 + code, and one packed subtraction leaves both values, exactly. That is two
instructions a weight, and the two land in the register of the matrix instruction that wants them side by side. So
nothing passes through shared memory. Entries of a table are found by the instruction that selects bytes.

Then scales cost more than codes. For few rows, sums are scaled: each group's products are added up by the matrix
instruction and multiplied in float32, so W is not even rounded. An offset is multiplied by the sum of the group of x.
That is work for each row, saved for each column, so it is done while a tile has no more rows than a group has columns.
For many rows, weights are scaled: in float32, then rounded once, which is what `dequantize` gives.
"""

# ruff: noqa: RET505 (Triton compiles the code after a return, whatever the condition)

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import lax
from triton.language.extra import libdevice

from jaxllm.formats import planes_of
from jaxllm.formats.base import Weight
from jaxllm.kernels import gpu
from jaxllm.kernels.gpu import Tile

# Up to 16 rows, a multiprocessor wants many small programs, because each waits for its loads, and Triton then uses the
# older `mma.sync`: on Hopper `wgmma` would have to be waited for after each group, and on Blackwell `tcgen05` takes
# codes from, and gives sums to, its own memory. 256 columns are whole chunks of all bits, so all shifts are constants.
# For many rows, as many as possible share the dequantized weights.
TILES = (
    Tile(8, 32, 256, 2, 3),
    Tile(16, 32, 256, 2, 3),
    Tile(32, 64, 128, 4, 3),
    Tile(64, 128, 128, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
)
TILES_FLOAT32 = (Tile(16, 32, 64, 4, 3), Tile(64, 32, 64, 8, 3))
WARPS = 16 * 132  # the fewest per launch, 16 for each multiprocessor of an H100


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


@dataclass(frozen=True)
class Code:
    """What the kernel has to know of the codes; `alike` columns of a step have the same scale."""

    bits: int
    zero: float
    group: int
    coarse_group: int
    divides: bool
    alike: int


def _matmul(x: jax.Array, weight: Weight, expert: jax.Array | None) -> jax.Array:
    """`x[rows, in]` times one matrix, or tiles of rows times the matrices `expert[tiles]` of a stack."""
    w = planes_of.planes_of(weight, transposed=False)
    tiles = 1 if expert is None else expert.shape[0]
    rows, (n, k) = x.shape[0] // tiles, w.shape[-2:]
    if w.order is not None:
        order = w.order if expert is None else jnp.repeat(w.order[expert], rows, axis=0)
        x = x[:, order] if expert is None else jnp.take_along_axis(x, order, axis=-1)
    tile = gpu.tile_for(rows, TILES_FLOAT32 if x.dtype == jnp.float32 else TILES)
    alike = math.gcd(tile.k, w.group, 128)
    scales_sums = tile.m <= alike
    sums = None
    if scales_sums and (w.zeros is not None or w.offsets is not None):
        sums = jnp.sum(x.reshape(x.shape[0], -1, alike), axis=-1, dtype=jnp.float32)
    fine, coarse = (None, None) if w.offsets is None else (w.offsets.fine, w.offsets.coarse)
    zero = w.zero if w.zeros is None else 0
    work = gpu.Work.of(rows, n, k, tile, tiles, WARPS // tile.warps)
    y = gpu.launch(
        _matmul_kernel,
        x,
        sums,
        w.codes,
        w.table,
        *(_floats(leaf) for leaf in (w.scales.fine, w.scales.coarse, w.zeros, fine, coarse)),
        expert,
        out_type=work.out_type,
        grid=work.grid,
        warps=tile.warps,
        stages=tile.stages,
        CODE=Code(w.bits, zero, w.group, w.coarse_group, w.scales.divides, alike),
        SCALES_SUMS=scales_sums,
        **work.constants,
    )
    y = jnp.sum(y, axis=0)
    return y if w.factor == 1 else y * w.factor


def _floats(leaf: jax.Array | None) -> jax.Array | None:
    """An array of `Levels` in a dtype that Triton has: the bits of float16 as that."""
    if leaf is None or leaf.dtype != jnp.uint16:
        return leaf
    return lax.bitcast_convert_type(leaf, jnp.float16)


@triton.jit
def _fields(
    w: tl.tensor, mask: tl.tensor, slab: tl.tensor, NEXT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr
):
    """What the plane of `WIDTH` bits holds of a slab's codes, see `_pairs`.

    A step is whole groups of words or a part of one, so what `slab` and `NEXT` contribute can be added.
    """
    CHUNK: tl.constexpr = 16 // (BITS & -BITS)  # slabs
    PLANE: tl.constexpr = CHUNK // 2  # words for each bit; planes of more bits come first
    first = (slab // CHUNK + NEXT // CHUNK) * (BITS * PLANE) + (BITS & -2 * WIDTH) * PLANE
    group = slab % CHUNK * WIDTH // 16 + NEXT % CHUNK * WIDTH // 16
    words = tl.load(w + (first + 8 * group), mask=mask, other=0)
    field = slab % (16 // WIDTH) + NEXT % (16 // WIDTH)
    return words >> field * WIDTH & ((1 << WIDTH) - 1) * 0x10001


@triton.jit
def _pairs(w: tl.tensor, mask: tl.tensor, slab: tl.tensor, NEXT: tl.constexpr, BITS: tl.constexpr):
    """The codes of slab `slab + NEXT`, two in each word, as they are neighbours: uint32 `[N, 8]`."""
    pairs = tl.full(w.shape, 0, tl.uint32)
    for i in tl.static_range(4):
        if BITS & 8 >> i:
            pairs = pairs << (8 >> i) | _fields(w, mask, slab, NEXT, BITS, 8 >> i)
    return pairs


@triton.jit
def _neighbours(even: tl.tensor, odd: tl.tensor):
    """Even and odd columns `[N, 8]`, together."""
    return tl.join(even, odd).reshape(even.shape[0], 2 * even.shape[1])


@triton.jit
def _halves(words: tl.tensor):
    """Both halves of words: uint16 `[N, 16]`."""
    return _neighbours((words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16))


@triton.jit
def _bfloat16(words: tl.tensor):
    return _halves(words).to(tl.bfloat16, bitcast=True)


@triton.jit
def _decoded(pairs: tl.tensor, BITS: tl.constexpr, ZERO: tl.constexpr):
    """Codes less `ZERO` as bfloat16, which has all of them."""
    if BITS == 8:
        low = _bfloat16(pairs & 0x7F007F | 0x43004300)  # 128 + the lower seven bits
        values = low - _bfloat16(pairs & 0x800080 ^ 0x43804380)  # 256, or 128 if the highest bit is set
        return values + tl.full((1, 1), 128 - ZERO, tl.bfloat16)
    elif ZERO % 1 == 0:
        return _bfloat16(pairs | 0x43004300) - tl.full((1, 1), 128 + ZERO, tl.bfloat16)
    else:
        codes = _bfloat16(pairs | 0x43004300) - tl.full((1, 1), 128, tl.bfloat16)
        return codes - tl.full((1, 1), ZERO, tl.bfloat16)


@triton.jit
def _bytes(table: tl.tensor, FIRST: tl.constexpr, SHIFT: tl.constexpr):
    """A byte of each of four entries rounded to bfloat16, as one int32."""
    word = tl.full((1, 1), 0, tl.uint32)
    for i in tl.static_range(4):
        # A tensor, because Triton moves no dot's layout across a scalar that becomes a tensor.
        entry = tl.load(table + tl.full((1, 1), FIRST + i, tl.int32)).to(tl.bfloat16)
        word |= (entry.to(tl.uint16, bitcast=True).to(tl.uint32) >> SHIFT & 0xFF) << 8 * i
    return word.to(tl.int32, bitcast=True)


@triton.jit
def _plane(table: tl.tensor, SHIFT: tl.constexpr):
    return _bytes(table, 0, SHIFT), _bytes(table, 4, SHIFT), _bytes(table, 8, SHIFT), _bytes(table, 12, SHIFT)


@triton.jit
def _looked_up(plane: tl.tuple, words: tl.tensor):
    """A byte of the entries of the four codes in the lower half of each word."""
    codes = (words & 0x7777).to(tl.int32, bitcast=True)
    low, high = libdevice.byte_perm(plane[0], plane[1], codes), libdevice.byte_perm(plane[2], plane[3], codes)
    return libdevice.byte_perm(low, high, (words >> 1 & 0x4444 | 0x3210).to(tl.int32, bitcast=True))


@triton.jit
def _entry(table: tl.tuple, words: tl.tensor, FIELD: tl.constexpr):
    """The entry of one of those codes, as bfloat16."""
    TWO: tl.constexpr = 0x7362 if FIELD >= 2 else 0x5140
    two = libdevice.byte_perm(_looked_up(table[0], words), _looked_up(table[1], words), TWO)
    return (two >> FIELD % 2 * 16 & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _values(
    w: tl.tensor,
    mask: tl.tensor,
    table: tl.tensor,
    slab: tl.tensor,
    FIRST: tl.constexpr,
    SLABS: tl.constexpr,
    CODE: tl.constexpr,
    dtype: tl.constexpr,
):
    """Decoded codes, or their entries, of slabs from `slab + FIRST` on: `[N, 16 * SLABS]`."""
    if SLABS > 1:
        HALF: tl.constexpr = SLABS // 2
        left = _values(w, mask, table, slab, FIRST, HALF, CODE, dtype)
        return _beside(left, _values(w, mask, table, slab, FIRST + HALF, HALF, CODE, dtype))
    elif table is None:
        return _decoded(_pairs(w, mask, slab, FIRST, CODE.bits), CODE.bits, CODE.zero).to(dtype)
    elif dtype == tl.bfloat16:
        words = tl.load(w + (slab // 4 + FIRST // 4) * 8, mask=mask, other=0)
        return _neighbours(_entry(table, words, FIRST % 4), _entry(table, words >> 16, FIRST % 4))
    else:
        return tl.load(table + _halves(_pairs(w, mask, slab, FIRST, 4)).to(tl.int32))


@triton.jit
def _beside(left: tl.tensor, right: tl.tensor):
    """Two `[N, columns]` as one."""
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


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
def _levels(
    fine: tl.tensor, coarse: tl.tensor, at: tl.tensor, coarse_at: tl.tensor, mask: tl.tensor, DIVIDES: tl.constexpr
):
    """One of the `Levels` for each row: float32 `[N, 1]`."""
    levels = tl.load(fine + at, mask=mask, other=0.0).to(tl.float32)
    if coarse is not None:
        shared = tl.load(coarse + coarse_at, mask=mask, other=1.0).to(tl.float32)
        levels = tl.div_rn(levels, shared) if DIVIDES else levels * shared
    return levels


@triton.jit
def _scaling(
    leaves: tl.tuple,
    row: tl.tensor,
    e: tl.tensor,
    mask: tl.tensor,
    step: tl.tensor,
    COLUMN: tl.constexpr,
    CODE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scale, zero and offset of each row at a step's column: float32 `[N, 1]`, or None."""
    scales, coarse_scales, zeros, offsets, coarse_offsets = leaves
    at = row * (K // CODE.group) + _group(step, COLUMN, CODE.group, BLOCK_K)
    if CODE.coarse_group == 0:
        coarse_at = e + tl.zeros_like(row)
    else:
        coarse_at = row * (K // CODE.coarse_group) + _group(step, COLUMN, CODE.coarse_group, BLOCK_K)
    scale, zero, offset = _levels(scales, coarse_scales, at, coarse_at, mask, CODE.divides), None, None
    if zeros is not None:
        zero = _levels(zeros, None, at, coarse_at, mask, False)
    if offsets is not None:
        offset = _levels(offsets, coarse_offsets, at, coarse_at, mask, False)
    return scale, zero, offset


@triton.jit
def _weights(
    w: tl.tensor,
    leaves: tl.tuple,
    row: tl.tensor,
    e: tl.tensor,
    mask: tl.tensor,
    table: tl.tensor,
    step: tl.tensor,
    slab: tl.tensor,
    FIRST: tl.constexpr,
    SLABS: tl.constexpr,
    CODE: tl.constexpr,
    dtype: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights of slabs from `slab + FIRST` on: `[N, 16 * SLABS]`, computed in float32 and rounded once."""
    if CODE.alike < 16 * SLABS:
        HALF: tl.constexpr = SLABS // 2
        left = _weights(w, leaves, row, e, mask, table, step, slab, FIRST, HALF, CODE, dtype, K, BLOCK_K)
        right = _weights(w, leaves, row, e, mask, table, step, slab, FIRST + HALF, HALF, CODE, dtype, K, BLOCK_K)
        return _beside(left, right)
    else:
        if K % BLOCK_K != 0:
            mask &= step * BLOCK_K + 16 * FIRST < K
        values = _values(w, mask, table, slab, FIRST, SLABS, CODE, dtype).to(tl.float32)
        scale, zero, offset = _scaling(leaves, row, e, mask, step, 16 * FIRST, CODE, K, BLOCK_K)
        if zero is not None:
            values -= zero
        values *= scale
        if offset is not None:
            values += offset
        return values.to(dtype)


@triton.jit
def _matmul_kernel(
    x: tl.tensor,  # [rows, K]
    sums: tl.tensor,  # float32 [rows, K / alike]: of neighbours in x; or None
    w: tl.tensor,  # uint32 [experts, N, K * bits / 32]
    table: tl.tensor,  # float32 [experts, 16], or None
    scales: tl.tensor,  # [experts, N, K / group]
    coarse_scales: tl.tensor,  # [experts, N, K / coarse_group], or [experts] if that is 0, or None
    zeros: tl.tensor,  # [experts, N, K / group], or None
    offsets: tl.tensor,  # like scales, or None
    coarse_offsets: tl.tensor,  # like coarse_scales
    expert: tl.tensor,  # int32 [tiles], or None for one tile and one matrix
    y: tl.tensor,  # float32 [splits, rows, N]
    CODE: tl.constexpr,
    SCALES_SUMS: tl.constexpr,  # whether sums of products are scaled; otherwise weights are
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
    n = (first_n + tl.arange(0, BLOCK_N))[:, None]
    in_m, in_n = row < ROWS, n < N
    e = tl.full((), 0, tl.int64)
    if expert is not None:
        e = tl.load(expert + tile).to(tl.int64)
        if e < 0:
            return
        if table is not None:
            table += e * 16
    if table is not None and x.dtype.element_ty == tl.bfloat16:
        table = _plane(table, 0), _plane(table, 8)
    m = tile * ROWS + row
    WIDTH: tl.constexpr = CODE.alike if SCALES_SUMS else BLOCK_K  # of a dot
    k = tl.arange(0, WIDTH)
    x += m[:, None] * K + k[None, :]
    n_of_all = e * N + n
    w += n_of_all * (K * CODE.bits // 32) + tl.arange(0, 8)[None, :]
    leaves = scales, coarse_scales, zeros, offsets, coarse_offsets
    WHOLE: tl.constexpr = BLOCK_K * (CODE.bits & -CODE.bits) % 256 == 0  # chunks

    split = tl.program_id(2)
    first = split * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, tl.cdiv(K, BLOCK_K))
    acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        words, slab = (w + i * (BLOCK_K * CODE.bits // 32), 0) if WHOLE else (w, i * (BLOCK_K // 16))
        for j in tl.static_range(BLOCK_K // WIDTH):
            start = i * BLOCK_K + j * WIDTH
            x_mask, w_mask = in_m[:, None], in_n
            if K % BLOCK_K != 0:
                x_mask, w_mask = x_mask & (k < K - start)[None, :], w_mask & (start < K)
            xs = tl.load(x + start, mask=x_mask, other=0.0)
            if SCALES_SUMS:
                values = _values(words, w_mask, table, slab, j * WIDTH // 16, WIDTH // 16, CODE, xs.dtype)
                scale, zero, offset = _scaling(leaves, n_of_all, e, w_mask, i, j * WIDTH, CODE, K, BLOCK_K)
                acc += tl.dot(values, xs.T, input_precision="ieee") * scale
                if sums is not None:
                    at = m * (K // WIDTH) + i * (BLOCK_K // WIDTH) + j
                    x_sum = tl.load(sums + at, mask=in_m & (start < K), other=0.0)[None, :]
                    if zero is not None:
                        acc -= zero * scale * x_sum
                    if offset is not None:
                        acc += offset * x_sum
            else:
                weights = _weights(
                    words, leaves, n_of_all, e, w_mask, table, i, slab, 0, WIDTH // 16, CODE, xs.dtype, K, BLOCK_K
                )
                acc = tl.dot(weights, xs.T, acc, input_precision="ieee")

    y += (split.to(tl.int64) * ALL_ROWS + m)[None, :] * N + n
    tl.store(y, acc, mask=in_m[None, :] & in_n)
