"""Training beside torch and peft (tests/reference/finetune_goldens.py), on meshes, over packed bases; and what it leaves."""

import json
from pathlib import Path

import numpy as np
import pytest
from covering import some

import jaxllm
from jaxllm.finetuning.data import Example
from jaxllm.finetuning.factors import as_adapter, continued
from jaxllm.finetuning.loop import Training
from jaxllm.finetuning.packing import packed
from jaxllm.finetuning.settings import Settings

GOLDEN = Path(__file__).parent / "golden"
FINETUNED = GOLDEN / "finetuned"
SETTINGS = {"steps": 20, "warmup": 0.2, "learning_rate": 1e-2, "weight_decay": 0.1, "clip": 0.5}


def base_of(name):
    return GOLDEN / json.loads((FINETUNED / name / "adapter_config.json").read_text())["base_model_name_or_path"]


def examples(golden):
    """The texts of a golden, as examples."""
    pairs = zip(golden["tokens"], golden["learned"], strict=True)
    return [Example(tokens[tokens >= 0], learned[tokens >= 0]) for tokens, learned in pairs]


def training(model, name, settings, length=32):
    golden = np.load(FINETUNED / name / "golden.npz")
    rows = packed(examples(golden), length, np.arange(len(golden["tokens"])))
    places, factors = continued(model, FINETUNED / name)
    return Training(model, Settings(**SETTINGS | settings), rows, None, places, False), factors, golden


MESHES = [
    ("llama", "tp=2", {"batch": 1, "accumulate": 2}),  # two texts in each row
    ("llama", "tp=8", {"remat": True}),
    ("qwen3_moe", "tp=2,ep=2", {}),
    ("deepseek", "tp=2", {"remat": True}),
    ("gpt_oss", "tp=1", {}),
    ("llama", "dp=2", {}),
    ("qwen3_moe", "tp=1", {"remat": True}),
    ("qwen3_moe", "tp=8", {}),
    ("deepseek", "tp=1", {}),
    ("deepseek", "tp=2,ep=4", {}),
    ("gpt_oss", "ep=2", {"batch": 1, "accumulate": 2}),
    ("gpt_oss", "tp=8", {}),
]


@pytest.mark.parametrize(("name", "mesh", "settings"), some(MESHES, MESHES[:5]))
def test_losses_are_those_of_torch(name, mesh, settings):
    model = jaxllm.load(base_of(name), mesh=mesh, dtype="float32", progress=False)
    run, factors, golden = training(model, name, settings)
    trained, log, _ = run.run(factors, None)
    np.testing.assert_allclose(log.losses, golden["losses"], atol=1e-3)
    model.adapters.attach(as_adapter(name, run.places, trained), 1.0)
    after = model.logits(np.load(base_of(name) / "golden.npz")["tokens"])
    np.testing.assert_allclose(after, golden["logits"], atol=1e-2)
