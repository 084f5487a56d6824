"""What every backend of the kernels has to do. A backend's test class inherits these and says how it is run."""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compiled import dequantized
from covering import in_turn, some
from native_cases import SCALES
from quantized_writers import pack_bits

from jaxllm.formats.affine import Affine
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.nvfp4 import NVFP4
from jaxllm.formats.scaled import Activations, Scaled
from jaxllm.kernels.activations import Quantized
from jaxllm.kernels.attention import Cached, Scoring
from jaxllm.kernels.coded import Coded, stored

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


def shapes(*others):
    """Those that differ most, and some others; the backend's kernels share how they cut them."""
    return some([*SHAPES], ["one row", "all ragged", "many rows", *others])


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def block_fp8(*shape, block=(128, 128), group=None):
    """A weight with scales of many sizes, its last block all zeros; with `group`, of activations that are rounded."""
    w = numbers(*shape, seed=1) * np.exp(numbers(*shape[:-1], 1, seed=2))
    w[..., -block[0] :, -block[1] :] = 0 if shape[-1] > block[1] else w[..., -block[0] :, -block[1] :]
    weight = jax.jit(Scaled.from_dense, static_argnums=1)(w, block)
    return dataclasses.replace(weight, activations=None if group is None else Activations(group))


def mxfp4(*shape):
    w = numbers(*shape, seed=1) * np.exp(2 * numbers(*shape[:-1], 1, seed=2))
    w[..., -1, :32] = 0
    return jax.jit(MXFP4.encoded)(w)


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
        values = 32 // math.gcd(bits, 32)  # of whole words
        codes = pack_bits(rng.integers(0, 2**bits, shape).reshape(*shape[:-1], -1, values), bits)

        def normal(dtype):
            made = rng.normal(size=levels).astype(dtype)
            return np.pad(made, ((0, 0), (1, 0))) if act_order else made

        offsets = rng.integers(0, 2**bits, levels).astype(zeros) if zeros == np.uint8 else zeros and normal(zeros)
        groups = 1 + rng.permutation(np.arange(shape[-1], dtype=np.int32) // group) if act_order else None
        given = {"zeros": offsets, "biases": biases and normal(biases), "in_groups": groups, "even": act_order}
        return jax.tree.map(jnp.asarray, Affine(codes, normal(scales), bits, group, "test", 2 ** (bits - 1), **given))

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
    "NF4": lambda *shape: jax.jit(Codebook.from_dense, static_argnums=1)(numbers(*shape, seed=1), "NF4"),
    "NVFP4": lambda *shape: jax.jit(NVFP4.from_dense)(numbers(*shape, seed=1)),
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
        w = dequantized(weight) if w is None else w
        self.close(self.run(self.module.matmul, x, weight), x, w)

    def check_grouped(self, tile, expert, stack, x):
        got = self.run(self.module.grouped_matmul, x, stack, jnp.asarray(expert, jnp.int32))
        assert got.shape == (len(x), stack.shape[-2])
        w = dequantized(stack)
        for t, e in enumerate(expert):
            if e >= 0:
                rows = slice(t * tile, (t + 1) * tile)
                self.close(got[rows], x[rows], w[e])


class MXFP4Cases(KernelCases):
    @pytest.mark.parametrize("shape", shapes("ragged n"))
    def test_matmul(self, shape):
        m, n, k = SHAPES[shape]
        for dtype in self.dtypes:
            self.check_matmul(numbers(m, k).astype(dtype), mxfp4(n, k))

    @pytest.mark.parametrize(("tiles", "shape"), in_turn(TILES, (72, 96), (128, 256)))
    def test_grouped_matmul(self, tiles, shape):
        tile, expert = TILES[tiles]
        x = numbers(len(expert) * tile, shape[1]).astype(self.dtypes[-1])
        self.check_grouped(tile, expert, mxfp4(EXPERTS, *shape), x)

    @pytest.mark.optimized  # every bit counts
    def test_every_code_at_every_scale(self):
        """With one-hot rows the product is the weight itself: exact for scales that bfloat16's products can reach."""
        codes = np.tile(np.arange(16, dtype=np.uint8), 2)
        blocks = np.tile(codes[0::2] | codes[1::2] << 4, (64, 1)).astype(np.uint8)
        scales = np.arange(96, 160, dtype=np.uint8)[:, None]
        weight = MXFP4(blocks, scales)
        got = self.run(self.module.matmul, np.eye(32, dtype=self.dtypes[-1]), weight)
        np.testing.assert_array_equal(got, dequantized(weight).T)


MANY = ["Q6_K", "act-order", "NF4"]


class PlanesCases(KernelCases):
    """The module takes the formats that planes are made of, too."""

    @pytest.mark.parametrize("kind", PLANES)
    def test_few_rows(self, kind):
        self.check_matmul(numbers(3, 512).astype(self.dtypes[-1]), PLANES[kind](72, 512))

    @pytest.mark.parametrize("kind", some(["4 bits, zeros", *MANY, "INT8 per row"], MANY))
    def test_many_rows(self, kind):
        self.check_matmul(numbers(130, 256).astype(self.dtypes[-1]), PLANES[kind](136, 256))

    @pytest.mark.parametrize("shape", shapes("smaller than a tile"))
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
        np.testing.assert_array_equal(got, dequantized(weight, self.dtypes[-1]).astype(np.float32).T)


class BlockFP8Cases(KernelCases):
    BLOCKS = ((128, 128), (64, 128), (128, 64), (16, 32))

    @pytest.mark.parametrize("shape", shapes("ragged k"))
    def test_matmul(self, shape):
        m, n, k = SHAPES[shape]
        for dtype in self.dtypes:
            self.check_matmul(numbers(m, k).astype(dtype), block_fp8(n, k))

    @pytest.mark.parametrize("block", BLOCKS)
    def test_blocks(self, block):
        self.check_matmul(numbers(4, 256).astype(self.dtypes[-1]), block_fp8(192, 256, block=block))

    @pytest.mark.parametrize("shape", shapes("a few rows"))
    def test_activations_in_fp8(self, shape):
        m, n, k = SHAPES[shape]
        x = numbers(m, k) * np.exp(numbers(m, 1, seed=3))
        x[:1, : min(k, 128)] = 0
        x = x.astype(self.dtypes[-1])
        weight = block_fp8(n, k, group=128)
        self.close(self.run(self.module.matmul, x, weight), rounded(x, 128), dequantized(weight))

    def test_activations_with_scales_of_powers_of_two(self):
        x, weight = numbers(3, 256).astype(self.dtypes[-1]), block_fp8(128, 256)
        weight = dataclasses.replace(weight, activations=Activations(128, power_of_two=True))
        w, got = dequantized(weight), self.run(self.module.matmul, x, weight)
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
        self.close(got, seen, dequantized(weight))

    @pytest.mark.parametrize(
        ("tiles", "case"),
        in_turn(TILES, (None, (128, 256)), (None, (200, 384)), (128, (200, 384)), (128, (128, 256))),
    )
    def test_grouped_matmul(self, tiles, case):
        (tile, expert), (group, shape) = TILES[tiles], case
        x = numbers(len(expert) * tile, shape[1]).astype(self.dtypes[-1])
        stack = block_fp8(EXPERTS, *shape, group=group)
        got = self.run(self.module.grouped_matmul, x, stack, jnp.asarray(expert, jnp.int32))
        seen, w = rounded(x, group), dequantized(stack)
        for t, e in enumerate(expert):
            if e >= 0:
                rows = slice(t * tile, (t + 1) * tile)
                self.close(got[rows], seen[rows], w[e])

    @pytest.mark.optimized  # every bit counts
    @pytest.mark.parametrize(
        ("shape", "power_of_two"), in_turn([(1, 128), (5, 384), (130, 200), (2, 3, 256)], False, True)
    )
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
        np.testing.assert_array_equal(got, dequantized(weight))


class Case(NamedTuple):
    """Attention; `dim` of keys, of values (0: the keys serve as values) and of what keys go on with (`rope`)."""

    time: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    length: int
    first: tuple[int, ...]  # the position of each row's first token
    rope: int = 0
    sliding_window: int | None = None
    score_cap: float | None = None
    sinks: bool = False
    ring: bool = False  # the cache holds positions in any order, and some of its slots are empty
    cache: str = "bfloat16"
    dtype: str = "bfloat16"


ATTENTION = {
    "a token": Case(1, 8, 1, 128, 128, 256, (200, 3)),
    "a token of many heads": Case(1, 6, 3, 64, 64, 300, (290, 130)),
    "a token of many positions, with sinks": Case(1, 4, 1, 32, 32, 640, (600, 20), sinks=True),  # divided on GPUs
    "a few tokens": Case(3, 4, 2, 64, 128, 200, (150,), cache="float32", dtype="float32"),
    "a prompt": Case(20, 4, 2, 32, 16, 300, (0, 270), dtype="float32"),
    "a prompt in a window, with sinks": Case(20, 4, 1, 64, 64, 400, (350,), sliding_window=30, sinks=True),
    "a token in a ring": Case(1, 4, 1, 64, 64, 192, (500, 40), sliding_window=128, sinks=True, ring=True),
    "a prompt in a ring": Case(9, 2, 1, 96, 96, 150, (140,), sliding_window=100, score_cap=5.0, ring=True),
    "scores with a cap": Case(2, 4, 2, 256, 256, 140, (100, 137), score_cap=2.0),
    "latents": Case(1, 16, 1, 128, 0, 300, (280, 100), rope=64),
    "latents of every head": Case(5, 2, 2, 32, 48, 130, (120,), rope=16),
    "int8": Case(2, 4, 1, 64, 64, 200, (190, 60), cache="int8", sinks=True),
    "fp8": Case(1, 4, 2, 128, 128, 256, (255,), cache="float8_e4m3fn"),
    "latents in 8 bits": Case(1, 4, 1, 128, 0, 150, (140,), rope=32, cache="float8_e4m3fn"),
}


held_as = jax.jit(stored, static_argnums=1)


def attention_operands(case):
    """Sequences lie in the cache in another order, and one of them belongs to no row."""
    batch, dim = len(case.first), case.dim + case.rope
    buffers = {"keys": (case.kv_heads, case.dim), "values": (case.kv_heads, case.value_dim), "rope": (1, case.rope)}
    held = {
        name: held_as(numbers(batch + 1, case.length, heads, size, seed=i).swapaxes(1, 2), case.cache)
        for i, (name, (heads, size)) in enumerate(buffers.items(), 1)
        if size
    }
    at = None
    if case.ring:
        newest, age = np.array(case.first) + case.time - 1, np.random.default_rng(0).permutation(case.length)
        at = jnp.asarray(np.maximum(newest[:, None] - age, -1), jnp.int32)
    return Cached(
        q=jnp.asarray(numbers(batch, case.time, case.heads, dim) * 3 * dim**-0.5, case.dtype),
        keys=held["keys"],
        values=held.get("values"),
        positions=jnp.asarray(np.array(case.first)[:, None] + np.arange(case.time), jnp.int32),
        key_positions=at,
        sinks=jnp.asarray(numbers(case.heads, seed=5) + 3) if case.sinks else None,
        rows=jnp.arange(batch, 0, -1, dtype=jnp.int32),
        rope=held.get("rope"),
    ), Scoring(min(case.length, max(case.first) + case.time), case.sliding_window, case.score_cap)


def attended(given, scoring):
    """Attention in float64, one query after the other."""

    def wide(x, heads):
        if isinstance(x, Coded):
            codes = np.asarray(x.codes).view(jnp.dtype(x.dtype)).astype(np.float64)
            x = codes * np.asarray(x.scales, np.float64)
        return np.repeat(np.asarray(x, np.float64), heads // x.shape[1], axis=1)

    q, (batch, time, heads, _) = np.asarray(given.q, np.float64), given.q.shape
    keys = wide(given.keys, heads)
    values = keys if given.values is None else wide(given.values, heads)
    if given.rope is not None:
        keys = np.concatenate([keys, wide(given.rope, heads)], axis=-1)
    y = np.zeros((batch, time, heads, values.shape[-1]))
    for b, t, h in np.ndindex(batch, time, heads):
        sequence, position = int(given.rows[b]), int(given.positions[b, t])
        at = np.arange(keys.shape[2]) if given.key_positions is None else np.asarray(given.key_positions[b])
        seen = (at >= 0) & (at <= position)
        if scoring.sliding_window is not None:
            seen &= at > position - scoring.sliding_window
        scores = keys[sequence, h, seen] @ q[b, t, h]
        if scoring.score_cap is not None:
            scores = scoring.score_cap * np.tanh(scores / scoring.score_cap)
        weights = np.exp(scores)
        total = weights.sum() + (0 if given.sinks is None else np.exp(np.float64(given.sinks[h])))
        y[b, t, h] = weights @ values[sequence, h, seen] / total
    return y


class AttentionCases(KernelCases):
    @pytest.mark.parametrize("name", ATTENTION)
    def test_attention(self, name):
        given, scoring = attention_operands(ATTENTION[name])
        self.check_attention(given, scoring)

    def test_blocks_that_nobody_sees_are_not_read(self):
        """Their values are NaN, which times a weight of 0 would be NaN."""
        given, scoring = attention_operands(Case(2, 2, 1, 32, 32, 640, (320,), sliding_window=40, dtype="float32"))
        nobodys = (np.arange(640) < 256) | (np.arange(640) >= 384)
        given = given._replace(values=given.values.at[:, :, nobodys].set(jnp.nan))
        self.check_attention(given, dataclasses.replace(scoring, window=640))

    def check_attention(self, given, scoring):
        got = self.run(partial(self.module.attention, scoring=scoring), given)
        assert got.dtype == given.q.dtype
        error = 2e-5 if given.q.dtype == jnp.float32 else 0.02
        np.testing.assert_allclose(got.astype(np.float64), attended(given, scoring), rtol=0, atol=error)


def check_refusals_of_attention(refuses, too_large):
    """`too_large`: part of what it says of heads of 2^20 numbers."""

    def told(q=jnp.bfloat16, cache=jnp.bfloat16, dim=128):
        buffer = jax.eval_shape(lambda: stored(jnp.zeros((2, 1, 64, dim)), cache))
        queries, at = jax.ShapeDtypeStruct((2, 1, 8, dim), q), jax.ShapeDtypeStruct((2, 1), jnp.int32)
        return refuses("attention", Cached(queries, buffer, buffer, at), jax.Array)

    assert told() is told(cache=jnp.int8) is told(jnp.float32, jnp.float32) is None
    assert "a cache of float16 for queries of bfloat16: both" in told(cache=jnp.float16)
    assert "float16, " in told(jnp.float16, jnp.float16)
    assert too_large in told(dim=1 << 20)
