"""Hugging Face directories against transformers' own logits and tokens, on every kind of mesh."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from compiled import step_by_step
from covering import in_turn, some
from safetensors.numpy import load_file, save_file
from same_model import assert_same_config, assert_same_parameters

from jaxllm.checkpoint.opening import open_checkpoint

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
SPARSE = [name for name in NAMES if "mixtral" in name or "moe" in name]
WIDE = [("olmo2", mesh) for mesh in ("tp=2", "tp=8")]  # heads padded or copied, and a norm over all of them
DENSE = [name for name in NAMES if name not in SPARSE and name != "gemma3n"]  # which has test_gemma3n
SAMPLES = some(
    [*in_turn(NAMES, "tp=8", "tp=1", "tp=2"), *in_turn(SPARSE, "ep=4", "tp=2,ep=2")],
    [*in_turn(DENSE, "tp=8"), *in_turn(SPARSE, "tp=2,ep=2", "tp=8")],
)
# Files of another layout hold the same model: its logits need not be computed again.
ONE_TENSOR = ["mixtral_stacked", "mixtral_transposed"]
CASES = [case for case in dict.fromkeys([*SAMPLES, *WIDE]) if case[0] not in some([], ONE_TENSOR)]
# mixtral_stacked and _transposed are one tensor for all experts, as in GGUF files.
NOT_IN_GGUF = ["gemma3", "odd", "qwen2_window", "qwen3_moe", "smollm3_listed", "glm4_moe_groups"]


def golden(name):
    return np.load(CHECKPOINTS / name / "golden.npz")


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_logits_are_those_of_transformers(load_once, name, mesh):
    expected = golden(name)
    got = load_once(CHECKPOINTS / name, mesh=mesh, dtype="float32").logits(expected["tokens"])
    np.testing.assert_allclose(got, expected["logits"], atol=1e-3)


@pytest.mark.parametrize("name", ONE_TENSOR)
def test_one_tensor_for_all_experts_is_the_same_model(load_once, name):
    model, expected = (load_once(CHECKPOINTS / n, mesh="tp=2,ep=2", dtype="float32") for n in (name, "mixtral"))
    assert_same_config(model.config, expected.config)
    assert_same_parameters(model, expected)


# A decode step does not know which file the weights are from: those of other models are in test_gguf_architectures.
@pytest.mark.parametrize(("name", "mesh"), in_turn(some(NOT_IN_GGUF, NOT_IN_GGUF[:-1]), "tp=1", "tp=2"))
def test_token_by_token_equals_all_at_once(load_once, name, mesh):
    model = load_once(CHECKPOINTS / name, mesh=mesh, dtype="float32")
    np.testing.assert_allclose(step_by_step(model, golden(name)["tokens"]), golden(name)["logits"], atol=1e-3)


@pytest.mark.parametrize(("name", "mesh"), in_turn(some(NAMES, ["gemma3"]), "tp=1", "tp=2"))
def test_greedy_tokens_are_those_of_transformers(load_once, name, mesh):
    expected = golden(name)
    model = load_once(CHECKPOINTS / name, mesh=mesh, dtype="float32")
    prompts = [expected["tokens"][0].tolist(), expected["tokens"][1, :5].tolist()]
    assert model.generate(prompts, 12)[0].tokens == expected["greedy"].tolist()


@pytest.mark.parametrize("name", [n for n in NAMES if (CHECKPOINTS / n / "config_old.json").exists()])
def test_the_older_spelling_of_a_config_means_the_same(name, tmp_path):
    shutil.copytree(CHECKPOINTS / name, tmp_path / name)
    shutil.copy(CHECKPOINTS / name / "config_old.json", tmp_path / name / "config.json")
    assert open_checkpoint(tmp_path / name).config == open_checkpoint(CHECKPOINTS / name).config


def test_a_layer_for_multi_token_prediction_is_ignored(load_once, tmp_path):
    shutil.copytree(CHECKPOINTS / "glm4_moe", tmp_path / "a")
    more = {f"model.layers.2.{name}.weight": np.ones(3, np.float32) for name in ("eh_proj", "self_attn.q_proj")}
    save_file(load_file(tmp_path / "a" / "model.safetensors") | more, tmp_path / "a" / "model.safetensors")
    model, expected = (load_once(path, dtype="float32") for path in (tmp_path / "a", CHECKPOINTS / "glm4_moe"))
    assert model.config == expected.config
    assert_same_parameters(model, expected)
