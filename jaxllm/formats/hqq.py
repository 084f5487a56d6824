"""HQQ's encoder: integers whose offsets minimize a norm of the error that cares little for outliers.

A group has a scale, from its minimum and maximum, and an offset that is searched: half-quadratic splitting alternates
between an estimate of the error that sparsifies it (`_shrink`) and the offset that is best for the rest. No
calibration is needed. (Least squares would give outliers, which no code can reach, most of the say.)

Groups are those of HQQ's axis 0: the matrix read as `[64, out * in / 64]`, and a group for each column of that. So the
members of a group are rows `out / 64` apart, which `Affine.out_groups` describes. If 64 does not divide the rows,
groups are neighbours along `in` instead, which is HQQ's axis 1.

Sources: `optimize_weights_proximal_legacy` of the package hqq; mistral.rs takes 10 steps.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.formats.affine import Affine, pack
from jaxllm.formats.scaled import quotient

F32 = jnp.float32
State = tuple[jax.Array, ...]
GROUP, STEPS = 64, 10
NORM, BETA, KAPPA = 0.7, 10.0, 1.01  # the norm's power, the first weight of the quadratic term, and its growth
STEEPEST = 2e4  # codes per unit: steps below 5e-5 would be subnormal in float16
FARTHEST = 6e4  # offsets have to be float16 too


def encode(w: jax.Array, bits: int) -> Affine:
    """Floats `[*batch, out, in]` as codes of `bits` with float16 scales and zeros, which decode to `(code - zero) *
    scale`. Each matrix is searched on its own; one that stops improving keeps its offsets. Rows are whole words."""
    w = jnp.asarray(w, F32)
    *batch, out, in_ = w.shape
    if out % GROUP:
        group = math.gcd(in_, GROUP)
        codes, scales, zeros = _fit(w.reshape(*batch, out, -1, group), -1, bits)
        return Affine(_words(codes, w, bits), scales[..., 0], bits, group, "HQQ", zeros=zeros[..., 0])
    heads = out // GROUP
    codes, scales, zeros = _fit(w.reshape(*batch, GROUP, heads, in_), -3, bits)
    index = jnp.broadcast_to(np.arange(out, dtype=np.int32) % heads + 1, (*batch, out))
    return Affine(_words(codes, w, bits), _behind(scales), bits, 1, "HQQ", zeros=_behind(zeros), out_groups=index)


def _words(codes: jax.Array, w: jax.Array, bits: int) -> jax.Array:
    return pack(codes.reshape(w.shape), bits)


def _behind(values: jax.Array) -> jax.Array:
    """`[*batch, 1, heads, in]` as `[*batch, heads + 1, in]`: group 0 is for padding."""
    return jnp.pad(values[..., 0, :, :], [(0, 0)] * (values.ndim - 3) + [(1, 0), (0, 0)])


def _fit(w: jax.Array, axis: int, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, uint32 in the shape of the groups `[*batch, a, b, c]` along `axis`; float16 scales and zeros, where the
    groups' axis has size 1."""
    top = F32(2**bits - 1)
    low, high = jnp.min(w, axis, keepdims=True), jnp.max(w, axis, keepdims=True)
    steep = jnp.minimum(F32(STEEPEST), quotient(F32(FARTHEST), jnp.maximum(jnp.abs(low), jnp.abs(high))))
    scale = jnp.where(high - low > top / steep, quotient(top, high - low), steep)
    inverse = F32(1) / scale

    def code(scale: jax.Array, zero: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(w * scale + zero), F32(0), top)

    def error_of(zero: jax.Array) -> jax.Array:
        return w - (code(scale, zero) - zero) * inverse

    def step(state: State) -> State:
        count, zero, best, going = state
        beta = BETA * KAPPA ** count.astype(F32)
        size = jnp.abs(error_of(zero))
        better = jnp.mean(code(scale, zero) - w * scale, axis, keepdims=True)
        # All errors of most matrices are so small that they shrink to 0; then the powers need not be computed.
        better += lax.cond(
            jnp.max(size) > beta ** F32(1 / (NORM - 2)),
            lambda: jnp.mean(_shrink(error_of(zero), beta) * scale, axis, keepdims=True),
            lambda: jnp.zeros_like(zero),
        )
        error = jnp.mean(size, (-3, -2, -1), keepdims=True)
        return count + 1, jnp.where(going, better, zero), jnp.minimum(error, best), going & (error < best)

    def unfinished(state: State) -> jax.Array:
        return (state[0] < STEPS) & jnp.any(state[3])

    one = (*w.shape[:-3], 1, 1, 1)
    begin: State = (jnp.int32(0), -low * scale, jnp.full(one, jnp.inf, F32), jnp.full(one, True))
    zeros = lax.while_loop(unfinished, step, begin)[1].astype(jnp.float16)
    scales = inverse.astype(jnp.float16)
    # The codes are chosen for the scales and zeros that a decoder will see.
    return code(F32(1) / scales.astype(F32), zeros.astype(F32)).astype(jnp.uint32), scales, zeros


def _shrink(x: jax.Array, beta: jax.Array) -> jax.Array:
    """The proximal operator of the p-norm, approximately: what is left of each error when small ones become 0."""
    size = jnp.abs(x)
    return jnp.sign(x) * jnp.maximum(size - size ** F32(NORM - 1) / beta, F32(0))
