"""Attention over a cache on TPUs, with an online softmax: scores stay in VMEM.

A grid step multiplies one tile of queries by one block of keys. Blocks that no query of a tile sees are not copied:
their steps name the block that is in VMEM already, and do nothing. So a decode step reads what its sequences hold, not
what the cache could.

XLA holds an array whose last axis is no multiple of 128 with that axis before the last (heads of 64, rotary parts). The
kernel takes such buffers as they lie, transposed; anything else would copy the whole cache before every call.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxllm.kernels import tpu
from jaxllm.kernels.attention import Cached, Scoring
from jaxllm.kernels.flash.blocks import Rows, cache_refused, parts

TILE = 512  # rows of queries
BLOCK_BYTES = 5 << 18  # of what is read in a step, at most: 1.6 us on v5e, several times what a step costs by itself
POSITIONS = 2048  # of the cache in a step, at most: what is read of a short sequence in vain is about half of it
SCORES = 512 * 512  # in a step: of many rows
LEAST = -1e30  # below every score, but finite: what a row begins with that has not seen anything yet


def refuses(op: str, given: Cached, weight: Any) -> str | None:
    """Why this cannot be served, in words for users, or None."""
    if given.q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"queries of {given.q.dtype.name}, the kernel takes float32 and bfloat16"
    if problem := cache_refused(given):
        return problem
    if sizes(given).vmem_bytes > tpu.VMEM_BUDGET:
        return f"heads of {given.q.shape[3]} numbers do not fit into the chip's vector memory"
    return None


def sizes(given: Cached) -> tpu.Sizes:
    """What a grid step holds: rows of queries, and positions of the cache."""
    _, time, heads, dim = given.q.shape
    kv_heads, length, _ = given.keys.shape[1:]
    buffers = [x for x in (given.keys, given.rope, given.values) if x is not None]
    tile, bytes_each = min(time * heads // kv_heads, TILE), sum(x.shape[3] * x.dtype.itemsize for x in buffers)
    most = min(BLOCK_BYTES // bytes_each, POSITIONS, SCORES // tile) // tpu.LANES * tpu.LANES
    block = _block(length, max(most, tpu.LANES))
    value_dim = given.weighted.shape[3]
    copied = block * bytes_each + tile * (dim + value_dim) * given.q.dtype.itemsize + 2 * tile * tpu.LANES * 4
    computed = 4 * tile * block + block * dim + tile * value_dim  # in float32: scores, weights, numbers of codes, sums
    return tpu.Sizes(tile, block, 2 * copied + 4 * computed)


def _block(length: int, most: int) -> int:
    """All of a short cache; else the largest multiple of 128 that divides it, if that is not small; else any."""
    if length <= most + tpu.LANES:
        return length
    dividing = [size for size in range(tpu.LANES, most + 1, tpu.LANES) if length % size == 0]
    return dividing[-1] if dividing and 2 * dividing[-1] > most else most


def attention(given: Cached, scoring: Scoring, *, interpret: tpu.Interpret = False) -> jax.Array:
    """See `attention.attend`. A query that sees nothing gets zeros."""
    rows, size = Rows.of(given, scoring), sizes(given)
    tile, block, (batch, kv_heads, count, _) = size.tile, size.block, rows.q.shape
    first, end = rows.spans(tile, block, scoring.sliding_window)
    tiles, blocks = first.shape[1], pl.cdiv(rows.key_positions.shape[1], block)
    sequences = jnp.arange(batch, dtype=jnp.int32) if given.rows is None else given.rows
    pad = blocks * block - rows.key_positions.shape[1]
    places = jnp.pad(rows.key_positions, ((0, 0), (0, pad)), constant_values=-1)[:, None]
    value_dim = given.weighted.shape[3]

    def spec(shape: tuple[int | None, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        """`index(b, h, t, s, j)`: what a step needs, for row b of the batch (sequence s) and block j of the keys."""

        def at(b: jax.Array, h: jax.Array, t: jax.Array, j: jax.Array, *prefetched: jax.Ref) -> tuple:
            sequences, first, end = prefetched
            last = jnp.maximum(end[b * tiles + t] - 1, 0)
            return index(b, h, t, sequences[b], jnp.minimum(first[b * tiles + t] + j, last))

        return pl.BlockSpec(shape, at)

    def of_queries(x: jax.Array) -> pl.BlockSpec:
        return spec((None, None, tile, x.shape[3]), lambda b, h, t, s, j: (b, h, t, 0))

    def of_cache(x: jax.Array, axis: int) -> pl.BlockSpec:
        """Positions run along the `axis`."""
        heads, shape = x.shape[1], (block, x.shape[3]) if axis == 2 else (x.shape[2], block)
        at = (lambda s, h, j: (s, h, j, 0)) if axis == 2 else (lambda s, h, j: (s, h, 0, j))
        return spec((None, None, *shape), lambda b, h, t, s, j: at(s, h if heads > 1 else 0, j))

    held = {"q": (rows.q, of_queries(rows.q))}
    if rows.rope is not None:
        held["q_rope"] = rows.rope, of_queries(rows.rope)
    held["positions"] = rows.positions[..., None], spec((None, tile, 1), lambda b, h, t, s, j: (b, t, 0))
    if rows.sinks is not None:
        held["sinks"] = rows.sinks[..., None], spec((None, tile, 1), lambda b, h, t, s, j: (h, t, 0))
    one = len(places) == 1
    held["places"] = places, spec((None, 1, block), lambda b, h, t, s, j: (0 if one else b, 0, j))
    for name, x, scales in parts(given):
        axis = _axis(x)
        x = x if axis == 2 else x.swapaxes(2, 3)
        held[name] = x, of_cache(x, axis)
        if scales is not None:
            held[f"{name}_scales"] = scales, of_cache(scales, 3)
    axes = {name: _axis(x) - 2 for name, x, _ in parts(given)}

    def kernel(
        sequences: jax.Ref, first: jax.Ref, end: jax.Ref, refs: dict[str, jax.Ref], y: jax.Ref, *so_far: jax.Ref
    ) -> None:
        at, step = pl.program_id(0) * tiles + pl.program_id(2), pl.program_id(3)
        j, (peak, total, sums) = first[at] + step, so_far

        @pl.when(step == 0)
        def _() -> None:  # the sink is a key that every query has seen, whose value is zero
            peak[...] = refs["sinks"][...] if "sinks" in refs else jnp.full(peak.shape, LEAST, jnp.float32)
            total[...] = jnp.full(total.shape, 1.0 if "sinks" in refs else 0.0, jnp.float32)
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

        @pl.when(j < end[at])
        def _() -> None:
            inside = given.keys.shape[2] - j * block if given.keys.shape[2] % block else None
            _meet(refs, axes, scoring, inside, *so_far)

        @pl.when(step == blocks - 1)
        def _() -> None:
            y[...] = (sums[...] / jnp.where(total[...] > 0, total[...], 1)).astype(y.dtype)

    read = sum(x.nbytes // x.shape[0] for _, x, _ in parts(given)) * batch * blocks * block // given.keys.shape[2]
    products = 2 * batch * kv_heads * count * blocks * block
    y = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads, tiles, blocks),
            in_specs=[{name: spec for name, (_, spec) in held.items()}],
            out_specs=spec((None, None, tile, value_dim), lambda b, h, t, s, j: (b, h, t, 0)),
            scratch_shapes=[pltpu.VMEM((tile, columns), jnp.float32) for columns in (1, 1, value_dim)],
        ),
        out_shape=tpu.result((batch, kv_heads, count, value_dim), given.q.dtype, given.q),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=tpu.VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * (given.q.shape[3] + value_dim),
            bytes_accessed=read + 2 * given.q.nbytes,
            transcendentals=products // 2,
        ),
        name="attention",
        interpret=interpret,
    )(sequences, first.reshape(-1), end.reshape(-1), {name: x for name, (x, _) in held.items()})
    return rows.result(y, given)


def _meet(
    refs: dict[str, jax.Ref],
    axes: dict[str, int],
    scoring: Scoring,
    inside: jax.Array | None,
    peak: jax.Ref,
    total: jax.Ref,
    sums: jax.Ref,
) -> None:
    """A tile of queries meets a block of keys.

    Args:
        axes: the axis of positions in "keys", "rope" and "values".
        inside: how many of the block's positions the cache has, if not all.
        peak, total, sums: of each query the highest score so far, and relative to it the sum of weights (these are
            `[tile, 1]`) and the weighted sum of values, `[tile, value_dim]`.
    """
    dtype = refs["q"].dtype
    scores = _product(refs["q"][...], _numbers(refs["keys"], dtype), 1 - axes["keys"])
    if "keys_scales" in refs:
        scores *= refs["keys_scales"][...]
    if "q_rope" in refs:
        more = _product(refs["q_rope"][...], _numbers(refs["rope"], dtype), 1 - axes["rope"])
        scores += more * refs["rope_scales"][...] if "rope_scales" in refs else more
    if scoring.score_cap is not None:
        scores = scoring.score_cap * jnp.tanh(scores / scoring.score_cap)
    place, position = refs["places"][...], refs["positions"][...]
    visible = (place >= 0) & (place <= position)
    if scoring.sliding_window is not None:
        visible &= place > position - scoring.sliding_window
    scores = jnp.where(visible, scores, -jnp.inf)
    before = peak[...]
    peak[...] = now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    weights, faded = jnp.exp(scores - now), jnp.exp(before - now)
    total[...] = total[...] * faded + jnp.sum(weights, axis=1, keepdims=True)
    name = "values" if "values" in refs else "keys"
    if f"{name}_scales" in refs:
        weights *= refs[f"{name}_scales"][...]
    values = _numbers(refs[name], dtype)
    if inside is not None:  # what lies beyond the cache may be anything, and 0 * NaN is no 0
        index = lax.broadcasted_iota(jnp.int32, values.shape, axes[name])
        values = jnp.where(index < inside, values.astype(jnp.float32), 0).astype(dtype)
    sums[...] = sums[...] * faded + _product(weights.astype(dtype), values, axes[name])


def _axis(x: jax.Array) -> int:
    """The axis of positions in a buffer `[sequences, heads, length, dim]` as XLA's TPU compiler holds it."""
    return 2 if x.shape[3] % tpu.LANES == 0 else 3


def _numbers(ref: jax.Ref, dtype: jnp.dtype) -> jax.Array:
    """A block of a cache, or codes without their scales."""
    x = ref[...]
    return (pltpu.bitcast(x, jnp.float8_e4m3fn) if x.dtype == jnp.uint8 else x).astype(dtype)


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """The sum over a's columns and an axis of b, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = ((1,), (axis,)), ((), ())
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
