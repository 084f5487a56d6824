"""What the Triton kernels share: how they are launched, how work is cut for a GPU, and how to compile them without one.

Every kernel computes `y.T = w @ x.T`: the matrix's rows are the matrix instruction's M, x's rows its N. Its N may be as
small as 8, its M is at least 64, so few rows of x cost little; and on Hopper only the first operand may come from
registers, where the codes are decoded. (The other way around, each decoded tile would go through shared memory.)
"""

import contextlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.backends.nvidia
import triton.language as tl
from jax import lax
from jaxllm.kernels.experts import tile_size
from jaxllm.kernels.shapes import Shape
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jaxllm.formats.fp8 import BlockFP8
from jaxllm.formats.mxfp4 import MXFP4

PROGRAMS = 2 * 132  # that a launch should have at least: two for each multiprocessor of an H100, to hide latencies
FEWEST_STEPS = 4  # of the loop over k in one program: fewer do not fill the pipeline of loads
FEW_ROWS = 1024  # beyond, there are programs enough, and what splits write and read grows with the rows

X_DTYPES = (jnp.float32, jnp.bfloat16)
TYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "i8", "uint8": "u8", "int32": "i32"}
TYPE_NAMES |= {"float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5"}
MATRIX_INSTRUCTION = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*")


class Tile(NamedTuple):
    """What one program multiplies at once: `[n, k]` of the matrix and `[m, k]` of x."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tile_for(rows: int, table: tuple[Tile, ...]) -> Tile:
    """The first tile of a table that holds all rows, or its last."""
    return next((tile for tile in table if rows <= tile.m), table[-1])


class Work(NamedTuple):
    """How a matmul is divided: the grid, and the constants that both formats' kernels take."""

    grid: tuple[int, int, int]
    constants: dict[str, int]

    @classmethod
    def of(cls, rows: int, n: int, k: int, tile: Tile, tiles: int = 1) -> Self:
        """Programs for `tiles` times `rows` rows of x against matrices `[n, k]`.

        The sum over k is split where programs would be too few. How many tiles are in use is not known yet, often
        few: they count as one. Splits are summed by XLA, always in one order; atomic additions would save a launch,
        and differ from run to run.
        """
        blocks, parts, steps = triton.cdiv(n, tile.n), triton.cdiv(rows, tile.m), triton.cdiv(k, tile.k)
        splits = min(max(PROGRAMS // (blocks * parts), 1), max(steps // FEWEST_STEPS, 1))
        per_split = triton.cdiv(steps, splits) if tiles * rows <= FEW_ROWS else steps
        constants = {"ROWS": rows, "ALL_ROWS": tiles * rows, "N": n, "K": k, "PER_SPLIT": per_split}
        constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "STAGES": tile.stages}
        return cls((blocks, tiles * parts, triton.cdiv(steps, per_split)), constants)

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        """Of a result for each split: `[splits, all rows, n]`."""
        return jax.ShapeDtypeStruct((self.grid[2], self.constants["ALL_ROWS"], self.constants["N"]), jnp.float32)


@triton.jit
def place(ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tuple:
    """This program's tile, the rows of it, and the first row of the matrix; int64, because their products may be.

    Programs that run at the same time share up to 8 blocks of x, and what they share stays in the L2 cache.
    """
    block_m, block_n = tl.program_id(1), tl.program_id(0)
    block_m, block_n = tl.swizzle2d(block_m, block_n, tl.num_programs(1), tl.num_programs(0), 8)
    parts: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    row = block_m % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    return block_m // parts, row.to(tl.int64), block_n.to(tl.int64) * BLOCK_N


def refuses(x: jax.Array | None) -> str | None:
    """Why no kernel can serve this machine's GPU or activations `x`, or None.

    Without a GPU, programs are compiled for another machine's, which is taken to be one that can.
    """
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if capability is not None and not 9 <= float(capability) < 11:
        return f"the GPU kernels are made for compute capability 9.0 and 10.x, this GPU's is {capability}"
    if x is not None and x.dtype not in X_DTYPES:
        return f"activations are {x.dtype}, and the GPU kernels take float32 and bfloat16"
    return None


def launch(
    kernel: triton.JITFunction,
    *args: jax.Array | None,
    out_type: Any,
    grid: tuple[int, ...],
    warps: int = 4,
    stages: int = 3,
    **constants: Any,
) -> Any:
    """Run a kernel. Its parameters: `args`, then pointers to the results, then constants.

    Shapes are constants: XLA compiles for one shape anyway, and only of constants Triton sees what divides them.
    """
    results = jax_triton.triton_call(
        *args,
        kernel=kernel,
        out_type=out_type,
        grid=grid,
        num_warps=warps,
        num_stages=stages,
        **constants,
    )
    # Inside `shard_map`, results differ between devices where arguments do; jax_triton says that they do not.
    axes = tuple(frozenset().union(*(jax.typeof(a).mat.varying for a in args if a is not None)))
    return jax.tree.map(lambda result: lax.pcast(result, axes, to="varying"), results) if axes else results


class Launch(NamedTuple):
    """A call of `launch` with types in place of arrays."""

    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, int]

    def compile(self, arch: int) -> triton.compiler.CompiledKernel:
        """For compute capability `arch`, 90 for example, down to machine code. Needs no GPU."""
        parameters = [p.name for p in self.kernel.params]
        signature = {name: self.types.get(name, "constexpr") for name in parameters}
        # XLA's buffers are aligned, and jax_triton says so to Triton.
        attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(parameters) if name in self.types}
        source = ASTSource(self.kernel, signature=signature, constexprs=self.constants, attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)


def launches(f: Callable, *args: Any) -> list[Launch]:
    """What `f` would launch, from ShapeDtypeStructs."""
    with _recorded() as recorded:
        jax.eval_shape(lambda *args: f(*args), *args)  # a function of its own: the trace of `f` may be in a cache
    return recorded


@contextlib.contextmanager
def _recorded() -> Iterator[list[Launch]]:
    global launch
    recorded, run = [], launch

    def record(kernel, *args, out_type, grid, warps=4, stages=3, **constants):  # noqa: ANN001, ANN202
        names = [p.name for p in kernel.params if not p.is_constexpr]
        arrays = dict(zip(names, [*args, *jax.tree.leaves(out_type)], strict=True))
        types = {name: "*" + TYPE_NAMES[str(a.dtype)] for name, a in arrays.items() if a is not None}
        constants |= {name: None for name, a in arrays.items() if a is None}
        recorded.append(Launch(kernel, types, constants, grid, {"num_warps": warps, "num_stages": stages}))
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), out_type)

    launch = record
    try:
        yield recorded
    finally:
        launch = run


def arguments(op: str, shape: Shape, dtype: jax.typing.DTypeLike = jnp.bfloat16, group: int | None = None) -> tuple:
    """ShapeDtypeStructs for an op of `shapes.named()`: x and a weight, for grouped ones as many tiles as there may be.

    Args:
        group: `BlockFP8.activation_group`.
    """
    struct, (m, n, k, experts) = jax.ShapeDtypeStruct, shape
    batch = (experts,) if experts else ()
    if op.startswith("mxfp4."):
        weight = MXFP4(struct((*batch, n, k // 2), jnp.uint8), struct((*batch, n, k // 32), jnp.uint8))
    else:
        scales = struct((*batch, triton.cdiv(n, 128), triton.cdiv(k, 128)), jnp.float32)
        weight = BlockFP8(struct((*batch, n, k), jnp.float8_e4m3fn), scales, (128, 128), group)
    if not experts:
        return struct((m, k), dtype), weight
    tile = tile_size(m, experts)
    tiles = m // tile + min(experts, m)
    return struct((tiles * tile, k), dtype), weight, struct((tiles,), jnp.int32)


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
        "warps": matmul.options["num_warps"],
        "stages": matmul.options["num_stages"],
        **resources(matmul.compile(arch)),
    }


def resources(compiled: triton.compiler.CompiledKernel) -> dict[str, Any]:
    """A compiled kernel's shared memory, registers of a thread, spilled bytes, and matrix instructions.

    `from_registers` is whether Hopper's takes its first operand from the registers that it was computed in.
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
        "from_registers": not stored and bool(re.search(r"wgmma\.mma_async\S+ \{[^}]*\}, \{", ptx)),
    }
