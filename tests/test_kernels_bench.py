"""The benchmark of the kernels, as far as it goes without their chips."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxllm.kernels import bench
from jaxllm.kernels.shapes import Shape, attention, named

README = (Path(__file__).parents[1] / "kernels" / "README.md").read_text()


@pytest.mark.parametrize(
    ("op", "shape", "nbytes", "flops"),
    [
        ("mxfp4.matmul", Shape(1, 32, 64), 32 * 64 // 2 + 32 * 2 + 2 * 64 + 4 * 32, 2 * 32 * 64),
        ("mxfp4.grouped_matmul", Shape(2, 32, 64, 8), 2 * (32 * 64 // 2 + 32 * 2) + 2 * 128 + 4 * 64, 4 * 32 * 64),
        # Q4_K: codes, a scale and a minimum for 32, and float16 ones for 256
        ("planes.matmul", Shape(1, 32, 256, kind="Q4_K"), 32 * (128 + 2 * 8 + 2 * 2) + 2 * 256 + 4 * 32, 2 * 32 * 256),
        ("block_fp8.matmul", Shape(16, 128, 256), 128 * 256 + 2 * 4 + 2 * 16 * 256 + 4 * 16 * 128, 2 * 16 * 128 * 256),
    ],
)
def test_what_an_op_has_to_move_and_multiply(op, shape, nbytes, flops):
    assert bench.bytes_and_flops(op, shape) == (nbytes, flops)


@pytest.mark.parametrize(
    ("name", "tokens", "nbytes", "flops"),
    [
        ("Llama-70B", 1, (8192 * 256 + 8 * 256) * 2, 2 * 8 * 256 * 8192),
        ("gpt-oss-120b window", 1, (128 * 128 + 8 * 128) * 2, 2 * 8 * 128 * 128),
        ("DeepSeek-V3", 1, (8192 * 576 + 16 * (576 + 512)) * 2, 2 * 16 * (576 + 512) * 8192),
        ("Llama-70B", 512, (8192 * 256 + 512 * 8 * 256) * 2, 2 * 8 * 256 * sum(range(7681, 8193))),
    ],
)
def test_what_attention_has_to_move_and_multiply(name, tokens, nbytes, flops):
    assert bench.attention_bytes_and_flops(*attention(name, tokens)) == (nbytes, flops)


def test_attention_is_timed(monkeypatch):
    """Over a ring, whose newest positions are those of the tokens."""
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=iter([10, 13]).__next__))
    assert bench.measured_attention(*attention("gpt-oss-120b window", 1)) == 3


@pytest.mark.parametrize("op", named())
def test_runs_are_timed(op, monkeypatch):
    """By a clock on which runs take 1, 5 and 2 seconds; compiling, before them, is not looked at."""
    times = iter([10, 11, 20, 25, 30, 32])
    monkeypatch.setattr(bench, "REPEATS", 3)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    shape = Shape(2, 128, 128, 4 if "grouped" in op else 0, "MLX 4-bit" if op.startswith("planes") else "")
    assert bench.measured(op, shape, None) == 2
    assert next(times, None) is None


def test_a_weights_bits():
    """Which the table names ops by."""
    shape = Shape(1, 128, 256)
    kinds = ("block_fp8.matmul", ""), ("mxfp4.matmul", ""), ("planes.matmul", "Q6_K"), ("planes.matmul", "NF4")
    assert [bench.bits(op, shape._replace(kind=kind)) for op, kind in kinds] == [8, 4, 6, 4]


@pytest.mark.parametrize("chip", bench.CHIPS)
def test_the_readme_has_every_shape_and_claims_no_measurement(chip):
    table = README.split(f"### {chip}:")[1].split("###")[0]
    assert all(f"| {label} |" in table for shapes in named().values() for label in shapes)
    rows = [line for line in table.splitlines() if line.startswith(("| block_fp8", "| mxfp4", "| planes"))]
    assert len(rows) > 50 and all(line.endswith("| not measured |") for line in rows)


def test_without_a_chip_it_says_what_it_needs():
    got = subprocess.run([sys.executable, "-m", "jaxllm.kernels.bench"], capture_output=True, text=True)
    assert got.returncode == 2
    assert got.stderr.count("\n") == 1 and got.stderr.startswith("error: ")
    assert "is none of TPU v5e" in got.stderr or "is not installed: pip install" in got.stderr
