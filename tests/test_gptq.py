"""GPTQ, AWQ and rounding to nearest, beside gptqmodel and AutoAWQ, and beside slower ways to say the same."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled import dequantized
from quantized_writers import gptq as gptq_tensors
from quantized_writers import unpack_bits
from reference.gptq_goldens import AWQ_CASES, CASES, error, problem

from jaxllm.checkpoint.integer_schemes import gptq as gptq_scheme
from jaxllm.errors import InputError
from jaxllm.formats.awq import EXPONENTS, awq, awq_scales
from jaxllm.formats.gptq import gptq
from jaxllm.formats.rtn import SHARES, rtn

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gptq_errors.json").read_text())
PROBLEMS = [problem(seed) for seed in (0, 1)]


def codes_of(weight) -> np.ndarray:
    out, words, each = weight.codes.shape
    return unpack_bits(np.asarray(weight.codes).reshape(out, words * each), weight.bits, weight.shape[1])


def decoded(weight) -> np.ndarray:
    """`[out, in]` in numpy, from the codes, scales and zeros."""
    zeros = np.full(weight.scales.shape, weight.zero) if weight.zeros is None else weight.zeros
    scales, zeros = (a.astype(np.float32).repeat(weight.group, 1)[:, : weight.shape[1]] for a in (weight.scales, zeros))
    return (codes_of(weight).astype(np.float32) - zeros) * scales


def plain(w: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Rounded to nearest, with the smallest and largest value of each group exact but for the zero point."""
    grid = w.reshape(len(w), -1, group)
    low, high = np.minimum(grid.min(-1, keepdims=True), 0), np.maximum(grid.max(-1, keepdims=True), 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    return ((np.clip(np.rint(grid / scale) + zero, 0, 2**bits - 1) - zero) * scale).reshape(w.shape)


def test_the_problems_are_the_goldens():
    for seed, (w, x) in enumerate(PROBLEMS):
        squares = np.square(x.astype(np.float64) @ w.T.astype(np.float64)).sum()
        assert squares == pytest.approx(GOLDEN[f"zeros {seed}"], rel=1e-6)


@pytest.mark.parametrize(("bits", "group", "symmetric"), CASES)
def test_gptq_leaves_less_error_than_gptqmodel_and_much_less_than_rounding(bits, group, symmetric):
    for seed, (w, x) in enumerate(PROBLEMS):
        weight = gptq(w, x.T @ x, bits, group, symmetric)
        ours, theirs = error(x, w, decoded(weight)), GOLDEN[f"gptq {seed} {bits} {group} {symmetric}"]
        assert ours <= 1.02 * theirs["best"]
        assert ours <= 0.9 * theirs["default"]
        assert ours <= 0.2 * error(x, w, decoded(rtn(w, bits, group, symmetric, np.square(x).mean(0))))
        np.testing.assert_array_equal(dequantized(weight), decoded(weight))


def column_by_column(w: np.ndarray, h: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int) -> np.ndarray:
    """GPTQ's codes as the paper derives them (section 3, equations 2 and 3): the inverse shrinks with every column."""
    w, h = w.astype(np.float64), h.astype(np.float64)
    inverse = np.linalg.inv(h + 0.01 * np.diagonal(h).mean() * np.eye(len(h)))
    codes = np.zeros(w.shape)
    for q in np.argsort(-np.diagonal(h), kind="stable"):
        codes[:, q] = np.clip(np.rint(w[:, q] / scales[:, q]) + zeros[:, q], 0, 2**bits - 1)
        rest = (w[:, q] - (codes[:, q] - zeros[:, q]) * scales[:, q]) / inverse[q, q]
        w -= np.outer(rest, inverse[q])
        inverse -= np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        inverse[q, q] = 1  # done with: its row and column are zero
    return codes


def test_gptq_equals_the_papers_derivation():
    w, x = PROBLEMS[0]
    weight = gptq(w, x.T @ x, 4, 64)
    scales, zeros = (np.asarray(a, np.float64).repeat(64, 1) for a in (weight.scales, weight.zeros))
    want = column_by_column(w, x.T @ x, scales, zeros, 4)
    assert (codes_of(weight) != want).mean() < 2e-3  # ties, which float32 may see differently
    assert w.shape[1] > 128  # more than one block


def test_gptq_has_the_layout_of_a_checkpoint():
    w, x = PROBLEMS[0]
    for bits in (3, 4, 8):
        tensors = gptq_tensors(w, np.random.default_rng(0), 64, bits)
        read = gptq_scheme(bits, 64, v2=False).build(**tensors)
        ours = gptq(w, x.T @ x, bits, 64)
        assert jax.tree.structure(ours) == jax.tree.structure(read)
        for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(read), strict=True):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)


def test_gptq_of_a_stack_is_that_of_each_expert():
    (w, x), (v, y) = PROBLEMS
    products = np.stack([x.T @ x, y.T @ y])
    both = gptq(np.stack([w, v]), products, 4, 64)
    for i, matrix in enumerate((w, v)):
        one = gptq(matrix, products[i], 4, 64)
        for mine, theirs in zip(jax.tree.leaves(both), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(mine[i], theirs)


def test_gptq_where_nothing_is_known_rounds_to_nearest():
    w, x = PROBLEMS[0]
    h = x.T @ x
    unknown = gptq(w, np.zeros_like(h), 4, 64)
    np.testing.assert_array_equal(decoded(unknown), decoded(gptq(w, 1e-9 * np.eye(len(h)), 4, 64, damp=0.0)))
    check_nearest(unknown, w, slice(None))

    h[:, 5] = h[5] = 0  # an input that was always zero
    check_nearest(gptq(w, h, 4, 64), w, slice(5, 6))


def check_nearest(weight, w: np.ndarray, columns: slice) -> None:
    """Values of these columns are off by at most half a step, except at the ends of the range."""
    codes, step = (
        codes_of(weight)[:, columns],
        np.asarray(weight.scales, np.float32).repeat(weight.group, 1)[:, columns],
    )
    inside = (codes > 0) & (codes < 15)
    assert inside.mean() > 0.8
    assert (np.abs(decoded(weight) - w)[:, columns][inside] <= 0.501 * step[inside]).all()


def test_gptq_zero_points_are_what_version_1_can_say():
    steps = np.tile(np.arange(16, dtype=np.float32) % 15, (4, 2)) / 14  # 15 values from 0: one code is left
    weight = gptq(steps, np.eye(32, dtype=np.float32), 4, 16)
    np.testing.assert_array_equal(weight.zeros, 1)
    np.testing.assert_allclose(decoded(weight), steps, atol=5e-4)  # scales are float16


def test_a_last_group_may_be_smaller():
    w, x = (a[:, :96] for a in PROBLEMS[0])
    for weight in (gptq(w, x.T @ x, 4, 64), rtn(w, 4, 64, True)):
        assert weight.shape == (64, 96)
        assert weight.scales.shape == (64, 2)
        np.testing.assert_array_equal(dequantized(weight), decoded(weight))
    alone = rtn(w[:, 64:], 4, 32, True)
    np.testing.assert_array_equal(decoded(rtn(w, 4, 64, True))[:, 64:], decoded(alone))


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True), (4, False), (8, False)])
def test_rtn_is_the_best_of_all_ranges(bits, symmetric):
    w, x = PROBLEMS[1]
    importance = np.square(x).mean(0)
    weight = rtn(w[:4], bits, 32, symmetric, importance)
    most = 2**bits - 1
    for row in range(4):
        for g in range(w.shape[1] // 32):
            values, weights = w[row, 32 * g :][:32].astype(np.float64), importance[32 * g :][:32].astype(np.float64)
            low, high = min(values.min(), 0), max(values.max(), 0)
            if symmetric:
                low, high = -max(-low, high), max(-low, high)
            losses = []
            for share in SHARES:
                scale = float(np.float16(np.float32(high - low) * share / np.float32(most)))
                zero = 2 ** (bits - 1) if symmetric else min(max(np.rint(-low * share / scale), 0), most)
                near = (np.clip(np.rint(values / scale) + zero, 0, most) - zero) * scale
                losses.append((weights * (near - values) ** 2).sum())
            mine = decoded(weight)[row, 32 * g :][:32]
            assert (weights * (mine - values) ** 2).sum() == pytest.approx(min(losses), rel=1e-3)
    assert weight.format == f"INT {bits}-bit"
    assert (weight.zeros is None) == symmetric
    assert error(x, w, decoded(rtn(w, bits, 32, False, importance))) < 0.8 * error(x, w, plain(w, bits, 32))


@pytest.mark.parametrize(("bits", "group"), AWQ_CASES)
def test_awq_leaves_less_error_than_autoawqs_factors_and_much_less_than_rounding(bits, group):
    for seed, (w, x) in enumerate(PROBLEMS):
        s = awq_scales([w], x.T @ x, bits, group)
        weight = awq(w, s, np.square(x).mean(0), bits, group)
        ours, theirs = error(x / s, w * s, decoded(weight)), GOLDEN[f"awq {seed} {bits} {group}"]
        assert ours <= 0.95 * theirs["scaled"]
        assert ours <= 1.1 * theirs["clipped"]
        assert ours <= 0.55 * error(x, w, plain(w, bits, group))
        assert weight.format == "AWQ 4-bit"
        assert (weight.scales.dtype, weight.zeros.dtype) == (np.float16, np.uint8)


def test_awq_scales_are_the_best_of_all_exponents_for_all_matrices_together():
    (w, x), (v, _) = PROBLEMS
    x = x[:, :64]
    w, v, squares = w[:, :64], v[:40, :64], np.square(x).mean(0)
    found = awq_scales([w, v], x.T @ x, 4, 32)
    losses, tried = [], []
    for exponent in EXPONENTS:
        s = np.sqrt(squares) ** exponent
        tried.append(s / np.sqrt(s.max() * s.min()))
        losses.append(
            sum(
                np.square((x / tried[-1]) @ (m * tried[-1] - decoded(awq(m, tried[-1], squares, 4, 32))).T).sum()
                for m in (w, v)
            )
        )
    np.testing.assert_allclose(found, tried[int(np.argmin(losses))], rtol=1e-5)
    assert 0 < np.argmin(losses) < len(EXPONENTS) - 1
    np.testing.assert_array_equal(awq_scales([w], np.zeros((64, 64), np.float32), 4, 32), np.ones(64, np.float32))


def test_what_cannot_be_encoded_is_refused():
    w, x = PROBLEMS[0]
    h = x.T @ x
    with pytest.raises(InputError, match="integers of 1 bits"):
        rtn(w, 1, 32)
    with pytest.raises(InputError, match="rows of 252 are not whole words of 8 4-bit codes"):
        gptq(w[:, :252], h[:252, :252])
    with pytest.raises(InputError, match="not finite, or larger than 65504"):
        rtn(np.where(w == w[3, 3], np.nan, w), 4, 32)
    with pytest.raises(InputError, match="products of inputs that are not finite"):
        gptq(w, np.where(np.eye(len(h)) > 0, np.nan, h))
    with pytest.raises(InputError, match="products that no inputs can have"):
        gptq(w, -h)
    with pytest.raises(InputError, match="groups of 96 do not divide rows of 256"):
        awq(w, np.ones(256, np.float32), group=96)
