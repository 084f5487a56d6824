"""Attention over a cache on NVIDIA GPUs, in Triton, with an online softmax: scores stay in registers.

A program multiplies one tile of queries by the blocks of keys that they see. Where that makes too few programs, as in a
decode step, the blocks are divided among several: each writes what it found and the logarithm of its weights' sum, and
XLA joins the parts. Because the blocks of each sequence are divided by themselves, short ones have no idle programs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxllm.kernels import gpu
from jaxllm.kernels.attention import Cached, Scoring
from jaxllm.kernels.flash.blocks import Rows, cache_refused, parts

LARGEST = 512  # numbers of a head
FEW = 64  # queries: with tiles of 16, reading the cache bounds what they cost


class Tile(NamedTuple):
    """What one program multiplies at once: `m` queries by `n` keys."""

    m: int
    n: int
    warps: int
    stages: int


def refuses(op: str, given: Cached, weight: Any) -> str | None:
    """Why this cannot be served, in words for users, or None."""
    if problem := gpu.refuses(given.q):
        return problem
    if problem := cache_refused(given):
        return problem
    if (largest := max(given.keys.shape[3], given.weighted.shape[3])) > LARGEST:
        return f"heads of {largest} numbers: the GPU kernels take up to {LARGEST}"
    return None


def tile_for(rows: int, dim: int, dtype: jax.typing.DTypeLike) -> Tile:
    """The tile for so many queries of heads of this size, a power of two. Of others that were compiled too, those with
    more keys or fewer warps spill registers; none was measured."""
    if jnp.dtype(dtype) == jnp.float32:  # which no matrix instruction has
        return Tile(16, 32, 8, 2)
    if rows <= FEW or dim > 256:
        return Tile(16, 64 if dim <= 256 else 32, 4, 3)
    return Tile(128, 64, 8, 2) if dim <= 128 else Tile(64, 64, 4, 2)


def attention(given: Cached, scoring: Scoring) -> jax.Array:
    """See `attention.attend`. A query that sees nothing gets zeros."""
    rows = Rows.of(given, scoring)
    batch, kv_heads, count, dim = rows.q.shape
    value_dim = given.weighted.shape[3]
    rope_heads, rope_dim = (0, 0) if given.rope is None else (given.rope.shape[1], given.rope.shape[3])
    sizes = {"D": dim, "V": value_dim, "R": rope_dim}
    widths = {name: max(triton.next_power_of_2(size), 16) for name, size in sizes.items()}
    tile = tile_for(count, max(widths["D"], widths["V"]), given.q.dtype)
    first, end = rows.spans(tile.m, tile.n, scoring.sliding_window)
    places = rows.key_positions
    programs, steps = batch * kv_heads * first.shape[1], triton.cdiv(places.shape[1], tile.n)
    splits = min(max(gpu.PROGRAMS // programs, 1), max(steps // gpu.FEWEST_STEPS, 1))
    cached = {name: (x, scales) for name, x, scales in parts(given)}
    shape = splits, batch, kv_heads, count
    y, weight = gpu.launch(
        _attention_kernel,
        rows.q,
        rows.rope,
        *cached["keys"],
        *cached.get("rope", (None, None)),
        *cached.get("values", (None, None)),
        rows.positions,
        places,
        rows.sinks,
        given.rows,
        first,
        end,
        out_type=(
            jax.ShapeDtypeStruct((*shape, value_dim), given.q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        grid=(first.shape[1], splits, batch * kv_heads),
        warps=tile.warps,
        stages=tile.stages,
        ROWS=count,
        HEADS=kv_heads,
        ROPE_HEADS=rope_heads,
        LENGTH=given.keys.shape[2],
        PLACES=places.shape[1],
        SHARED=len(places) == 1,
        DIM=dim,
        VALUE_DIM=value_dim,
        ROPE_DIM=rope_dim,
        **widths,
        WINDOW=scoring.sliding_window,
        CAP=scoring.score_cap,
        SPLITS=splits,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        STAGES=tile.stages,
    )
    if splits > 1:
        y = jnp.sum(y * jax.nn.softmax(weight, axis=0)[..., None], axis=0, keepdims=True).astype(given.q.dtype)
    return rows.result(y[0], given)


@triton.jit
def _numbers(x: tl.tensor, dtype: tl.constexpr):
    """A block of a cache, or codes without their scales."""
    if x.dtype == tl.uint8:
        x = x.to(tl.float8e4nv, bitcast=True)
    return x.to(dtype)


@triton.jit
def _attention_kernel(
    q: tl.tensor,  # [batch, HEADS, ROWS, DIM]
    q_rope: tl.tensor,  # [batch, HEADS, ROWS, ROPE_DIM], or None
    keys: tl.tensor,  # [sequences, HEADS, LENGTH, DIM]
    key_scales: tl.tensor,  # float32 [sequences, HEADS, LENGTH], or None
    rope: tl.tensor,  # [sequences, ROPE_HEADS, LENGTH, ROPE_DIM], or None
    rope_scales: tl.tensor,
    values: tl.tensor,  # [sequences, HEADS, LENGTH, VALUE_DIM], or None: the keys
    value_scales: tl.tensor,
    positions: tl.tensor,  # int32 [batch, ROWS]
    places: tl.tensor,  # int32 [batch, PLACES], SHARED: [1, PLACES]; the positions of keys
    sinks: tl.tensor,  # float32 [HEADS, ROWS], or None
    sequences: tl.tensor,  # int32 [batch], or None
    first: tl.tensor,  # int32 [batch, tiles]: the first block that a tile sees
    end: tl.tensor,
    y: tl.tensor,  # [SPLITS, batch, HEADS, ROWS, VALUE_DIM]
    weight: tl.tensor,  # float32 [SPLITS, batch, HEADS, ROWS]: logarithms of the weights' sums
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    ROPE_HEADS: tl.constexpr,
    LENGTH: tl.constexpr,
    PLACES: tl.constexpr,
    SHARED: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    D: tl.constexpr,  # DIM as a power of two
    V: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile, split, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = head // HEADS, head % HEADS
    sequence = (b if sequences is None else tl.load(sequences + b)).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d, v, r = tl.arange(0, D), tl.arange(0, V), tl.arange(0, R)
    in_rows, in_d, in_v, in_r = row < ROWS, d < DIM, v < VALUE_DIM, r < ROPE_DIM
    at = head.to(tl.int64) * ROWS + row
    queries = tl.load(q + at[:, None] * DIM + d[None, :], mask=in_rows[:, None] & in_d[None, :], other=0.0)
    if q_rope is not None:
        in_q = in_rows[:, None] & in_r[None, :]
        more = tl.load(q_rope + at[:, None] * ROPE_DIM + r[None, :], mask=in_q, other=0.0)
        rope += (sequence * ROPE_HEADS + h % ROPE_HEADS) * LENGTH * ROPE_DIM
        if rope_scales is not None:
            rope_scales += (sequence * ROPE_HEADS + h % ROPE_HEADS) * LENGTH
    position = tl.load(positions + b * ROWS + row, mask=in_rows, other=0)
    keys += (sequence * HEADS + h) * LENGTH * DIM
    if key_scales is not None:
        key_scales += (sequence * HEADS + h) * LENGTH
    if values is not None:
        values += (sequence * HEADS + h) * LENGTH * VALUE_DIM
        if value_scales is not None:
            value_scales += (sequence * HEADS + h) * LENGTH
    if not SHARED:
        places += b * PLACES

    begin = tl.load(first + b * tl.num_programs(0) + tile)
    stop = tl.load(end + b * tl.num_programs(0) + tile)
    each = tl.cdiv(stop - begin, SPLITS)
    begin += split * each
    stop = tl.minimum(begin + each, stop)
    # Below every score but finite, until a key is seen. The sink is a key that has been seen, whose value is zero.
    peak, total = tl.full((BLOCK_M,), -1e30, tl.float32), tl.full((BLOCK_M,), 0, tl.float32)
    if sinks is not None:  # noqa: SIM102 (known when the kernel is compiled, and the next is not)
        if split == 0:
            peak, total = tl.load(sinks + h * ROWS + row, mask=in_rows, other=0.0), total + 1
    sums = tl.full((BLOCK_M, V), 0, tl.float32)
    for j in tl.range(begin, stop, num_stages=STAGES):
        n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < PLACES
        block = tl.load(keys + n[:, None] * DIM + d[None, :], mask=inside[:, None] & in_d[None, :], other=0)
        block = _numbers(block, queries.dtype)
        scores = tl.dot(queries, block.T, input_precision="ieee")
        if key_scales is not None:
            scale = tl.load(key_scales + n, mask=inside, other=0.0)
            scores *= scale[None, :]
        if q_rope is not None:
            in_rope = inside[:, None] & in_r[None, :]
            part = tl.load(rope + n[:, None] * ROPE_DIM + r[None, :], mask=in_rope, other=0)
            added = tl.dot(more, _numbers(part, queries.dtype).T, input_precision="ieee")
            if rope_scales is not None:
                added *= tl.load(rope_scales + n, mask=inside, other=0.0)[None, :]
            scores += added
        if CAP is not None:
            scores = CAP - 2 * CAP / (tl.exp(scores * (2 / CAP)) + 1)  # CAP tanh(scores / CAP)
        place = tl.load(places + n, mask=inside, other=-1)[None, :]
        visible = (place >= 0) & (place <= position[:, None])
        if WINDOW is not None:
            visible = visible & (place > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        now = tl.maximum(peak, tl.max(scores, 1))
        weights, faded = tl.exp(scores - now[:, None]), tl.exp(peak - now)
        total = total * faded + tl.sum(weights, 1)
        if values is not None:
            in_values = inside[:, None] & in_v[None, :]
            block = tl.load(values + n[:, None] * VALUE_DIM + v[None, :], mask=in_values, other=0)
            block = _numbers(block, queries.dtype)
            if value_scales is not None:
                weights *= tl.load(value_scales + n, mask=inside, other=0.0)[None, :]
        elif key_scales is not None:
            weights *= scale[None, :]
        sums = tl.dot(weights.to(queries.dtype), block, sums * faded[:, None], input_precision="ieee")
        peak = now

    total = tl.where(total > 0, total, 1.0)  # a query that has seen nothing gets zeros, of no weight
    result = sums / total[:, None]
    at += split.to(tl.int64) * tl.num_programs(2) * ROWS
    in_y = in_rows[:, None] & in_v[None, :]
    tl.store(y + at[:, None] * VALUE_DIM + v[None, :], result.to(y.dtype.element_ty), mask=in_y)
    if SPLITS > 1:
        tl.store(weight + at, peak + tl.log(total), mask=in_rows)
