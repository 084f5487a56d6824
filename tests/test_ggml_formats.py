"""Every GGML block type against gguf-py, bit for bit; the few that it cannot decode against slow decoders below."""

import itertools
import struct
from collections.abc import Callable
from typing import NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxllm.errors import InputError
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES

pytestmark = pytest.mark.optimized

ROWS, BLOCKS = 16, 24  # one shape for all tests, so that every decoder is compiled once
PLAIN = {"F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"}

TINY = 2.0**-24  # the smallest float16; 2^-14 is the smallest that is not subnormal
F16_EDGES = np.array(
    [0.0, -0.0, 1.0, -0.1, TINY, -TINY, 2**-14 - TINY, 2**-14, 65504, -65504, np.inf, -np.inf, np.nan], np.float16
)
F32_EDGES = np.array([0.0, -0.0, 1.0, -0.1, 2**-126, -1e-30, 1e30, 3e38, -3e38, np.inf, -np.inf, np.nan], np.float32)

Writer = Callable[[np.ndarray], None]


def f16_at(*offsets: int) -> Writer:
    """Writes all combinations of edge values to the scales at `offsets`, one a block."""

    def write(blocks):
        for block, scales in zip(blocks, itertools.product(F16_EDGES, repeat=len(offsets)), strict=False):
            for offset, scale in zip(offsets, scales, strict=True):
                block[offset : offset + 2] = np.frombuffer(scale.tobytes(), np.uint8)

    return write


def f16_in_quarters(blocks):
    """IQ1_M keeps its float16 in the high nibbles of the last four words."""
    for block, scale in zip(blocks, F16_EDGES.view(np.uint16), strict=False):
        for i in range(4):
            block[49 + 2 * i] = block[49 + 2 * i] & 15 | (int(scale) >> 4 * i & 15) << 4


def normal_f32(blocks):
    """Q8_K: edge values, then ordinary ones. Subnormals are left out: XLA may take them for zeros."""
    scales = np.random.default_rng(1).normal(size=len(blocks)).astype(np.float32)
    scales[: len(F32_EDGES)] = F32_EDGES
    blocks[:, :4] = scales[:, None].view(np.uint8)


def bytes_at(count: int) -> Writer:
    """All 256 values of the first `count` bytes, which are scales."""

    def write(blocks):
        blocks[:, :count] = np.arange(count * len(blocks), dtype=np.uint32).astype(np.uint8).reshape(-1, count)

    return write


class Case(NamedTuple):
    size: int
    nbytes: int
    write_edges: Writer


CASES = {
    "Q1_0": Case(128, 18, f16_at(0)),
    "Q4_0": Case(32, 18, f16_at(0)),
    "Q4_1": Case(32, 20, f16_at(0, 2)),
    "Q5_0": Case(32, 22, f16_at(0)),
    "Q5_1": Case(32, 24, f16_at(0, 2)),
    "Q8_0": Case(32, 34, f16_at(0)),
    "Q8_1": Case(32, 36, f16_at(0, 2)),
    "Q2_K": Case(256, 84, f16_at(80, 82)),
    "Q3_K": Case(256, 110, f16_at(108)),
    "Q4_K": Case(256, 144, f16_at(0, 2)),
    "Q5_K": Case(256, 176, f16_at(0, 2)),
    "Q6_K": Case(256, 210, f16_at(208)),
    "Q8_K": Case(256, 292, normal_f32),
    "TQ1_0": Case(256, 54, f16_at(52)),
    "TQ2_0": Case(256, 66, f16_at(64)),
    "MXFP4": Case(32, 17, bytes_at(1)),
    "NVFP4": Case(64, 36, bytes_at(4)),
    "IQ1_S": Case(256, 50, f16_at(0)),
    "IQ1_M": Case(256, 56, f16_in_quarters),
    "IQ2_XXS": Case(256, 66, f16_at(0)),
    "IQ2_XS": Case(256, 74, f16_at(0)),
    "IQ2_S": Case(256, 82, f16_at(0)),
    "IQ3_XXS": Case(256, 98, f16_at(0)),
    "IQ3_S": Case(256, 110, f16_at(0)),
    "IQ4_NL": Case(32, 18, f16_at(0)),
    "IQ4_XS": Case(256, 136, f16_at(0)),
}
each_type = pytest.mark.parametrize("name", CASES)


def slow_q1_0(block: bytes) -> list[np.float32]:
    """`ggml_half d; uint8_t qs[16]`: a set bit is d, a clear one -d."""
    (d,) = np.frombuffer(block[:2], np.float16).astype(np.float32)
    return [d if block[2 + j // 8] >> j % 8 & 1 else -d for j in range(128)]


def slow_q8_1(block: bytes) -> list[np.float32]:
    """`ggml_half d, s; int8_t qs[32]`: s, the sum of the weights, serves dot products only."""
    d, _s, *qs = struct.unpack("<2s2s32b", block)
    return [np.frombuffer(d, np.float16).astype(np.float32)[0] * np.float32(q) for q in qs]


def slow_q8_k(block: bytes) -> list[np.float32]:
    """`float d; int8_t qs[256]; int16_t bsums[16]`."""
    d, *values = struct.unpack("<f256b16h", block)
    return [np.float32(d) * np.float32(q) for q in values[:256]]


SLOW = {"Q1_0": slow_q1_0, "Q8_1": slow_q8_1, "Q8_K": slow_q8_k}


def reference(name: str, blocks: np.ndarray) -> np.ndarray:
    """The weights of `[rows, n, nbytes]` blocks, `[rows, n * size]`."""
    with np.errstate(all="ignore"):
        if name in SLOW:
            return np.array([[w for block in row for w in SLOW[name](bytes(block))] for row in blocks], np.float32)
        return gguf.quants.dequantize(blocks.reshape(len(blocks), -1), GGMLQuantizationType[name])


def example(name: str) -> GGML:
    """Random bytes, edge values for the scales of the first blocks."""
    case = CASES[name]
    blocks = np.random.default_rng(0).integers(0, 256, (ROWS * BLOCKS, case.nbytes), np.uint8)
    case.write_edges(blocks)
    return GGML(blocks.reshape(ROWS, BLOCKS, case.nbytes), name)


def bits(x: np.ndarray) -> np.ndarray:
    """The bits of float32 values. All NaNs are one: which of its operands' NaNs a sum passes on is up to a compiler."""
    return np.where(np.isnan(x), np.uint32(0x7FC00000), np.asarray(x).view(np.uint32))


@jax.jit
def decode(weight: GGML) -> jax.Array:
    return weight.dequantize()


def test_every_block_type_of_gguf_has_a_decoder_and_a_case():
    assert set(BLOCK_TYPES) == set(CASES) == {t.name for t in GGMLQuantizationType} - PLAIN


@each_type
def test_decodes_to_the_same_bits_as_the_reference(name):
    weight = example(name)
    values, expected = np.asarray(decode(weight)), reference(name, weight.blocks)
    assert np.isfinite(expected).mean() > 0.5
    np.testing.assert_array_equal(bits(values), bits(expected))


@each_type
def test_zero_bytes_are_zeros(name):
    zeros = GGML(np.zeros((ROWS, BLOCKS, CASES[name].nbytes), np.uint8), name)
    np.testing.assert_array_equal(decode(zeros), 0)


@each_type
def test_sizes(name):
    size, nbytes, _ = CASES[name]
    if name != "Q8_1":  # gguf-py has the size of an older layout there
        assert (size, nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    weight = GGML(np.zeros((2, 3, 5, nbytes), np.uint8), name)
    assert weight.format == name
    assert weight.shape == (2, 3, 5 * size)
    assert weight.unit("in") == size
    assert weight.nbytes == 2 * 3 * 5 * nbytes
    assert weight.bits_per_weight == 8 * nbytes / size
    decoded = jax.eval_shape(lambda w: w.dequantize(jnp.bfloat16), weight)
    assert (decoded.shape, decoded.dtype) == (weight.shape, jnp.bfloat16)


@each_type
def test_arranging_blocks_arranges_the_matrix(name):
    weight, size, rng = example(name), CASES[name].size, np.random.default_rng(2)
    rows, blocks = rng.permutation(ROWS), rng.permutation(BLOCKS)
    rows[[1, 5]], blocks[[0, 7]] = -1, -1
    cols = np.where(blocks[:, None] < 0, -1, blocks[:, None] * size + np.arange(size)).reshape(-1)
    dense = np.asarray(decode(weight))
    expected = np.where((rows[:, None] < 0) | (cols < 0), 0, dense[rows][:, cols])
    np.testing.assert_array_equal(decode(weight.arrange(rows, cols)), expected)


@each_type
@pytest.mark.parametrize("tear", ["shift", "reverse", "cut", "hole"])
def test_a_block_cannot_be_torn(name, tear):
    weight, size = example(name), CASES[name].size
    whole = np.arange(BLOCKS * size)
    cols = {
        "shift": np.roll(whole, 1),
        "reverse": whole[::-1],
        "cut": whole[: -size // 2],
        "hole": np.where(whole == size + 1, -1, whole),
    }[tear]
    with pytest.raises(InputError, match=f"dimension 'in' .* whole blocks of {size}$"):
        weight.arrange(cols=cols)
