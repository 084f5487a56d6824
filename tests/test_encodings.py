"""Encoders against the packages that define their formats, and what all types of `quantize=` have in common.

(What llama.cpp's types are worth is for test_ggml_encode.py.)
"""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from covering import some
from reference.encoding_goldens import COLS, FEW, error, matrix

from jaxllm.encodings import ENCODINGS, check, encoding, fitting
from jaxllm.errors import InputError
from jaxllm.formats import e2m1
from jaxllm.formats.affine import Affine, unpack
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_encode import ENCODERS

GOLDEN = Path(__file__).parent / "golden" / "encodings"
ERRORS = json.loads((GOLDEN / "errors.json").read_text())
EXACT = dict(np.load(GOLDEN / "exact.npz"))
W = matrix()
NAMES = (
    "hqq2 hqq3 hqq4 hqq8 afq2 afq3 afq4 afq5 afq6 afq8 mxfp4 nvfp4 nvfp4_mlx mxfp8 fp8 fp8_block f8q8 nf4 fp4 int8 int4"
)
NAMES = [*NAMES.split(), "f16", "bf16", "f32"]
DISTINCT = [name for name in NAMES if name not in ("hqq2", "hqq3", "hqq8", "afq2", "afq3", "afq5", "afq8")]


def encoded(name, w, importance=None):
    return jax.jit(ENCODINGS[name].encode)(w, importance)


@cache
def whole(name):
    return encoded(name, W)


@jax.jit
def decoded(weight):
    return weight.dequantize()


def same(ours, golden):
    """Bit for bit, so that NaN equals NaN and -0 is not 0."""
    ours, golden = np.asarray(ours), EXACT[golden]
    np.testing.assert_array_equal(ours.view(np.uint8).reshape(-1), golden.view(np.uint8).reshape(-1))


@pytest.mark.optimized
@pytest.mark.parametrize("bits", some([2, 3, 4, 6, 8], [3, 4, 8]))
def test_mlx_affine(bits):
    weight = jax.jit(lambda w: Affine.from_dense(w, bits, 64))(W[FEW])
    for i, leaf in enumerate((weight.codes, weight.scales, weight.biases)):
        same(leaf, f"afq{bits}.{i}")


def test_codes_are_chosen_for_the_rounded_scales():
    """So scales and biases in bfloat16 hardly cost anything, with 8 bits too."""
    w = W * np.float32(1.1)  # whose extremes are not bfloat16
    exact, rounded = (
        error(w, np.asarray(decoded(jax.jit(lambda w, d=dtype: Affine.from_dense(w, 8, 64, d))(w))))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded < 1.02 * exact


@pytest.mark.optimized
def test_mxfp8_of_mlx():
    same(whole("mxfp8").values[FEW], "mxfp8.0")
    same(whole("mxfp8").scales[FEW], "mxfp8.1")


@pytest.mark.optimized
def test_mxfp4_of_torchao():
    same(whole("mxfp4").blocks[FEW], "mxfp4.blocks")
    same(whole("mxfp4").scales[FEW], "mxfp4.scales")


@pytest.mark.optimized
def test_nvfp4_of_compressed_tensors():
    values = e2m1.VALUES[np.asarray(e2m1.unpack(whole("nvfp4").blocks))][FEW]
    np.testing.assert_array_equal(values, EXACT["nvfp4.values"])
    # Theirs have no scale of zero: they put a small number in its place.
    scales = np.asarray(whole("nvfp4").scales, np.float32)[FEW]
    np.testing.assert_array_equal(scales, np.where(scales == 0, 0, EXACT["nvfp4.scales"]))


@pytest.mark.optimized
def test_nvfp4_of_mlx():
    """Theirs has no code for -0, and rounds ties down."""
    weight = whole("nvfp4_mlx")
    assert weight.global_scale is None
    same(weight.scales[FEW], "nvfp4_mlx.1")
    theirs = e2m1.VALUES[np.asarray(e2m1.unpack(EXACT["nvfp4_mlx.0"].view(np.uint8)))]
    ours = e2m1.VALUES[np.asarray(e2m1.unpack(weight.blocks))][FEW]
    scales = np.repeat(np.asarray(weight.scales, np.float32), 16, axis=-1)[FEW]
    exact = W[FEW] / np.where(scales == 0, 1, scales)
    np.testing.assert_array_equal(np.abs(ours - exact), np.abs(theirs - exact))
    assert np.mean(ours != theirs) < 0.01


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes_4bit(name):
    same(whole(name).codes[FEW], f"{name}.codes")
    same(whole(name).scales[FEW], f"{name}.scales")
    same(whole(name).table, f"{name}.table")


@pytest.mark.optimized
def test_bitsandbytes_8bit():
    same(whole("int8").values[FEW], "int8.values")
    same(whole("int8").scales[FEW], "int8.scales")


@pytest.mark.optimized
@pytest.mark.parametrize(("name", "rows"), [("fp8", FEW), ("fp8_block", slice(None))])
def test_fp8_of_torch(name, rows):
    same(whole(name).values[rows], f"{name}.values")
    same(whole(name).scales, f"{name}.scales")


HQQ = {"": W, " along in": W[:32], " of large values": W * 64}


@pytest.mark.parametrize(("name", "w"), HQQ.items())
def test_hqq(name, w):
    """A value that lies between two codes may go to the other one, which then moves the zero of its group."""
    weight = encoded("hqq4", w)
    first = 0 if weight.out_groups is None else 1
    scales, zeros = (np.asarray(leaf, np.float32)[first:].reshape(-1) for leaf in (weight.scales, weight.zeros))
    golden = {part: EXACT[f"hqq4{name}.{part}"] for part in ("codes", "scales", "zeros")}
    varied = golden["scales"].reshape(-1) != 1  # how hqq has groups of equal values; mistral.rs has 5e-5
    np.testing.assert_allclose(scales[varied], golden["scales"].reshape(-1)[varied], rtol=2**-11)
    close = np.isclose(zeros, golden["zeros"].reshape(-1), rtol=2**-10, atol=2e-3)
    assert np.mean(close[varied]) > 0.97
    assert np.mean(np.asarray(unpack(weight.codes, 4)) != golden["codes"]) < 0.005
    assert error(w, np.asarray(decoded(weight))) < 1.005 * ERRORS[f"hqq4{name}"]["hqq"]


def test_hqq_of_equal_values():
    """Their offset, in codes, would be beyond float16."""
    made = np.asarray(decoded(encoded("hqq4", np.full(W.shape, 3e4, np.float32))))
    np.testing.assert_allclose(made, 3e4, rtol=1e-3)


def test_each_matrix_of_a_stack_is_searched_on_its_own():
    """The search ends when the error of the whole matrix stops falling, and its last offsets are kept."""
    stack = np.stack([W, W**3])  # the second one stops earlier
    together = encoded("hqq4", stack)
    np.testing.assert_array_equal(together.zeros, np.stack([encoded("hqq4", w).zeros for w in stack]))


# What our error has to be below, in those of the others. It is 1.005 where nothing is said.
BELOW = {
    ("afq6", "mistralrs"): 1.03,  # MLX's rule makes zero and one end of a group exact, mistral.rs's both ends; also,
    ("afq8", "mistralrs"): 1.03,  # mistral.rs's scales are float32
    ("int4", "compressed_tensors"): 0.95,  # our scales are searched
}


@pytest.mark.parametrize("name", [name for name in ERRORS if name in ENCODINGS])
def test_error_is_not_above_that_of_others(name):
    ours = error(W, np.asarray(decoded(whole(name))))
    for package, theirs in ERRORS[name].items():
        assert ours <= BELOW.get((name, package), 1.005) * theirs, (package, ours / theirs)


def test_f8q8_clips_nothing():
    """Its scales are the least that E4M3 has, and so errors are half a step at most."""
    ideal = np.abs(W.reshape(len(W), -1, 32)).max(-1) * np.float32(448 / 127)
    scales = np.asarray(whole("f8q8").scales, np.float32)
    known = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(scales, known[np.searchsorted(known, ideal)])
    off = np.abs(np.asarray(decoded(whole("f8q8"))) - W)
    assert (off <= 0.501 / 448 * np.repeat(scales, 32, axis=1)).all()


GROUPS = [("afq4", 64, 64), ("afq4", 96, 32), ("int4", 256, 128), ("int4", 192, 64), ("int4", 96, 32)]
GROUPS += [("nf4", 64, 64), ("nf4", 96, 32), ("hqq4", 64, 64), ("hqq4", 96, 32), ("hqq4", 72, 8)]


@pytest.mark.parametrize(("name", "columns", "group"), GROUPS)
def test_the_widest_groups_that_fit(name, columns, group):
    weight = jax.eval_shape(ENCODINGS[name].encode, jax.ShapeDtypeStruct((32, columns), jnp.float32), None)
    assert (weight.group, weight.scales.shape) == (group, (32, columns // group))


@pytest.mark.parametrize("name", DISTINCT)
def test_shapes_batches_and_zeros(name):
    """Shapes are known in advance; each matrix of a batch is encoded on its own; zeros stay zeros, of any block."""
    batch = np.zeros((2, 2, *W.shape), np.float32)
    batch[0, 1], batch[1, 0] = W, 7 * W
    weight = encoded(name, batch)
    shapes = jax.eval_shape(ENCODINGS[name].encode, batch, None)
    assert weight.shape == shapes.shape == batch.shape
    assert jax.tree.map(lambda a: (a.shape, a.dtype), weight) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    values = np.asarray(decoded(weight))
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values[0, 1], decoded(whole(name)))
    together = (-2, -1) if name.startswith("hqq") else -1  # its groups go through all rows
    assert not values[~batch.any(axis=together)].any()
    nothing = jax.tree.map(lambda a: np.zeros(a.nbytes, np.uint8).view(a.dtype).reshape(a.shape), weight)
    assert not np.asarray(decoded(nothing)).any()


@pytest.mark.parametrize("name", some(DISTINCT, ["afq4", "nvfp4", "mxfp8", "f8q8", "nf4", "fp8_block", "int4", "hqq4"]))
def test_any_magnitude_that_the_check_lets_through(name):
    """In rows of 96, so that groups are the smaller ones."""
    e = ENCODINGS[name]
    w = np.repeat(np.float32([0, 1e-40, 1e-37, 1e-7, 1e-3, 1, e.limit / 2, e.limit]), 8)[:, None] * np.sign(W[:64, :96])
    w[::8] = np.abs(w[::8])  # equal values
    check(w, e)
    assert np.isfinite(np.asarray(decoded(encoded(name, w)))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_no_type_holds_are_refused(bad):
    for e in ENCODINGS.values():
        with pytest.raises(InputError, match=f"{e.name}$"):
            check(np.float32([[0, bad]]), e)


@pytest.mark.parametrize(("name", "most"), [("q4_k", 65504), ("hqq4", 65504), ("f16", 65504), ("f8q8", 127)])
def test_values_beyond_a_type_are_refused(name, most):
    check(np.float32([[0, -most]]), ENCODINGS[name])
    with pytest.raises(InputError, match=f"beyond {most}.*{name}"):
        check(np.float32([[0, -most - 1]]), ENCODINGS[name])


def weighted(weight, importance):
    return np.sum((np.asarray(decoded(weight)) - W) ** 2 * importance)


def test_int4_minds_important_columns():
    importance = np.float32(np.random.default_rng(3).random(COLS) ** 8)
    plain, minding = whole("int4"), encoded("int4", W, importance)
    assert weighted(minding, importance) < 0.95 * weighted(plain, importance)
    nothing = encoded("int4", W, np.zeros(COLS, np.float32))
    np.testing.assert_array_equal(nothing.codes, plain.codes)
    stack = encoded("int4", np.stack([W, W]), np.stack([importance, np.zeros_like(importance)]))
    np.testing.assert_array_equal(stack.codes, np.stack([minding.codes, plain.codes]))


def test_ggml_types_get_the_importance():
    importance = np.float32(np.random.default_rng(3).random(COLS) ** 8)
    plain, minding = (encoded("q4_0", W, i) for i in (None, importance))
    assert isinstance(minding, GGML) and minding.type == "Q4_0"
    assert weighted(minding, importance) < 0.95 * weighted(plain, importance)


SPELLINGS = {"Q4K": "q4_k", "q4_k": "q4_k", "Q4-K": "q4_k", "iq4nl": "iq4_nl", "FP8-block": "fp8_block", "HQQ4": "hqq4"}
SPELLINGS |= {"F8E4M3": "fp8", "bfloat16": "bf16", "F16": "f16", "afq_4": "afq4"}
SPELLINGS |= {2: "q2_k", 3: "q3_k", "4": "q4_k", 5: "q5_k", 6: "q6_k", "8": "q8_0"}


@pytest.mark.parametrize(("text", "name"), SPELLINGS.items())
def test_spellings(text, name):
    assert encoding(text) is ENCODINGS[name]


@pytest.mark.parametrize("text", ["q9", "", 7, "q4_k_m", "k"])
def test_an_unknown_type_is_refused_with_the_known_ones(text):
    with pytest.raises(InputError, match=f"'{text}'.*q4_k.*hqq4.*afq6.*fp8_block.*8"):
        encoding(text)


ISQ = "q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k hqq4 hqq8 fp8 afq2 afq3 afq4 afq6 afq8 f8q8 mxfp4"


def test_all_types_are_listed():
    """Those of mistral.rs that it can read back, all of GGML, and those that the other tests name."""
    assert set(ISQ.split()) <= set(ENCODINGS)
    assert set(ENCODINGS) == {*NAMES, *(type.lower() for type in ENCODERS)}


FITS = [("q4_k", 512, "q4_k"), ("q4_k", 576, "q5_0"), ("q6_k", 576, "q8_0"), ("q2_k", 32, "q4_0"), ("q4_k", 40, "f16")]
FITS += [("afq4", 96, "afq4"), ("afq4", 80, "f16"), ("nvfp4", 48, "nvfp4"), ("mxfp8", 48, "f16"), ("fp8", 7, "fp8")]
FITS += [("hqq4", 72, "hqq4"), ("hqq4", 4, "f16"), ("hqq8", 4, "hqq8"), ("bf16", 1, "bf16"), ("int8", 1, "int8")]


@pytest.mark.parametrize(("name", "columns", "fits"), FITS)
def test_rows_that_are_not_whole_blocks(name, columns, fits):
    assert fitting(ENCODINGS[name], columns).name == fits


@pytest.mark.parametrize("e", ENCODINGS.values(), ids=ENCODINGS)
def test_chains_end(e):
    assert fitting(e, 1).block == 1
    assert e.promoted is None or e.promoted in ENCODINGS


PROMOTED = {"q2_k": "q6_k", "q4_1": "q6_k", "iq4_nl": "q6_k", "mxfp4": "q6_k", "q5_k": "q8_0", "q8_0": "q8_0"}
PROMOTED |= {"afq2": "afq6", "afq4": "afq6", "afq6": "afq8", "afq8": "afq8", "hqq4": "q8_0", "bf16": None, "f16": None}


@pytest.mark.parametrize(("name", "promoted"), PROMOTED.items())
def test_types_of_embedding_tables(name, promoted):
    assert ENCODINGS[name].promoted == promoted
