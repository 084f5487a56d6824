"""Experts over devices that they do not divide: every kind of mixture against transformers, padded with zeros."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled import dequantized, step_by_step
from covering import some

from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.parallel import make_mesh
from jaxllm.plan import dense, fill_with_shapes

GOLDEN = Path(__file__).parent / "golden"

# (checkpoint, mesh) -> experts that there are, and places for them
CASES = {
    ("checkpoints/mixtral", "ep=3"): (4, 6),  # a tensor for each expert
    ("checkpoints/mixtral_stacked", "ep=3,tp=2"): (4, 6),  # one tensor for all
    ("checkpoints/qwen2_moe", "ep=5"): (4, 5),  # a shared expert with a gate
    ("deepseek/v2", "ep=5"): (8, 10),  # groups, two shared experts
    ("deepseek/v3", "ep=3"): (8, 9),  # groups and a correction bias
    ("deepseek/v3_fp8_small_blocks", "ep=3,tp=2"): (8, 9),
    ("gpt_oss/bf16", "ep=5"): (4, 5),  # biases
    ("gpt_oss/mxfp4", "ep=3,tp=2"): (4, 6),
}

OPTIONS = {"quantize": "q8_0", "weights": "packed"}


# Of the others it is enough that they hold the right numbers: how many matrices there are, a router does not see.
COMPUTED = some([*CASES], [("deepseek/v3", "ep=3"), ("gpt_oss/mxfp4", "ep=3,tp=2")])


@pytest.mark.parametrize(("name", "mesh"), COMPUTED)
def test_logits_are_those_of_transformers(load_once, name, mesh):
    golden = np.load(GOLDEN / name / "golden.npz")
    model = load_once(GOLDEN / name, mesh=mesh, dtype="float32", weights="packed")
    np.testing.assert_allclose(model.logits(golden["tokens"]), golden["logits"], atol=1e-3)


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_the_experts_are_those_of_one_device(load_once, name, mesh):
    experts, places = CASES[name, mesh]
    model, alone = (load_once(GOLDEN / name, mesh=m, dtype="float32", weights="packed") for m in (mesh, "tp=1"))
    stacks = [p for p in model.placed if ".experts." in p.name]
    assert {p.weight.shape[0] for p in stacks} == {places}
    expected = {p.name: p for p in alone.placed}
    for p in stacks:
        values = dequantized(p.weight)
        np.testing.assert_array_equal(p.declaration.restore(values), dequantized(expected[p.name].weight))
        assert np.count_nonzero(values.any((1, 2))) == experts
    assert {p.declaration.shape[0] for p in stacks} == {experts}
    for row in model.summary().rows:
        assert (f"{places - experts} zero matrices added" in row[-1]) == (".experts." in row[0])


def test_token_by_token_equals_all_at_once(load_once):
    """Decode steps, in which most devices hold no expert that was chosen."""
    golden = np.load(GOLDEN / "deepseek" / "v3" / "golden.npz")
    model = load_once(GOLDEN / "deepseek" / "v3", mesh="ep=3", dtype="float32", weights="packed")
    np.testing.assert_allclose(step_by_step(model, golden["tokens"]), golden["logits"], atol=1e-3)


def test_a_plan_counts_the_padding():
    checkpoint, mesh = open_checkpoint(GOLDEN / "deepseek" / "v3"), make_mesh("ep=5")
    sizes = fill_with_shapes(checkpoint.family.model(checkpoint.config, mesh, 1), mesh, dense("int8"))
    c = checkpoint.config
    held = {name: size for name, size in sizes.items() if re.search(r"\.experts\.", name)}
    assert held and set(held.values()) == {2 * c.moe_intermediate_size * c.hidden_size}  # 8 over 5 are 2 on each


def test_quantized_while_loading(load_once):
    """Encoded as on one device, and followed by zeros."""
    one, many = (
        {p.name: p.weight for p in load_once(GOLDEN / "checkpoints" / "mixtral", mesh=mesh, **OPTIONS).placed}
        for mesh in ("ep=1", "ep=5")
    )
    for name in (name for name in one if ".experts." in name):
        [expected], [leaf] = jax.tree.leaves(one[name]), jax.tree.leaves(many[name])
        np.testing.assert_array_equal(leaf, np.pad(expected, [(0, 1)] + [(0, 0)] * (expected.ndim - 1)))
