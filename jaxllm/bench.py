"""`jaxllm bench`: tokens per second, and how much of the memory bandwidth decoding reaches.

At batch 1 every new token reads every weight once, so memory bandwidth bounds decoding. The fraction of it that is
reached says how much is left to gain. With `--peers`, other engines run the same file in the same minutes.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from jaxllm import processor
from jaxllm.cli import Parser, execute
from jaxllm.engine.engine import Engine
from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.language_model import LanguageModel
from jaxllm.loading import DTYPES, WEIGHTS, find_checkpoint, load
from jaxllm.parallel import EP
from jaxllm.startup import measure_startup

# Engines, and what they quantize the weights to.
PEERS = ("llama.cpp", None), ("mistral.rs", "q8_0"), ("mistral.rs", "q4k"), ("mistral.rs", None)
FEW = 512  # longer prompts are measured with the first two only: the others would take minutes
RATES = "prefill_tok_s", "decode_tok_s"
HEAD = "prompt", "", "prefill tok/s", "decode tok/s", "we prefill", "we decode"
VERSION = importlib.metadata.version("jaxllm")
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
        engine = Engine(model, 1, prefill + decode + 1)
        begun = time.perf_counter()
        answer = engine.add(prompt, decode + 1, eos_ids=(), temperature=0.0)
        while not answer.completion.tokens:
            engine.step()
        first = time.perf_counter()
        while engine.busy:
            engine.step()
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


def peer(name: str, isq: str | None, prefill: int, file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The speed of another engine, as `peer_bench.py` measures it in a process of the Python that has that engine.

    Raises:
        InputError: it is not installed there, or fails.
    """
    command = [args.peers, PEER_SCRIPT, name, file, "--prefill", prefill, "--decode", args.decode]
    command += ["--threads", os.cpu_count(), "--repeats", args.repeats, *([] if isq is None else ["--isq", isq])]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return json.loads(done.stdout)


def parser() -> Parser:
    p = Parser("jaxllm.bench", "Measure tokens per second.")
    p.add_argument("--model", default="demo", metavar="PATH", help="a file, directory or hub id (demo)")
    p.add_argument("--prefill", type=int, nargs="+", default=[512], metavar="N", help="lengths of prompts (512)")
    p.add_argument("--decode", type=int, default=64, metavar="N", help="tokens generated after it (64)")
    p.add_argument("--repeats", type=int, default=5, metavar="N", help="take the median of N runs (5)")
    p.add_argument("--dtype", choices=DTYPES, help="of activations")
    p.add_argument("--weights", choices=WEIGHTS, help="what matrices are held as")
    p.add_argument("--json", type=Path, metavar="FILE", help="add each row to this file, as a line of JSON")
    p.add_argument(
        "--peers", metavar="PYTHON", help="compare with llama.cpp and mistral.rs, run by this Python, which has them"
    )
    return p


def run(args: argparse.Namespace) -> None:
    model = load(args.model, dtype=args.dtype, weights=args.weights)
    limit, read = bandwidth(), bytes_per_token(model)
    print(f"{model.name}, dtype {model.dtype}, {args.decode} tokens at batch 1 after each prompt")
    print(processor.describe())
    measured = []
    for prefill in args.prefill:
        ours = measure(model, prefill, args.decode, args.repeats)
        measured.append({"engine": "jaxllm", "version": VERSION, "prompt": prefill, **ours})
        for name, isq in PEERS if args.peers else ():
            if prefill <= FEW or (name, isq) in PEERS[:2]:
                theirs = peer(name, isq, prefill, find_checkpoint(args.model), args)
                rates = {key: theirs[key] for key in RATES}
                engine = name if isq is None else f"{name}, {isq}"
                measured.append({"engine": engine, "version": theirs["version"], "prompt": prefill, **rates})
    if args.json:
        common = {"model": model.name, "processor": processor.describe(), "decode": args.decode}
        try:
            with args.json.open("a") as file:
                file.writelines(json.dumps(common | row) + "\n" for row in measured)
        except OSError as error:
            raise InputError(f"{args.json}: {error.strerror}") from error
    best = max(row["decode_tok_s"] for row in measured if row["engine"] == "jaxllm")
    print(
        f"memory streams {limit / 1e9:.1f} GB/s here; decoding reads {read / 2**20:.0f} MiB of weights a token, "
        f"{read * best / 1e9:.1f} GB/s, {read * best / limit:.0%} of that"
    )
    print(tabulate(list(_rows(measured)), HEAD, floatfmt=".1f"))
    startup = measure_startup(args.model, args.dtype)
    print(
        f"first token {startup.cold:.1f} s after the start of the process, {startup.warm:.1f} s once programs are on "
        f"disk; decode step of DeepSeek-V3's 61 layers compiled from shapes in {startup.deepseek_v3:.0f} s"
    )


def _rows(measured: list[dict[str, Any]]) -> Iterator[tuple]:
    """Lines of the table, each engine beside ours with the same prompt."""
    ours: dict[str, Any] = {}
    for row in measured:
        rates = [row[key] for key in RATES]
        if row["engine"] == "jaxllm":
            ours, ratios = row, [""] * len(RATES)
        else:
            ratios = [f"{ours[key] / row[key]:.2f}x" for key in RATES]
        yield row["prompt"], f"{row['engine']} {row['version']}", *rates, *ratios


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(execute(parser(), run))
