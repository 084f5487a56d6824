"""`python -m jaxllm.kernels.bench`: what the kernels compile to, the limits of each chip, and the measured speed on a
machine that has one of the chips.

With `--compile-only` nothing runs: the chips' compilers are asked, and the measured columns say so.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxllm.cli import Parser, execute
from jaxllm.errors import InputError
from jaxllm.formats.planes import Planes
from jaxllm.formats.scaled import Scaled
from jaxllm.kernels import dispatch, shapes, tpu_report
from jaxllm.kernels.attention import Cached, Scoring
from jaxllm.kernels.experts import tile_size
from jaxllm.kernels.shapes import Shape
from jaxllm.planning.chips import CHIPS as LIMITS
from jaxllm.planning.chips import Chip

NOT_MEASURED = "not measured"
REPEATS = 20


# The chips that kernels are compiled for: a device's limits, and the compiler's name for it (a TPU topology, or a GPU's
# compute capability).
CHIPS: dict[str, tuple[Chip, str | int]] = {
    "TPU v5e": (LIMITS["v5e"], "v5e:2x2"),
    "TPU v6e": (LIMITS["v6e"], "v6e:2x4"),
    "TPU7x": (LIMITS["tpu7x"], "tpu7x:2x2x1"),
    "H100": (LIMITS["h100"], 90),
    "B200": (LIMITS["b200"], 100),
}

# What others published for these matrices with activations in FP8, on Hopper.
PUBLISHED = {
    "DeepSeek-V3 o_proj, whole x 64": "DeepGEMM, H800: 336 TFLOPS, 2.67 TB/s",
    "DeepSeek-V3 o_proj, whole x 4096": "DeepGEMM, H800: 1358 TFLOPS",
    "DeepSeek-V3 q_a and kv_a x 128": "vLLM's Triton, H100: 118 TFLOPS",
    "DeepSeek-V3 q_a and kv_a x 4096": "vLLM's Triton, H100: 403 TFLOPS; CUTLASS 457",
}


def bytes_and_flops(op: str, shape: Shape) -> tuple[float, float]:
    """The bytes that an op reads and writes (bfloat16 activations and packed weights), and its FLOPs. Counts as many
    experts as possible: one per row, up to all of them."""
    used = min(shape.m, shape.experts) / shape.experts if shape.experts else 1
    packed = shapes.abstract_weight(op.split(".")[0], shape).nbytes
    return used * packed + 2 * shape.m * shape.k + 4 * shape.m * shape.n, 2.0 * shape.m * shape.n * shape.k


def attention_bytes_and_flops(given: Cached, scoring: Scoring) -> tuple[float, float]:
    """The same of attention at the end of a cache: the positions that any query sees are read once."""
    buffers = [buffer for buffer in (given.keys, given.values, given.rope) if buffer is not None]
    (batch, tokens, heads, dim), length = given.q.shape, given.keys.shape[2]
    value_dim = given.weighted.shape[3]
    window = scoring.sliding_window or length
    seen = min(window + tokens - 1, length)
    pairs = sum(min(window, length - tokens + i + 1) for i in range(tokens))
    read = batch * seen * sum(x.shape[1] * x.shape[3] * x.dtype.itemsize for x in buffers)
    rows = batch * heads * (dim + value_dim)
    return read + rows * tokens * given.q.dtype.itemsize, 2.0 * rows * pairs


def compiled(op: str, shape: Shape, group: int | None, target: str | int) -> tuple[str, str, str, str]:
    """Tile sizes, on-chip memory, other facts from the compiler, and its estimate of the time."""
    if isinstance(target, str):
        made = tpu_report.compile_report(op, shape, target, group=group)
        seconds = made["optimal_seconds"]
        estimate = f"{seconds * 1e6:.1f}" if seconds and seconds > 0 else "none"
        return f"{made['tile']} x {made['block']}", f"{made['vmem_bytes'] / 2**20:.1f} MiB VMEM", "", estimate
    from jaxllm.kernels import gpu_report

    made = gpu_report.compile_report(op, shape, target, group=group)
    tile = " x ".join(map(str, made["tile"]))
    more = f"{', '.join(made['instructions'])}; {made['registers']} registers, {made['spills']} bytes spilled"
    return tile, f"{made['shared'] / 2**10:.0f} KiB shared", more, "none"


def compiled_attention(name: str, tokens: int, batch: int, target: str | int) -> tuple[str, str, str, str]:
    """The same of attention."""
    if isinstance(target, str):
        made = tpu_report.attention_report(name, tokens, target, batch=batch)
        estimate = f"{made['optimal_seconds'] * 1e6:.1f}"
        return f"{made['tile']} x {made['block']}", f"{made['vmem_bytes'] / 2**20:.1f} MiB VMEM", "", estimate
    from jaxllm.kernels import gpu_report

    launch = gpu_report.attention_launch(name, tokens, batch=batch)
    made = gpu_report.resources(gpu_report.compiled(launch, target))
    tile = f"{launch.constants['BLOCK_M']} x {launch.constants['BLOCK_N']}"
    more = f"{', '.join(made['instructions'])}; {made['registers']} registers, {made['spills']} bytes spilled"
    return tile, f"{made['shared'] / 2**10:.0f} KiB shared", more, "none"


def measured(op: str, shape: Shape, group: int | None) -> float:
    """The median seconds per run on this machine's first device."""
    kind, name = op.split(".")
    weight = shapes.abstract_weight(kind, shape, group, transposed=jax.default_backend() == "tpu")
    weight = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), weight)
    f: Callable = getattr(dispatch, name)
    rows = tile_size(shape.m, shape.experts) if shape.experts else shape.m
    tiles = shape.m // rows + min(shape.experts, shape.m) if shape.experts else 1
    args = [jnp.ones((tiles * rows, shape.k), jnp.bfloat16), weight]
    if shape.experts:
        used = min(tiles, max(shape.m // rows, min(shape.experts, shape.m)))
        args.append(jnp.where(jnp.arange(tiles) < used, jnp.arange(tiles) % shape.experts, -1).astype(jnp.int32))
    return _median_seconds(f, *args)


def measured_attention(given: Cached, scoring: Scoring) -> float:
    """The same of attention, the newest tokens at the end of the cache."""
    tokens, length = given.q.shape[1], given.keys.shape[2]
    given = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), given)
    newest = jnp.arange(shapes.LENGTH - length, shapes.LENGTH, dtype=jnp.int32)
    given = given._replace(positions=jnp.broadcast_to(newest[-tokens:], given.positions.shape))
    if given.key_positions is not None:
        given = given._replace(key_positions=jnp.broadcast_to(newest, given.key_positions.shape))
    return _median_seconds(partial(dispatch.attention, scoring=scoring), given)


def _median_seconds(f: Callable, *args: Any) -> float:
    f = jax.jit(f)
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def bits(op: str, shape: Shape) -> int:
    """Of a weight's code."""
    weight = shapes.abstract_weight(op.split(".")[0], shape)
    return weight.bits if isinstance(weight, Planes) else 8 if isinstance(weight, Scaled) else 4


def rows(name: str, measure: bool) -> list[tuple]:
    """A chip's table. FP8 weights are multiplied by activations in bfloat16 (W8A16) and in FP8 (W8A8)."""
    (chip, target), out = CHIPS[name], []
    cases = [
        (op, group, label, shape)
        for op, named in shapes.named().items()
        for group in ([None, 128] if op.startswith("block_fp8") else [None])
        for label, shape in named.items()
    ]
    for op, group, label, shape in tqdm(cases, name, leave=False, disable=not sys.stderr.isatty()):
        nbytes, flops = bytes_and_flops(op, shape)
        reading, multiplying = nbytes / chip.bandwidth, flops / (chip.flops_fp8 if group else chip.flops)
        limit, bound = max((reading, "memory"), (multiplying, "compute"))
        speed = NOT_MEASURED
        if measure:
            seconds = measured(op, shape, group)
            speed = f"{seconds * 1e6:.1f} us, {limit / seconds:.0%} of the limit"
        published = PUBLISHED.get(label, "") if group and name == "H100" else ""
        sizes = f"{nbytes / 1e6:.1f}", f"{flops / 1e9:.2f}", f"{limit * 1e6:.1f} ({bound})"
        kind = f"{op} W{bits(op, shape)}A{8 if group else 16}"
        out.append((kind, label, *sizes, *compiled(op, shape, group, target), published, speed))
    return out + attention_rows(name, measure)


def attention_rows(name: str, measure: bool) -> list[tuple]:
    """The same for attention: a token of 1 and of 16 sequences, and a chunk of a prompt, at the end of the cache."""
    (chip, target), out = CHIPS[name], []
    for label, (tokens, batch) in product(shapes.ATTENTION, ((1, 1), (1, shapes.BATCH), (shapes.CHUNK, 1))):
        given, scoring = shapes.attention(label, tokens, batch)
        nbytes, flops = attention_bytes_and_flops(given, scoring)
        limit, bound = max((nbytes / chip.bandwidth, "memory"), (flops / chip.flops, "compute"))
        speed = NOT_MEASURED
        if measure:
            seconds = measured_attention(given, scoring)
            speed = f"{seconds * 1e6:.1f} us, {limit / seconds:.0%} of the limit"
        sizes = f"{nbytes / 1e6:.1f}", f"{flops / 1e9:.2f}", f"{limit * 1e6:.1f} ({bound})"
        what = f"{label} x {tokens}" + (f", {batch} sequences" if batch > 1 else "")
        out.append(("attention", what, *sizes, *compiled_attention(label, tokens, batch, target), "", speed))
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
        jax.config.update("jax_platforms", "cpu")  # otherwise JAX looks for a TPU, since a compiler for it is installed
    kind = jax.devices()[0].device_kind
    here = [name for name, (chip, _) in CHIPS.items() if any(k in kind for k in chip.kinds)]
    if not here and not args.compile_only:
        raise InputError(f"{kind} is none of {', '.join(CHIPS)}; --compile-only needs none of them")
    for name in CHIPS if args.compile_only else here:
        chip, table = CHIPS[name][0], rows(name, not args.compile_only)
        keep = [i for i in range(len(HEADERS)) if any(row[i] for row in table)]
        print(f"\n### {name}: {chip.bandwidth / 1e12:.2f} TB/s, {chip.flops / 1e12:.0f} TFLOPS in bfloat16\n")
        for row in (HEADERS, ["---"] * len(HEADERS), *table):
            print(f"| {' | '.join(row[i] for i in keep)} |")


if __name__ == "__main__":
    sys.exit(execute(parser(), run))
