"""Matmuls of MXFP4 weights on NVIDIA GPUs, in Triton, with unrounded activations (W4A16).

Codes are loaded packed and dequantized in registers. A byte holds columns 2k and 2k + 1. Triton would interleave the
dequantized columns through shared memory. Instead, even columns are multiplied by x's even columns and odd ones by its
odd ones. XLA first lays out x that way: a pass over x, which is small, and which fuses with the computation of x.

`tl.dot_scaled` would do all this in one line. But neither Hopper nor Blackwell multiplies bfloat16 by E2M1, so it
dequantizes too, with a sixth more instructions (compiled both ways for sm_90, 128 x 128). It takes no float32, and
Triton's interpreter does not have it.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxllm.formats.mxfp4 import BLOCK, MXFP4
from jaxllm.kernels import gpu
from jaxllm.kernels.gpu import Tile

# k counts columns, twice as many as bytes. For few rows, each row of a tile is then a full 128-byte line of memory.
# See `block_fp8.triton_gpu.TILES` for the rest.
TILES = (Tile(16, 64, 256, 4, 4), Tile(32, 64, 256, 4, 3), Tile(64, 128, 128, 8, 4), Tile(128, 128, 128, 8, 4))
TILES_FLOAT32 = (Tile(16, 32, 64, 4, 3), Tile(64, 32, 64, 8, 3))


def refuses(op: str, x: jax.Array, weight: MXFP4) -> str | None:
    """Why `op` ("matmul" or "grouped_matmul") cannot be served here, or None."""
    return gpu.refuses(x)


def matmul(x: jax.Array, weight: MXFP4) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`."""
    rows = x.reshape(-1, x.shape[-1])
    return _matmul(rows, weight, None).reshape(*x.shape[:-1], weight.shape[-2])


def grouped_matmul(x: jax.Array, stack: MXFP4, expert: jax.Array) -> jax.Array:
    """`matmul` for tiles of rows, each with its own matrix, see `dense.grouped_matmul`."""
    return _matmul(x, stack, expert)


def _matmul(x: jax.Array, weight: MXFP4, expert: jax.Array | None) -> jax.Array:
    """`x[rows, in]` times one matrix, or tiles of rows times the matrices `expert[tiles]` of a stack."""
    tiles = 1 if expert is None else expert.shape[0]
    rows, (n, k) = x.shape[0] // tiles, weight.shape[-2:]
    tile = gpu.tile_for(rows, TILES_FLOAT32 if x.dtype == jnp.float32 else TILES)
    work = gpu.Work.of(rows, n, k, tile, tiles)
    y = gpu.launch(
        _matmul_kernel,
        x.reshape(-1, k // 2, 2).swapaxes(1, 2),
        weight.blocks,
        weight.scales,
        expert,
        out_type=work.out_type,
        grid=work.grid,
        warps=tile.warps,
        stages=tile.stages,
        GROUP=BLOCK // 2,
        **work.constants,
    )
    return jnp.sum(y, axis=0)


@triton.jit
def _as(bits: tl.tensor, dtype: tl.constexpr):
    """The float32 or bfloat16 whose upper (or only) 16 bits are `bits`."""
    if dtype == tl.bfloat16:
        return bits.to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505 (Triton compiles the code after a return, whatever the condition)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _power(scales: tl.tensor, dtype: tl.constexpr):
    """`2^(scales - 127)`; scale 0 gives a subnormal, scale 255 a NaN."""
    bits = scales.to(tl.uint16) << 7
    bits = tl.where(bits == 0, 0x40, tl.where(bits == 0x7F80, 0x7FC0, bits)).to(tl.uint16)
    return _as(bits, dtype)


@triton.jit
def _decoded(nibbles: tl.tensor, dtype: tl.constexpr):
    """E2M1 codes (uint16) as floats.

    A code's three lower bits become the lowest bits of a float's exponent and the highest of its significand. The
    float, perhaps subnormal, is 2^126 too small. One multiplication copies the code there and to the sign.
    """
    return _as(nibbles * 0x1040 & 0x81C0, dtype) * 8.507059173023462e37


@triton.jit
def _matmul_kernel(
    x: tl.tensor,  # [rows, 2, K / 2]: even columns, odd columns
    w: tl.tensor,  # uint8 [experts, N, K / 2]
    scales: tl.tensor,  # uint8 [experts, N, K / 2 / GROUP]
    expert: tl.tensor,  # int32 [tiles], or None for one tile and one matrix
    y: tl.tensor,  # float32 [splits, rows, N]
    GROUP: tl.constexpr,  # bytes that share a scale
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
    BYTES: tl.constexpr = K // 2
    BLOCK: tl.constexpr = BLOCK_K // 2
    if expert is not None:
        e = tl.load(expert + tile).to(tl.int64)
        if e < 0:
            return
        w += e * N * BYTES
        scales += e * N * (BYTES // GROUP)
    m = tile * ROWS + row
    k, group = tl.arange(0, BLOCK), tl.arange(0, BLOCK // GROUP)
    x += m[:, None] * K + k[None, :]
    w += n[:, None] * BYTES + k[None, :]
    scales += n[:, None] * (BYTES // GROUP) + group[None, :]
    in_m, in_n = row < ROWS, n < N

    split = tl.program_id(2)
    first = split * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, tl.cdiv(BYTES, BLOCK))
    acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
    # Too few bytes for a thread's asynchronous copy, so they are loaded a step ahead instead.
    next_scale = tl.load(
        scales + first * (BLOCK // GROUP),
        mask=in_n[:, None] & (group < BYTES // GROUP - first * (BLOCK // GROUP))[None, :],
        other=0,
    )
    for i in tl.range(first, last, num_stages=STAGES):
        start = i * BLOCK
        x_mask, w_mask = in_m[:, None], in_n[:, None]
        if BYTES % BLOCK != 0:
            x_mask, w_mask = x_mask & (k < BYTES - start)[None, :], w_mask & (k < BYTES - start)[None, :]
        even = tl.load(x + start, mask=x_mask, other=0.0)
        odd = tl.load(x + start + BYTES, mask=x_mask, other=0.0)
        codes = tl.load(w + start, mask=w_mask, other=0).to(tl.uint16)
        scale = _power(next_scale, even.dtype)
        ahead = (i + 1) * (BLOCK // GROUP)
        next_scale = tl.load(scales + ahead, mask=in_n[:, None] & (group < BYTES // GROUP - ahead)[None, :], other=0)
        scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCK // GROUP, GROUP)).reshape(BLOCK_N, BLOCK)
        low = _decoded(codes & 15, even.dtype) * scale
        high = _decoded(codes >> 4, even.dtype) * scale
        acc = tl.dot(low, even.T, acc, input_precision="ieee")
        acc = tl.dot(high, odd.T, acc, input_precision="ieee")

    y += (split.to(tl.int64) * ALL_ROWS + m)[None, :] * N + n[:, None]
    tl.store(y, acc, mask=in_m[None, :] & in_n[:, None])
