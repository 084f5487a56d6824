"""What Triton compiles a kernel to, without a GPU: `compile_report`."""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jaxllm.kernels import gpu, shapes
from jaxllm.kernels.experts import tile_size
from jaxllm.kernels.flash import triton_gpu as flash
from jaxllm.kernels.shapes import Shape, abstract_weight

TYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "i8", "uint8": "u8", "int32": "i32"}
TYPE_NAMES |= {"uint32": "u32", "float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5"}
MATRIX_INSTRUCTION = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*")


def launches(f: Callable, *args: Any) -> list[gpu.Launch]:
    """The launches that `f` would make, from ShapeDtypeStructs."""
    recorded = []

    def record(launch: gpu.Launch) -> Any:
        recorded.append(launch)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), launch.out_type)

    with gpu.run_by(record):
        jax.eval_shape(lambda *args: f(*args), *args)  # a new function, because the trace of `f` may be cached
    return recorded


def compiled(launch: gpu.Launch, arch: int) -> triton.compiler.CompiledKernel:
    """A launch's kernel for compute capability `arch`, 90 for example, down to machine code. Needs no GPU."""
    parameters = [p.name for p in launch.kernel.params]
    names = [p.name for p in launch.kernel.params if not p.is_constexpr]
    arrays = dict(zip(names, [*launch.args, *jax.tree.leaves(launch.out_type)], strict=True))
    types = {name: "*" + TYPE_NAMES[str(a.dtype)] for name, a in arrays.items() if a is not None}
    constants = launch.constants | {name: None for name, a in arrays.items() if a is None}
    # XLA's buffers are aligned, and jax_triton says so to Triton.
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(parameters) if name in types}
    signature = {name: types.get(name, "constexpr") for name in parameters}
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def arguments(op: str, shape: Shape, dtype: jax.typing.DTypeLike = jnp.bfloat16, group: int | None = None) -> tuple:
    """ShapeDtypeStructs for an op of `shapes.named()`: x and a weight; for grouped ops, the largest number of tiles.

    Args:
        group: the group size of activations that are rounded to FP8 (W8A8).
    """
    weight, struct = abstract_weight(op.split(".")[0], shape, group), jax.ShapeDtypeStruct
    if not shape.experts:
        return struct((shape.m, shape.k), dtype), weight
    tile = tile_size(shape.m, shape.experts)
    tiles = shape.m // tile + min(shape.experts, shape.m)
    return struct((tiles * tile, shape.k), dtype), weight, struct((tiles,), jnp.int32)


def function(op: str) -> Callable:
    """`block_fp8.triton_gpu.matmul`, for example, of "block_fp8.matmul"."""
    family, name = op.split(".")
    return getattr(importlib.import_module(f"jaxllm.kernels.{family}.triton_gpu"), name)


def compile_report(
    op: str, shape: Shape, arch: int, dtype: jax.typing.DTypeLike = jnp.bfloat16, group: int | None = None
) -> dict[str, Any]:
    """What an op's matmul kernel is compiled to for compute capability `arch` (90, 100). Needs no GPU."""
    matmul = launches(function(op), *arguments(op, shape, dtype, group))[-1]
    constants = matmul.constants
    return {
        "tile": tuple(constants[f"BLOCK_{axis}"] for axis in "MNK"),
        "grid": matmul.grid,
        "warps": matmul.warps,
        "stages": matmul.stages,
        **resources(compiled(matmul, arch)),
    }


def attention_launch(name: str, time: int, **options: Any) -> gpu.Launch:
    """The launch of one of `shapes.ATTENTION`, see `shapes.attention`."""
    given, scoring = shapes.attention(name, time, **options)
    (launch,) = launches(lambda given: flash.attention(given, scoring), given)
    return launch


def resources(compiled: triton.compiler.CompiledKernel) -> dict[str, Any]:
    """A compiled kernel's shared memory, registers per thread, spilled bytes, and matrix instructions.

    `from_registers`: whether the instruction takes its first operand from the registers that it was computed in.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    ptx, stored = compiled.asm["ptx"], re.search(r"local_alloc %\S+ : \(tensor", compiled.asm["ttgir"])
    return {
        "shared": compiled.metadata.shared,
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "instructions": sorted(set(MATRIX_INSTRUCTION.findall(ptx))),
        "from_registers": not stored and bool(re.search(r"mma\.sync|wgmma\.mma_async\S+ \{[^}]*\}, \{", ptx)),
    }
