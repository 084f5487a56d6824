"""Statistics of activations: against the inputs of every product in DeepSeek's model once more in numpy."""

import deepseek_numpy
import jax
import numpy as np
import pytest
import tiny_hf

import jaxllm
from jaxllm import make_mesh, parallel
from jaxllm.errors import InputError
from jaxllm.layers import COLUMN, ROW, Experts, Linear

TOKENS = np.array([[3, 50, 7, 7, 19, 80, 1], [90, 2, 33, 4, 5, 6, 11]])
NAMES = {
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.wo": "self_attn.o_proj",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
    "ffn.gate": "mlp.gate",
    "ffn.shared_experts.w1": "mlp.shared_expert.gate_proj",
    "ffn.shared_experts.w2": "mlp.shared_expert.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_expert.up_proj",
}
EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class Watched(deepseek_numpy.Transformer):
    """Notes the inputs of every product."""

    def __init__(self, *args):
        super().__init__(*args)
        self.inputs = {}

    def linear(self, name, x):
        self.inputs.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))
        return super().linear(name, x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_hf.write(tmp_path_factory.mktemp("tracking") / "model", "deepseek")


@pytest.fixture(scope="module")
def expected(folder):
    """The rows that each matrix met, by our names; experts' with their number."""
    model = Watched(*deepseek_numpy.load(folder))
    model(TOKENS)
    rows = {}
    for name, x in model.inputs.items():
        if not name.startswith("layers."):
            continue
        layer, rest = name.split(".", 2)[1:]
        if rest.startswith("ffn.experts."):
            number, matrix = rest.split(".")[2:]
            rows[f"layers.{layer}.mlp.experts.{EXPERTS[matrix]}", int(number)] = np.concatenate(x)
        else:
            rows[f"layers.{layer}.{NAMES[rest]}.weight", None] = np.concatenate(x)
    return rows


@pytest.mark.parametrize("mesh", ["tp=2,ep=4", "tp=8"])
def test_every_matrix_of_a_model(folder, expected, mesh):
    model = jaxllm.load(folder, dtype="float32", mesh=mesh, progress=False)
    products = mesh != "tp=8"
    model.begin_track_stats(products=products)
    model.logits(TOKENS[:1])
    model.logits(TOKENS[1:])
    found = model.end_track_stats()
    assert {name for name, _ in expected} == found.keys() - {f"layers.{i}.self_attn.kv_b_proj.weight" for i in (0, 1)}
    for (name, number), rows in expected.items():
        statistics = found[name]
        squares, counts, outer = statistics.squares, statistics.counts, statistics.products
        if number is not None:
            squares, counts = squares[number], counts[number]
            outer = None if outer is None else outer[number]
        assert counts == len(rows)
        np.testing.assert_allclose(squares, (rows**2).sum(0), rtol=1e-3, atol=1e-5 * (rows**2).sum(0).max())
        if products:
            np.testing.assert_allclose(outer, rows.T @ rows, rtol=1e-3, atol=1e-4 * np.abs(rows.T @ rows).max())
        importance = statistics.importance if number is None else statistics.importance[number]
        np.testing.assert_allclose(importance, squares / len(rows), rtol=1e-6)
    latents = found["layers.0.self_attn.kv_b_proj.weight"]
    assert latents.counts == TOKENS.size
    assert all(len(s.squares) == 4 for name, s in found.items() if ".experts." in name)
    with pytest.raises(InputError, match=r"call begin_track_stats\(\)"):
        model.end_track_stats()


def test_experts_that_no_token_met_know_nothing(monkeypatch):
    # As two programs: outside `jit`, shard_map would compile each operation.
    monkeypatch.setattr(parallel, "experts", jax.jit(parallel.experts, static_argnums=(4, 5)))
    monkeypatch.setattr(parallel, "expert_sums", jax.jit(parallel.expert_sums, static_argnums=(3, 4, 5)))
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    with jax.set_mesh(make_mesh("tp=2,ep=2")):
        experts = Experts.from_weight(*(np.ones(shape, np.float32) for shape in ((5, 6, 8), (5, 6, 8), (5, 8, 6))))
        experts.begin_track_stats()
        experts(x, np.ones((3, 1), np.float32), np.array([[4], [1], [4]], np.int32))
        found = experts.end_track_stats()
    np.testing.assert_array_equal(found["gate_proj"].counts, [0, 1, 0, 0, 2])
    np.testing.assert_allclose(found["gate_proj"].importance[4], (x[[0, 2]] ** 2).mean(0), rtol=1e-5)
    assert not found["down_proj"].importance[[0, 2, 3]].any()
    assert found["down_proj"].squares.shape == (5, 6)


@pytest.mark.parametrize("spec", [COLUMN, ROW], ids=["column", "row"])
def test_a_layer_on_its_own(monkeypatch, spec):
    monkeypatch.setattr(parallel, "linears", jax.jit(parallel.linears, static_argnums=(2, 3)))  # as above
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 20)).astype(np.float32)
    with jax.set_mesh(make_mesh("tp=8")):
        layer = Linear.from_weight(rng.normal(size=(24, 20)), spec)
        layer(x)
        layer.begin_track_stats(products=True)
        layer(x)
        layer(x[:1])
        found = layer.end_track_stats()["weight"]
        layer(x)
    rows = np.concatenate([x.reshape(-1, 20), x[0]])
    assert found.counts == 15
    np.testing.assert_allclose(found.squares, (rows**2).sum(0), rtol=1e-5)
    np.testing.assert_allclose(found.products, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_a_layer_on_its_own_is_not_tracked_under_jit():
    with jax.set_mesh(make_mesh("")):
        layer = Linear.from_weight(np.ones((4, 8), np.float32), COLUMN)
        layer.begin_track_stats()
        jax.jit(lambda x: layer(x))(np.ones((1, 8), np.float32))
        with pytest.raises(InputError, match="outside jit only"):
            layer.end_track_stats()
        with pytest.raises(InputError, match="call begin_track_stats"):
            layer.end_track_stats()
