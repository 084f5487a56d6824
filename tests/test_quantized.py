"""Every prequantized format: decoded bit for bit, and read as its config declares it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from quantized_writers import read_safetensors

from jaxllm.checkpoint.quantized import assemble
from jaxllm.checkpoint.safetensors import HFDirectory, read_header
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
