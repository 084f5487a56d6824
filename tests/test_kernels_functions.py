"""DeepSeek's kernels, and their counterparts for MXFP4, as functions, against numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compiled import dequantized
from kernel_cases import act_quant, mxfp4, numbers, plain

from jaxllm.errors import InputError
from jaxllm.kernels import block_fp8, dispatch
from jaxllm.kernels import mxfp4 as functions
from jaxllm.kernels.registry import Kernel

pytestmark = pytest.mark.optimized

E4M3 = ml_dtypes.float8_e4m3fn


def weight(out, in_, block=128):
    codes = (100 * numbers(out, in_, seed=1)).clip(-448, 448).astype(E4M3)
    scales = np.exp(numbers(-(-out // block), -(-in_ // block), seed=2)).astype(np.float32)
    spread = np.repeat(np.repeat(scales, block, 0)[:out], block, 1)[:, :in_]
    return codes, scales, codes.astype(np.float32) * spread


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_act_quant_is_bit_exact(dtype):
    """Thousands of groups, compiled and, once, not: half of them differ where XLA multiplies by 1 / 448."""
    x = (numbers(500, 1024) * np.exp(2 * numbers(500, 1, seed=3))).clip(-6e4, 6e4).astype(dtype)
    x[3, :128] = 0
    for run in (jax.jit(block_fp8.act_quant), *([block_fp8.act_quant] if dtype == np.float32 else [])):
        codes, scales = run(jnp.asarray(x))
        expected, wanted = act_quant(x)
        np.testing.assert_array_equal(np.asarray(scales), wanted)
        np.testing.assert_array_equal(np.asarray(codes).view(np.uint8), expected.view(np.uint8))


def test_act_quant_of_other_blocks_and_scales():
    x = numbers(3, 5, 200)
    for options, expected in (
        ({"block_size": 48}, act_quant(x, 48)),
        ({"scale_fmt": "ue8m0"}, act_quant(x, 128, power_of_two=True)),
    ):
        got = jax.jit(partial(block_fp8.act_quant, **options))(x)
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(ours), theirs)
    assert (np.frexp(got[1])[0] == 0.5).all()


def test_weight_dequant():
    for block in (128, 32):
        codes, scales, w = weight(200, 300, block)
        assert block_fp8.weight_dequant(codes, scales, block).dtype == jnp.bfloat16
        got = block_fp8.weight_dequant(codes, scales, block, jnp.float32)
        np.testing.assert_array_equal(got, w)
        got = block_fp8.weight_dequant(codes, scales, block)
        np.testing.assert_array_equal(np.asarray(got), w.astype(ml_dtypes.bfloat16))


def test_fp8_gemm():
    """Codes by codes, of which none are rounded again: that would make 448 of each group's largest."""
    b, b_s, w = weight(200, 320)
    a, a_s = act_quant(numbers(2, 3, 320))
    a = a.astype(np.float32).clip(-320, 320).astype(E4M3)
    seen = a.astype(np.float32) * np.repeat(a_s, 128, -1)[..., :320]
    assert block_fp8.fp8_gemm(a, a_s, b, b_s).dtype == jnp.bfloat16
    got = block_fp8.fp8_gemm(a, a_s, b, b_s, jnp.float32)
    scale = plain(np.abs(seen), np.abs(w)).max()
    np.testing.assert_allclose(got, plain(seen, w), atol=1e-6 * scale)


def test_mxfp4():
    stored, x = mxfp4(72, 96), numbers(2, 3, 96)
    w = dequantized(stored)
    for blocks in (stored.blocks, np.asarray(stored.blocks).reshape(72, 3, 16)):
        np.testing.assert_array_equal(functions.dequantize(blocks, stored.scales, jnp.float32), w)
        got = jax.jit(functions.matmul, static_argnums=3)(x, blocks, stored.scales, jnp.float32)
        np.testing.assert_allclose(got, plain(x, w), atol=1e-4 * np.abs(w).max())
    assert functions.matmul(x, stored.blocks, stored.scales).dtype == jnp.bfloat16


def test_the_platforms_kernels_are_used(monkeypatch):
    called = []

    def kernel(op, cls):
        def function(*args):
            called.append(op)
            return next(k for k in before if k.takes(op, cls) and k.platform is None).function(*args)

        return Kernel(op, cls, "cpu", "toy", function)

    before = dispatch.registry.KERNELS
    ops = "act_quant", "weight_dequant", "matmul"
    toys = [kernel(op, dispatch.Scaled) for op in ops] + [kernel("matmul", functions.MXFP4)]
    monkeypatch.setattr(dispatch.registry, "KERNELS", [*toys, *before])
    b, b_s, _ = weight(128, 128)
    stored = mxfp4(32, 32)

    def calls():
        block_fp8.fp8_gemm(*block_fp8.act_quant(jnp.ones((2, 128))), b, b_s)
        block_fp8.weight_dequant(b, b_s)
        functions.matmul(jnp.ones((1, 32)), stored.blocks, stored.scales)

    jax.eval_shape(calls)
    assert called == ["act_quant", "matmul", "weight_dequant", "matmul"]


CODES, SCALES, _ = weight(128, 256)
X = np.ones((2, 256), np.float32)
BYTES = np.zeros((4, 32), np.uint8)
WRONG = {
    "codes rounded again": (lambda: block_fp8.act_quant(X.astype(E4M3)), "x is of float8_e4m3fn"),
    "another format of scales": (lambda: block_fp8.act_quant(X, scale_fmt="e8"), "scale_fmt 'e8': choose"),
    "scales of a weight": (lambda: block_fp8.weight_dequant(CODES, SCALES, 64), r"\[1, 2\], expected \[2, 4\]"),
    "scales of activations": (
        lambda: block_fp8.fp8_gemm(CODES, SCALES, CODES, SCALES),
        r"a_s of shape \[1, 2\], expected \[128, 2\]",
    ),
    "numbers that are no codes": (
        lambda: block_fp8.fp8_gemm(X, np.ones((2, 2), np.float32), CODES, SCALES),
        "x is of float32 and the weight of float8_e4m3fn",
    ),
    "other columns": (lambda: block_fp8.fp8_gemm(CODES[:, :128], SCALES, CODES, SCALES), "as many columns"),
    "bytes and scales": (lambda: functions.dequantize(BYTES, BYTES), "a scale for each 16 bytes"),
    "bytes of another dtype": (lambda: functions.dequantize(BYTES.view(np.int8), BYTES), "have to be uint8"),
    "columns of x": (lambda: functions.matmul(X, BYTES, BYTES[:, :2]), "a matrix of 256 columns"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case):
    call, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        call()
