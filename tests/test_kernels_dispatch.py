"""What multiplies by a weight, why, and that gradients pass through it."""

import importlib
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import block_fp8, mxfp4, numbers

from jaxllm import parallel
from jaxllm.errors import InputError
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.kernels import dense, dispatch
from jaxllm.parallel import COLUMN, ROW, make_mesh

X = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)
WEIGHTS = {"MXFP4": mxfp4(128, 256), "FP8 128x128": block_fp8(128, 256)}
Q8_0 = GGML.from_dense(numbers(128, 256), "Q8_0")


@pytest.fixture
def tpu_module(monkeypatch):
    """A stand-in for every backend, which serves matrices of 128 rows."""
    calls = []

    def refuses(op, x, weight):
        return None if weight.shape[-2] == 128 else f"matrices of {weight.shape[-2]} rows"

    def matmul(x, weight):
        calls.append("matmul")
        return dense.matmul(x, weight)

    def grouped_matmul(x, stack, expert):
        calls.append("grouped_matmul")
        return dense.grouped_matmul(x, stack, expert)

    module = SimpleNamespace(refuses=refuses, matmul=matmul, grouped_matmul=grouped_matmul, calls=calls)
    loaded = dispatch._loaded
    monkeypatch.setattr(dispatch, "_loaded", lambda *a: (module, None) if loaded(*a)[1] is None else loaded(*a))
    return module


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_runs_where_and_why(name, tpu_module):
    weight = WEIGHTS[name]
    say = lambda platform: dispatch.explain("matmul", X, weight, platform)  # noqa: E731
    assert say("cpu") == f"matmul of {name} 128x256: reference (there are no kernels for cpu)"
    assert say("tpu") == f"matmul of {name} 128x256: pallas_tpu (made for tpu)"
    narrow = jax.tree.map(lambda leaf: leaf[: len(leaf) // 2] if len(leaf) > 1 else leaf, weight)
    assert "64x256: reference (pallas_tpu cannot: matrices of 64 rows)" in dispatch.explain("matmul", X, narrow, "tpu")


def test_a_format_without_kernels_is_decoded():
    assert (
        dispatch.explain("matmul", X, Q8_0, "tpu")
        == "matmul of Q8_0 128x256: reference (Q8_0 has no kernels: it is decoded)"
    )


def test_a_backend_asked_for_by_name_fails_loudly(tpu_module):
    weight = WEIGHTS["MXFP4"]
    with (
        dispatch.using("pallas_tpu"),
        pytest.raises(InputError, match=r"cannot do mxfp4.matmul: these are cpu devices"),
    ):
        dispatch.matmul(jnp.ones((4, 256)), weight)
    with dispatch.using("pallas_tpu"), pytest.raises(InputError, match="cannot do mxfp4.matmul: matrices of 64 rows"):
        dispatch.choose("matmul", X, jax.tree.map(lambda leaf: leaf[:64], weight), "tpu")
    with dispatch.using("reference"):
        assert "reference (asked for)" in dispatch.explain("matmul", X, weight, "tpu")
    with (
        pytest.raises(InputError, match="'cuda_cores': choose one of pallas_tpu, reference, triton_gpu"),
        dispatch.using("cuda_cores"),
    ):
        pass
    assert dispatch.choose("matmul", X, weight, "cpu").why == "there are no kernels for cpu"  # the names are forgotten


def test_a_missing_package_is_said(monkeypatch):
    """Whether or not it is installed here."""
    found = importlib.import_module

    def without_triton(name):
        if name.endswith("triton_gpu"):
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return found(name)

    monkeypatch.setattr(importlib, "import_module", without_triton)
    said = dispatch.explain("matmul", X, WEIGHTS["MXFP4"], "gpu")
    assert said == "matmul of MXFP4 128x256: reference (triton_gpu cannot: triton is not installed)"
    monkeypatch.setattr(dispatch, "_platform", lambda: "gpu")
    with dispatch.using("triton_gpu"), pytest.raises(InputError, match="triton is not installed"):
        dispatch.matmul(jnp.ones((4, 256)), WEIGHTS["MXFP4"])


def test_layers_and_experts_use_what_was_chosen(tpu_module, monkeypatch):
    """On a mesh that says it is of TPUs, every matmul of theirs is the backend's."""
    monkeypatch.setattr(dispatch, "_platform", lambda: "tpu")
    x = jnp.asarray(numbers(4, 256))
    with jax.set_mesh(make_mesh("tp=2")):
        got = jax.jit(lambda x, w: parallel.linear(x, w, ROW))(x, WEIGHTS["MXFP4"])
    np.testing.assert_allclose(got, x @ WEIGHTS["MXFP4"].dequantize().T, rtol=1e-4, atol=1e-4)
    assert tpu_module.calls == ["matmul"]


@pytest.mark.parametrize("spec", [COLUMN, ROW])
@pytest.mark.parametrize("weight", [mxfp4(256, 256), block_fp8(256, 256, activation_group=128)], ids=["MXFP4", "FP8"])
def test_a_real_kernel_on_each_devices_shards(monkeypatch, weight, spec):
    """The TPU kernels, interpreted, where a mesh of two devices says that it is of TPUs."""
    kind = dispatch.OPS[type(weight)]
    module = importlib.import_module(f"jaxllm.kernels.{kind}.pallas_tpu")
    interpreted = SimpleNamespace(refuses=module.refuses, matmul=partial(module.matmul, interpret=True))
    monkeypatch.setattr(dispatch, "_loaded", lambda *names: (interpreted, None))
    monkeypatch.setattr(dispatch, "_platform", lambda: "tpu")
    # The interpreter mixes what varies and what does not, which the compilers of tests/accelerators do not mind.
    monkeypatch.setattr(parallel, "local", partial(parallel.local, check_vma=False))
    x = jnp.asarray(numbers(4, 256), jnp.bfloat16)
    expected = np.asarray(parallel_linear(x, weight, spec, "tp=1"), np.float32)
    got = np.asarray(parallel_linear(x, weight, spec, "tp=2"), np.float32)
    np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-2)
    monkeypatch.undo()
    plain = np.asarray(parallel_linear(x, weight, spec, "tp=1"), np.float32)
    np.testing.assert_allclose(got, plain, rtol=2e-2, atol=0.05)


def parallel_linear(x, weight, spec, mesh):
    with jax.set_mesh(make_mesh(mesh)):
        return jax.jit(lambda x, w: parallel.linear(x, w, spec))(x, weight)


CASES = {
    "MXFP4": mxfp4(256, 256),
    "FP8": block_fp8(256, 256),
    "FP8, activations too": block_fp8(256, 256, activation_group=128),
}


@pytest.mark.parametrize("spec", [COLUMN, ROW])
@pytest.mark.parametrize("name", [*CASES, "Q8_0"])
def test_gradients_are_those_of_the_decoded_matrix(name, spec):
    weight = CASES.get(name, GGML.from_dense(numbers(256, 256), "Q8_0"))
    x, g = jnp.asarray(numbers(4, 256)), jnp.asarray(numbers(4, 256, seed=5))
    expected = np.asarray(g) @ np.asarray(weight.dequantize())

    def loss(x, w):
        return jnp.sum(parallel.linear(x, w, spec) * g)

    with jax.set_mesh(make_mesh("tp=2")):
        got = jax.jit(jax.grad(loss))(x, weight)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_experts(name):
    weight = CASES[name]
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), weight)
    x, g = jnp.asarray(numbers(4, 256)), jnp.asarray(numbers(4, 256, seed=5))
    expert = jnp.array([1, 0], jnp.int32)
    got = jax.jit(jax.grad(lambda x: jnp.sum(dispatch.grouped_matmul(x, stack, expert) * g)))(x)
    w = np.asarray(stack.dequantize())
    np.testing.assert_allclose(got, np.concatenate([g[:2] @ w[1], g[2:] @ w[0]]), rtol=1e-4, atol=1e-4)


def test_plain_weights_can_be_trained():
    x, w = jnp.asarray(numbers(4, 256)), Dense(jnp.asarray(numbers(128, 256)))
    got = jax.jit(jax.grad(lambda w: jnp.sum(dispatch.matmul(x, w))))(w)
    np.testing.assert_allclose(got.values, np.broadcast_to(np.asarray(x).sum(0), (128, 256)), rtol=1e-5, atol=1e-5)
