"""Products with packed weights on a CPU, in C++ (native/): nothing is dequantized in memory.

Activations are either exact (float32 products of the dequantized weights, summed in float32) or rounded to int8 with a
scale for every 32 neighbours, as llama.cpp does. See kernels/README.md.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.scaled import Scaled
from jaxllm.kernels import dense
from jaxllm.kernels.activations import Quantized, group_of, rounds_int8_blocks
from jaxllm.kernels.attention import Cached, Scoring, attend, joined
from jaxllm.kernels.coded import Buffer, Coded
from jaxllm.kernels.cpu import library
from jaxllm.kernels.cpu.operands import operands
from jaxllm.kernels.dispatch import kept
from jaxllm.processor import has_bfloat16

ENOUGH = 256  # rows, for which it pays to dequantize a matrix


def refuses(op: str, x: Any, weight: Weight | type[Weight]) -> str | None:
    """See `Kernel.refuses`."""
    if op == "rms_norm":
        return None
    if op == "attention":
        return _refuses_attention(x)
    if isinstance(weight, Dense) and (weight.values.dtype.itemsize > 2 or weight.values.dtype == x.dtype):
        return f"XLA multiplies {x.dtype.name} by {weight.format} itself"
    if isinstance(weight, Scaled) and group_of(weight) is not None:
        return "groups of activations are rounded as the checkpoint says, which the reference does"
    if isinstance(x, Quantized):
        return "it takes floats"
    return None


def _refuses_attention(given: Cached) -> str | None:
    if given.weighted.shape[3] % 8:
        return f"values of {given.weighted.shape[3]} numbers: multiples of 8 are possible"
    if not isinstance(given.keys, Coded) and given.keys.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"keys of {given.keys.dtype.name}"
    return None


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """`x[..., in] @ weight[out, in].T` -> float32 `[..., out]`."""
    return matmuls(x, weight)[0]


def matmuls(x: jax.Array, *weights: Weight) -> tuple[jax.Array, ...]:
    """`matmul` with several weights, in one call: x is rounded once, and threads are handed one piece of work."""
    rows = x.reshape(-1, x.shape[-1])
    sizes = [(len(rows), weight.shape[0]) for weight in weights]
    return tuple(y.reshape(*x.shape[:-1], -1) for y in _call("jaxllm_matmul", sizes, [rows], weights))


def trained_matmuls(x: jax.Array, *weights: Weight) -> tuple[jax.Array, ...]:
    """`matmuls` where gradients are computed, and a row may depend, to the last bit, on how many there are. So
    processors that multiply bfloat16 twice as fast as float32 do it, by matrices that are dequantized one by one."""
    if x.dtype != jnp.bfloat16 or rounds_int8_blocks() or x.size < ENOUGH * x.shape[-1] or not has_bfloat16():
        return matmuls(x, *weights)
    x, weights = lax.optimization_barrier((x, weights))  # none is dequantized before x is there
    return tuple(dense.matmul(x, weight) for weight in weights)


def grouped_matmul(x: jax.Array, stack: Weight, expert: jax.Array) -> jax.Array:
    """See `dense.grouped_matmul`."""
    return grouped_matmuls(x, expert, stack)[0]


def grouped_matmuls(x: jax.Array, expert: jax.Array, *stacks: Weight) -> tuple[jax.Array, ...]:
    """`grouped_matmul` with several stacks, in one call, see `matmuls`."""
    return tuple(_call("jaxllm_grouped_matmul", [(len(x), stack.shape[1]) for stack in stacks], [x, expert], stacks))


def attention(given: Cached, scoring: Scoring) -> jax.Array:
    """See `attention.attend`. No key behind the last query's position is read, whatever `scoring.window` is."""
    return _whole(joined(given, scoring), scoring)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(given: Cached, scoring: Scoring) -> jax.Array:
    return _attention(given, scoring, with_logs=False)[0]


def _attention(given: Cached, scoring: Scoring, with_logs: bool) -> tuple[jax.Array, jax.Array]:
    """What attention gives, and float32 `[batch, time, heads]`, the logarithms of the sums of exp(score), or `[0]`."""
    library.native()
    q, keys, _, positions, key_positions, sinks, rows, _ = given
    (keys, key_scales), (values, value_scales) = _codes_and_scales(keys), _codes_and_scales(given.weighted)
    arrays = [
        q.astype(jnp.float32),
        keys,
        values,
        key_scales,
        value_scales,
        positions,
        jnp.zeros((1, 0), jnp.int32) if key_positions is None else key_positions,
        jnp.zeros(0, jnp.float32) if sinks is None else sinks,
        jnp.arange(len(q), dtype=jnp.int32) if rows is None else rows,
    ]
    sizes = (*q.shape[:3], values.shape[3]), q.shape[:3] if with_logs else (0,)
    results = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    y, logs = _varying(jax.ffi.ffi_call("jaxllm_attention", results)(*arrays, **_options(scoring)), arrays)
    return y.astype(q.dtype), logs


def _options(scoring: Scoring) -> dict[str, Any]:
    return {"window": np.int64(scoring.sliding_window or 0), "score_cap": np.float32(scoring.score_cap or 0)}


def _attention_forward(given: Cached, scoring: Scoring) -> tuple[jax.Array, tuple]:
    # Named here, where a backward pass finds them: it would compute them again for others' names.
    y, logs = (kept(result) for result in _attention(given, scoring, with_logs=True))
    return y, (given, y, logs)


def _attention_backward(scoring: Scoring, saved: tuple, g: jax.Array) -> tuple[Cached]:
    given, y, logs = saved
    q, keys, _, positions, key_positions, sinks, rows, _ = given
    values = given.weighted
    if isinstance(keys, Coded) or rows is not None or key_positions is None or q.shape[3] % 8:
        return jax.vjp(partial(attend, scoring=scoring), given)[1](g)  # a cache, which nobody trains through
    wide = g.astype(jnp.float32)
    means = jnp.sum(wide * y.astype(jnp.float32), axis=-1)
    floats = [each.astype(jnp.float32) for each in (q, keys, values)]
    arrays = [*floats, positions, key_positions, logs, means, wide]
    sizes = q.shape, *((*q.shape[::2][:2], *each.shape[2:]) for each in (keys, values))
    results = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    calls = jax.ffi.ffi_call("jaxllm_attention_gradients", results)(*arrays, **_options(scoring))
    to_q, *to_heads = _varying(calls, arrays)
    # Those of each query head; those that share a key head are adjacent.
    to_keys, to_values = (
        jnp.sum(each.reshape(*held.shape[:2], -1, *held.shape[2:]), axis=2).astype(held.dtype)
        for each, held in zip(to_heads, (keys, values), strict=True)
    )
    to_sinks = None if sinks is None else -jnp.sum(jnp.exp(sinks - logs) * means, axis=(0, 1))
    return (Cached(to_q.astype(q.dtype), to_keys, to_values, None, None, to_sinks),)  # type: ignore[arg-type]


_whole.defvjp(_attention_forward, _attention_backward)


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """See `norm.rms_norm`. A row's result does not depend on how many rows there are, to the bit."""
    library.native()
    arrays = [x.astype(jnp.float32), jnp.zeros(0, jnp.float32) if weight is None else weight.astype(jnp.float32)]
    y = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return jax.ffi.ffi_call("jaxllm_rms_norm", y)(*arrays, eps=np.float32(eps)).astype(x.dtype)


def _call(
    target: str, sizes: list[tuple[int, int]], given: list[jax.Array], weights: Sequence[Weight]
) -> list[jax.Array]:
    library.native()
    leaves, plan = operands(weights)
    arrays = [given[0].astype(jnp.float32), *given[1:], *leaves]
    results = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    ys = jax.ffi.ffi_call(target, results)(*arrays, plan=plan, exact=not rounds_int8_blocks())
    return _varying(ys, arrays)


def _varying(results: Sequence[jax.Array], operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Results, marked as varying over the mesh axes that operands vary over: a call into C++ does not say so itself."""
    axes = tuple(frozenset().union(*(jax.typeof(operand).mat.varying for operand in operands)))
    return [lax.pcast(result, axes, to="varying") for result in results] if axes else list(results)


def _codes_and_scales(buffer: Buffer) -> tuple[jax.Array, jax.Array]:
    """What the C++ reads of keys or values; there are no scales of plain numbers."""
    return (buffer.codes, buffer.scales) if isinstance(buffer, Coded) else (buffer, jnp.zeros(0, jnp.bfloat16))
