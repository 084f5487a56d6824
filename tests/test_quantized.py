"""Every prequantized format: decoded bit for bit, and read as its config declares it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from covering import some
from quantized_writers import dequantize, hqq, read_safetensors

from jaxllm import parallel
from jaxllm.checkpoint import repack
from jaxllm.checkpoint.declared import declared
from jaxllm.checkpoint.quantized import assemble, join
from jaxllm.checkpoint.safetensors import HFDirectory, read_header
from jaxllm.errors import InputError
from jaxllm.formats.dense import Dense
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.scaled import Activations, Scaled
from jaxllm.kernels.dispatch import matmul
from jaxllm.kernels.experts import Gated
from jaxllm.layers.parameter import Declaration
from jaxllm.parallel import COLUMN, ROW, make_mesh
from jaxllm.placing import Source, place

GOLDEN = Path(__file__).parent / "golden" / "quantized"
HQQ = {"quant_method": "hqq"}
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


@pytest.mark.optimized
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
    x = tensors["x"].astype(np.float32)
    assert (np.abs(x) >= 6).any()
    for threshold, expected in ((6.0, "y_threshold6_f32"), (0.0, "y_threshold0_f32")):
        int8 = replace(weight, activations=Activations(threshold=threshold))
        np.testing.assert_allclose(jax.jit(matmul)(x, int8), tensors[expected], rtol=1e-4, atol=1e-4)
    assert np.abs(tensors["y_threshold6_f32"] - tensors["y_threshold0_f32"]).max() > 0.1


DELTAS = ("mlx_4", "mlx_6", "mlx_8", "mlx_mxfp4", "mlx_nvfp4", "fp8_block_f32", "fp8_tensor", "fp8_channel")
CHANGED = [name for name in CASES if name.startswith(DELTAS)]
FIRST = [next(name for name in CHANGED if name.startswith(kind)) for kind in DELTAS]


@pytest.mark.parametrize("name", some(CHANGED, FIRST))
def test_a_delta_is_added_and_encoded_again(name):
    weight, expected = opened(name)
    weight = on_device(weight)
    delta = np.random.default_rng(0).normal(size=expected.shape).astype(np.float32) * np.abs(expected).max() / 4
    add = type(weight).add_delta
    again = (add if isinstance(weight, MXFP4) else jax.jit(add))(weight, delta)  # MXFP4 looks whether they are finite
    assert type(again) is type(weight) and again.format == weight.format
    values = np.asarray(decoded(again))
    error = np.abs(values - (expected + delta)).max()
    assert error < 0.25 * np.abs(expected + delta).max()
    assert np.abs(values - expected).max() > error


@pytest.mark.parametrize("name", ["gptq_4", "awq_32", "bnb_nf4", "hqq_4_axis0", "ct_int8_channel"])
def test_what_is_searched_for_is_not_encoded_again(name):
    weight, expected = opened(name)
    with pytest.raises(InputError, match="cannot be encoded"):
        jax.jit(type(weight).add_delta)(on_device(weight), expected)


@pytest.mark.parametrize(("bits", "axis"), [(4, 0), (4, 1), (3, 1)])
def test_rows_that_no_words_fit(bits, axis):
    """Rows of 6 codes are decoded while they are read."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 6)).astype(np.float32)
    tensors = hqq(w, rng, 64, bits, axis)
    joined = join({f"m.{n}": Dense(a) for n, a in tensors.items()}, declared({"quantization_config": HQQ}, {}))
    np.testing.assert_array_equal(decoded(on_device(joined["m.weight"])), dequantize(tensors, HQQ))


def test_gradients_pass_as_if_activations_were_not_rounded():
    weight = on_device(opened("fp8_channel")[0])
    out, in_ = weight.shape
    x = np.random.default_rng(1).normal(size=(3, in_)).astype(np.float32)
    rounding = replace(weight, activations=Activations())
    with jax.set_mesh(make_mesh("tp=2")):
        for spec in (COLUMN, ROW):
            got = jax.jit(jax.grad(lambda x, spec=spec: parallel.linear(x, rounding, spec).sum()))(x)
            expected = np.broadcast_to(np.asarray(decoded(weight)).sum(0), (3, in_))
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mesh", some(["tp=1", "ep=2", "tp=2,ep=2"], ["tp=2,ep=2"]))
def test_outliers_are_those_of_an_experts_own_tokens(mesh):
    """Only one token of four has outliers: the columns of other experts are rounded, on any mesh."""
    rng = np.random.default_rng(2)

    def stack(out, in_):
        w = rng.normal(size=(2, out, in_)).astype(np.float32)
        scale = np.abs(w).max(-1, keepdims=True)
        codes = np.rint(w / scale * 127).astype(np.int8)
        return Scaled(codes, scale, (1, None), Activations(threshold=6.0), factor=1 / 127)

    gate, up, down = stack(8, 16), stack(8, 16), stack(16, 8)
    x = rng.normal(size=(4, 16)).astype(np.float32)
    x[3, 5] = 20
    chosen, scores = np.array([[0], [0], [0], [1]], np.int32), np.ones((4, 1), np.float32)
    with jax.set_mesh(make_mesh(mesh)):
        run = jax.jit(lambda *args: parallel.experts(*args, 2, lambda g, u: g + u))
        got = np.asarray(run(x, scores, chosen, Gated(gate, up, down)))

    def rounded(rows):
        alone = (np.abs(rows) >= 6).any(0)
        peak = np.where(np.abs(rows) < 6, np.abs(rows), 0).max(1, keepdims=True)
        return np.where(alone, rows, np.rint(rows / peak * 127) * peak / 127)

    for e, rows in ((0, x[:3]), (1, x[3:])):
        g, u, d = (np.asarray(decoded(w))[e] for w in (gate, up, down))
        expected = rounded(rounded(rows) @ (g + u).T) @ d.T
        np.testing.assert_allclose(got[:3] if e == 0 else got[3:], expected, rtol=1e-4, atol=1e-3)


def test_what_is_computed_is_computed_once(monkeypatch):
    calls, columns = [], repack.awq_columns
    monkeypatch.setattr(repack, "awq_columns", lambda words: calls.append(1) or columns(words))
    weight, expected = opened("awq_32")
    placed = place(Source("m", (weight,)), Declaration(weight.shape, COLUMN), make_mesh("tp=8"))
    assert len(calls) == 2  # codes and zeros
    np.testing.assert_array_equal(jax.jit(lambda w: w.dequantize())(placed), expected)
