"""The Pallas TPU kernels against products in float64, on a simulated TPU that forgives nothing: what was not written
is NaN, what is read out of bounds raises, and races are found.

`make test` has each kernel in its longest form, over many blocks. `make test-accelerators` has all of this file.
"""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compiled import dequantized
from covering import in_turn, some
from jax import lax
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax._src.pallas.mosaic.primitives import pack_elementwise_p
from jax.experimental.pallas import tpu as pltpu
from kernel_cases import (
    ATTENTION,
    PLANES,
    SHAPES,
    TILES,
    AttentionCases,
    BlockFP8Cases,
    KernelCases,
    MXFP4Cases,
    PlanesCases,
    check_refusals_of_attention,
    ggml,
    integers,
    numbers,
    rounded,
)
from kernel_cases import block_fp8 as block_fp8_weight
from kernel_cases import mxfp4 as mxfp4_weight

from jaxllm.formats.planes_of import planes_of
from jaxllm.formats.scaled import Activations, Scaled
from jaxllm.kernels import shapes, tpu
from jaxllm.kernels.block_fp8 import pallas_tpu as block_fp8
from jaxllm.kernels.flash import pallas_tpu as flash
from jaxllm.kernels.mxfp4 import pallas_tpu as mxfp4
from jaxllm.kernels.planes import pallas_tpu as planes

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
BF16 = ml_dtypes.bfloat16


def pack_elementwise(low, high, *, packed_dtype):
    """Two arrays in one of words, as the primitive's docstring has it; the simulator lacks it."""
    low, high = (lax.bitcast_convert_type(x.astype(packed_dtype), jnp.uint16).astype(jnp.uint32) for x in (low, high))
    return low | high << 16


mlir.register_lowering(pack_elementwise_p, mlir.lower_fun(pack_elementwise, multiple_results=False), platform="cpu")


@pytest.fixture
def no_races(monkeypatch):
    """Every kernel that a test runs is watched, and there is one."""
    watched, state = [], interpret_pallas_call.RaceDetectionState
    monkeypatch.setattr(
        interpret_pallas_call, "RaceDetectionState", lambda **options: watched.append(state(**options)) or watched[-1]
    )
    yield
    interpret_pallas_call.reset_tpu_interpret_mode_state()
    assert watched
    assert not any(each.races_found for each in watched)


class Quickly:
    """The simulator's programs run once, so LLVM need not polish them. float32 has tests of its own, tighter ones."""

    dtypes = (BF16,)

    @pytest.fixture(autouse=True)
    def quickly(self, optimizations):
        """Also where a case is marked `optimized`: these programs are the simulator's, not users'."""
        jax.config.update("jax_disable_most_optimizations", True)


def simulated(module, *names):
    return SimpleNamespace(**{name: partial(getattr(module, name), interpret=STRICT) for name in names})


@pytest.mark.simulator
@pytest.mark.usefixtures("no_races")
class TestMXFP4(Quickly, MXFP4Cases):
    module = simulated(mxfp4, "matmul", "grouped_matmul")

    # Blocks and tiles are cut by what all kernels share, of which the others have tests of more shapes.
    @pytest.mark.parametrize("shape", some([*SHAPES], ["all ragged", "many rows"]))
    def test_matmul(self, shape):
        super().test_matmul(shape)

    @pytest.mark.parametrize(
        ("tiles", "shape"), some(in_turn(TILES, (72, 96), (128, 256)), [("prefill", (72, 96)), ("decode", (128, 256))])
    )
    def test_grouped_matmul(self, tiles, shape):
        super().test_grouped_matmul(tiles, shape)

    @pytest.mark.parametrize("shape", some([(1, 128, 256), (3, 72, 96)], [(3, 72, 96)]))
    def test_float32(self, shape):
        m, n, k = shape
        x, weight = numbers(m, k), mxfp4_weight(n, k)
        self.close(self.run(self.module.matmul, x, weight), x, dequantized(weight), error=1e-6)

    def test_scales_that_no_encoder_writes(self):
        """A NaN stays in its row; the smallest scale counts as the next one; a row of zeros is zero at any scale."""
        weight = mxfp4_weight(64, 64)
        scales = np.array(weight.scales)
        scales[5, 1], scales[7] = 255, 0
        weight = dataclasses.replace(weight, scales=jnp.asarray(scales))
        got = self.run(self.module.matmul, numbers(3, 64).astype(BF16), weight)
        assert np.isnan(got[:, 5]).all()
        assert np.isfinite(np.delete(got, 5, axis=1)).all()
        assert (np.abs(got[:, 7]) < 1e-35).all()
        zero = dataclasses.replace(weight, blocks=jnp.zeros_like(weight.blocks), scales=jnp.zeros_like(weight.scales))
        assert (self.run(self.module.matmul, numbers(3, 64).astype(BF16), zero) == 0).all()


@pytest.mark.simulator
@pytest.mark.usefixtures("no_races")
class TestBlockFP8(Quickly, BlockFP8Cases):
    module = simulated(block_fp8, "matmul", "grouped_matmul", "act_quant", "weight_dequant")

    # A few rows are compared more closely below.
    @pytest.mark.parametrize("shape", some([*SHAPES], ["one row", "all ragged", "many rows"]))
    def test_activations_in_fp8(self, shape):
        super().test_activations_in_fp8(shape)

    @pytest.mark.parametrize(
        "block", some([*BlockFP8Cases.BLOCKS, (8, 16), (256, 256)], [(128, 64), (8, 16), (256, 256)])
    )
    def test_activations_in_fp8_with_other_blocks(self, block):
        weight, x = block_fp8_weight(272, 288, block=block, group=128), numbers(4, 288).astype(BF16)
        seen = rounded(x, 128)
        self.check_matmul_of(seen, self.run(self.module.matmul, x, weight), weight)

    @pytest.mark.parametrize("block", [(1, None), (None, None), *some([(64, None)], [])])
    def test_one_scale_for_rows(self, block):
        """Results are scaled, so that only x is rounded."""
        values = jnp.asarray(numbers(3, 136, 160, seed=1)).astype(jnp.float8_e4m3fn)
        counts = -(-136 // (block[0] or 136)), 1
        stack = Scaled(values, jnp.exp(jnp.asarray(numbers(3, *counts, seed=2))).astype(jnp.bfloat16), block)
        x = numbers(4, 160).astype(BF16)
        weight = jax.tree.map(lambda leaf: leaf[1], stack)
        assert block_fp8.refuses("matmul", x, weight) is None
        self.close(self.run(self.module.matmul, x, weight), x, dequantized(weight), error=1e-6)
        self.check_grouped(2, [2, 0], stack, x)

    def test_small_blocks(self):
        weight, x = block_fp8_weight(72, 160, block=(8, 16)), numbers(4, 160).astype(BF16)
        self.check_matmul(x, weight)

    def test_products_are_not_rounded(self):
        """Codes times codes, scaled afterwards: float32 all the way, where a decoded bfloat16 weight is 2^-9 off."""
        weight, x = block_fp8_weight(128, 384, group=128), numbers(4, 384).astype(BF16)
        seen = rounded(x, 128)
        self.check_matmul_of(seen, self.run(self.module.matmul, x, weight), weight, error=1e-6)

    def test_scales_in_bfloat16(self):
        weight = block_fp8_weight(128, 256)
        weight = dataclasses.replace(weight, scales=weight.scales.astype(jnp.bfloat16))
        x = numbers(2, 3, 256)
        got = self.run(self.module.matmul, x, weight)
        self.close(got, x, dequantized(weight), error=1e-6)

    def check_matmul_of(self, seen, got, weight, error=2e-3):
        self.close(got, seen, dequantized(weight), error)


SUMMED = ["4 bits, offsets", "Q3_K", "Q4_K", "IQ4_XS"]


@pytest.mark.simulator
@pytest.mark.usefixtures("no_races")
class TestPlanes(Quickly, PlanesCases):
    module = simulated(planes, "matmul", "grouped_matmul")

    # Few rows of the others are multiplied below, and compared more closely, or in tiles or of another shape.
    @pytest.mark.parametrize("kind", some([*PLANES], ["3 bits", "Q2_K", "Q5_K", "Q1_0", "INT8 per row"]))
    def test_few_rows(self, kind):
        super().test_few_rows(kind)

    @pytest.mark.parametrize("kind", ["Q4_K", "8 bits, zeros of floats", "NF4"])
    def test_float32(self, kind):
        x, weight = numbers(3, 256), PLANES[kind](40, 256)
        self.close(self.run(self.module.matmul, x, weight), x, dequantized(weight), error=1e-6)

    @pytest.mark.parametrize("kind", some(["4 bits, zeros", "Q8_0", *SUMMED], SUMMED))
    def test_few_rows_are_not_rounded(self, kind):
        """Codes are multiplied, sums are scaled: float32 all the way."""
        x, weight = numbers(2, 1024).astype(BF16), PLANES[kind](40, 1024)
        assert planes.groups_at_once(2, planes_of(weight, True), BF16)
        self.close(self.run(self.module.matmul, x, weight), x, dequantized(weight), error=1e-6)

    def test_every_size_of_scale(self):
        """float16 with its subnormals, of both signs: one-hot rows give the weight in float32, bit for bit."""
        scales = np.arange(0, 0x7C00, 31, dtype=np.uint16)[:1024].reshape(128, 8)
        scales[::2] |= 0x8000
        weight = integers(4, 32)(128, 256)
        weight = dataclasses.replace(weight, scales=jnp.asarray(scales.view(np.float16)))
        x = np.eye(256, dtype=BF16)[3::32]
        got = self.run(self.module.matmul, x, weight)
        np.testing.assert_array_equal(got, dequantized(weight)[:, 3::32].T)
        scales[5, 2], scales[6, 3] = 0x7C00, 0x7E00
        weight = dataclasses.replace(weight, scales=jnp.asarray(scales.view(np.float16)))
        got = self.run(self.module.matmul, x, weight)
        assert np.isnan(got[3, 6])
        assert not np.isfinite(got[2, 5])


@pytest.mark.usefixtures("no_races")
class TestManySteps(Quickly, KernelCases):
    """More rows than a tile holds, more than a block does, more columns than are decoded at once."""

    @pytest.mark.parametrize(
        ("module", "weight"),
        [
            (mxfp4, partial(mxfp4_weight, 136, 1184)),
            (block_fp8, partial(block_fp8_weight, 136, 1184)),
            (block_fp8, partial(block_fp8_weight, 136, 672, group=128)),
            (planes, partial(PLANES["Q4_K"], 264, 1280)),
        ],
        ids=["mxfp4", "W8A16", "W8A8", "planes"],
    )
    def test_many_tiles(self, module, weight, monkeypatch):
        weight = weight()
        monkeypatch.setattr(tpu, "PROMPT_TILE", 32)
        monkeypatch.setattr(tpu, "PROMPT_BLOCK", 128)
        x = numbers(70, weight.shape[1]).astype(BF16)
        got = self.run(partial(module.matmul, interpret=STRICT), x, weight)
        group = activations.group if (activations := getattr(weight, "activations", None)) else None
        self.close(got, rounded(x, group), dequantized(weight))

    @pytest.mark.parametrize(
        ("module", "stack"),
        [
            (mxfp4, partial(mxfp4_weight, 3, 136, 64)),
            (block_fp8, partial(block_fp8_weight, 3, 136, 64, block=(64, 64))),
            (planes, partial(PLANES["4 bits, offsets"], 3, 264, 64)),
        ],
        ids=["mxfp4", "block_fp8", "planes"],
    )
    def test_experts_of_many_blocks(self, module, stack, monkeypatch):
        monkeypatch.setattr(tpu, "BLOCK_BYTES", 1)
        self.module = SimpleNamespace(grouped_matmul=partial(module.grouped_matmul, interpret=STRICT))
        self.check_grouped(2, [1, 1, 0, -1], stack(), numbers(8, 64).astype(BF16))

    def test_decoding_many_blocks(self, monkeypatch):
        monkeypatch.setattr(tpu, "BLOCK_BYTES", 1)
        weight = block_fp8_weight(2, 264, 96, block=(64, 64))
        got = self.run(partial(block_fp8.weight_dequant, dtype=jnp.float32, interpret=STRICT), weight)
        np.testing.assert_array_equal(got, dequantized(weight))


# Everything that attention is told, each at least once.
FIRST = ["a prompt in a ring", "latents of every head"]
FEW = ["a token of many heads", "a prompt", "a token in a ring", "int8", "latents in 8 bits"]
LATER = [pytest.param(name, marks=pytest.mark.simulator) for name in some([*ATTENTION], FEW) if name not in FIRST]


@pytest.mark.usefixtures("no_races")
class TestAttention(Quickly, AttentionCases):
    """In small blocks, so that there are several, some of which nobody sees."""

    module = simulated(flash, "attention")

    @pytest.mark.parametrize("name", FIRST + LATER)
    def test_attention(self, name):
        super().test_attention(name)

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        monkeypatch.setattr(flash, "BLOCK_BYTES", 1)
        monkeypatch.setattr(flash, "TILE", 16)


SMALL = jax.ShapeDtypeStruct((1, 256), jnp.bfloat16)


def fp8(*shape, block=(128, 128), group=None):
    activations = None if group is None else Activations(group)
    return Scaled(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), None, block, activations)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (fp8(256, 256), None),
        (fp8(256, 256, block=(16, 32), group=128), None),
        (fp8(256, 256, block=(256, 256)), None),
        (fp8(256, 256, block=(4, 128)), "blocks of 4 rows"),
        (fp8(256, 256, block=(None, 128)), "one scale for a whole row or column"),
        (fp8(256, 256, block=(96, 128)), "blocks of 96 rows"),
        (fp8(256, 256, block=(640, 128)), "blocks of 640 rows"),
        (fp8(256, 256, block=(128, 48)), "blocks of 48 columns"),
        (fp8(256, 256, block=(128, 32), group=48), "groups of 48"),
    ],
)
def test_what_fp8_refuses(weight, reason):
    told = block_fp8.refuses("matmul", SMALL, weight)
    assert (told is None) if reason is None else reason in told


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (partial(PLANES["Q4_K"], 8, 256), None),
        (partial(ggml("IQ3_S"), 8, 256), "IQ3_S is not codes with a scale for each group"),
        (partial(integers(3, 32), 8, 96), "rows of 96 columns, the kernel takes multiples of 256 for 3 bits"),
    ],
)
def test_what_planes_refuse(weight, reason):
    weight = weight()
    x = jax.ShapeDtypeStruct((1, weight.shape[-1]), jnp.bfloat16)
    assert planes.refuses("matmul", x, weight) == reason


@pytest.mark.parametrize("module", [block_fp8, mxfp4])
def test_what_both_refuse(module):
    def told(k, dtype):
        x = jax.ShapeDtypeStruct((1, k), dtype)
        half = jax.ShapeDtypeStruct((64, k // 2), jnp.uint8)
        weight = fp8(64, k) if module is block_fp8 else mxfp4.MXFP4(half, None)
        return module.refuses("matmul", x, weight)

    assert told(28672, jnp.float32) is None
    assert "float16" in told(256, jnp.float16)
    assert "rows of 1048576 columns" in told(1 << 20, jnp.bfloat16)


def test_what_attention_refuses():
    check_refusals_of_attention(flash.refuses, "heads of 1048576 numbers do not fit")


def test_tiles_fit():
    """Blocks that the lanes of the output allow, tiles that VMEM has room for, and no more steps than that takes."""
    for op, named in shapes.named().items():
        for shape in named.values():
            for itemsize in (2, 4):
                rows = shape.k if "fp8" in op else shape.k * 17 // 32
                size = tpu.sizes(shape.m, shape.n, shape.k, rows, itemsize)
                assert size.vmem_bytes <= tpu.VMEM_BUDGET
                assert size.block % 128 == 0
                assert size.block < shape.n + 128
                assert size.tile == shape.m or size.tile % 16 == 0
