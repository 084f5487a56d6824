"""Matmuls of blockwise FP8 (and INT8) weights on NVIDIA GPUs from Hopper on, in Triton.

The scale of a block is constant along the k of one step. So the matrix instruction sums each step's products, which are
then scaled in float32, as in DeepSeek's `fp8_gemm`. That also limits Hopper's FP8 sums, which are narrower than
float32, to 128 terms.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import lax

from jaxllm.formats.scaled import Scaled
from jaxllm.kernels import gpu
from jaxllm.kernels.activations import Quantized, group_of, rounds_to_powers
from jaxllm.kernels.gpu import Tile

# Each step waits for the matrix instruction, so two or more programs should fit on a multiprocessor. Its 227 KB of
# shared memory hold `stages` times `n * k` codes and `m * k` numbers. Few rows get a small n: that makes more programs,
# which read more of the weights at once. Other sizes were compiled, none was measured: see the tests.
TILES = (Tile(16, 64, 128, 4, 5), Tile(32, 64, 128, 4, 4), Tile(64, 64, 128, 4, 4), Tile(128, 128, 128, 8, 3))
# float32 means float32, which no matrix instruction has. Here n is 32 because from 64 on, Triton 3.7.1 uses TF32's
# instruction on Blackwell, whatever `input_precision` says.
TILES_FLOAT32 = (Tile(16, 32, 32, 4, 3), Tile(64, 32, 32, 4, 3))
SMALLEST_K = 16, 32  # of one matrix instruction, for bfloat16 and for FP8


def refuses(op: str, x: jax.Array, weight: Scaled) -> str | None:
    """Why `op` cannot be served here, or None.

    Args:
        op: "matmul", "grouped_matmul", "act_quant" or "weight_dequant".
        x: `[..., in]`, an array or its shape; ignored by "weight_dequant".
    """
    problem = gpu.refuses(None if op == "weight_dequant" or isinstance(x, Quantized) else x)
    if problem or op in ("act_quant", "weight_dequant"):
        return problem
    group = group_of(weight)
    quantized = group is not None
    if quantized and weight.values.dtype != jnp.float8_e4m3fn:
        return f"weights are {weight.values.dtype}, and activations are rounded to float8_e4m3fn: both must be that"
    if _step(weight) < SMALLEST_K[quantized]:
        sizes = [f"blocks of {weight.block[1]} columns"]
        sizes += [f"activations in groups of {group}"] if quantized else []
        return f"{' and '.join(sizes)}: the GPU kernels want multiples of {SMALLEST_K[quantized]}"
    return None


def matmul(x: jax.Array | Quantized, weight: Scaled) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`; W8A8 if the weight requires groups to be rounded."""
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), x)
    return _matmul(rows, weight, None).reshape(*x.shape[:-1], weight.shape[-2])


def grouped_matmul(x: jax.Array | Quantized, stack: Scaled, expert: jax.Array) -> jax.Array:
    """`matmul` for tiles of rows, each with its own matrix, see `dense.grouped_matmul`."""
    return _matmul(x, stack, expert)


def act_quant(x: jax.Array, group: int = 128, power_of_two: bool = False) -> tuple[jax.Array, jax.Array]:
    """Activations `[..., in]` as FP8 with a scale for each `group` neighbours, see `reference.act_quant`."""
    rows, size = math.prod(x.shape[:-1]), x.shape[-1]
    block = min(16, triton.next_power_of_2(rows))
    groups = triton.cdiv(size, group)
    values = jax.ShapeDtypeStruct(x.shape, jnp.float8_e4m3fn)
    return gpu.launch(
        _act_quant_kernel,
        x,
        out_type=(values, jax.ShapeDtypeStruct((*x.shape[:-1], groups), jnp.float32)),
        grid=(groups, triton.cdiv(rows, block)),
        ROWS=rows,
        K=size,
        GROUP=group,
        POWER_OF_TWO=power_of_two,
        BLOCK=block,
        WIDTH=triton.next_power_of_2(group),
    )


def weight_dequant(weight: Scaled, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
    """The matrix `[*batch, out, in]`: dequantized in float32, then rounded once."""
    *batch, n, k = weight.shape
    return gpu.launch(
        _weight_dequant_kernel,
        weight.values,
        _scales(weight),
        out_type=jax.ShapeDtypeStruct(weight.shape, dtype),
        grid=(triton.cdiv(k, 128), triton.cdiv(n, 32), math.prod(batch)),
        N=n,
        K=k,
        **_constants(weight),
        BLOCK_N=32,
        BLOCK_K=128,
    )


def _matmul(x: jax.Array | Quantized, weight: Scaled, expert: jax.Array | None) -> jax.Array:
    """`x[rows, in]` times one matrix, or tiles of rows times the matrices `expert[tiles]` of a stack."""
    table = TILES_FLOAT32 if x.dtype == jnp.float32 and group_of(weight) is None else TILES
    tiles = 1 if expert is None else expert.shape[0]
    rows, (n, k) = x.shape[0] // tiles, weight.shape[-2:]
    tile = gpu.tile_for(rows, table)
    tile = tile._replace(k=min(tile.k, _step(weight)))
    group = group_of(weight)
    if group is not None and not isinstance(x, Quantized):
        x = Quantized(*act_quant(x, group, rounds_to_powers(weight)), group)
    codes, x_scales = (x.codes, x.scales) if isinstance(x, Quantized) else (x, None)
    work = gpu.Work.of(rows, n, k, tile, tiles)
    y = gpu.launch(
        _matmul_kernel,
        codes,
        x_scales,
        weight.values,
        _scales(weight),
        expert,
        out_type=work.out_type,
        grid=work.grid,
        warps=tile.warps,
        stages=tile.stages,
        GROUP=group,
        **_constants(weight),
        **work.constants,
    )
    return jnp.sum(y, axis=0)


def _step(weight: Scaled) -> int:
    """The largest number of columns, up to 128, that a step over k can have while its scales are constant."""
    return math.gcd(128, weight.block[1] or 0, group_of(weight) or 0)


def _constants(weight: Scaled) -> dict[str, Any]:
    """How many rows and columns share a scale, and the factor that all scales share."""
    (rows, columns), (n, k) = weight.block, weight.shape[-2:]
    return {"SCALED_N": rows or n, "SCALED_K": columns or k, "FACTOR": weight.factor}


def _scales(weight: Scaled) -> jax.Array:
    """Scales in a dtype that Triton has: float8_e8m0fnu as its bits."""
    is_power = weight.scales.dtype == jnp.float8_e8m0fnu
    return lax.bitcast_convert_type(weight.scales, jnp.uint8) if is_power else weight.scales


@triton.jit
def _float32(scales: tl.tensor):
    """Scales of any dtype as float32; uint8 are the bits of float8_e8m0fnu."""
    if scales.dtype == tl.uint8:
        bits = tl.where(scales == 0, 1 << 22, scales.to(tl.int32) << 23)  # 2^-127 is subnormal
        return tl.where(scales == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    else:  # noqa: RET505 (Triton compiles what follows a return, whatever the condition)
        return scales.to(tl.float32)


@triton.jit
def _matmul_kernel(
    x: tl.tensor,  # [rows, K]: floats, or codes with x_scales
    x_scales: tl.tensor,  # float32 [rows, ceil(K / GROUP)] or None
    w: tl.tensor,  # codes [experts, N, K]
    w_scales: tl.tensor,  # [experts, ceil(N / SCALED_N), ceil(K / SCALED_K)]
    expert: tl.tensor,  # int32 [tiles], or None for one tile and one matrix
    y: tl.tensor,  # float32 [splits, rows, N]
    SCALED_N: tl.constexpr,
    SCALED_K: tl.constexpr,
    FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
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
    # One scale for all of the program's rows, if it can be: that saves a multiplication for each number of a step.
    scaled_n = first_n + tl.arange(0, 1 if SCALED_N % BLOCK_N == 0 else BLOCK_N)
    if expert is not None:
        e = tl.load(expert + tile).to(tl.int64)
        if e < 0:
            return
        w += e * N * K
        w_scales += e * tl.cdiv(N, SCALED_N) * tl.cdiv(K, SCALED_K)
    m = tile * ROWS + row
    k = tl.arange(0, BLOCK_K)
    x += m[:, None] * K + k[None, :]
    w += n[:, None] * K + k[None, :]
    w_scales += scaled_n // SCALED_N * tl.cdiv(K, SCALED_K)
    in_m, in_n = row < ROWS, n < N

    split = tl.program_id(2)
    first = split * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, tl.cdiv(K, BLOCK_K))
    acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
    for i in tl.range(first, last, num_stages=STAGES):
        start = i * BLOCK_K
        x_mask, w_mask = in_m[:, None], in_n[:, None]
        if K % BLOCK_K != 0:
            x_mask, w_mask = x_mask & (k < K - start)[None, :], w_mask & (k < K - start)[None, :]
        xs = tl.load(x + start, mask=x_mask, other=0.0)
        codes = tl.load(w + start, mask=w_mask, other=0.0)
        scale = _float32(tl.load(w_scales + start // SCALED_K, mask=scaled_n < N, other=0))[:, None] * FACTOR
        if x_scales is None:
            # By way of half and float32: two conversions at full speed, where the direct one runs at a quarter of it.
            codes = (codes if codes.dtype == tl.int8 else codes.to(tl.float16)).to(tl.float32).to(xs.dtype)
        else:
            at = m * tl.cdiv(K, GROUP) + start // GROUP
            scale = scale * tl.load(x_scales + at, mask=in_m, other=0)[None, :]
        acc += tl.dot(codes, xs.T, input_precision="ieee") * scale

    y += (split.to(tl.int64) * ALL_ROWS + m)[None, :] * N + n[:, None]
    tl.store(y, acc, mask=in_m[None, :] & in_n[:, None])


@triton.jit
def _act_quant_kernel(
    x: tl.tensor,  # [ROWS, K]
    values: tl.tensor,  # e4m3 [ROWS, K]
    scales: tl.tensor,  # float32 [ROWS, ceil(K / GROUP)]
    ROWS: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # the power of two from GROUP on
):
    group = tl.program_id(0)
    row = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    k = tl.arange(0, WIDTH)
    at = row[:, None] * K + (group * GROUP + k)[None, :]
    mask = (row < ROWS)[:, None] & ((k < GROUP) & (group * GROUP + k < K))[None, :]
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(wide), axis=1)
    # Rounded to nearest; a plain `/` is an approximation on a GPU.
    scale = tl.where(peak == 0, 1.0, tl.div_rn(peak, tl.full([BLOCK], 448.0, tl.float32)))
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    ratio = tl.div_rn(wide, tl.broadcast_to(scale[:, None], (BLOCK, WIDTH)))
    ratio = tl.clamp(ratio, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(values + at, ratio.to(tl.float8e4nv), mask=mask)
    tl.store(scales + row * tl.cdiv(K, GROUP) + group, scale, mask=row < ROWS)


@triton.jit
def _weight_dequant_kernel(
    values: tl.tensor,  # codes [batch, N, K]
    scales: tl.tensor,  # [batch, ceil(N / SCALED_N), ceil(K / SCALED_K)]
    y: tl.tensor,  # [batch, N, K]
    N: tl.constexpr,
    K: tl.constexpr,
    SCALED_N: tl.constexpr,
    SCALED_K: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (k < K)[None, :]
    at = (batch * N + n)[:, None] * K + k[None, :]
    rows, columns = tl.cdiv(N, SCALED_N), tl.cdiv(K, SCALED_K)
    block = (batch * rows + n // SCALED_N)[:, None] * columns + (k // SCALED_K)[None, :]
    codes = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
    decoded = codes * _float32(tl.load(scales + block, mask=mask, other=0)) * FACTOR
    tl.store(y + at, decoded.to(y.dtype.element_ty), mask=mask)
