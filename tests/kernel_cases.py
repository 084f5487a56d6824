"""What every backend of the kernels has to do. A backend's test class inherits these and says how it is run."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from native_cases import SCALES

from jaxllm.formats import affine
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.nvfp4 import NVFP4
from jaxllm.formats.scaled import Activations, Scaled
from jaxllm.kernels.activations import Quantized

# [m, n, k]; k is whole blocks of 32, which MXFP4 needs.
SHAPES = {
    "one row": (1, 256, 256),
    "a few rows": (5, 128, 384),
    "ragged n": (16, 200, 256),
    "ragged k": (8, 128, 352),
    "all ragged": (3, 72, 96),
    "smaller than a tile": (2, 32, 32),
    "many rows": (130, 256, 256),
}
# Experts of the tiles: out of order, repeated, some of nobody, tiles that are not in use.
TILES = {
    "one": (1, [2]),
    "decode": (2, [0, 2, 3, -1, -1]),
    "prefill": (16, [0, 0, 1, 3, 3, 3, -1]),
    "none": (4, [-1, -1]),
}
EXPERTS = 4


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def block_fp8(*shape, block=(128, 128), group=None):
    """A weight with scales of many sizes, its last block all zeros; with `group`, of activations that are rounded."""
    w = numbers(*shape, seed=1) * np.exp(numbers(*shape[:-1], 1, seed=2))
    w[..., -block[0] :, -block[1] :] = 0 if shape[-1] > block[1] else w[..., -block[0] :, -block[1] :]
    weight = Scaled.from_dense(w, block)
    return dataclasses.replace(weight, activations=None if group is None else Activations(group))


def mxfp4(*shape):
    w = numbers(*shape, seed=1) * np.exp(2 * numbers(*shape[:-1], 1, seed=2))
    w[..., -1, :32] = 0
    return MXFP4.from_dense(w)


def ggml(type):
    """Random blocks, with scales that are finite and of any sign and size."""

    def make(*shape):
        *lead, n, k = shape
        rng, block = np.random.default_rng(3), BLOCK_TYPES[type]
        blocks = rng.integers(0, 256, (*lead, n, k // block.size, block.nbytes), dtype=np.uint8)
        for at in SCALES.get(type, (0,)):
            scales = rng.normal(size=(*blocks.shape[:-1], 1)) * 10.0 ** rng.integers(-6, 0, (*blocks.shape[:-1], 1))
            blocks[..., at : at + 2] = scales.astype(np.float16).view(np.uint8)
        return GGML(jnp.asarray(blocks), type)

    return make


def integers(bits, group, scales=np.float16, zeros=None, biases=None, act_order=False):
    """`Affine` of random codes; the dtypes of its leaves, where there are some."""

    def make(*shape):
        rng, levels = np.random.default_rng(bits), (*shape[:-1], shape[-1] // group)
        codes = affine.pack(jnp.asarray(rng.integers(0, 2**bits, shape), jnp.uint32), bits)

        def normal(dtype):
            made = jnp.asarray(rng.normal(size=levels).astype(dtype))
            return jnp.pad(made, ((0, 0), (1, 0))) if act_order else made

        offsets = jnp.asarray(rng.integers(0, 2**bits, levels), zeros) if zeros == np.uint8 else zeros and normal(zeros)
        groups = 1 + rng.permutation(np.arange(shape[-1], dtype=np.int32) // group) if act_order else None
        given = {"zeros": offsets, "biases": biases and normal(biases), "in_groups": groups, "even": act_order}
        return affine.Affine(codes, normal(scales), bits, group, "test", 2 ** (bits - 1), **given)

    return make


def int8(*shape):
    values = (40 * numbers(*shape, seed=1)).astype(np.int8)
    return Scaled(jnp.asarray(values), jnp.asarray(numbers(*shape[:-1], 1, seed=2)), (1, None), factor=1 / 127)


# Weights `[n, k]` or `[experts, n, k]` that are held as planes of codes.
PLANES = {
    "4 bits, zeros": integers(4, 128, zeros=np.uint8),
    "4 bits, offsets": integers(4, 64, ml_dtypes.bfloat16, biases=ml_dtypes.bfloat16),
    "8 bits, zeros of floats": integers(8, 32, np.float32, zeros=np.float32),
    "3 bits": integers(3, 128),
    "act-order": integers(4, 32, act_order=True),
    **{type: ggml(type) for type in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q1_0", "IQ4_XS")},
    "NF4": lambda *shape: Codebook.from_dense(numbers(*shape, seed=1), "NF4"),
    "NVFP4": lambda *shape: NVFP4.from_dense(numbers(*shape, seed=1)),
    "INT8 per row": int8,
}


def act_quant(x, group=128, power_of_two=False):
    """Codes and scales of DeepSeek's kernel.py: float32's own division by 448 (and 1 for zeros)."""
    x = np.asarray(x).astype(np.float32)
    groups = np.split(x, range(group, x.shape[-1], group), axis=-1)
    peak = np.stack([np.abs(part).max(-1) for part in groups], axis=-1)
    scales = np.where(peak == 0, np.float32(1), peak / np.float32(448))
    if power_of_two:
        scales = np.exp2(np.ceil(np.log2(scales.astype(np.float64)))).astype(np.float32)
    spread = np.repeat(scales, group, axis=-1)[..., : x.shape[-1]]
    return np.clip(x / spread, -448, 448).astype(ml_dtypes.float8_e4m3fn), scales


def rounded(x, group, power_of_two=False):
    """The activations that a W8A8 product sees."""
    if group is None:
        return x
    codes, scales = act_quant(x, group, power_of_two)
    return codes.astype(np.float32) * np.repeat(scales, group, axis=-1)[..., : x.shape[-1]]


def plain(x, w):
    """The product in float64."""
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64).swapaxes(-1, -2)


class KernelCases:
    """`module` is the backend; `run(f, *args)` calls one of its functions; `dtypes` of x that it can be tested with."""

    module = None
    dtypes = (np.float32, ml_dtypes.bfloat16)

    def run(self, f, *args):
        return np.asarray(jax.jit(f)(*args))

    def close(self, got, x, w, error=2e-3):
        """Equal to the product of what the operands stand for, relative to the sum of magnitudes of its terms."""
        assert got.dtype == np.float32
        scale = plain(np.abs(np.asarray(x, np.float64)), np.abs(np.asarray(w, np.float64)))
        assert (np.abs(got - plain(x, w)) <= error * scale + 1e-30).all()

    def check_matmul(self, x, weight, w=None):
        """`w` is the matrix that x is compared with; by default what the weight decodes to."""
        w = np.asarray(weight.dequantize()) if w is None else w
        self.close(self.run(self.module.matmul, x, weight), x, w)

    def check_grouped(self, tile, expert, stack, x):
        got = self.run(self.module.grouped_matmul, x, stack, jnp.asarray(expert, jnp.int32))
        assert got.shape == (len(x), stack.shape[-2])
        w = np.asarray(stack.dequantize())
        for t, e in enumerate(expert):
            if e >= 0:
                rows = slice(t * tile, (t + 1) * tile)
                self.close(got[rows], x[rows], w[e])


class MXFP4Cases(KernelCases):
    @pytest.mark.parametrize("shape", SHAPES)
    def test_matmul(self, shape):
        m, n, k = SHAPES[shape]
        for dtype in self.dtypes:
            self.check_matmul(numbers(m, k).astype(dtype), mxfp4(n, k))

    @pytest.mark.parametrize("tiles", TILES)
    def test_grouped_matmul(self, tiles):
        tile, expert = TILES[tiles]
        for n, k in ((128, 256), (72, 96)):
            x = numbers(len(expert) * tile, k).astype(self.dtypes[-1])
            self.check_grouped(tile, expert, mxfp4(EXPERTS, n, k), x)

    @pytest.mark.optimized  # every bit counts
    def test_every_code_at_every_scale(self):
        """With one-hot rows the product is the weight itself: exact for scales that bfloat16's products can reach."""
        codes = np.tile(np.arange(16, dtype=np.uint8), 2)
        blocks = np.tile(codes[0::2] | codes[1::2] << 4, (64, 1)).astype(np.uint8)
        scales = np.arange(96, 160, dtype=np.uint8)[:, None]
        weight = MXFP4(blocks, scales)
        got = self.run(self.module.matmul, np.eye(32, dtype=self.dtypes[-1]), weight)
        np.testing.assert_array_equal(got, np.asarray(weight.dequantize()).T)


class PlanesCases(KernelCases):
    """The module takes the formats that planes are made of, too."""

    @pytest.mark.parametrize("kind", PLANES)
    def test_few_rows(self, kind):
        self.check_matmul(numbers(3, 512).astype(self.dtypes[-1]), PLANES[kind](72, 512))

    @pytest.mark.parametrize("kind", ["4 bits, zeros", "Q6_K", "act-order", "NF4", "INT8 per row"])
    def test_many_rows(self, kind):
        self.check_matmul(numbers(130, 256).astype(self.dtypes[-1]), PLANES[kind](136, 256))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_shapes(self, shape):
        m, n, k = SHAPES[shape]
        self.check_matmul(numbers(m, k).astype(self.dtypes[-1]), PLANES["Q8_0"](n, k))

    @pytest.mark.parametrize(
        ("tiles", "kind", "k"),
        [("one", "4 bits, zeros", 256), ("decode", "Q4_K", 512), ("prefill", "NVFP4", 256), ("none", "Q8_0", 96)],
    )
    def test_grouped_matmul(self, tiles, kind, k):
        tile, expert = TILES[tiles]
        x = numbers(len(expert) * tile, k).astype(self.dtypes[-1])
        self.check_grouped(tile, expert, PLANES[kind](EXPERTS, 136, k), x)

    @pytest.mark.optimized  # every bit counts
    @pytest.mark.parametrize("kind", ["4 bits, offsets", "Q3_K", "Q4_K", "IQ4_XS"])
    def test_one_weight_at_a_time(self, kind):
        """With one-hot rows the product is the weight itself, dequantized in float32 and rounded once."""
        weight = PLANES[kind](72, 256)
        got = self.run(self.module.matmul, np.eye(256, dtype=self.dtypes[-1]), weight)
        np.testing.assert_array_equal(got, np.asarray(weight.dequantize(self.dtypes[-1])).astype(np.float32).T)


class BlockFP8Cases(KernelCases):
    BLOCKS = ((128, 128), (64, 128), (128, 64), (16, 32))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_matmul(self, shape):
        m, n, k = SHAPES[shape]
        for dtype in self.dtypes:
            self.check_matmul(numbers(m, k).astype(dtype), block_fp8(n, k))

    @pytest.mark.parametrize("block", BLOCKS)
    def test_blocks(self, block):
        self.check_matmul(numbers(4, 256).astype(self.dtypes[-1]), block_fp8(192, 256, block=block))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_activations_in_fp8(self, shape):
        m, n, k = SHAPES[shape]
        x = numbers(m, k) * np.exp(numbers(m, 1, seed=3))
        x[:1, : min(k, 128)] = 0
        x = x.astype(self.dtypes[-1])
        weight = block_fp8(n, k, group=128)
        self.close(self.run(self.module.matmul, x, weight), rounded(x, 128), np.asarray(weight.dequantize()))

    def test_activations_with_scales_of_powers_of_two(self):
        x, weight = numbers(3, 256).astype(self.dtypes[-1]), block_fp8(128, 256)
        weight = dataclasses.replace(weight, activations=Activations(128, power_of_two=True))
        w, got = np.asarray(weight.dequantize()), self.run(self.module.matmul, x, weight)
        self.close(got, rounded(x, 128, True), w)
        assert np.abs(plain(rounded(x, 128, True), w) - plain(rounded(x, 128), w)).max() > 0.01

    def test_codes_with_scales(self):
        """What `fp8_gemm` gets: nothing is rounded again."""
        codes, scales = act_quant(numbers(5, 320))
        codes = (
            codes.astype(np.float32).clip(-320, 320).astype(ml_dtypes.float8_e4m3fn)
        )  # rounding would make 448 of 320
        weight = block_fp8(200, 320, group=128)
        got = self.run(self.module.matmul, Quantized(codes, scales, 128), weight)
        seen = codes.astype(np.float32) * np.repeat(scales, 128, -1)[:, :320]
        self.close(got, seen, np.asarray(weight.dequantize()))

    @pytest.mark.parametrize("tiles", TILES)
    @pytest.mark.parametrize("group", [None, 128])
    def test_grouped_matmul(self, tiles, group):
        tile, expert = TILES[tiles]
        for n, k in ((128, 256), (200, 384)):
            x = numbers(len(expert) * tile, k).astype(self.dtypes[-1])
            stack = block_fp8(EXPERTS, n, k, group=group)
            got = self.run(self.module.grouped_matmul, x, stack, jnp.asarray(expert, jnp.int32))
            seen, w = rounded(x, group), np.asarray(stack.dequantize())
            for t, e in enumerate(expert):
                if e >= 0:
                    rows = slice(t * tile, (t + 1) * tile)
                    self.close(got[rows], seen[rows], w[e])

    @pytest.mark.optimized  # every bit counts
    @pytest.mark.parametrize("power_of_two", [False, True])
    @pytest.mark.parametrize("shape", [(1, 128), (5, 384), (130, 200), (2, 3, 256)])
    def test_act_quant(self, shape, power_of_two):
        x = numbers(*shape) * np.exp(3 * numbers(*shape[:-1], 1, seed=3))
        x[..., :1, :128] = 0
        got = jax.jit(lambda x: self.module.act_quant(x, 128, power_of_two))(jnp.asarray(x))
        for ours, expected in zip(got, act_quant(x, 128, power_of_two), strict=True):
            np.testing.assert_array_equal(np.asarray(ours), expected)

    @pytest.mark.optimized  # every bit counts
    @pytest.mark.parametrize(
        ("shape", "block"), [((256, 256), (128, 128)), ((200, 300), (128, 128)), ((40, 70), (16, 32))]
    )
    def test_weight_dequant(self, shape, block):
        weight = block_fp8(*shape, block=block)
        got = self.run(lambda w: self.module.weight_dequant(w, jnp.float32), weight)
        np.testing.assert_array_equal(got, np.asarray(weight.dequantize()))
