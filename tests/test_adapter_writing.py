"""Adapters that we write, beside those that peft wrote, from models of every kind of file."""

import json
from pathlib import Path

import numpy as np
import pytest
from hf_to_gguf import convert
from quantized_writers import read_safetensors

import jaxllm
from jaxllm.checkpoint.adapter_files import read_adapter
from jaxllm.checkpoint.adapter_writing import write_peft
from jaxllm.checkpoint.adapting import adapter
from jaxllm.finetuning.factors import trainable

GOLDEN = Path(__file__).parent / "golden"
ADAPTERS = GOLDEN / "adapters"
# Adapters of peft's, and how many of their tensors are of matrices that we join: each part has a rank of its own there.
CASES = {"second": 0, "fused": 8, "experts": 4, "latents": 4, "transposed": 4}


def shapes_of(model):
    return {name: placed.declaration.shape for name, placed in trainable(model).items()}


def written(name, model, folder):
    """The changes of one of peft's adapters, without those of a router, written for this model; and the changes."""
    declared = {placed.name: placed.declaration for placed in model.placed}
    read = adapter(read_adapter(ADAPTERS / name), model.config, declared).changes
    changes = {path: change for path, change in read.items() if not path.endswith("gate.weight")}
    folder.mkdir()
    write_peft(folder, changes, shapes_of(model), model.config, "base")
    return changes, adapter(read_adapter(folder), model.config, declared).changes


@pytest.mark.parametrize("name", CASES)
def test_files_are_those_of_peft(load_once, tmp_path, name):
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    model = load_once(GOLDEN / config["base_model_name_or_path"], dtype="float32")
    changes, again = written(name, model, tmp_path / "out")
    assert again.keys() == changes.keys()
    for path, change in changes.items():
        np.testing.assert_allclose(again[path].dequantize(), change.dequantize(), atol=1e-6)
    theirs, ours = (read_safetensors(p / "adapter_model.safetensors")[0] for p in (ADAPTERS / name, tmp_path / "out"))
    theirs = {key: values for key, values in theirs.items() if ".gate." not in key and ".router." not in key}
    assert ours.keys() == theirs.keys()
    joined = {key for key in theirs if ours[key].shape != theirs[key].shape}
    assert len(joined) == CASES[name]
    for key in theirs.keys() - joined:
        np.testing.assert_array_equal(ours[key], theirs[key])


@pytest.mark.parametrize("name", ["second", "transposed"])
def test_names_and_rows_are_those_of_a_directory_whatever_file_was_loaded(load_once, tmp_path, name):
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    base = GOLDEN / config["base_model_name_or_path"]
    convert(base, tmp_path / "base.gguf")
    written(name, load_once(base, dtype="float32"), tmp_path / "directory")
    written(name, load_once(tmp_path / "base.gguf", dtype="float32"), tmp_path / "gguf")
    one, other = (read_safetensors(tmp_path / kind / "adapter_model.safetensors")[0] for kind in ("directory", "gguf"))
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


def test_of_a_joined_matrix_a_part_alone_can_be_changed(tmp_path):
    """The other rows of what is written are zero."""
    model = jaxllm.load(GOLDEN / "checkpoints" / "phi3", dtype="float32", progress=False)
    declared = {placed.name: placed.declaration for placed in model.placed}
    changes = adapter(read_adapter(ADAPTERS / "fused"), model.config, declared).changes
    part = {path: change for path, change in changes.items() if path.endswith("k_proj.weight")}
    write_peft(tmp_path, part, shapes_of(model), model.config, "base")
    again = adapter(read_adapter(tmp_path), model.config, declared).changes
    for path, change in again.items():
        expected = part[path].dequantize() if path in part else np.zeros(change.shape)
        np.testing.assert_allclose(change.dequantize(), expected, atol=1e-6)
