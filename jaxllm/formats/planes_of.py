"""Quantized weights as planes of codes (`planes.py`), exactly: nothing is dequantized."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.formats import e2m1
from jaxllm.formats.affine import Affine, unpack
from jaxllm.formats.base import Weight
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_bits import fields, flat, nibbles, split
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.nvfp4 import NVFP4
from jaxllm.formats.parts import Levels, Parts, held
from jaxllm.formats.planes import SLAB, Planes, chunk, pack
from jaxllm.formats.scaled import Scaled


def refuses(weight: Weight) -> str | None:
    """Why one device's shard of a weight, perhaps shapes only, is not held as planes, in words for users, or None."""
    if isinstance(weight, Planes):
        return None
    if (reason := REFUSALS[type(weight)](weight)) is not None:
        return reason
    in_, parts = weight.shape[-1], jax.eval_shape(PARTS[type(weight)], weight)
    group = in_ / parts.scales.fine.shape[-1]
    if in_ % chunk(parts.bits):
        return f"rows of {in_} columns, the kernel takes multiples of {chunk(parts.bits)} for {parts.bits} bits"
    if group % SLAB:
        return f"groups of {group:g} columns, the kernel takes multiples of {SLAB}"
    return None


def planes_of(weight: Any, transposed: bool) -> Planes:
    """A weight that `refuses` accepts, as planes. Traceable, on any mesh; `transposed`: see `Planes`."""
    if isinstance(weight, Planes):
        return weight if weight.transposed == transposed else weight.turned()
    parts, order = PARTS[type(weight)](weight), None
    if isinstance(weight, Affine) and weight.in_groups is not None:
        order = jnp.argsort(weight.in_groups, axis=-1)  # stable
        parts = replace(parts, codes=jnp.take_along_axis(parts.codes, order[..., None, :], axis=-1))
    *batch, _, in_ = weight.shape
    fine, coarse = parts.scales.fine.shape[-1], parts.scales.coarse
    shared = coarse is not None and coarse.ndim < parts.codes.ndim
    made = Planes(
        pack(parts.codes, parts.bits),
        parts.scales,
        parts.bits,
        in_ // fine,
        0 if coarse is None or shared else in_ // coarse.shape[-1],
        False,
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((), leaf.dtype), weight),
        parts.zero,
        weight.factor if isinstance(weight, Scaled) else 1.0,
        parts.zeros,
        parts.offsets,
        None if parts.table is None else jnp.broadcast_to(parts.table, (*batch, 16)),
        order,
    )
    return made.turned() if transposed else made


def _affine(w: Affine) -> Parts:
    def of_groups(leaf: Any) -> Any:
        return leaf if leaf is None or w.in_groups is None else leaf[..., 1:]  # without the group of padding

    zeros, biases = of_groups(w.zeros), of_groups(w.biases)
    if zeros is not None:  # 256 - 1 + 1 needs nine bits, and uint16 stands for float16
        zeros = zeros.astype(jnp.float32) if zeros.dtype == jnp.uint16 else held(zeros)
    offsets = None if biases is None else Levels(held(biases))
    codes = unpack(w.codes, w.bits).astype(jnp.uint8)
    return Parts(codes, Levels(held(of_groups(w.scales))), w.bits, w.zero if biases is None else 0, zeros, offsets)


def _affine_refusal(w: Affine) -> str | None:
    if w.out_groups is not None:
        return "groups along rows, the kernel takes groups along columns"
    groups, in_ = w.scales.shape[-1], w.shape[-1]
    if w.in_groups is None:
        return None if groups * w.group == in_ else f"groups of {w.group} do not divide rows of {in_} columns"
    complete = w.even and (groups - 1) * w.group == in_
    return None if complete else f"columns of any group in any order (act-order), not {w.group} of each group"


def _ggml(w: GGML) -> Parts:
    if w.type == "NVFP4":
        d, qs = split(w.blocks, 4, 32)
        # 127 is 0. 255, which no encoder writes, is 480 to ggml and NaN here, because E4M3 ends at 448.
        scales = jax.lax.bitcast_convert_type(jnp.where(d == 127, 0, d & 127).astype(jnp.uint8), jnp.float8_e4m3fn)
        parts = Parts(flat(nibbles(qs.reshape(*qs.shape[:-1], 4, 8)), 2), Levels(scales), 4, table=e2m1.VALUES)
    else:
        taken = BLOCK_TYPES[w.type].parts
        assert taken is not None, "`refuses` is asked first"
        parts = taken(w.blocks)
    table = parts.table
    joined = jax.tree.map(lambda leaf: flat(leaf, 2), replace(parts, table=None))
    return replace(joined, table=table)


def _ggml_refusal(w: GGML) -> str | None:
    known = w.type == "NVFP4" or BLOCK_TYPES[w.type].parts is not None
    return None if known else f"{w.type} is not codes with a scale for each group"


def _codebook(w: Codebook) -> Parts:
    codes = flat(fields(w.codes, 4, 2)[..., ::-1], 2)
    return Parts(codes, Levels(w.scales), 4, table=w.table)


def _nvfp4(w: NVFP4) -> Parts:
    return Parts(e2m1.unpack(w.blocks), Levels(w.scales, w.global_scale, w.divides), 4, table=e2m1.VALUES)


def _scaled(w: Scaled) -> Parts:
    codes = jax.lax.bitcast_convert_type(w.values, jnp.uint8) ^ jnp.uint8(128)
    return Parts(codes, Levels(held(w.scales)), 8, 128)


def _scaled_refusal(w: Scaled) -> str | None:
    if w.values.dtype != jnp.int8:
        return f"codes of {w.values.dtype.name}, the kernel takes integers"
    if w.activations is not None or w.block != (1, None):
        return "the kernel takes integers with one scale a row, and activations as they are"
    return None


PARTS: dict[type[Weight], Callable[[Any], Parts]] = {
    GGML: _ggml,
    Affine: _affine,
    Codebook: _codebook,
    NVFP4: _nvfp4,
    Scaled: _scaled,
}
REFUSALS: dict[type[Weight], Callable[[Any], str | None]] = {
    GGML: _ggml_refusal,
    Affine: _affine_refusal,
    Codebook: lambda w: None,
    NVFP4: lambda w: None,
    Scaled: _scaled_refusal,
}
