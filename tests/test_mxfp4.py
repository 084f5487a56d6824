"""MXFP4 against ml_dtypes, a slow decoder and gguf-py, and its three operations against one another."""

from fractions import Fraction
from functools import partial

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import checkify

import jaxllm
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.kernels.dispatch import matmul
from jaxllm.kernels.experts import Gated, gather_forward, grouped_mlp, tile_size
from jaxllm.layers.mlp import ClampedSwiGLU

RNG = np.random.default_rng


def slow(blocks, scales):
    """One value after the other, in exact fractions, rounded to float32 at the end."""
    out = np.empty((*blocks.shape[:-1], blocks.shape[-1] * 2), np.float32)
    for i in np.ndindex(out.shape):
        byte = int(blocks[(*i[:-1], i[-1] // 2)])
        code = byte >> 4 if i[-1] % 2 else byte % 16
        size = Fraction((0, 1, 2, 3, 4, 6, 8, 12)[code % 8], 2)
        scale = int(scales[(*i[:-1], i[-1] // 32)])
        exact = size * Fraction(2) ** (scale - 127)
        value = np.float32(np.inf) if exact >= 2**128 else np.float32(float(exact))
        out[i] = np.nan if scale == 255 else -value if code >= 8 else value
    return out


def everything():
    """Every code with every scale, at even and at odd places."""
    codes = np.stack([np.arange(16), np.arange(16)[::-1]], -1).reshape(-1).astype(np.uint8)
    return np.tile(codes[0::2] | codes[1::2] << 4, (256, 1)), np.arange(256, dtype=np.uint8)[:, None]


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


@partial(jax.jit, static_argnums=1)
def decoded(weight, dtype=jnp.float32):
    return weight.dequantize(dtype)


encoded = jax.jit(MXFP4.encoded)  # what `from_dense` calls once it has checked the values


@pytest.mark.optimized
def test_every_code_at_every_scale_decodes_bit_for_bit():
    blocks, scales = everything()
    got, expected = np.asarray(decoded(MXFP4(blocks, scales))), slow(blocks, scales)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    assert np.isnan(got[255]).all()  # OCP's NaN
    np.testing.assert_array_equal(bits(got[:255]), bits(expected[:255]))


@pytest.mark.optimized
def test_decoding_agrees_with_ml_dtypes():
    rng = RNG(0)
    codes = rng.integers(0, 16, (6, 64), np.uint8)
    scales = rng.integers(100, 150, (6, 2), np.uint8)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected = values * np.repeat(scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), 32, -1)
    got = decoded(MXFP4(codes[:, ::2] | codes[:, 1::2] << 4, scales))
    np.testing.assert_array_equal(bits(got), bits(expected))


@pytest.mark.optimized
def test_bfloat16_holds_every_value():
    blocks, scales = everything()
    weight = MXFP4(blocks[4:250], scales[4:250])  # those whose values are normal
    np.testing.assert_array_equal(np.asarray(decoded(weight, jnp.bfloat16), np.float32), decoded(weight))


@pytest.mark.optimized
def test_ggufs_blocks_put_in_order():
    data = RNG(1).integers(0, 253, (5, 3, 17), np.uint8)  # gguf-py warns of overflow beyond
    expected = gguf.quants.dequantize(data.reshape(5, -1), gguf.GGMLQuantizationType.MXFP4)
    got = jax.jit(MXFP4.from_ggml)(GGML(data, "MXFP4"))
    assert got.shape == (5, 96)
    np.testing.assert_array_equal(decoded(got), expected)  # but for the sign of a zero, which ggml does not keep


def nearest(w):
    """The OCP rule, by trying every code: the nearest value, ties to the code whose last bit is 0."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = np.asarray(w, np.float64).reshape(*w.shape[:-1], -1, 32)
    out = np.empty_like(grid)
    for i in np.ndindex(grid.shape[:-1]):
        peak = np.abs(grid[i]).max()
        exponent = np.floor(np.log2(peak)) - 2 if peak else -127
        scaled = np.abs(grid[i]) / 2.0**exponent
        gap = np.abs(scaled[:, None] - values)
        best = [min(range(8), key=lambda c, g=g: (g[c], c % 2)) for g in gap]
        out[i] = np.copysign(values[best] * 2.0**exponent, grid[i])
    return out.reshape(w.shape)


@pytest.mark.optimized
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_encoding_is_ocps(scale):
    w = RNG(2).normal(size=(8, 96)) * scale
    w[0, :32] = 0
    w[1, :8] = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -4.0]) * 2.0 ** np.round(np.log2(scale))  # ties
    w[1, 8:32] = 0
    w = w.astype(np.float32)
    np.testing.assert_array_equal(decoded(encoded(w)), nearest(w))


@pytest.mark.optimized
def test_encoding_saturates():
    w = np.full((1, 32), 7.9, np.float32)  # the exponent of 4, so 6 is the most there is
    assert (np.asarray(decoded(MXFP4.from_dense(w))) == 6).all()


@pytest.mark.optimized
def test_encoding_again_changes_nothing():
    blocks, scales = RNG(3).integers(0, 256, (4, 48), np.uint8), RNG(3).integers(3, 250, (4, 3), np.uint8)
    blocks[:, ::16] = 7  # each block has its largest code, so that its scale is the one the rule gives
    once = decoded(MXFP4(blocks, scales))
    np.testing.assert_array_equal(bits(decoded(encoded(once))), bits(once))


@pytest.mark.parametrize(("w", "message"), [(np.ones((2, 48)), "rows of 48"), (np.full((2, 32), np.inf), "not finite")])
def test_what_cannot_be_encoded(w, message):
    with pytest.raises(jaxllm.InputError, match=message):
        MXFP4.from_dense(w.astype(np.float32))


# The three operations: linear, packed linear, gather.

EXPERTS, TOKENS, CHOICES, HIDDEN, INTERMEDIATE = 6, 5, 2, 64, 96
ACTIVATION = ClampedSwiGLU(1.702, 7.0)


def stack(seed=4):
    rng = RNG(seed)

    def one(out, in_):
        matrix = rng.normal(size=(EXPERTS, out, in_)).astype(np.float32) * 2 / in_**0.5
        return encoded(matrix), Dense(rng.normal(size=(EXPERTS, out, 1)).astype(np.float32))

    (gate, b), (up, c), (down, d) = one(INTERMEDIATE, HIDDEN), one(INTERMEDIATE, HIDDEN), one(HIDDEN, INTERMEDIATE)
    return Gated(gate, up, down, Gated(b, c, d))


def chosen(seed=5):
    return np.stack([RNG(seed + i).permutation(EXPERTS)[:CHOICES] for i in range(TOKENS)]).astype(np.int32)


def test_linear():
    x, weight = RNG(6).normal(size=(2, 3, HIDDEN)).astype(np.float32), jax.tree.map(lambda a: a[0], stack().gate)
    expected = x.astype(np.float64) @ slow(*map(np.asarray, (weight.blocks, weight.scales))).T.astype(np.float64)
    np.testing.assert_allclose(jax.jit(matmul)(x, weight), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of_each_choice", [False, True])
def test_gather_forward(of_each_choice):
    s, ids = stack(), chosen()
    x = RNG(7).normal(size=(TOKENS, CHOICES, HIDDEN) if of_each_choice else (TOKENS, HIDDEN)).astype(np.float32)
    w, bias = np.asarray(decoded(s.gate), np.float64), np.asarray(s.bias.gate.values)[..., 0]
    rows = x if of_each_choice else np.repeat(x[:, None], CHOICES, 1)
    expected = np.einsum("tki,tkoi->tko", rows, w[ids]) + bias[ids]
    got = jax.jit(gather_forward)(x, s.gate, ids, s.bias.gate)
    assert got.shape == (TOKENS, CHOICES, INTERMEDIATE) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_gathered_the_grouped_and_the_dense_route_agree():
    s, ids = stack(), chosen()
    x, scores = RNG(8).normal(size=(TOKENS, HIDDEN)).astype(np.float32) * 3, RNG(9).random((TOKENS, CHOICES))
    scores = scores.astype(np.float32)

    @jax.jit
    def by_choice(x, scores, ids, s):
        gate, up = (gather_forward(x, w, ids, b) for w, b in ((s.gate, s.bias.gate), (s.up, s.bias.up)))
        return jnp.sum(gather_forward(ACTIVATION(gate, up), s.down, ids, s.bias.down) * scores[..., None], 1)

    gathered = by_choice(x, scores, ids, s)
    by_expert = jax.jit(grouped_mlp, static_argnums=(4, 5))
    grouped = by_expert(x, scores, ids, s, tile_size(ids.size, EXPERTS), ACTIVATION)

    def every(x, w, b):  # every token times every expert
        product = np.einsum("...i,eoi->...eo" if x.ndim == 2 else "...ei,eoi->...eo", x, np.asarray(decoded(w)))
        return product + np.asarray(b.values)[..., 0]

    gate, up = every(x, s.gate, s.bias.gate), every(x, s.up, s.bias.up)
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    assert ((gate == 7).any(), (np.abs(up) == 7).any()) == (True, True)
    h = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    mask = np.zeros((TOKENS, EXPERTS), np.float32)
    np.put_along_axis(mask, ids, scores, -1)
    dense = np.einsum("te,teo->to", mask, every(h, s.down, s.bias.down))

    np.testing.assert_allclose(gathered, dense, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(grouped, dense, rtol=1e-5, atol=1e-4)


@pytest.mark.optimized
def test_a_gather_needs_the_memory_of_the_chosen_experts_only():
    many = MXFP4(np.zeros((512, 256, 256), np.uint8), np.zeros((512, 256, 16), np.uint8))
    x, ids = np.zeros((1, 512), np.float32), np.array([[3, 400]], np.int32)
    memory = jax.jit(gather_forward).lower(x, many, ids).compile().memory_analysis()
    two_decoded = 2 * 256 * 512 * 4
    assert memory.temp_size_in_bytes < 1.1 * two_decoded < 0.1 * many.nbytes


def test_an_index_out_of_range():
    """Zeros, or, where checks are asked for, an error."""
    s, x = stack(), np.ones((1, HIDDEN), np.float32)
    gathered, checked = (jax.jit(f) for f in (gather_forward, checkify.checkify(gather_forward)))
    for ids in (np.array([[0, EXPERTS]], np.int32), np.array([[0, -1]], np.int32)):
        got = np.asarray(gathered(x, s.gate, ids, s.bias.gate))
        assert got[0, 0].any() and not got[0, 1].any()
        error, _ = checked(x, s.gate, ids, s.bias.gate)
        with pytest.raises(checkify.JaxRuntimeError, match="an expert index is not one of the 6 experts"):
            error.throw()
