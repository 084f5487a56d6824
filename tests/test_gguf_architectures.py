"""GGUF files of every architecture: the logits that transformers gives for the same weights.

Where the file gives the same parameters, bit for bit, and the same config as the Hugging Face directory, whose logits
tests/test_hf.py compares, the logits follow; `--full` computes them nevertheless.
"""

from pathlib import Path

import numpy as np
import pytest
from compiled import step_by_step
from covering import in_turn, some
from hf_to_gguf import convert
from same_model import assert_same_config, assert_same_parameters

import jaxllm

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"

# name -> how the file is written
FILES = {
    "llama": {"per_layer": True},
    "llama3_rope": {},
    "llama_bias": {},
    "llama_linear": {},
    "llama_yarn": {},
    "mistral": {},
    "mixtral": {},
    "mixtral, experts one by one": {"merged_experts": False},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe_b": {},
    "phi3": {},
    "phi3_longrope": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n": {},
    "granite": {},
    "smollm3": {},
    "olmo2": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe, predicting further": {  # a layer that is not the model's
        "more_metadata": {"block_count": 3, "nextn_predict_layers": 1},
        "more_tensors": {f"blk.2.{name}.weight": np.ones(4) for name in ("attn_norm", "nextn.eh_proj")},
    },
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    for name, options in FILES.items():
        convert(CHECKPOINTS / name.split(",")[0], folder / f"{name}.gguf", **options)
    return folder


# A decode step does not know which file the weights are from: test_hf has those of every architecture.
STEPPED = some([*FILES], ["mixtral"])
# Gemma's norms and tables are not those of its Hugging Face directories.
COMPUTED = some([*FILES], ["llama", "mixtral", "gemma2", "gemma3_text", "gemma3n", "glm4_moe, predicting further"])


@pytest.mark.parametrize(("name", "mesh"), in_turn((n for n in FILES if "gemma" not in n), "tp=1", "tp=2,ep=4"))
def test_parameters_and_config_are_those_of_the_directory(files, name, mesh):
    model, expected = (
        jaxllm.load(path, mesh=mesh, dtype="float32", progress=False)
        for path in (files / f"{name}.gguf", CHECKPOINTS / name.split(",")[0])
    )
    assert_same_parameters(model, expected)
    assert_same_config(model.config, expected.config)


@pytest.mark.parametrize(("name", "mesh"), in_turn(COMPUTED, "tp=1", "tp=2,ep=4"))
def test_logits_are_those_of_transformers(load_once, files, name, mesh):
    golden = np.load(CHECKPOINTS / name.split(",")[0] / "golden.npz")
    model = load_once(files / f"{name}.gguf", mesh=mesh, dtype="float32")
    np.testing.assert_allclose(model.logits(golden["tokens"]), golden["logits"], atol=1e-3)
    if name in STEPPED:
        np.testing.assert_allclose(step_by_step(model, golden["tokens"]), golden["logits"], atol=1e-3)


def test_short_sequences_of_a_long_context_model_use_its_short_factors(load_once, files):
    golden = np.load(CHECKPOINTS / "phi3_longrope" / "golden.npz")
    model = load_once(files / "phi3_longrope.gguf", mesh="tp=1", dtype="float32")
    np.testing.assert_allclose(model.logits(golden["tokens_short"]), golden["logits_short"], atol=1e-3)
