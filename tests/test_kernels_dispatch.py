"""What multiplies by a weight, why, and that gradients pass through it."""

import importlib
import types
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compiled import dequantized
from covering import in_turn
from kernel_cases import block_fp8, mxfp4, numbers

import jaxllm
from jaxllm import parallel
from jaxllm.errors import InputError
from jaxllm.formats.base import Cut, Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.scaled import Activations, Scaled
from jaxllm.kernels import dense, dispatch, registry, shapes
from jaxllm.kernels.activations import Rounded
from jaxllm.kernels.registry import Kernel, Layout
from jaxllm.parallel import COLUMN, ROW, make_mesh

X = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)
WEIGHTS = {"MXFP4": mxfp4(128, 256), "FP8 128x128": block_fp8(128, 256)}
V3 = Path(__file__).parent / "golden" / "deepseek" / "v3_fp8"


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for every kernel of a TPU or GPU, which serve matrices of 128 rows and say that they were called."""
    called = []

    def refuses(op, x, weight):
        return None if weight.shape[-2] == 128 else f"matrices of {weight.shape[-2]} rows"

    def standing_in(kernel):
        def function(*args):
            called.append(kernel.op)
            return getattr(dense, kernel.op)(*args)

        return replace(kernel, function=function, refuses=refuses, missing=registry.nothing)

    kernels = [k for k in registry.KERNELS if k.platform != "cpu"]
    kernels = [standing_in(kernel) if kernel.platform else kernel for kernel in kernels]
    monkeypatch.setattr(registry, "KERNELS", kernels)
    return called


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_runs_where_and_why(name, calls):
    weight = WEIGHTS[name]
    say = lambda platform: dispatch.explain("matmul", X, weight, platform)  # noqa: E731
    assert say("cpu") == f"matmul of {name} 128x256: reference (there are no kernels for cpu)"
    assert say("tpu") == f"matmul of {name} 128x256: pallas_tpu (made for tpu)"
    narrow = jax.tree.map(lambda leaf: leaf[: len(leaf) // 2] if len(leaf) > 1 else leaf, weight)
    assert "64x256: reference (pallas_tpu cannot: matrices of 64 rows)" in dispatch.explain("matmul", X, narrow, "tpu")


def test_a_format_without_kernels_is_decoded():
    weight = GGML(jax.ShapeDtypeStruct((128, 1, 66), jnp.uint8), "IQ2_XXS")
    why = "pallas_tpu cannot: IQ2_XXS is not codes with a scale for each group"
    assert dispatch.explain("matmul", X, weight, "tpu") == f"matmul of IQ2_XXS 128x256: reference ({why})"


def test_the_second_kernel_of_a_backend_serves_what_the_first_refuses():
    weight = Scaled(jax.ShapeDtypeStruct((128, 256), jnp.int8), jax.ShapeDtypeStruct((128, 1), jnp.float32), (1, None))
    with dispatch.using("pallas_tpu"):
        assert dispatch.choose("matmul", X, weight, "tpu").backend == "pallas_tpu"
        with pytest.raises(
            InputError, match="codes of float8_e5m2, the kernel takes float8_e4m3fn; codes of float8_e5m2"
        ):
            dispatch.choose(
                "matmul", X, replace(weight, values=jax.ShapeDtypeStruct((128, 256), jnp.float8_e5m2)), "tpu"
            )


def test_what_attends_and_why():
    given, _ = shapes.attention("gpt-oss-120b window", 1)
    say = lambda given: dispatch.explain("attention", given, jax.Array, "tpu")  # noqa: E731
    assert say(given) == "attention of bfloat16 to keys in bfloat16 1x1x192x64: pallas_tpu (made for tpu)"
    other = given._replace(keys=given.keys.update(dtype=jnp.float16))
    assert "reference (pallas_tpu cannot: a cache of float16 for queries of bfloat16: both have to be the" in say(other)


def test_a_backend_asked_for_by_name_fails_loudly(calls):
    weight = WEIGHTS["MXFP4"]
    with (
        dispatch.using("pallas_tpu"),
        pytest.raises(InputError, match=r"cannot do matmul of MXFP4: these are cpu devices"),
    ):
        dispatch.matmul(jnp.ones((4, 256)), weight)
    with (
        dispatch.using("pallas_tpu"),
        pytest.raises(InputError, match="cannot do matmul of MXFP4: matrices of 64"),
    ):
        dispatch.choose("matmul", X, jax.tree.map(lambda leaf: leaf[:64], weight), "tpu")
    with dispatch.using("reference"):
        assert "reference (asked for)" in dispatch.explain("matmul", X, weight, "tpu")
    with (
        pytest.raises(InputError, match="'cuda_cores': choose one of .*pallas_tpu, reference, triton_gpu"),
        dispatch.using("cuda_cores"),
    ):
        pass
    assert dispatch.choose("matmul", X, weight, "cpu").why == "there are no kernels for cpu"  # the names are forgotten


@pytest.fixture
def without(monkeypatch):
    """Packages are not installed, or damaged, whether or not they are here."""
    found = importlib.import_module

    def damage(**errors):
        def import_module(name):
            if error := errors.get(name):
                raise error
            return types.ModuleType(name) if name in ("triton", "jax_triton") else found(name)

        monkeypatch.setattr(importlib, "import_module", import_module)

    return damage


@pytest.mark.parametrize(("module", "package"), [("triton", "triton"), ("jax_triton", "jax-triton")])
def test_a_missing_package_is_said(without, monkeypatch, module, package):
    without(**{module: ModuleNotFoundError(f"No module named '{module}'", name=module)})
    said = dispatch.explain("matmul", X, WEIGHTS["MXFP4"], "gpu")
    assert f"128x256: reference (triton_gpu cannot: {package} is not installed" in said
    monkeypatch.setattr(dispatch, "_platform", lambda: "gpu")
    with dispatch.using("triton_gpu"), pytest.raises(InputError, match=f"{package} is not installed"):
        dispatch.matmul(jnp.ones((4, 256)), WEIGHTS["MXFP4"])


@pytest.mark.parametrize(
    "error",
    [
        ImportError("undefined symbol"),
        ModuleNotFoundError("No module named 'triton.language'", name="triton.language"),
        ModuleNotFoundError("No module named 'numpy'", name="numpy"),
    ],
    ids=str,
)
def test_a_broken_package_is_no_missing_one(without, error):
    without(triton=error)
    with pytest.raises(type(error), match=str(error)):
        dispatch.explain("matmul", X, WEIGHTS["MXFP4"], "gpu")


def test_a_model_without_its_kernels_is_warned_about_once(without, monkeypatch, tmp_path):
    """On a GPU; here the kernels are said to be those of this platform."""
    without(triton=ModuleNotFoundError("No module named 'triton'", name="triton"))
    others = [k for k in registry.KERNELS if k.platform != "cpu"]
    here = [replace(k, platform="cpu") if k.platform == "gpu" else k for k in others]
    monkeypatch.setattr(registry, "KERNELS", here)
    with pytest.warns(UserWarning, match="without the kernels for cpu: triton is not installed") as said:
        model = jaxllm.load(V3, progress=False, weights="packed", dtype="float32")
    assert len(said) == 1
    summary = model.summary()
    assert {row[4] for row in summary.rows} == {"reference", ""}
    assert "; no kernel attends to the cache: triton_gpu cannot: triton is not installed" in summary.title


def test_ops_that_there_are():
    for ask in (dispatch.choose, dispatch.explain):
        with pytest.raises(InputError, match="op 'matmull': choose one of matmul, grouped_matmul, act_quant, .*"):
            ask("matmull", X, WEIGHTS["MXFP4"])


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8])
def test_codes_without_scales_are_refused(dtype):
    weight, expert = WEIGHTS["FP8 128x128"], jnp.zeros(1, jnp.int32)
    with pytest.raises(InputError, match=f"x is of {jnp.dtype(dtype).name}: codes need their scales"):
        dispatch.matmul(jnp.ones((4, 256), dtype), weight)
    with pytest.raises(InputError, match="codes need their scales"):
        dispatch.grouped_matmul(jnp.ones((4, 256), dtype), jax.tree.map(lambda leaf: leaf[None], weight), expert)


class TestRoundedRows:
    """Scales for whole rows: the product is that of the rows rounded, whoever rounds them."""

    weight = replace(block_fp8(64, 256, block=(1, 256)), block=(1, None))
    x = numbers(6, 256) * np.exp(numbers(6, 1, seed=3))

    def expected(self, power_of_two=False, scale=None):
        peak = np.abs(self.x).max(-1, keepdims=True)
        scale = peak / np.float32(448) if scale is None else scale
        scale = np.exp2(np.ceil(np.log2(scale))) if power_of_two else scale
        seen = np.clip(self.x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        return seen @ dequantized(self.weight).T

    @pytest.mark.parametrize(
        "activations",
        [Activations(), Activations(power_of_two=True), Activations(scale=np.full((1,), 0.02, np.float32))],
        ids=["each row", "powers of two", "given"],
    )
    def test_matmul_is_whole_in_itself(self, activations):
        weight = replace(self.weight, activations=activations)
        expected = self.expected(activations.power_of_two, activations.scale)
        plain = self.x @ dequantized(weight).T
        assert np.abs(expected - plain).max() > 0.1
        np.testing.assert_allclose(dispatch.matmul(jnp.asarray(self.x), weight), expected, rtol=1e-4, atol=1e-3)
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weight)
        got = dispatch.grouped_matmul(jnp.asarray(self.x), stack, jnp.array([1, 0], jnp.int32))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)

    def test_rows_of_several_devices_share_a_scale(self):
        weight = replace(self.weight, activations=Activations())
        for spec in (COLUMN, ROW):
            got = parallel_linear(jnp.asarray(self.x), weight, spec, "tp=4")
            np.testing.assert_allclose(got, self.expected(), rtol=1e-4, atol=1e-3)

    def test_rounded_rows_are_not_rounded_again(self):
        weight = replace(self.weight, activations=Activations(scale=np.full((1,), 1.0, np.float32)))
        x = jnp.full((1, 256), 1.03, jnp.float32)
        got = dispatch.matmul(Rounded(x), weight)
        np.testing.assert_allclose(got, np.asarray(x) @ dequantized(weight).T, rtol=1e-4, atol=1e-3)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Interleaved(Weight):
    """A toy's own format: plain numbers, columns in pairs."""

    pairs: jax.Array  # float32 [*batch, out, in / 2, 2]

    @property
    def format(self):
        return "interleaved"

    @property
    def axes(self):
        return {"pairs": (Cut("out"), Cut("in", 2), None)}

    def dequantize(self, dtype=jnp.float32):
        return self.pairs.reshape(*self.pairs.shape[:-2], -1).astype(dtype)


def test_a_backend_from_outside(monkeypatch):
    """It is chosen, explained, shown, and used, and matrices are repacked for it while they are loaded."""
    calls = []

    def interleave(weight):
        w = weight.dequantize()
        return Interleaved(w.reshape(*w.shape[:-1], -1, 2))

    def multiply(x, weight):
        calls.append(weight.shape)
        return dense.matmul(x, weight)

    def refuses(op, x, weight):
        return None if x.dtype == jnp.float32 else f"activations of {x.dtype.name}"

    monkeypatch.setattr(registry, "KERNELS", [*registry.KERNELS])
    registry.register(
        Kernel("matmul", Scaled, "cpu", "toy", multiply, refuses, Layout(repack=interleave)),
        Kernel("matmul", Interleaved, "cpu", "toy", multiply, refuses),
    )
    said = dispatch.explain("matmul", jax.ShapeDtypeStruct((1, 256), jnp.float32), WEIGHTS["FP8 128x128"], "cpu")
    assert said == "matmul of FP8 128x128 128x256: toy (made for cpu)"
    assert "toy cannot: activations of bfloat16)" in dispatch.explain("matmul", X, WEIGHTS["FP8 128x128"])
    with (
        dispatch.using("toy"),
        pytest.raises(InputError, match="'toy' cannot do matmul of FP8 128x128: activations of"),
    ):
        dispatch.choose("matmul", X, WEIGHTS["FP8 128x128"])

    golden = np.load(V3 / "golden.npz")
    model = jaxllm.load(V3, progress=False, weights="packed", dtype="float32", mesh="tp=2")
    shown = {row[0]: (row[1], row[3], row[4]) for row in model.summary().rows}
    [o_proj] = [row for name, row in shown.items() if name.endswith("o_proj.weight")]
    assert o_proj[1:] == ("interleaved", "toy") and "FP8" in o_proj[0]
    np.testing.assert_allclose(model.logits(golden["tokens"]), golden["logits"], atol=1e-3)
    assert calls


def test_the_latest_backend_is_preferred(monkeypatch):
    monkeypatch.setattr(registry, "KERNELS", [*registry.KERNELS])
    for name in ("first", "second"):
        registry.register(Kernel("matmul", MXFP4, "cpu", name, dense.matmul))
    assert dispatch.choose("matmul", X, WEIGHTS["MXFP4"], "cpu").backend == "second"
    with dispatch.using("first"):
        assert dispatch.choose("matmul", X, WEIGHTS["MXFP4"], "cpu").backend == "first"


def test_layers_and_experts_use_what_was_chosen(calls, monkeypatch):
    """On a mesh that says it is of TPUs, every matmul of theirs is the backend's."""
    monkeypatch.setattr(dispatch, "_platform", lambda: "tpu")
    x = jnp.asarray(numbers(4, 256))
    with jax.set_mesh(make_mesh("tp=2")):
        got = jax.jit(lambda x, w: parallel.linear(x, w, ROW))(x, WEIGHTS["MXFP4"])
    np.testing.assert_allclose(got, x @ dequantized(WEIGHTS["MXFP4"]).T, rtol=1e-4, atol=1e-4)
    assert calls == ["matmul"]


REAL = {"MXFP4": mxfp4(256, 256), "FP8": block_fp8(256, 256, group=128)}


@pytest.mark.parametrize(("name", "spec"), in_turn(REAL, ROW, COLUMN))
def test_a_real_kernel_on_each_devices_shards(monkeypatch, name, spec):
    """The TPU kernels, interpreted, where a mesh of two devices says that it is of TPUs."""
    weight = REAL[name]
    interpreted = [
        replace(k, function=partial(k.function, interpret=True)) if k.platform == "tpu" else k for k in registry.KERNELS
    ]
    monkeypatch.setattr(registry, "KERNELS", interpreted)
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
    "FP8, activations too": block_fp8(256, 256, group=128),
}


@pytest.mark.parametrize(("name", "spec"), in_turn([*CASES, "Q8_0"], COLUMN, ROW))
def test_gradients_are_those_of_the_decoded_matrix(name, spec):
    weight = CASES.get(name, GGML.from_dense(numbers(256, 256), "Q8_0"))
    x, g = jnp.asarray(numbers(4, 256)), jnp.asarray(numbers(4, 256, seed=5))
    expected = np.asarray(g) @ dequantized(weight)

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
    w = dequantized(stack)
    np.testing.assert_allclose(got, np.concatenate([g[:2] @ w[1], g[2:] @ w[0]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_weights_can_be_trained(dtype):
    x, w = jnp.asarray(numbers(4, 256)), Dense(jnp.asarray(numbers(128, 256), dtype))
    got = jax.jit(jax.grad(lambda w: jnp.sum(dispatch.matmul(x, w))))(w)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-2, "atol": 1e-2}
    expected = np.broadcast_to(np.asarray(x).sum(0), (128, 256))
    np.testing.assert_allclose(got.values.astype(jnp.float32), expected, **close)


def test_stacks_of_plain_weights_can_be_trained():
    """Of each expert's tiles, whatever the unused one has in it."""
    x, g = jnp.asarray(numbers(8, 256)), jnp.asarray(numbers(8, 128, seed=5)).at[6:].set(0)
    stack, expert = Dense(jnp.asarray(numbers(3 * 128, 256, seed=6).reshape(3, 128, 256))), jnp.array([2, 0, 2, -1])
    got = jax.jit(jax.grad(lambda w: jnp.sum(dispatch.grouped_matmul(x, w, expert)[:6] * g[:6])))(stack)
    expected = np.zeros((3, 128, 256), np.float32)
    for tile, number in ((0, 2), (1, 0), (2, 2)):
        rows = slice(2 * tile, 2 * tile + 2)
        expected[number] += np.asarray(g[rows]).T @ np.asarray(x[rows])
    np.testing.assert_allclose(got.values, expected, rtol=1e-4, atol=1e-4)
