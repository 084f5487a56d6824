"""What the TPU's compiler turns a kernel into, without a TPU: `compile_report`."""

import functools
import importlib
import re
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.formats.base import Weight
from jaxllm.kernels import shapes
from jaxllm.kernels.flash import pallas_tpu as flash
from jaxllm.kernels.shapes import Shape, abstract_weight
from jaxllm.planning.topologies import topology

# Those that start and are done prefetch operands, or slices of them, to VMEM without changing their layout.
NO_WORK = {"parameter", "custom-call", "bitcast", "tuple", "get-tuple-element"}
NO_WORK |= {"copy-start", "copy-done", "slice-start", "slice-done"}
INSTRUCTION = re.compile(r"= \(?(\w+)\[([\d,]*)\][^=]*? ([a-z][\w-]*)\(")


def compile_report(op: str, shape: Shape, chips: str, dtype: str = "bfloat16", group: int | None = None) -> dict:
    """Compile one of `shapes.named()`'s ops for chips that need not be there.

    Args:
        op: for example "block_fp8.matmul".
        chips: libtpu's name of a topology, for example "v6e:2x4".
        dtype: the dtype of the activations.
        group: the group size of activations that are rounded to FP8 (W8A8).

    Returns:
        `tile`, `block`: rows of activations and of the weight in a grid step; `vmem_bytes` that they take;
        `weight_bytes` as stored, `temp_bytes` that the program needs in HBM beside its arguments and results;
        `copies`: its instructions that make another array of the weight's size (there should be none); `kernels`: names
        of the kernels in it; `seconds`: how long compiling took; `optimal_seconds`: the compiler's estimate of a run,
        which for a kernel rests on the kernel's own count of FLOPs and bytes.
    """
    format, name = op.split(".")
    module = importlib.import_module(f"jaxllm.kernels.{format}.pallas_tpu")
    weight, mesh = abstract_weight(format, shape, group, transposed=True), topology_mesh(chips)
    arguments = [jax.ShapeDtypeStruct((shape.m, shape.k), dtype), weight]
    rows = shape.m
    if shape.experts:
        from jaxllm.kernels.experts import tile_size

        rows = tile_size(shape.m, shape.experts)
        tiles = shape.m // rows + min(shape.experts, shape.m)
        arguments[0] = jax.ShapeDtypeStruct((tiles * rows, shape.k), dtype)
        arguments.append(jax.ShapeDtypeStruct((tiles,), jnp.int32))
    arguments = jax.tree.map(lambda leaf: placed(leaf, NamedSharding(mesh, PartitionSpec())), arguments)

    local = jax.shard_map(
        getattr(module, name), mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    start = perf_counter()
    compiled = jax.jit(local).lower(*arguments).compile()
    seconds, text = perf_counter() - start, compiled.as_text() or ""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None and cost is not None  # TPU compilers have both
    size = module.tile_sizes(rows, weight, dtype)
    return {
        "tile": size.tile,
        "block": size.block,
        "vmem_bytes": size.vmem_bytes,
        "weight_bytes": weight.nbytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "copies": weight_copies(text, weight),
        "kernels": sorted(set(re.findall(rf"%({format}\w+)\S* = .*tpu_custom_call", text))),
        "seconds": seconds,
        "optimal_seconds": cost.get("optimal_seconds"),
    }


def attention_report(name: str, time: int, chips: str, **options: Any) -> dict:
    """Compile one of `shapes.ATTENTION`; the cache lies as the compiler wants it, which is how it is allocated.

    Args:
        time, options: see `shapes.attention`.

    Returns:
        `tile`, `block`: queries and positions in a grid step, and `vmem_bytes` that they take; `temp_bytes`, `kernels`,
        `seconds` and `optimal_seconds` as in `compile_report`; `copies` of keys or values, which there should be none
        of (but of the scales of those in 8 bits).
    """
    given, scoring = shapes.attention(name, time, **options)
    mesh, everywhere = topology_mesh(chips), PartitionSpec()
    local = jax.shard_map(
        functools.partial(flash.attention, scoring=scoring),
        mesh=mesh,
        in_specs=everywhere,
        out_specs=everywhere,
        check_vma=False,
    )
    given = jax.tree.map(lambda leaf: leaf.update(sharding=NamedSharding(mesh, everywhere)), given)
    start = perf_counter()
    compiled = jax.jit(local).lower(given).compile()
    seconds, text = perf_counter() - start, compiled.as_text() or ""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None and cost is not None  # TPU compilers have both
    size, (heads, length) = flash.sizes(given), given.keys.shape[1:3]
    held = rf"\w+\[\d+,{heads},(?:{length},(?!1\])\d+|(?!1,)\d+,{length})\]"  # but not of scales
    return {
        "tile": size.tile,
        "block": size.block,
        "vmem_bytes": size.vmem_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "copies": re.findall(rf"= ({held}\S* (?:copy|transpose|fusion))\(", text),
        "kernels": sorted(set(re.findall(r"%(\w+)\S* = .*tpu_custom_call", text))),
        "seconds": seconds,
        "optimal_seconds": cost.get("optimal_seconds"),
    }


def topology_mesh(name: str) -> Mesh:
    """A mesh of all devices of a topology in a row. Only the compiler knows these devices."""
    return Mesh(topology(name).devices, ("devices",))


def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """A leaf in row-major order, as kernels read it.

    By default TPUs transpose arrays where that saves padding (`uint8[2880, 1440]`, `[8192, 32]`), and the compiler
    would transpose them back before each kernel: a copy of the entire weight at every call.
    """
    format = Format(Layout(tuple(range(len(leaf.shape)))), sharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=format)


def weight_copies(text: str, weight: Weight) -> list[str]:
    """Instructions of a compiled program that make an array of the size of the weight, or of one of its larger leaves.
    (Scales of entire blocks are a thousandth of it.)"""
    entry = text[text.index("ENTRY") :]
    leaves = [leaf.shape for leaf in jax.tree.leaves(weight) if 100 * leaf.size * leaf.dtype.itemsize > weight.nbytes]
    sizes = [set(map(str, shape[-2:])) for shape in (weight.shape, *leaves)]
    return [
        f"{op} of {dtype}[{dims}]"
        for dtype, dims, op in INSTRUCTION.findall(entry)
        if op not in NO_WORK and set(dims.split(",")[-2:]) in sizes
    ]
