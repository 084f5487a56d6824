"""`python -m jaxllm.kernels.bench`: what the kernels are compiled to, how far the chips could go, and, on a machine
that has one of the chips, how far they go.

With `--compile-only` nothing runs: the compilers of the chips are asked, and measured columns say so.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxllm.cli import Parser, execute
from jaxllm.errors import InputError
from jaxllm.kernels import dispatch, shapes, tpu_report
from jaxllm.kernels.experts import tile_size
from jaxllm.kernels.shapes import Shape

NOT_MEASURED = "not measured"
REPEATS = 20


@dataclass(frozen=True)
class Chip:
    """What a device can do at most, by its maker's data sheet.

    Attributes:
        target: what the compiler calls it: a topology of TPUs, or the compute capability of a GPU.
        kinds: what JAX may call it (`device_kind`), a part of the name.
        bandwidth: of its memory, bytes a second.
        flops: of bfloat16 operands, a second.
        flops_fp8: of FP8 operands; where a chip has no such product, of those as bfloat16.
    """

    target: str | int
    kinds: tuple[str, ...]
    bandwidth: float
    flops: float
    flops_fp8: float


# One device as JAX counts them: of the two in a chip of TPU7x, half of what the chip has.
CHIPS = {
    "TPU v5e": Chip("v5e:2x2", ("TPU v5 lite", "TPU v5e"), 819e9, 197e12, 197e12),
    "TPU v6e": Chip("v6e:2x4", ("TPU v6 lite", "TPU v6e"), 1640e9, 918e12, 918e12),
    "TPU7x": Chip("tpu7x:2x2x1", ("TPU7x", "TPU v7"), 3690e9, 1153e12, 2307e12),
    "H100": Chip(90, ("H100",), 3352e9, 989e12, 1979e12),
    "B200": Chip(100, ("B200",), 8000e9, 2250e12, 4500e12),
}

# What others published for these matrices with activations in FP8, on Hopper.
PUBLISHED = {
    "DeepSeek-V3 o_proj, whole x 64": "DeepGEMM, H800: 336 TFLOPS, 2.67 TB/s",
    "DeepSeek-V3 o_proj, whole x 4096": "DeepGEMM, H800: 1358 TFLOPS",
    "DeepSeek-V3 q_a and kv_a x 128": "vLLM's Triton, H100: 118 TFLOPS",
    "DeepSeek-V3 q_a and kv_a x 4096": "vLLM's Triton, H100: 403 TFLOPS; CUTLASS 457",
}


def bytes_and_flops(op: str, shape: Shape) -> tuple[float, float]:
    """What an op has to read and write, bfloat16 activations and packed weights, and multiply. Of experts, as many as
    there can be: every row its own, up to all."""
    matrices = min(shape.m, shape.experts) if shape.experts else 1
    scales = shape.n * shape.k / 32 if op.startswith("mxfp4") else shape.n * shape.k / 128**2 * 4
    packed = shape.n * shape.k * (0.5 if op.startswith("mxfp4") else 1) + scales
    return matrices * packed + 2 * shape.m * shape.k + 4 * shape.m * shape.n, 2.0 * shape.m * shape.n * shape.k


def compiled(op: str, shape: Shape, group: int | None, chip: Chip) -> tuple[str, str, str, str]:
    """Tile sizes, memory on the chip, what else the compiler says, and its estimate of the time."""
    if isinstance(chip.target, str):
        made = tpu_report.compile_report(op, shape, chip.target, group=group)
        seconds = made["optimal_seconds"]
        estimate = f"{seconds * 1e6:.1f}" if seconds and seconds > 0 else "none"
        return f"{made['tile']} x {made['block']}", f"{made['vmem_bytes'] / 2**20:.1f} MiB VMEM", "", estimate
    from jaxllm.kernels import gpu_report

    made = gpu_report.compile_report(op, shape, chip.target, group=group)
    tile = " x ".join(map(str, made["tile"]))
    more = f"{', '.join(made['instructions'])}; {made['registers']} registers, {made['spills']} bytes spilled"
    return tile, f"{made['shared'] / 2**10:.0f} KiB shared", more, "none"


def measured(op: str, shape: Shape, group: int | None) -> float:
    """Seconds of a run on this machine's first device, the median of many."""
    kind, name = op.split(".")
    weight = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes.abstract_weight(kind, shape, group))
    f: Callable = getattr(dispatch, name)
    rows = tile_size(shape.m, shape.experts) if shape.experts else shape.m
    tiles = shape.m // rows + min(shape.experts, shape.m) if shape.experts else 1
    args = [jnp.ones((tiles * rows, shape.k), jnp.bfloat16), weight]
    if shape.experts:
        used = min(tiles, max(shape.m // rows, min(shape.experts, shape.m)))
        args.append(jnp.where(jnp.arange(tiles) < used, jnp.arange(tiles) % shape.experts, -1).astype(jnp.int32))
    f = jax.jit(f)
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def rows(name: str, chip: Chip, measure: bool) -> list[tuple]:
    """The table of a chip. FP8 weights meet activations in bfloat16 (W8A16) and in FP8 (W8A8)."""
    out = []
    cases = [
        (op, kind, group, label, shape)
        for op, named in shapes.named().items()
        for kind, group in ([("W8A16", None), ("W8A8", 128)] if op.startswith("block_fp8") else [("W4A16", None)])
        for label, shape in named.items()
    ]
    for op, kind, group, label, shape in tqdm(cases, name, leave=False, disable=not sys.stderr.isatty()):
        nbytes, flops = bytes_and_flops(op, shape)
        reading, multiplying = nbytes / chip.bandwidth, flops / (chip.flops_fp8 if group else chip.flops)
        limit, bound = max((reading, "memory"), (multiplying, "compute"))
        speed = NOT_MEASURED
        if measure:
            seconds = measured(op, shape, group)
            speed = f"{seconds * 1e6:.1f} us, {limit / seconds:.0%} of the limit"
        published = PUBLISHED.get(label, "") if group and name == "H100" else ""
        sizes = f"{nbytes / 1e6:.1f}", f"{flops / 1e9:.2f}", f"{limit * 1e6:.1f} ({bound})"
        out.append((f"{op} {kind}", label, *sizes, *compiled(op, shape, group, chip), published, speed))
    return out


HEADERS = (
    "op",
    "matrix x rows",
    "MB",
    "GFLOP",
    "chip's limit, us",
    "tile",
    "on chip",
    "compiled to",
    "compiler's estimate, us",
    "published",
    "measured",
)


def parser() -> Parser:
    p = Parser("jaxllm.kernels.bench", "What the kernels are compiled to, and how far they go.")
    p.add_argument("--compile-only", action="store_true", help="ask the compilers alone; needs none of the chips")
    return p


def run(args: argparse.Namespace) -> None:
    if missing := [name for name in ("libtpu", "triton", "jax_triton") if importlib.util.find_spec(name) is None]:
        raise InputError(f"{missing[0]} is not installed: pip install 'jaxllm[plan]'")
    if args.compile_only:
        jax.config.update("jax_platforms", "cpu")  # else JAX looks for a TPU, since there is a compiler for it
    kind = jax.devices()[0].device_kind
    here = [name for name, chip in CHIPS.items() if any(k in kind for k in chip.kinds)]
    if not here and not args.compile_only:
        raise InputError(f"{kind} is none of {', '.join(CHIPS)}; --compile-only needs none of them")
    for name in CHIPS if args.compile_only else here:
        chip = CHIPS[name]
        table = rows(name, chip, not args.compile_only)
        keep = [i for i in range(len(HEADERS)) if any(row[i] for row in table)]
        print(f"\n### {name}: {chip.bandwidth / 1e12:.2f} TB/s, {chip.flops / 1e12:.0f} TFLOPS in bfloat16\n")
        for row in (HEADERS, ["---"] * len(HEADERS), *table):
            print(f"| {' | '.join(row[i] for i in keep)} |")


if __name__ == "__main__":
    sys.exit(execute(parser(), run))
