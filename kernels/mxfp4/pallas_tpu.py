"""Matmuls of MXFP4 weights on TPUs: packed bytes go from HBM to VMEM, where each block is dequantized once.

In a TPU's registers a 32-bit word holds bytes of four rows, or bfloat16 numbers of two rows. So integer arithmetic
alone turns words of packed bytes into words of bfloat16, two codes at a time, with the scale added to the exponents. It
takes 8 vector instructions for 1024 codes; dequantizing to float32, multiplying and rounding takes 13. The costs are
small: of every 32 rows the even ones come out first (the product restores the order), and the columns of low and of
high nibbles stay apart (x is split the same way, once).

Two kinds of scale that no encoder writes differ from the definition: 0, which stands for the subnormal 2^-127, counts
as 2^-126. And 253 and 254, with which some codes are infinite, make the row's products NaN, as 255 does by definition.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxllm.formats.mxfp4 import BLOCK, MXFP4
from jaxllm.kernels import tpu

PAIRS = 256  # columns that are split at once into even and odd: the MXU's size, and two registers' lanes
LARGEST_SCALE = 252  # 6 * 2^(252 - 127) is the largest that bfloat16 can hold
GROUP = 32  # rows that are dequantized together: as many as a register of bytes holds


def refuses(op: str, x: jax.Array, weight: MXFP4) -> str | None:
    """Why `op` cannot be done here, in words for the user; None: it can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"activations of {x.dtype.name}, the kernel multiplies float32 and bfloat16"
    if tile_sizes(min(x.size // x.shape[-1], tpu.LANES), weight, x.dtype) is None:
        return f"rows of {x.shape[-1]} columns do not fit into the chip's vector memory"
    return None


def matmul(x: jax.Array, weight: MXFP4, *, interpret: tpu.Interpret = False) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`."""
    rows = x.reshape(-1, x.shape[-1])
    tile = tpu.fitting(tile_sizes(len(rows), weight, x.dtype)).tile
    tiles = tpu.tiles_of(rows, tile)
    stack = jax.tree.map(lambda leaf: leaf[None], weight)
    y = _multiply(tiles, stack, jnp.zeros(len(tiles), jnp.int32), "mxfp4_matmul", interpret)
    return y.reshape(-1, y.shape[-1])[: len(rows)].reshape(*x.shape[:-1], y.shape[-1])


def grouped_matmul(x: jax.Array, stack: MXFP4, expert: jax.Array, *, interpret: tpu.Interpret = False) -> jax.Array:
    """Tiles of rows, each times its own matrix, see `dense.grouped_matmul`."""
    tiles = x.reshape(len(expert), -1, x.shape[-1])
    y = _multiply(tiles, stack, expert, "mxfp4_grouped_matmul", interpret)
    return y.reshape(-1, y.shape[-1])


def tile_sizes(m: int, weight: MXFP4, dtype: jax.typing.DTypeLike) -> tpu.Sizes | None:
    """What a grid step holds for `m` rows of `dtype`; None: it does not fit."""
    *_, n, k = weight.shape
    return tpu.sizes(m, n, k, row_bytes=k // 2 + k // BLOCK, itemsize=jnp.dtype(dtype).itemsize)


def _multiply(tiles: jax.Array, stack: MXFP4, expert: jax.Array, name: str, interpret: tpu.Interpret) -> jax.Array:
    """`tiles[tiles, tile, in]` times their experts: `[tiles, tile, out]`."""
    _, n, k = stack.shape
    _, tile, _ = tiles.shape
    block = tpu.fitting(tile_sizes(tile, stack, tiles.dtype)).block
    scratch = (
        jax.ShapeDtypeStruct((2, block, k // 2), tiles.dtype),
        jax.ShapeDtypeStruct((2, tile, k // 2), tiles.dtype),
        jax.ShapeDtypeStruct((PAIRS, PAIRS), tiles.dtype),
    )
    leaves = [tpu.rows(leaf, block) for leaf in (stack.blocks, stack.scales)]
    return tpu.multiply((tiles,), leaves, expert, n, block, scratch, _decode, _product, name, interpret)


def _decode(blocks: jax.Ref, scales: jax.Ref, decoded: jax.Ref, halves: jax.Ref, split: jax.Ref) -> None:
    """`blocks[block, in / 2]`, `scales[block, in / 32]` -> `decoded[2, block, in / 2]`: low nibbles, high nibbles.

    Of every 32 rows, the 16 even ones come first.
    """
    split[...] = _even_then_odd(PAIRS).astype(split.dtype)

    def one_group(i: jax.Array, _: None) -> None:
        row = pl.multiple_of(i * GROUP, GROUP)
        fields = jnp.clip(scales[pl.ds(row, GROUP), :].astype(jnp.int32), 1, LARGEST_SCALE) - 1
        exponents = pltpu.bitcast(fields.astype(jnp.uint8), jnp.int32)
        for start, count in tpu.chunks(blocks.shape[1]):
            codes = pltpu.bitcast(blocks[pl.ds(row, GROUP), start : start + count], jnp.int32)
            spread = tpu.spread(exponents, BLOCK // 2, start, count)
            for parity in (0, 1):
                scale = _shifted(spread, 7 - 8 * parity) & 0x7F807F80
                for nibble in (0, 1):
                    values = pltpu.bitcast(_bfloat16_words(codes, nibble, parity, scale), jnp.bfloat16)
                    half = pl.ds(pl.multiple_of(row + parity * GROUP // 2, GROUP // 2), GROUP // 2)
                    decoded[nibble, half, start : start + count] = values.astype(decoded.dtype)

    lax.fori_loop(0, blocks.shape[0] // GROUP, one_group, None)


def _bfloat16_words(codes: jax.Array, nibble: int, parity: int, scale: jax.Array) -> jax.Array:
    """From words with bytes of four rows, the nibbles of two rows times their scales: int32, two bfloat16s each.

    `scale` is the exponent of 0.5 times the scale, at the position of bfloat16's exponent.
    """
    at = 4 * nibble + 8 * parity
    large = (codes >> 1 | codes >> 2) & 0x11111111  # codes from 2 on: 1.0 and more
    # Code 1 is the subnormal 0.5. Without its last bit it is a normal number's code, one exponent below 1.0.
    normal = codes & (large | ~0x11111111)
    some = _shifted((large | codes) & 0x11111111, -at) & 0x00010001
    magnitude = (_shifted(normal, 6 - at) & 0x01C001C0) + scale
    sign = _shifted(codes, 12 - at) & (0x80008000 - (1 << 32))
    return magnitude & ((some << 15) - some) | sign


def _shifted(words: jax.Array, left: int) -> jax.Array:
    return words << left if left > 0 else words >> -left if left else words


def _even_then_odd(size: int) -> jax.Array:
    """A permutation matrix: a row times its transpose has the even columns first."""
    place, source = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    half = size // 2
    return source == jnp.where(place < half, 2 * place, 2 * (place - half) + 1)


def _product(
    x: jax.Ref, blocks: jax.Ref, scales: jax.Ref, decoded: jax.Ref, halves: jax.Ref, split: jax.Ref
) -> jax.Array:
    """`x[tile, in]` times the dequantized block, with the block's rows back in order: `[tile, block]`."""
    for start in range(0, x.shape[1], PAIRS):
        count = min(PAIRS, x.shape[1] - start)
        pick = split[...] if count == PAIRS else _even_then_odd(count).astype(split.dtype)
        # Exact: each sum has one term that is not zero. (If x is infinite somewhere, neighbours become NaN.)
        picked = tpu.dot(x[:, start : start + count], pick).astype(x.dtype)
        for half in (0, 1):
            halves[half, :, start // 2 : (start + count) // 2] = picked[:, half * count // 2 : (half + 1) * count // 2]
    y = _in_order(tpu.dot(halves[0], decoded[0]) + tpu.dot(halves[1], decoded[1]))
    beyond = (scales[...].astype(jnp.int32) > LARGEST_SCALE).astype(jnp.bfloat16)
    some = tpu.dot(jnp.ones((8, beyond.shape[1]), jnp.bfloat16), beyond)[:1]
    return jnp.where(some > 0, jnp.nan, y)


def _in_order(y: jax.Array) -> jax.Array:
    """Undo the reordering of a block's rows: `y[tile, block]` with the columns of each 32 in their original order."""
    lane = lax.broadcasted_iota(jnp.int32, (1, tpu.LANES), 1)
    place = lane % GROUP
    source = lane - place + place % 2 * (GROUP // 2) + place // 2
    parts = [tpu.gather_lanes(y[:, i : i + tpu.LANES], source) for i in range(0, y.shape[1], tpu.LANES)]
    return jnp.concatenate(parts, axis=1)
