"""Weights with something of low rank beside them: in every place of a model, over bases of every kind of format.

Expectations are float64 products of the matrices that tests/quantized_writers.py says the bases stand for, plus b @ a.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import in_turn, some
from quantized_writers import FORMATS
from test_layers import check_product, example, run
from test_quantized_layers import EXPERT_MESHES, LINEAR_MESHES, Kind, linears, made, stacks

from jaxllm import make_mesh, parallel
from jaxllm.formats.adapted import Adapted, LowRank
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.kernels.activations import rounding
from jaxllm.layers import COLUMN, ROW, Embedding, Linear
from jaxllm.plan import collectives_of

RANK = 3
# Of every kind of base one: what is added to its product does not depend on it.
FEW = ["fp8-block", "gptq-act-order", "bnb-nf4", "bnb-int8", "mxfp4"]


def low_rank(shape, seed=3):
    """Two adapters with scales of their own, side by side, and the matrix that they stand for."""
    rng = np.random.default_rng(seed)
    out, in_ = shape
    a, b = ((rng.normal(size=s) / s[1] ** 0.5).astype(np.float32) for s in ((RANK, in_), (out, RANK)))
    scale = np.array([2, 2, -0.5], np.float32)
    return LowRank(a, b, scale), (b.astype(np.float64) * scale @ a).astype(np.float32)


def adapted(name, shape=(96, 224), seed=0):
    base, matrix = made(name, shape, seed) if name in FORMATS else example(name, shape)
    base = base if isinstance(base, Weight) else Dense(matrix)
    delta, change = low_rank(matrix.shape, seed)
    return Adapted(base, delta), matrix + change


def kind(name):
    return Kind(lambda shape, seed: adapted(name, shape, seed))


@pytest.mark.parametrize(("name", "mesh"), in_turn(some([*FORMATS], FEW), *LINEAR_MESHES))
def test_a_matrix_multiplies_as_the_sum_that_it_stands_for(name, mesh):
    for where, case in linears(kind(name), mesh).items():
        case = replace(case, scale=np.abs(case.expected) + 1 if case.scale is None else case.scale)
        case.check(where)


@pytest.mark.parametrize(("name", "mesh"), in_turn(some([*FORMATS], FEW), *EXPERT_MESHES))
def test_experts_multiply_as_the_sums_that_they_stand_for(name, mesh):
    for where, case in stacks(kind(name), mesh).items():
        case.check(where)


@pytest.mark.parametrize("spec", [COLUMN, ROW], ids=["column", "row"])
@pytest.mark.parametrize(
    ("name", "mesh"),
    [("Q4_K", "tp=1"), ("Q4_K", "tp=8"), ("fp8-block", "tp=8"), ("gptq-act-order", "tp=2"), ("float64 array", "tp=2")],
)
def test_both_are_cut_as_one(name, mesh, spec):
    weight, matrix = adapted(name)
    tp = make_mesh(mesh).shape["tp"]
    assert weight.shape == matrix.shape
    assert weight.nbytes == weight.base.nbytes + weight.delta.nbytes
    assert weight.unit("in") == weight.base.unit("in")
    assert weight.granularity("in") == weight.base.granularity("in")
    x = np.random.default_rng(1).normal(size=(3, matrix.shape[1])).astype(np.float32)
    with jax.set_mesh(make_mesh(mesh)):
        layer = Linear.from_weight(weight, spec)
        check_product(run(layer, x), x, matrix)
    placed = layer.weight.get_value()
    for leaf in (jax.tree.leaves(placed.base)[0], placed.delta.b if spec == COLUMN else placed.delta.a):
        assert leaf.addressable_shards[0].data.nbytes * tp == leaf.nbytes
    np.testing.assert_allclose(layer.dequantize(), matrix, rtol=1e-5, atol=1e-5)


def test_both_move_and_are_looked_up_as_one():
    weight, matrix = adapted("fp8-block")
    weight = replace(weight, base=weight.base.refined(1, 1))
    rows, cols = np.array([5, -1, 0]), np.arange(224)[::-1]
    moved = weight.arrange(rows, cols)
    expected = np.where(rows[:, None] < 0, 0, matrix[rows][:, cols])
    np.testing.assert_allclose(moved.dequantize(), expected, rtol=1e-5, atol=1e-5)
    with jax.set_mesh(make_mesh("tp=8")):
        ids = np.array([[3, 95]], np.int32)
        got = run(Embedding.from_weight(adapted("fp8-block")[0]), ids)
    np.testing.assert_allclose(got, matrix[ids], rtol=1e-5, atol=1e-5)


def test_the_term_needs_no_collective_of_its_own():
    weight, x = adapted("fp8-block", (64, 128))[0], np.ones((2, 128), np.float32)
    with jax.set_mesh(make_mesh("tp=8")):
        found = [dict(collectives_of(Linear.from_weight(weight, spec), x)) for spec in (COLUMN, ROW)]
    assert found == [{}, {"all-reduce": 1}]


def test_what_is_encoded_or_changed_is_the_base():
    weight, matrix = adapted("float64 array", (64, 128))
    delta = np.random.default_rng(5).normal(size=(64, 128)).astype(np.float32)
    with jax.set_mesh(make_mesh("tp=2")):
        layer = Linear.from_weight(weight, ROW)
        changed, encoded = layer.add_delta(delta), layer.requantize("q8_0")
    np.testing.assert_allclose(changed.dequantize(), matrix + delta, rtol=1e-5, atol=1e-5)
    held = encoded.weight.get_value()
    assert (held.base.format, held.delta.rank) == ("Q8_0", RANK)
    for before, after in zip(jax.tree.leaves(layer.weight.get_value().delta), jax.tree.leaves(held.delta), strict=True):
        np.testing.assert_array_equal(before, after)
    error = np.abs(encoded.dequantize() - matrix)
    assert 0 < error.max() <= np.abs(matrix - low_rank((64, 128), 0)[1]).max() / 127


def test_the_term_is_of_unrounded_activations():
    """A base that stands for zeros, on activations that rounding to int8 by 32 would change."""
    delta, change = low_rank((64, 64))
    x = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32)
    zeros = example("Q8_0")[0]
    base = type(zeros)(np.zeros((64, 2, 34), np.uint8), "Q8_0")
    with jax.set_mesh(make_mesh()), rounding(True):
        check_product(run(Linear.from_weight(Adapted(base, delta), COLUMN), x), x, change)


@pytest.mark.parametrize("spec", [COLUMN, ROW], ids=["column", "row"])
def test_gradients_reach_the_two_factors(spec):
    """Of sum(y * g), over a packed base, which has none: dB = scale (g^T x A^T)^T and dA = B^T g^T x, by hand."""
    weight, matrix = adapted("bnb-nf4", (64, 128))
    rng = np.random.default_rng(4)
    x, g = (rng.normal(size=(5, n)).astype(np.float32) for n in (128, 64))
    with jax.set_mesh(make_mesh("tp=8")):
        held = Linear.from_weight(weight, spec).weight.get_value()

        def loss(ab, x):
            trained = replace(held, delta=replace(held.delta, a=ab[0], b=ab[1]))
            return jnp.sum(parallel.linear(x, trained, spec) * g)

        (da, db), dx = jax.jit(jax.grad(loss, (0, 1)))((held.delta.a, held.delta.b), x)
    a, b, scale = (np.asarray(leaf, np.float64) for leaf in (weight.delta.a, weight.delta.b, weight.delta.scale))
    np.testing.assert_allclose(da, scale[:, None] * (b.T @ (g.T @ x)), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(db, (g.T @ x @ a.T) * scale, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dx, g @ matrix, rtol=1e-4, atol=1e-3)
