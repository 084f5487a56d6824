"""The Triton kernels, run by Triton's interpreter on the CPU: the code that GPUs get, launched as they get it.

The interpreter (of Triton 3.7.1) multiplies bfloat16 as if its bits were integers and rounds wrongly to narrow floats.
`MENDED` replaces just these operations by what ml_dtypes and float32 make of them. What nothing here can see: what
GPUs do differently from that (the order of sums, the narrower sums of Hopper's FP8 instruction), and races. That the
kernels compile for GPUs is checked in `accelerators/test_gpu.py`.
"""

import dataclasses
import types
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'jaxllm[plan]'")
pytest.importorskip("jax_triton", reason="jax-triton is not installed: pip install 'jaxllm[plan]'")

import triton.language as tl  # noqa: E402
from kernel_cases import (  # noqa: E402
    EXPERTS,
    PLANES,
    AttentionCases,
    BlockFP8Cases,
    MXFP4Cases,
    PlanesCases,
    act_quant,
    check_refusals_of_attention,
    integers,
    numbers,
    plain,
    rounded,
)
from kernel_cases import block_fp8 as block_fp8_weight  # noqa: E402
from kernel_cases import mxfp4 as mxfp4_weight  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from jaxllm.formats.mxfp4 import MXFP4  # noqa: E402
from jaxllm.formats.scaled import Activations, Scaled  # noqa: E402
from jaxllm.kernels import gpu, gpu_report  # noqa: E402
from jaxllm.kernels.block_fp8 import triton_gpu as block_fp8  # noqa: E402
from jaxllm.kernels.flash import triton_gpu as flash  # noqa: E402
from jaxllm.kernels.mxfp4 import triton_gpu as mxfp4  # noqa: E402
from jaxllm.kernels.planes import triton_gpu as planes  # noqa: E402

pytestmark = pytest.mark.optimized

# XLA's threads, which run callbacks, flush subnormal numbers to zero, and a new thread does what its parent does.
THREAD = ThreadPoolExecutor(1)
THREAD.submit(int).result()
NARROW = {
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
}


class Executor(interpreter.GridExecutor):
    """Takes pointers to numpy arrays as they are, where its parent copies torch tensors to and fro."""

    def _init_args_hst(self, args, kwargs):
        return args, kwargs

    def _restore_args_dev(self, *_):
        pass


def numbers_of(handle):
    """A handle's data as numbers, where the interpreter holds bits."""
    narrow = NARROW.get(handle.dtype.scalar)
    return handle.data if narrow is None else handle.data.view(narrow).astype(np.float32)


def handle_of(numbers, dtype):
    """The other way around, rounded to nearest."""
    narrow, held = NARROW.get(dtype), interpreter._get_np_dtype(dtype)
    data = numbers.astype(held) if narrow is None else numbers.astype(narrow).view(held)
    return interpreter.TensorHandle(data, dtype)


def cast(self, source, to, *_):
    return handle_of(np.asarray(numbers_of(source)), to.scalar)


def arithmetic(operation):
    return lambda self, a, b: handle_of(operation(numbers_of(a), numbers_of(b)), a.dtype.scalar)


def dot(self, a, b, acc, *_):
    product = np.matmul(numbers_of(a), numbers_of(b), dtype=np.float32)
    return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)


def byte_perm(low, high, selector):
    """CUDA's: each of a selector's four lower digits is the number of a byte of two words."""
    digits = getattr(selector, "handle", None)
    digits = np.full((1, 1), selector) if digits is None else digits.data
    assert not (digits & 0x8888).any()  # which would repeat signs
    both = low.handle.data.view(np.uint32).astype(np.uint64) | high.handle.data.view(np.uint32).astype(np.uint64) << 32
    picked = sum((both >> 8 * (digits.astype(np.uint64) >> 4 * i & 7) & 255) << 8 * i for i in range(4))
    handle = interpreter.TensorHandle(picked.astype(np.uint32).view(np.int32), tl.int32)
    return tl.tensor(handle, tl.block_type(tl.int32, list(picked.shape)))


MENDED = {
    "create_fp_to_fp": cast,
    "create_fp_ext": cast,
    "create_fp_trunc": cast,
    "create_si_to_fp": cast,
    "create_fadd": arithmetic(np.add),
    "create_fsub": arithmetic(np.subtract),
    "create_fmul": arithmetic(np.multiply),
    "create_dot": dot,
    "get_bf16": lambda self, value: handle_of(np.array([value]), tl.bfloat16),
}


@cache
def rewritten(function):
    return interpreter.InterpretedFunction(function).rewrite()


def call_helper(self, *args, **kwargs):
    """A kernel's call of another `triton.jit` function, which without TRITON_INTERPRET=1 is not interpreted."""
    return rewritten(self.fn)(*args, **kwargs)


def interpret(launch):
    """`gpu.run`, by the interpreter; as a callback, so that it also runs under jit."""
    outputs = jax.tree.leaves(launch.out_type)

    def run(*inputs):
        inputs = iter(np.ascontiguousarray(a) for a in inputs)
        # What is never written is NaN, or what FP8 has for it.
        results = [np.full(o.shape, 0xFF, np.uint8).repeat(o.dtype.itemsize, -1).view(o.dtype) for o in outputs]
        arrays = [*(None if a is None else next(inputs) for a in launch.args), *results]
        pointers = [a if a is None else pointer(a) for a in arrays]
        function = interpreter.InterpretedFunction(launch.kernel.fn)
        executor = Executor(function.rewrite(), function.arg_names, tuple(launch.grid))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JITFunction, "__call__", call_helper)
            patch.setattr(libdevice, "byte_perm", byte_perm)
            for name, operation in MENDED.items():
                patch.setattr(interpreter.InterpreterBuilder, name, operation, raising=False)
            scope = interpreter._patch_lang(tl.zeros.fn)  # for functions of the language itself
            try:
                THREAD.submit(executor, *pointers, **launch.constants).result()
            finally:
                scope.restore()
        return results

    flat = jax.pure_callback(run, outputs, *(a for a in launch.args if a is not None))
    return jax.tree.unflatten(jax.tree.structure(launch.out_type), flat)


def pointer(array):
    """What the interpreter takes for a tensor."""
    return types.SimpleNamespace(data_ptr=lambda: array.ctypes.data, dtype=gpu_report.TYPE_NAMES[str(array.dtype)])


@pytest.fixture(autouse=True)
def interpreted():
    with gpu.run_by(interpret):
        yield


class TestMXFP4(MXFP4Cases):
    module = mxfp4

    def test_matmul_of_split_sums(self):
        """Few programs share the sum over k, the last one has fewer steps, and the last step is ragged."""
        for dtype, k in ((np.float32, 1120), (ml_dtypes.bfloat16, 2336)):
            x, weight = numbers(3, k).astype(dtype), mxfp4_weight(40, k)
            (launch,) = gpu_report.launches(mxfp4.matmul, x, weight)
            assert launch.grid[2] > 1
            self.check_matmul(x, weight)

    def test_scales_at_the_ends(self):
        """0 is 2^-127, which is subnormal; 255 makes a block NaN."""
        weight = MXFP4(np.full((2, 16), 0x22, np.uint8), np.array([[0], [255]], np.uint8))
        for dtype in self.dtypes:
            got = self.run(mxfp4.matmul, np.ones((1, 32), dtype), weight)
            assert got[0, 0] == np.float32(2) ** -122 and np.isnan(got[0, 1])

    def test_tiles_of_many_rows(self):
        x, stack = numbers(2 * 70, 64), mxfp4_weight(EXPERTS, 40, 64)
        self.check_grouped(70, [3, 1], stack, x)


class TestBlockFP8(BlockFP8Cases):
    module = block_fp8

    @pytest.mark.parametrize("group", [None, 128])
    def test_matmul_of_split_sums(self, group):
        for dtype in self.dtypes:
            x, weight = numbers(3, 1120).astype(dtype), block_fp8_weight(40, 1120, group=group)
            assert gpu_report.launches(block_fp8.matmul, x, weight)[-1].grid[2] > 1
            self.check_seen(x, weight, group)

    @pytest.mark.parametrize("group", [64, 128])
    @pytest.mark.parametrize("block", [*BlockFP8Cases.BLOCKS, (128, 256)])
    def test_blocks_with_activations_in_fp8(self, block, group):
        x = numbers(4, 320).astype(ml_dtypes.bfloat16)
        self.check_seen(x, block_fp8_weight(192, 320, block=block, group=group), group)

    @pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8])
    @pytest.mark.parametrize("block", [(1, None), (None, None), (1, 32)])
    def test_other_codes_and_scales(self, dtype, block):
        n, k = 40, 96
        values = jnp.asarray(10 * numbers(n, k)).astype(dtype)
        scales = jnp.abs(numbers(-(-n // (block[0] or n)), -(-k // (block[1] or k)), seed=1)).astype(jnp.float16)
        weight = Scaled(values, scales, block, None, factor=0.75)
        for x in (numbers(3, k), numbers(3, k).astype(ml_dtypes.bfloat16)):
            self.check_matmul(x, weight)
        got = self.run(lambda w: block_fp8.weight_dequant(w, jnp.float32), weight)
        np.testing.assert_array_equal(got, weight.dequantize())

    def check_seen(self, x, weight, group):
        """`check_matmul` against what a W8A8 matmul sees of x."""
        seen = rounded(x, group)
        self.close(self.run(block_fp8.matmul, x, weight), seen, weight.dequantize())

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e8m0fnu])
    def test_narrow_scales(self, dtype):
        weight = block_fp8_weight(200, 256)
        weight = dataclasses.replace(weight, scales=weight.scales.astype(dtype))
        self.check_matmul(numbers(2, 256), weight)
        np.testing.assert_array_equal(self.run(block_fp8.weight_dequant, weight), weight.dequantize(jnp.bfloat16))

    def test_weight_dequant_of_a_stack(self):
        stack = block_fp8_weight(3, 40, 200, block=(16, 32))
        np.testing.assert_array_equal(self.run(block_fp8.weight_dequant, stack), stack.dequantize(jnp.bfloat16))

    def test_act_quant_in_groups_of_any_size(self):
        x = numbers(2, 130).astype(ml_dtypes.bfloat16)
        for got, expected in zip(block_fp8.act_quant(x, 48), act_quant(x, 48), strict=True):
            np.testing.assert_array_equal(got, expected)


class TestAttention(AttentionCases):
    module = flash


class TestPlanes(PlanesCases):
    module = planes

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_every_number_of_bits(self, bits):
        """In steps of whole chunks (few rows) and of parts of one."""
        weight = integers(bits, 32, np.float32)(24, 256)
        for rows in (2, 20):
            x = np.eye(256, dtype=self.dtypes[-1])[np.random.default_rng(rows).permutation(256)[:rows]]
            got = self.run(planes.matmul, x, weight)
            np.testing.assert_array_equal(got, plain(x, weight.dequantize()))  # in float32: sums are scaled

    @pytest.mark.parametrize("tile", planes.TILES[1:])
    def test_every_tile(self, tile):
        self.check_matmul(numbers(tile.m, 256).astype(self.dtypes[-1]), PLANES["Q5_K"](24, 256))

    @pytest.mark.parametrize("kind", ["4 bits, zeros", "3 bits", "NF4"])
    def test_activations_in_float32(self, kind):
        for rows in (3, 40):
            x, weight = numbers(rows, 256), PLANES[kind](24, 256)
            self.close(self.run(planes.matmul, x, weight), x, np.asarray(weight.dequantize()), 1e-6)

    @pytest.mark.parametrize("kind", ["4 bits, offsets", "act-order", "Q2_K", "INT8 per row"])
    def test_few_rows_scale_unrounded_weights(self, kind):
        x, weight = numbers(3, 256).astype(self.dtypes[-1]), PLANES[kind](24, 256)
        self.close(self.run(planes.matmul, x, weight), x, np.asarray(weight.dequantize()), 2e-6)

    def test_matmul_of_split_sums(self):
        """Few programs share the sum over k, the last one has fewer steps, and the last step is ragged."""
        x, weight = numbers(3, 544), PLANES["Q8_0"](24, 544)
        assert gpu_report.launches(planes.matmul, x, weight)[-1].grid[2] > 1
        self.check_matmul(x, weight)

    @pytest.mark.parametrize("rows", [3, 40])
    def test_a_row_ends_where_the_next_begins(self, rows):
        """The last step is ragged; of the next row it would see scales that are not numbers."""
        weight = PLANES["Q8_0"](24, 352)
        weight = dataclasses.replace(weight, blocks=weight.blocks.at[1::2, :, :2].set(0x7F))
        x = numbers(rows, 352).astype(self.dtypes[-1])
        got, w = self.run(planes.matmul, x, weight), np.asarray(weight.dequantize())
        assert np.isnan(got[:, 1::2]).all()
        self.close(got[:, ::2], x, w[::2])

    def test_groups_that_are_no_power_of_two(self):
        weight = integers(4, 48, zeros=np.uint8)(24, 192)
        for rows in (3, 20):
            self.check_matmul(numbers(rows, 192).astype(self.dtypes[-1]), weight)

    def test_each_expert_has_its_order(self):
        stack = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(integers(4, 32, act_order=True)(24, 256) for _ in range(4))
        )
        groups = np.stack([np.random.default_rng(e).permutation(stack.in_groups[0]) for e in range(4)])
        stack = dataclasses.replace(stack, in_groups=jnp.asarray(groups))
        self.check_grouped(2, [3, 0, -1], stack, numbers(6, 256).astype(self.dtypes[-1]))


def test_what_is_refused():
    x = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)
    assert mxfp4.refuses("matmul", x, mxfp4_weight(8, 256)) is None
    assert "float16" in mxfp4.refuses("matmul", x.update(dtype=jnp.float16), mxfp4_weight(8, 256))
    for block, group, reason in (
        ((128, 128), None, None),
        ((1, 16), None, None),
        ((128, 8), None, "blocks of 8 columns: the GPU kernels want multiples of 16"),
        ((1, 16), 128, "blocks of 16 columns and activations in groups of 128: the GPU kernels want multiples of 32"),
    ):
        weight = block_fp8_weight(8, 256, block=block, group=group)
        assert block_fp8.refuses("grouped_matmul", x, weight) == reason
        assert block_fp8.refuses("weight_dequant", x, weight) is None
    check_refusals_of_attention(flash.refuses, "heads of 1048576 numbers: the GPU kernels take up to 512")
    weight = dataclasses.replace(weight, values=weight.values.astype(jnp.int8), activations=Activations(128))
    assert "int8" in block_fp8.refuses("matmul", x, weight)
