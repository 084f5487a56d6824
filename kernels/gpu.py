"""What the Triton kernels share: how they are launched, and how work is divided on a GPU.

Every kernel computes `y.T = w @ x.T`: the matrix's rows are the matrix instruction's M, x's rows its N. N may be as
small as 8 but M is at least 64, so few rows of x cost little. Also, on Hopper only the first operand may come from
registers, where the codes are dequantized. (The other way around, each tile would go through shared memory.)
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

PROGRAMS = 2 * 132  # the fewest per launch: two for each multiprocessor of an H100, to hide latencies
FEWEST_STEPS = 4  # of the loop over k in one program: fewer do not fill the pipeline of loads
FEW_ROWS = 1024  # with more there are enough programs, and the memory traffic of splits grows with the rows

X_DTYPES = (jnp.float32, jnp.bfloat16)

# For Blackwell, triton 3.7 would write PTX 9.1, which is of its own ptxas; that of XLA's CUDA 13.0 refuses it.
PTX_VERSION = 87


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
    def of(cls, rows: int, n: int, k: int, tile: Tile, tiles: int = 1, programs: int = PROGRAMS) -> Self:
        """Programs for `tiles` times `rows` rows of x against matrices `[n, k]`.

        The sum over k is split if there would be fewer than `programs`. The number of tiles in use is not known yet and
        often small, so they count as one. XLA sums the splits, always in the same order. Atomic additions would save
        a launch but vary from run to run.
        """
        blocks, parts, steps = triton.cdiv(n, tile.n), triton.cdiv(rows, tile.m), triton.cdiv(k, tile.k)
        splits = min(max(programs // (blocks * parts), 1), max(steps // FEWEST_STEPS, 1))
        per_split = triton.cdiv(steps, splits) if tiles * rows <= FEW_ROWS else steps
        constants = {"ROWS": rows, "ALL_ROWS": tiles * rows, "N": n, "K": k, "PER_SPLIT": per_split}
        constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "STAGES": tile.stages}
        return cls((blocks, tiles * parts, triton.cdiv(steps, per_split)), constants)

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        """The type of the results, one per split: `[splits, all rows, n]`."""
        return jax.ShapeDtypeStruct((self.grid[2], self.constants["ALL_ROWS"], self.constants["N"]), jnp.float32)


@triton.jit
def place(ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tuple:
    """This program's tile, its rows, and its first row of the matrix; int64, because their products may need it.

    Programs that run at the same time share up to 8 blocks of x, which stay in the L2 cache.
    """
    block_m, block_n = tl.program_id(1), tl.program_id(0)
    block_m, block_n = tl.swizzle2d(block_m, block_n, tl.num_programs(1), tl.num_programs(0), 8)
    parts: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    row = block_m % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    return block_m // parts, row.to(tl.int64), block_n.to(tl.int64) * BLOCK_N


def refuses(x: jax.Array | None) -> str | None:
    """Why no kernel can serve this machine's GPU or the activations `x`, or None.

    Without a GPU, programs are compiled for another machine's GPU, which is assumed to be capable.
    """
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if capability is not None and not 9 <= float(capability) < 11:
        return f"the GPU kernels are made for compute capability 9.0 and 10.x, this GPU's is {capability}"
    if x is not None and x.dtype not in X_DTYPES:
        return f"activations are {x.dtype}, and the GPU kernels take float32 and bfloat16"
    return None


class Launch(NamedTuple):
    """A call of a kernel. The kernel's parameters are `args`, then pointers to the results, then constants.

    Shapes are constants: XLA compiles for one shape anyway, and Triton knows the divisors of constants only.

    Attributes:
        args: arrays or their shapes; None for an argument that the kernel does not need.
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
        backend_options={"ptx_version": PTX_VERSION},
        **launch.constants,
    )
    # Inside `shard_map`, results vary over the same mesh axes as the arguments; jax_triton says they do not vary.
    axes = tuple(frozenset().union(*(jax.typeof(a).mat.varying for a in launch.args if a is not None)))
    return jax.tree.map(lambda result: lax.pcast(result, axes, to="varying"), results) if axes else results


_runner: ContextVar[Callable[[Launch], Any]] = ContextVar("runner", default=run)


@contextmanager
def run_by(runner: Callable[[Launch], Any]) -> Iterator[None]:
    """Launches that are traced inside go to `runner`, which returns the results, instead of running on a GPU."""
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
