"""What the Triton kernels share: how they are launched, and how work is cut for a GPU.

Every kernel computes `y.T = w @ x.T`: the matrix's rows are the matrix instruction's M, x's rows its N. Its N may be as
small as 8, its M is at least 64, so few rows of x cost little; and on Hopper only the first operand may come from
registers, where the codes are decoded. (The other way around, each decoded tile would go through shared memory.)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jax import lax

PROGRAMS = 2 * 132  # that a launch should have at least: two for each multiprocessor of an H100, to hide latencies
FEWEST_STEPS = 4  # of the loop over k in one program: fewer do not fill the pipeline of loads
FEW_ROWS = 1024  # beyond, there are programs enough, and what splits write and read grows with the rows

X_DTYPES = (jnp.float32, jnp.bfloat16)


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


class Launch(NamedTuple):
    """A call of a kernel. The kernel's parameters are `args`, then pointers to the results, then constants.

    Shapes are constants: XLA compiles for one shape anyway, and only of constants Triton sees what divides them.

    Attributes:
        args: arrays, or what they will be; None for one that the kernel does without.
        out_type: ShapeDtypeStructs of the results, in a pytree of any kind.
    """

    kernel: triton.JITFunction
    args: tuple[jax.Array | None, ...]
    out_type: Any
    grid: tuple[int, ...]
    warps: int
    stages: int
    constants: dict[str, Any]


def run(launch: Launch) -> Any:
    """The results of a launch."""
    results = jax_triton.triton_call(
        *launch.args,
        kernel=launch.kernel,
        out_type=launch.out_type,
        grid=launch.grid,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **launch.constants,
    )
    # Inside `shard_map`, results differ between devices where arguments do; jax_triton says that they do not.
    axes = tuple(frozenset().union(*(jax.typeof(a).mat.varying for a in launch.args if a is not None)))
    return jax.tree.map(lambda result: lax.pcast(result, axes, to="varying"), results) if axes else results


_runner: ContextVar[Callable[[Launch], Any]] = ContextVar("runner", default=run)


@contextmanager
def run_by(runner: Callable[[Launch], Any]) -> Iterator[None]:
    """What is traced inside gives its launches to `runner`, which returns results, instead of running them on a GPU."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


def launch(
    kernel: triton.JITFunction,
    *args: jax.Array | None,
    out_type: Any,
    grid: tuple[int, ...],
    warps: int = 4,
    stages: int = 3,
    **constants: Any,
) -> Any:
    """Run a kernel, see `Launch`."""
    return _runner.get()(Launch(kernel, args, out_type, grid, warps, stages, constants))
