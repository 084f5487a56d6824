"""The grouped experts against a plain loop, and the work that they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import in_turn

from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.kernels import dense
from jaxllm.kernels.experts import Gated, grouped_mlp, tile_size
from jaxllm.layers.experts import MoE, TopKRouter
from jaxllm.layers.mlp import swiglu
from jaxllm.parallel import make_mesh

HIDDEN, INTERMEDIATE, EXPERTS = 32, 64, 8


def stacks(dtype=np.float32, experts=EXPERTS):
    rng = np.random.default_rng(0)
    shapes = [(experts, INTERMEDIATE, HIDDEN)] * 2 + [(experts, HIDDEN, INTERMEDIATE)]
    return [(rng.normal(size=shape) / shape[-1] ** 0.5).astype(dtype) for shape in shapes]


def plain(x, scores, chosen, gate, up, down):
    y = np.zeros_like(x)
    for n, k in np.ndindex(chosen.shape):
        if 0 <= (e := chosen[n, k]) < len(gate):
            g, u = gate[e] @ x[n], up[e] @ x[n]
            y[n] += scores[n, k] * (down[e] @ (g / (1 + np.exp(-g)) * u))
    return y


grouped = jax.jit(grouped_mlp, static_argnames=("tile", "activation"))

CHOICES = {
    "one token": lambda rng: rng.integers(0, EXPERTS, (1, 2)),
    "one token, partly of other devices": lambda rng: np.array([[5, -1, 2]]),
    "many tokens": lambda rng: rng.integers(0, EXPERTS, (150, 2)),
    "all of one expert": lambda rng: np.full((70, 1), 5),
    "only the last": lambda rng: np.full((3, 1), EXPERTS - 1),
    "mostly of other devices": lambda rng: rng.integers(-20, 20, (40, 3)),
    "none here": lambda rng: np.full((4, 2), -1),
}


@pytest.mark.parametrize(("name", "tile"), in_turn(CHOICES, 1, 4, 64))
def test_grouped_equals_one_by_one(name, tile):
    rng = np.random.default_rng(1)
    chosen = CHOICES[name](rng).astype(np.int32)
    x = rng.normal(size=(len(chosen), HIDDEN)).astype(np.float32)
    scores = rng.random(chosen.shape).astype(np.float32)
    weights = stacks()
    got = grouped(x, scores, chosen, Gated(*map(Dense, weights)), tile=tile, activation=swiglu)
    np.testing.assert_allclose(got, plain(x, scores, chosen, *weights), rtol=1e-4, atol=1e-5)


def test_gradients_of_one_token():
    """In tiles of one row, of which the one in the middle is not in use."""
    gate, up, down = weights = [jnp.asarray(w) for w in stacks()]
    x, g = (np.random.default_rng(i).normal(size=(1, HIDDEN)).astype(np.float32) for i in (5, 6))
    scores, chosen = np.array([[0.3, 0.5, 0.7]], np.float32), np.array([[5, -1, 2]], np.int32)

    def one_by_one(x):
        return sum(s * (down[e] @ (jax.nn.silu(gate[e] @ x[0]) * (up[e] @ x[0]))) for e, s in ((5, 0.3), (2, 0.7)))

    def loss(x):
        return jnp.vdot(g, grouped(x, scores, chosen, Gated(*map(Dense, weights)), tile=1, activation=swiglu))

    expected = jax.grad(lambda x: jnp.vdot(g[0], one_by_one(x)))(x)
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-4, atol=1e-5)


def test_packed_experts():
    rng = np.random.default_rng(2)
    packed = [GGML.from_dense(jnp.asarray(w), "Q8_0") for w in stacks()]
    chosen = rng.integers(0, EXPERTS, (5, 2)).astype(np.int32)
    x, scores = rng.normal(size=(5, HIDDEN)).astype(np.float32), rng.random((5, 2)).astype(np.float32)
    got = grouped(x, scores, chosen, Gated(*packed), tile=4, activation=swiglu)
    expected = plain(x, scores, chosen, *(np.asarray(w.dequantize()) for w in packed))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_work_grows_with_the_experts_that_are_used(monkeypatch):
    """Counted, not timed: every matmul of the loops over tiles reports itself."""
    rounds, matmul = [], dense.matmul

    def counting(x, weight):
        jax.debug.callback(lambda: rounds.append(1))
        return matmul(x, weight)

    monkeypatch.setattr(dense, "matmul", counting)
    weights, x = Gated(*map(Dense, stacks(experts=64))), np.ones((4, HIDDEN), np.float32)
    for chosen, expected in ((np.full((4, 2), [3, 60]), 2), (np.arange(8).reshape(4, 2), 8)):
        rounds.clear()
        tile = tile_size(chosen.size, 64)
        run = jax.jit(lambda x, c, tile=tile: grouped_mlp(x, x[:, :2], c, weights, tile, swiglu))
        run(x, chosen.astype(np.int32)).block_until_ready()
        jax.effects_barrier()
        assert len(rounds) == 3 * expected
    monkeypatch.undo()
    cost = jax.jit(grouped_mlp, static_argnums=(4, 5)).lower(x, x[:, :2], chosen, weights, 8, swiglu).compile()
    assert cost.memory_analysis().temp_size_in_bytes < 0.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(weights))


@pytest.mark.parametrize(("assignments", "experts", "tile"), [(2, 64, 2), (8, 64, 8), (1024, 64, 16), (10**5, 8, 64)])
def test_tiles(assignments, experts, tile):
    assert tile_size(assignments, experts) == tile


@pytest.mark.parametrize("normalize", [True, False])
def test_routing(normalize):
    logits = np.random.default_rng(3).normal(size=(7, 6)).astype(np.float32)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-probs, axis=-1)[:, :2]
    scores, experts = TopKRouter(2, normalize)(jnp.asarray(logits), None)
    expected = np.take_along_axis(probs, order, -1)
    np.testing.assert_array_equal(experts, order)
    np.testing.assert_allclose(scores, expected / expected.sum(-1, keepdims=True) if normalize else expected, rtol=1e-5)


def test_router_logits_are_float32_whatever_activations_are():
    """The logits are 64 and 64.125: of two experts the better one, though both are 64 in bfloat16."""
    with jax.set_mesh(make_mesh("tp=1")):
        moe = MoE(2, 2, 2, TopKRouter(1, True), 1, 1, 1)
        ones = np.ones((2, 2, 2), np.float32)
        moe.gate.weight.set_value(Dense(jnp.array([[1, 0], [1, 0.125]], jnp.bfloat16)))
        moe.experts.gate_proj.set_value(Dense(jnp.asarray(ones)))
        moe.experts.up_proj.set_value(Dense(jnp.asarray(ones)))
        moe.experts.down_proj.set_value(Dense(jnp.asarray(ones * np.array([0, 1])[:, None, None])))
        y = jax.jit(lambda moe, x: moe(x))(moe, jnp.array([[[64, 1]]], jnp.bfloat16))
    assert (np.asarray(y) > 1000).all()  # the other expert gives zeros
