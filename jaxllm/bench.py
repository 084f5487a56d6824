"""`jaxllm bench`: tokens per second, and how much of the memory bandwidth decoding reaches.

At batch 1 every new token reads every weight once, so memory bandwidth bounds decoding. The fraction of it that is
reached says how much is left to gain. With `--peers`, other engines run the same file in the same minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from jaxllm.cli import Parser, execute
from jaxllm.decoding import generate_tokens
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.language_model import LanguageModel
from jaxllm.loading import DTYPES, WEIGHTS, find_checkpoint, load
from jaxllm.parallel import EP
from jaxllm.sampling import Sampler
from jaxllm.startup import measure_startup

PEERS = ("llama.cpp", "mistral.rs")
PEER_SCRIPT = Path(__file__).with_name("peer_bench.py")


def bandwidth(mib: int = 512) -> float:
    """Bytes per second at which this machine streams float32 weights through a matrix-vector product."""
    w = jnp.ones((mib * 2**20 // 4 // 4096, 4096), jnp.float32)
    x = jnp.ones((4096,), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(w, x).block_until_ready()
    return w.nbytes / _median_seconds(lambda: product(w, x).block_until_ready(), 9)


def measure(model: LanguageModel, prefill: int, decode: int, repeats: int) -> dict[str, float]:
    """Median tokens/s over `repeats` runs, each on a new random prompt, after one warm-up that compiles."""
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(repeats + 1):
        prompt = rng.integers(0, model.config.vocab_size, prefill).tolist()
        steps = generate_tokens(model.programs, [prompt], decode + 1, Sampler())
        begun = time.perf_counter()
        next(steps)
        first = time.perf_counter()
        for _ in steps:
            pass
        runs.append((prefill / (first - begun), decode / (time.perf_counter() - first)))
    prefill_rate, decode_rate = (statistics.median(column) for column in zip(*runs[1:], strict=True))
    return {"prefill_tok_s": prefill_rate, "decode_tok_s": decode_rate}


def bytes_per_token(model: LanguageModel) -> int:
    """Bytes of weights that one decode step at batch 1 reads.

    All matrices count in the format they are held in, with two exceptions: only those experts count that a token is
    routed to, and the embedding table counts only if it is the head too.
    """
    total, moe = 0, getattr(model.config, "moe", model.config)
    for p in model.placed:
        if not isinstance(p.weight, Weight) or (
            p.name == "embed_tokens.weight" and not model.config.tie_word_embeddings
        ):
            continue
        nbytes = p.weight.nbytes
        if p.declaration.spec[0] == EP:  # a stack of experts
            nbytes = nbytes * moe.num_experts_per_tok // p.declaration.shape[0]
        total += nbytes
    return total


def peer(name: str, python: str, file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The speed of another engine, as `peer_bench.py` measures it in a process of the Python that has that engine.

    Raises:
        InputError: it is not installed there, or fails.
    """
    command = [python, PEER_SCRIPT, name, file, "--prefill", args.prefill, "--decode", args.decode]
    command += ["--threads", os.cpu_count(), "--repeats", args.repeats]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return json.loads(done.stdout)


def parser() -> Parser:
    p = Parser("jaxllm.bench", "Measure tokens per second.")
    p.add_argument("--model", default="demo", metavar="PATH", help="a file, directory or hub id (demo)")
    p.add_argument("--prefill", type=int, default=512, metavar="N", help="length of the prompt (512)")
    p.add_argument("--decode", type=int, default=64, metavar="N", help="tokens generated after it (64)")
    p.add_argument("--repeats", type=int, default=5, metavar="N", help="take the median of N runs (5)")
    p.add_argument("--dtype", choices=DTYPES, help="of activations")
    p.add_argument("--weights", choices=WEIGHTS, help="what matrices are held as")
    p.add_argument(
        "--peers", metavar="PYTHON", help="compare with llama.cpp and mistral.rs, run by this Python, which has them"
    )
    return p


def run(args: argparse.Namespace) -> None:
    model = load(args.model, dtype=args.dtype, weights=args.weights)
    limit = bandwidth()
    ours = measure(model, args.prefill, args.decode, args.repeats)
    read = bytes_per_token(model) * ours["decode_tok_s"]
    print(f"{model.name}, prompt of {args.prefill} tokens, then {args.decode} at batch 1, dtype {model.dtype}")
    print(
        f"memory streams {limit / 1e9:.1f} GB/s here; decoding reads {bytes_per_token(model) / 2**20:.0f} MiB of "
        f"weights a token, {read / 1e9:.1f} GB/s, {read / limit:.0%} of that"
    )
    rows: list[tuple] = [("jaxllm", ours["prefill_tok_s"], ours["decode_tok_s"], "", "")]
    if args.peers:
        for name in PEERS:
            theirs = peer(name, args.peers, find_checkpoint(args.model), args)
            ratios = [f"{ours[k] / theirs[k]:.2f}x" for k in ("prefill_tok_s", "decode_tok_s")]
            rows.append((f"{name} {theirs['version']}", theirs["prefill_tok_s"], theirs["decode_tok_s"], *ratios))
    print(tabulate(rows, ("", "prefill tok/s", "decode tok/s", "we prefill", "we decode"), floatfmt=".1f"))
    startup = measure_startup(args.model, args.dtype)
    print(
        f"first token {startup.cold:.1f} s after the start of the process, {startup.warm:.1f} s once programs are on "
        f"disk; decode step of DeepSeek-V3's 61 layers compiled from shapes in {startup.deepseek_v3:.0f} s"
    )


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(execute(parser(), run))
