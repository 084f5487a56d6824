"""Matmuls of blockwise FP8 weights on TPUs: codes go from HBM to VMEM, where a block of rows is dequantized once.

W8A16: a block is dequantized to the activations' dtype, scales included. W8A8: codes are multiplied by codes, and each
product of 128 columns (a block's, or a group's if that is smaller) is multiplied by both scales in float32, so only the
activations are rounded. Before TPU7x the MXU has no e4m3, so codes are widened to bfloat16, which is exact; TPU7x
multiplies e4m3 directly.
"""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxllm.formats.scaled import E4M3_MAX, Scaled, quotient, scale_for
from jaxllm.kernels import tpu
from jaxllm.kernels.activations import Quantized, each_row, group_of, rounds_to_powers

GROUP = 32  # rows that are dequantized together: as many as a register of bytes holds
QUANTIZED = 1 << 21  # values of x that are rounded in one step
LARGEST_UNIT = 512  # rows of the weight that a step must hold together, at most


def blocks(weight: Scaled) -> tuple[int, int]:
    """Rows and columns of a block, for a weight that has blocks."""
    rows, columns = weight.block
    assert rows is not None and columns is not None
    return rows, columns


def apart(weight: Scaled) -> tuple[Scaled, jax.Array | None]:
    """A matrix with one scale for each row, or one in all, as blocks of scale 1, and what results are multiplied by,
    float32 `[*batch, out]`; None for a matrix that has blocks.

    Nothing but x is rounded then, where `dequantize` rounds the products of codes and scales.
    """
    rows, columns = weight.block
    if columns is not None:
        return weight, None
    *batch, n, k = weight.shape
    scales = jnp.repeat(weight.scales[..., 0].astype(jnp.float32), rows or n, axis=-1)[..., :n]
    ones = jnp.ones((*batch, -(-n // tpu.LANES), -(-k // tpu.LANES)), jnp.float32)
    return replace(weight, scales=ones, block=(tpu.LANES, tpu.LANES)), scales


def refuses(op: str, x: jax.Array, weight: Scaled) -> str | None:
    """Why `op` cannot be done here, in words for the user; None: it can."""
    if op == "act_quant":
        return None
    if weight.values.dtype != jnp.float8_e4m3fn or weight.factor != 1:
        return f"codes of {weight.values.dtype.name}, the kernel takes float8_e4m3fn"
    if None in weight.block and (weight.block[1] is not None or op == "weight_dequant"):
        return "one scale for a whole row or column, the kernel takes blocks"
    weight = jax.eval_shape(apart, weight)[0]
    rows, columns = blocks(weight)
    if not isinstance(x, Quantized) and x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"activations of {x.dtype.name}, the kernel takes float32 and bfloat16"
    if rows < 8 or rows > LARGEST_UNIT or (rows % tpu.LANES and tpu.LANES % rows):
        return f"blocks of {rows} rows, the kernel takes 8, 16, 32, 64 and multiples of 128 up to {LARGEST_UNIT}"
    if columns % tpu.LANES and tpu.LANES % columns:
        return f"blocks of {columns} columns, the kernel takes multiples and divisors of {tpu.LANES}"
    if op == "weight_dequant":
        fits = tile_sizes(1, weight, jnp.float32)
        return None if fits else f"rows of {weight.shape[-1]} columns do not fit into the chip's vector memory"
    group = group_of(weight)
    if group and group % columns and columns % group:
        return f"activations in groups of {group} with blocks of {columns} columns, one has to divide the other"
    if tile_sizes(min(x.size // x.shape[-1], tpu.LANES), weight, x.dtype) is None:
        return f"rows of {x.shape[-1]} columns do not fit into the chip's vector memory"
    return None


def matmul(x: jax.Array | Quantized, weight: Scaled, *, interpret: tpu.Interpret = False) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`."""
    weight, scales = apart(weight)
    rows = math.prod(x.shape[:-1])
    tile = tpu.fitting(tile_sizes(rows, weight, x.dtype)).tile
    tiles = jax.tree.map(lambda leaf: tpu.tiles_of(leaf.reshape(-1, leaf.shape[-1]), tile), x)
    stack = jax.tree.map(lambda leaf: leaf[None], weight)
    y = _multiply(tiles, stack, jnp.zeros(tiles.shape[0], jnp.int32), "block_fp8_matmul", interpret)
    y = y.reshape(-1, y.shape[-1])[:rows].reshape(*x.shape[:-1], y.shape[-1])
    return y if scales is None else y * scales


def grouped_matmul(
    x: jax.Array | Quantized, stack: Scaled, expert: jax.Array, *, interpret: tpu.Interpret = False
) -> jax.Array:
    """Tiles of rows, each times its own matrix, see `dense.grouped_matmul`."""
    stack, scales = apart(stack)
    tiles = jax.tree.map(lambda leaf: leaf.reshape(len(expert), -1, leaf.shape[-1]), x)
    y = _multiply(tiles, stack, expert, "block_fp8_grouped_matmul", interpret)
    y = y.reshape(-1, y.shape[-1])
    return y if scales is None else y * each_row(scales, expert, len(y))


def tile_sizes(m: int, weight: Scaled, dtype: jax.typing.DTypeLike) -> tpu.Sizes | None:
    """What a grid step holds for `m` rows of `dtype`; None: it does not fit."""
    *_, n, k = weight.shape
    itemsize = 2 if group_of(weight) else jnp.dtype(dtype).itemsize
    return tpu.sizes(m, n, k, row_bytes=k, itemsize=itemsize, unit=math.lcm(blocks(weight)[0], tpu.LANES))


def _multiply(
    tiles: jax.Array | Quantized, stack: Scaled, expert: jax.Array, name: str, interpret: tpu.Interpret
) -> jax.Array:
    """`tiles[tiles, tile, in]` times their experts: `[tiles, tile, out]`."""
    _, n, k = stack.shape
    block = tpu.fitting(tile_sizes(tiles.shape[1], stack, tiles.dtype)).block
    scales = _scales_of_blocks(stack, block)
    group = group_of(stack)
    scratch: tuple[jax.ShapeDtypeStruct, ...]
    operands: list[Any]
    if group is None:
        scratch = (jax.ShapeDtypeStruct((block, k), tiles.dtype),)
        decode, product, operands = _scaled(blocks(stack)), _plain_product, [tiles]
    else:
        if not isinstance(tiles, Quantized):
            power_of_two = rounds_to_powers(stack)
            tiles = Quantized(*act_quant(tiles, group, power_of_two, interpret=interpret), group)
        operands, scales = [tiles.codes, tiles.scales], scales.swapaxes(-1, -2)
        native = not interpret and _multiplies_e4m3()
        scratch = () if native else (jax.ShapeDtypeStruct((block, k), jnp.bfloat16),)
        decode, product = _nothing if native else _widened, _scaled_product(blocks(stack), group)
    leaves = tpu.rows(stack.values, block), tpu.blocks(scales)
    return tpu.multiply(operands, leaves, expert, n, block, scratch, decode, product, name, interpret)


def _scales_of_blocks(stack: Scaled, block: int) -> jax.Array:
    """float32 `[experts, blocks, scales of a block's rows, ceil(in / columns)]`: few numbers, which fit any tiling."""
    scales, rows = stack.scales.astype(jnp.float32), block // blocks(stack)[0]
    pad = -scales.shape[1] % rows
    return jnp.pad(scales, ((0, 0), (0, pad), (0, 0))).reshape(len(scales), -1, rows, scales.shape[2])


def _scaled(block: tuple[int, int]):
    """Dequantizing with scales: `values[rows, in]`, `scales[rows / block[0], in / block[1]]` -> `decoded[rows, in]`."""
    unit = math.lcm(block[0], GROUP)
    count = unit // block[0]

    def decode(values: jax.Ref, scales: jax.Ref, decoded: jax.Ref) -> None:
        def one_unit(i: jax.Array, _: None) -> None:
            # Row by row: Mosaic loads several only from where it can prove that a register begins.
            scale = jnp.concatenate([scales[pl.ds(i * count + row, 1), :] for row in range(count)])
            for start, width in tpu.chunks(values.shape[1]):
                spread = tpu.spread(scale, block[1], start, width)
                spread = jnp.repeat(spread, GROUP // count, axis=0) if count > 1 else spread
                for row in range(0, unit, GROUP):
                    at = pl.ds(pl.multiple_of(i * unit + row, GROUP), GROUP), slice(start, start + width)
                    decoded[at] = (values[at].astype(jnp.float32) * spread).astype(decoded.dtype)

        lax.fori_loop(0, values.shape[0] // unit, one_unit, None)

    return decode


def _plain_product(x: jax.Ref, values: jax.Ref, scales: jax.Ref, decoded: jax.Ref) -> jax.Array:
    return tpu.dot(x[...], decoded[...])


def _widened(values: jax.Ref, scales: jax.Ref, decoded: jax.Ref) -> None:
    """Converting codes to the operand's dtype, without scales."""

    def one_group(i: jax.Array, _: None) -> None:
        at = pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)
        for start, width in tpu.chunks(values.shape[1]):
            decoded[at, start : start + width] = values[at, start : start + width].astype(decoded.dtype)

    lax.fori_loop(0, values.shape[0] // GROUP, one_group, None)


def _multiplies_e4m3() -> bool:
    """Whether the target chip can multiply e4m3."""
    return pltpu.get_tpu_info().is_matmul_supported(jnp.float8_e4m3fn, jnp.float8_e4m3fn)


def _nothing(values: jax.Ref, scales: jax.Ref) -> None:
    """No decoding, for a chip that multiplies codes."""


def _scaled_product(block: tuple[int, int], group: int):
    """Scaled products of codes: `codes[tile, in]`, `x_scales[tile, in / group]` and a block's transposed scales."""
    step = min(block[1], group)

    def product(codes: jax.Ref, x_scales: jax.Ref, values: jax.Ref, scales: jax.Ref, *widened: jax.Ref) -> jax.Array:
        weight = widened[0] if widened else values
        y = jnp.zeros((codes.shape[0], weight.shape[0]), jnp.float32)
        for start in range(0, codes.shape[1], step):
            columns = slice(start, min(start + step, codes.shape[1]))
            part = tpu.dot(codes[:, columns].astype(weight.dtype), weight[:, columns])
            row = start // block[1]
            of_rows = tpu.spread(scales[row : row + 1, :], block[0], 0, y.shape[1])
            y += part * x_scales[:, start // group : start // group + 1] * of_rows
        return y

    return product


def act_quant(
    x: jax.Array, group: int = 128, power_of_two: bool = False, *, interpret: tpu.Interpret = False
) -> tuple[jax.Array, jax.Array]:
    """Activations as FP8, see `reference.act_quant`: e4m3 `[..., in]` and float32 `[..., ceil(in / group)]`."""
    *batch, k = x.shape
    rows = x.reshape(-1, k)
    tile, groups = min(len(rows), max(GROUP, QUANTIZED // k // GROUP * GROUP)), -(-k // group)

    def kernel(x: jax.Ref, values: jax.Ref, scales: jax.Ref) -> None:
        for i in range(groups):
            columns = slice(i * group, min((i + 1) * group, k))
            wide = x[:, columns].astype(jnp.float32)
            peak = jnp.max(jnp.abs(wide), axis=1, keepdims=True)
            scale = scale_for(peak, E4M3_MAX, power_of_two)
            values[:, columns] = jnp.clip(quotient(wide, scale), -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
            scales[:, i : i + 1] = scale

    def whole(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((tile, columns), lambda i: (i, 0))

    values, scales = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(len(rows), tile),),
        in_specs=[whole(k)],
        out_specs=[whole(k), whole(groups)],
        out_shape=[
            tpu.result((len(rows), k), jnp.float8_e4m3fn, rows),
            tpu.result((len(rows), groups), jnp.float32, rows),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=tpu.VMEM_LIMIT),
        name="block_fp8_act_quant",
        interpret=interpret,
    )(rows)
    return values.reshape(*batch, k), scales.reshape(*batch, groups)


def weight_dequant(
    weight: Scaled, dtype: jax.typing.DTypeLike = jnp.bfloat16, *, interpret: tpu.Interpret = False
) -> jax.Array:
    """The matrix `[*batch, out, in]`: dequantized in float32, then rounded once."""
    *batch, n, k = weight.shape
    stack = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[-2:]), weight)
    block = tpu.fitting(tile_sizes(1, stack, dtype)).block
    scales = _scales_of_blocks(stack, block)

    def rows(*columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, block, *columns), lambda e, j: (e, j, 0))

    y = pl.pallas_call(
        _scaled(blocks(weight)),
        grid=(len(scales), pl.cdiv(n, block)),
        in_specs=[rows(k), pl.BlockSpec((None, None, *scales.shape[2:]), lambda e, j: (e, j, 0, 0))],
        out_specs=rows(k),
        out_shape=tpu.result(stack.shape, dtype, stack.values),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=tpu.VMEM_LIMIT
        ),
        name="block_fp8_weight_dequant",
        interpret=interpret,
    )(stack.values, scales)
    return y.reshape(*batch, n, k)
