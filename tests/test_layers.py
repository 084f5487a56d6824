"""Layers that stand alone: made of matrices of any format and size, multiplied, read back, changed and encoded anew.

Expectations are float64 products of matrices that tests/quantized_writers.py, gguf-py or numpy have dequantized.
"""

from functools import partial
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from covering import some
from flax import nnx
from gguf import GGMLQuantizationType
from quantized_writers import read_safetensors
from test_quantized_layers import made
from test_sharding import weight as ggml

from jaxllm import make_mesh, quantize
from jaxllm.errors import InputError
from jaxllm.layers import COLUMN, REPLICATED, ROW, Embedding, Experts, Linear, Merged
from jaxllm.plan import collectives_of

GOLDEN = Path(__file__).parent / "golden" / "checkpoints" / "llama"


def example(name, shape=(96, 224)):
    """A matrix in a format and its float32 values; GGML's are [12, 6 blocks]."""
    if name == "float64 array":
        values = np.random.default_rng(0).normal(size=shape)
        return values, values.astype(np.float32)
    if name == "bfloat16 array":
        values = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16)
        return jnp.asarray(values), values.astype(np.float32)
    return ggml(name) if name.startswith(("Q", "IQ", "TQ")) else made(name, shape, 0)


# Optimizing takes longer than running.
FAST = {"xla_backend_optimization_level": 0}


@partial(jax.jit, compiler_options=FAST)
def decoded(weight):
    return weight.dequantize()


def run(layer, *args):
    graph, state = nnx.split(layer)
    return jax.jit(lambda state, *args: nnx.merge(graph, state)(*args), compiler_options=FAST)(state, *args)


def check_product(y, x, matrix, bias=0.0):
    expected, size = x.astype(np.float64) @ matrix.T + bias, np.abs(x) @ np.abs(matrix).T
    assert y.shape == expected.shape
    assert (np.abs(y - expected) / size).max() < 1e-5


# Of 5 devices none divides 96 rows or 224 columns, 8 tear the groups of 224 columns apart.
CASES = [
    ("float64 array", COLUMN, "tp=5"),
    ("bfloat16 array", ROW, "tp=3,ep=2"),
    ("Q4_K", ROW, "tp=8"),
    ("Q6_K", REPLICATED, "tp=2"),
    ("Q4_0", COLUMN, "tp=8"),
    ("IQ4_XS", COLUMN, "tp=1"),
    ("gptq-4", ROW, "tp=5"),
    ("gptq-act-order", ROW, "tp=8"),
    ("gptq-3", COLUMN, "tp=5"),
    ("awq", COLUMN, "tp=2,ep=4"),
    ("mlx-5", ROW, "tp=4"),
    ("hqq-4-axis0", COLUMN, "tp=8"),
    ("bnb-nf4", ROW, "tp=5"),
    ("fp8-block", COLUMN, "tp=5"),
    ("fp8-block", ROW, "tp=8"),
    ("nvfp4-modelopt", ROW, "tp=2"),
    ("mxfp4", ROW, "tp=8"),
    ("ct-int8", REPLICATED, "tp=8"),
]


@pytest.mark.parametrize(("name", "spec", "mesh"), CASES, ids=str)
def test_a_layer_of_any_matrix_and_its_way_back(name, spec, mesh):
    weight, matrix = example(name)
    rng, mesh = np.random.default_rng(1), make_mesh(mesh)
    x, bias = rng.normal(size=(2, 3, matrix.shape[1])).astype(np.float32), rng.normal(size=len(matrix))
    with jax.set_mesh(mesh):
        layer = Linear.from_weight(weight, spec, bias)
        got = run(layer, x)
    check_product(got, x, matrix, bias)
    np.testing.assert_array_equal(layer.dequantize(), matrix)
    placed = layer.weight.get_value()
    codes = jax.tree.leaves(placed)[0]
    assert codes.addressable_shards[0].data.nbytes * (1 if spec == REPLICATED else mesh.shape["tp"]) == codes.nbytes
    padded = np.asarray(decoded(placed))
    assert not padded[matrix.shape[0] :].any()
    assert not padded[:, matrix.shape[1] :].any()


def test_sizes_that_the_mesh_divides_are_not_padded():
    with jax.set_mesh(make_mesh("tp=8")):
        for spec in (COLUMN, ROW, REPLICATED):
            assert Linear.from_weight(np.ones((64, 32)), spec).weight.get_value().shape == (64, 32)


def test_several_matrices_in_one_layer():
    names, biases = ("Q4_0", "float64 array", "gptq-4"), [None, np.arange(12.0), None]
    pairs = [example(name, (12 if name == "float64 array" else 64, 192)) for name in names]
    x = np.random.default_rng(1).normal(size=(3, 192)).astype(np.float32)
    with jax.set_mesh(make_mesh("tp=8")):
        layer = Linear.from_weight([weight for weight, _ in pairs], COLUMN, biases)
        results = run(layer, x)
        assert isinstance(layer, Merged)
        deltas = [np.ones_like(matrix) for _, matrix in pairs]
        changed = layer.requantize("q8_0").add_delta(deltas).dequantize()
    for y, back, new, bias, (_, matrix) in zip(results, layer.dequantize(), changed, biases, pairs, strict=True):
        check_product(y, x, matrix, 0.0 if bias is None else bias)
        np.testing.assert_array_equal(back, matrix)
        np.testing.assert_allclose(new, matrix + 1, atol=0.02 * np.abs(matrix + 1).max())


TABLES = [("fp8-block", "tp=5"), ("Q6_K", "tp=8"), ("bfloat16 array", "tp=2")]


@pytest.mark.parametrize(("name", "mesh"), some(TABLES, TABLES[:2]))
def test_an_embedding_table(name, mesh):
    weight, matrix = example(name)
    ids = np.array([[0, 11], [5, 7]], np.int32)
    x = np.random.default_rng(1).normal(size=(2, matrix.shape[1])).astype(np.float32)
    with jax.set_mesh(make_mesh(mesh)):
        table = Embedding.from_weight(weight)
        np.testing.assert_array_equal(run(table, ids), matrix[ids])
        check_product(np.asarray(table.attend(x)), x, matrix)
        doubled = table.requantize("q8_0").add_delta(matrix)
    np.testing.assert_array_equal(table.dequantize(), matrix)
    np.testing.assert_allclose(doubled.dequantize(), 2 * matrix, atol=0.02 * np.abs(matrix).max())


# ---- experts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mesh", "listed"), [("fp8-block", "tp=4,ep=2", True), ("float64 array", "tp=2,ep=4", False)]
)
def test_experts(name, mesh, listed):
    wide, narrow, biased = (96, 64), (64, 96), not listed
    rng = np.random.default_rng(0)
    if listed:
        parts = [[made(name, shape, 10 * i + e) for e in range(4)] for i, shape in enumerate((wide, wide, narrow))]
        given, matrices = ([[p[k] for p in part] for part in parts] for k in (0, 1))
        matrices = [np.stack(m) for m in matrices]
    else:
        given = matrices = [
            rng.normal(size=(4, *shape)).astype(np.float32) / 8 for shape in ((90, 64), (90, 64), (64, 90))
        ]
    biases = tuple(rng.normal(size=m.shape[:2]).astype(np.float32) for m in matrices) if biased else None
    x = rng.normal(size=(3, 64)).astype(np.float32)
    scores, chosen = rng.random((3, 2)).astype(np.float32), np.array([[0, 3], [2, 1], [3, 2]], np.int32)
    with jax.set_mesh(make_mesh(mesh)):
        experts = Experts.from_weight(*given, biases)
        got = np.asarray(run(experts, x, scores, chosen))
        changed = experts.add_delta(down=matrices[2]) if not listed else experts.requantize("q8_0")
    gate, up, down = (m.astype(np.float64)[chosen] for m in matrices)
    add = [b[chosen] for b in biases] if biased else [0, 0, 0]
    g, u = np.einsum("tkoi,ti->tko", gate, x) + add[0], np.einsum("tkoi,ti->tko", up, x) + add[1]
    h = g / (1 + np.exp(-g)) * u
    expected = np.einsum("tko,tk->to", np.einsum("tkoi,tki->tko", down, h) + add[2], scores)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    for back, matrix in zip(experts.dequantize(), matrices, strict=True):
        np.testing.assert_array_equal(back, matrix)
    for back, matrix, factor in zip(changed.dequantize(), matrices, (1, 1, 1 if listed else 2), strict=True):
        np.testing.assert_allclose(back, factor * matrix, atol=0.01 * np.abs(matrix).max())


# ---- changed where they lie ----------------------------------------------------------------------------------------


def shardings(layer):
    return jax.tree.map(lambda leaf: leaf.sharding, layer.weight.get_value())


@pytest.mark.parametrize(
    ("name", "spec", "mesh", "tolerance"),
    [
        ("float64 array", COLUMN, "tp=5", 1e-7),
        ("Q8_0", ROW, "tp=8", 0.005),
        ("Q4_0", COLUMN, "tp=8", 0.13),
        ("mlx-4", ROW, "tp=5", 0.13),
        ("fp8-block", ROW, "tp=8", 0.04),
        ("nvfp4-modelopt", COLUMN, "tp=5", 0.2),
    ],
    ids=str,
)
def test_a_delta_is_added_in_the_checkpoints_order_and_size(name, spec, mesh, tolerance):
    weight, matrix = example(name)
    delta = np.random.default_rng(2).normal(size=matrix.shape).astype(np.float32) * np.abs(matrix).max()
    with jax.set_mesh(make_mesh(mesh)):
        layer = Linear.from_weight(weight, spec)
    changed = layer.add_delta(delta)
    np.testing.assert_allclose(changed.dequantize(), matrix + delta, atol=tolerance * np.abs(matrix + delta).max())
    np.testing.assert_array_equal(layer.dequantize(), matrix)
    assert shardings(changed) == shardings(layer)


@pytest.mark.parametrize(
    ("name", "shape", "type", "spec", "mesh", "held"),
    [
        ("float64 array", (64, 512), "q8_0", ROW, "tp=8", "Q8_0"),
        ("gptq-4", (64, 512), "q4_k", ROW, "tp=2", "Q4_K"),
        ("gptq-4", (64, 512), "q4_k", ROW, "tp=4", "Q5_0"),  # 128 columns on each device
        ("fp8-block", (96, 224), "Q4_0", COLUMN, "tp=5", "Q4_0"),
        ("float64 array", (12, 100), "q4_k", COLUMN, "tp=4", "float16"),
        ("gptq-act-order", (64, 512), "q6k", REPLICATED, "tp=2,ep=2", "Q6_K"),
    ],
    ids=str,
)
def test_a_live_layer_is_quantized_anew(name, shape, type, spec, mesh, held):
    weight, matrix = example(name, shape)
    x = np.ones((1, shape[1]), np.float32)
    with jax.set_mesh(make_mesh(mesh)):
        layer = Linear.from_weight(weight, spec)
        new = layer.requantize(type)
        product = run(new, x)
    got, placed = np.asarray(new.dequantize()), new.weight.get_value()
    assert placed.format == held
    if held in ("Q8_0", "Q5_0", "Q4_0"):  # which gguf-py encodes, too
        kind = GGMLQuantizationType[held]
        expected = gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind)
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(got, matrix, atol={"float16": 1e-3, "Q8_0": 0.02, "Q6_K": 0.05}.get(held, 0.15))
    check_product(product, x, got)
    count = 1 if spec == REPLICATED else make_mesh(mesh).shape["tp"]
    for leaf in jax.tree.leaves(placed):
        assert leaf.addressable_shards[0].data.nbytes * count == leaf.nbytes


def test_what_cannot_be_encoded_says_so():
    with jax.set_mesh(make_mesh("tp=2")):
        layer = Linear.from_weight(np.full((4, 32), np.inf), COLUMN)
        gptq = Linear.from_weight(example("gptq-4")[0], COLUMN)
    with pytest.raises(InputError, match="NaN, or beyond 65504, cannot be encoded as q8_0"):
        layer.requantize("q8_0")
    with pytest.raises(InputError, match="cannot quantize to 'q9'"):
        layer.requantize("q9")
    with pytest.raises(InputError, match="GPTQ 4-bit cannot be encoded"):
        gptq.add_delta(np.zeros((96, 224)))


# ---- layers of a model ---------------------------------------------------------------------------------------------

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.mark.parametrize("weights", ["packed", "float32"])
def test_a_models_layers_give_the_checkpoints_matrices_back(load_once, weights):
    """On eight devices heads are padded and held several times."""
    tensors, _ = read_safetensors(GOLDEN / "model.safetensors")
    model = load_once(GOLDEN, mesh="tp=8", weights=weights).model
    rearranged = 0
    for name in PROJECTIONS:
        block, _, projection = name.partition(".")
        layer = getattr(getattr(model.layers[1], block), projection)
        matrix = tensors[f"model.layers.1.{name}.weight"].astype(np.float32)
        np.testing.assert_array_equal(layer.dequantize(), matrix)
        changed = layer.add_delta(matrix)
        np.testing.assert_array_equal(changed.dequantize(), 2 * matrix)
        np.testing.assert_array_equal(
            decoded(changed.weight.get_value()), 2 * np.asarray(decoded(layer.weight.get_value()))
        )
        rearranged += layer.weight.get_value().shape != matrix.shape
    assert rearranged >= 2
    table = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(model.embed_tokens.dequantize(), table)


# ---- what runs, and what cannot ------------------------------------------------------------------------------------


def test_collectives():
    x, ids, rng = np.ones((2, 64), np.float32), np.array([1, 2], np.int32), np.random.default_rng(0)
    with jax.set_mesh(make_mesh("tp=8")):
        found = {
            spec: dict(collectives_of(Linear.from_weight(rng.normal(size=(64, 64)), spec), x))
            for spec in (COLUMN, ROW, REPLICATED)
        }
        assert found == {COLUMN: {}, ROW: {"all-reduce": 1}, REPLICATED: {}}
        merged = Linear.from_weight([rng.normal(size=(64, 64)), rng.normal(size=(32, 64))], COLUMN)
        assert not collectives_of(merged, x)
        assert dict(collectives_of(Embedding.from_weight(rng.normal(size=(64, 64))), ids)) == {"all-reduce": 1}


def linear(weight=None, spec=COLUMN, bias=None):
    return Linear.from_weight(np.ones((16, 64), np.float32) if weight is None else weight, spec, bias)


ERRORS = {
    "ints": (lambda: linear(np.ones((4, 4), int)), "weight is of int64, not of floating-point numbers"),
    "a vector": (lambda: linear(np.ones(4)), r"weight has shape \[4\], expected 2 dimensions"),
    "spec": (lambda: linear(spec="column"), "spec 'column': choose COLUMN, ROW or REPLICATED"),
    "bias": (lambda: linear(bias=np.ones(15)), r"bias has shape \[15\], expected \[16\]"),
    "biases": (lambda: linear([np.ones((4, 4))] * 2, bias=[None]), "1 biases for 2 matrices"),
    "x": (lambda: linear()(np.ones((3, 16), np.float32)), r"x has shape \[3, 16\], .* takes \[\.\.\., 64\]"),
    "x of ints": (lambda: linear()(np.ones((3, 64), int)), "x is of int32, not of floating-point numbers"),
    "delta": (lambda: linear().add_delta(np.ones((64, 16))), r"\[64, 16\], but the parameter has \[16, 64\]"),
    "declared": (lambda: Linear((16, 64), COLUMN)(np.ones((3, 64))), r"nothing is loaded, .* \[16, 64\] is only decl"),
    "declared, changed": (lambda: Linear((16, 64), ROW).requantize("q8_0"), "nothing is loaded"),
    "declared table": (lambda: Embedding((16, 64), 2)(np.ones(3, int)), "nothing is loaded"),
    "ids": (lambda: Embedding.from_weight(np.ones((8, 8)))(np.ones(3)), "ids are of float32, not of integers"),
    "experts": (
        lambda: Experts.from_weight(np.ones((2, 8, 4)), np.ones((2, 8, 4)), np.ones((2, 8, 4))),
        r"gate_proj has shape \[2, 8, 4\], expected \[2, 4, 8\]",
    ),
    "experts of two formats": (
        lambda: Experts.from_weight(
            [np.ones((8, 32))] * 2, [np.ones((8, 32))] * 2, [np.ones((32, 8)), quantize(np.ones((32, 8)), "q8_0")]
        ),
        "experts of one layer differ in format",
    ),
    "chosen": (
        lambda: Experts.from_weight(*[np.ones((2, 8, 8))] * 3)(np.ones((3, 8)), np.ones((3, 2)), np.ones((2, 2), int)),
        r"x \[3, 8\], scores \[3, 2\] and chosen \[2, 2\]: expected",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_named_in_one_line(name):
    make, message = ERRORS[name]
    with jax.set_mesh(make_mesh("tp=2")), pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_mesh_is_needed():
    with jax.set_mesh(make_mesh("tp=2")):
        layer = linear()
    for call in (linear, lambda: layer(np.ones((3, 64), np.float32)), lambda: Embedding.from_weight(np.ones((8, 8)))):
        with pytest.raises(InputError, match="no mesh is set: call jax.set_mesh"):
            call()
    with jax.set_mesh(jax.make_mesh((2,), ("tp",))), pytest.raises(InputError, match=r"or make_mesh\(your_mesh\)"):
        linear()
