"""Every prequantized format: decoded bit for bit, and read as its config declares it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxllm.kernels.activations import seen
from jaxllm.kernels.dispatch import matmul
from quantized_writers import read_safetensors

from jaxllm.checkpoint.quantized import assemble
from jaxllm.checkpoint.safetensors import HFDirectory, read_header
from jaxllm.errors import InputError
from jaxllm.formats.dense import Dense

GOLDEN = Path(__file__).parent / "golden" / "quantized"
CASES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def opened(name):
    """A golden file's matrix as it is read from a checkpoint, and what another implementation makes of it."""
    tensors, metadata = read_safetensors(GOLDEN / f"{name}.safetensors")
    arrays = {n: a for n, a in read_header(GOLDEN / f"{name}.safetensors").items() if n.startswith("m")}
    config = {metadata["key"]: json.loads(metadata["config"])}
    joined = assemble(HFDirectory(GOLDEN, config, {n: Dense(a) for n, a in arrays.items()}))
    [weight] = joined.values()
    return weight, tensors["expected"]


def on_device(weight):
    return jax.tree.map(np.asarray, weight, is_leaf=lambda leaf: hasattr(leaf, "map"))


@jax.jit
def decoded(weight):
    return weight.dequantize()


@pytest.mark.parametrize("name", CASES)
def test_decodes_bit_for_bit(name):
    weight, expected = opened(name)
    got = np.asarray(decoded(on_device(weight)))
    assert weight.shape == got.shape == expected.shape
    np.testing.assert_array_equal(got, expected)


def test_llm_int8_with_its_outliers_is_bitsandbytes():
    """Rows rounded to INT8, but for columns that reach the threshold."""
    tensors, _ = read_safetensors(GOLDEN / "bnb_int8.safetensors")
    weight = on_device(opened("bnb_int8")[0])
    x = jnp.asarray(tensors["x"].astype(np.float32))
    assert (np.abs(x) >= 6).any()
    for threshold, expected in ((6.0, "y_threshold6_f32"), (0.0, "y_threshold0_f32")):
        int8 = replace(weight, activation_group=-1, threshold=threshold)
        np.testing.assert_allclose(matmul(seen(x, int8), int8), tensors[expected], rtol=1e-4, atol=1e-4)
    assert np.abs(tensors["y_threshold6_f32"] - tensors["y_threshold0_f32"]).max() > 0.1


DELTAS = ("mlx_4", "mlx_6", "mlx_8", "mlx_mxfp4", "mlx_nvfp4", "fp8_block_f32", "fp8_tensor", "fp8_channel")


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(DELTAS)])
def test_a_delta_is_added_and_encoded_again(name):
    weight, expected = opened(name)
    weight = on_device(weight)
    delta = np.random.default_rng(0).normal(size=expected.shape).astype(np.float32) * np.abs(expected).max() / 4
    again = weight.add_delta(delta)
    assert type(again) is type(weight) and again.format == weight.format
    error = np.abs(np.asarray(again.dequantize()) - (expected + delta)).max()
    assert error < 0.25 * np.abs(expected + delta).max()
    assert np.abs(np.asarray(again.dequantize()) - expected).max() > error


@pytest.mark.parametrize("name", ["gptq_4", "awq_32", "bnb_nf4", "hqq_4_axis0", "ct_int8_channel"])
def test_what_is_searched_for_is_not_encoded_again(name):
    weight, expected = opened(name)
    with pytest.raises(InputError, match="cannot be encoded"):
        on_device(weight).add_delta(expected)
