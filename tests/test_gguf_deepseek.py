"""GGUF files of architecture deepseek2, with the logits that transformers gives for the same weights."""

import dataclasses
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from compiled import step_by_step
from covering import in_turn, some
from deepseek_numpy import Transformer, load
from hf_to_gguf import convert
from safetensors.numpy import save_file
from same_model import assert_same_parameters

import jaxllm
from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.errors import InputError
from jaxllm.models.deepseek.family import DEEPSEEK
from jaxllm.models.deepseek.model import deepseek

CHECKPOINTS = Path(__file__).parent / "golden" / "deepseek"
# A file cannot say that halves are paired (v3_half_rope), nor have another mscale than mscale_all_dim (v3_unlike_demo).
NAMES = ["v2_lite", "v2", "v3", "v3_no_q_lora", "v3_plain_rope"]
UNLIKE = "v3_unlike_demo"
FORMS = {"split": True, "whole": False}  # of kv_b
MESHES = ["tp=1", "tp=2", "tp=2,ep=2", "tp=8"]
# Of the others it is enough that what the file gives is the same, which the next tests say.
CASES = [(name, form, "tp=2,ep=2") for name, form in some(in_turn(NAMES, *FORMS), [("v3", "split")])]
CASES += some([("v3", form, mesh) for form in FORMS for mesh in ("tp=1", "tp=2", "tp=8")], [])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Writes the file of a checkpoint, or gives the one that was written before."""
    folder = tmp_path_factory.mktemp("deepseek")

    def written(name, form):
        path = folder / f"{name}-{form}.gguf"
        if not path.exists():
            convert(CHECKPOINTS / name, path, split_kv_b=FORMS[form])
        return path

    return written


def golden(name):
    return np.load(CHECKPOINTS / name / "golden.npz")


def assert_logits(model, name):
    np.testing.assert_allclose(model.logits(golden(name)["tokens"]), golden(name)["logits"], atol=1e-3)


def assert_equal(model, other):
    assert fields(model.config) == fields(other.config)
    assert_same_parameters(model, other)


@pytest.mark.parametrize(("name", "form", "mesh"), CASES)
def test_logits_are_those_of_transformers(load_once, file, name, form, mesh):
    """A prompt is attended to per head, a decode step on latents: both give transformers' result."""
    model = load_once(file(name, form), mesh=mesh, dtype="float32", weights="packed")
    assert_logits(model, name)
    if name == "v3":
        np.testing.assert_allclose(step_by_step(model, golden(name)["tokens"]), golden(name)["logits"], atol=1e-3)


def fields(config):
    """What both kinds of checkpoint say, to compare; rotary frequencies apart."""
    own = ("model_type", "split_kv_b", "rope")
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in own}
    return values, [config.rope.scale, *config.rope.inv_freq]


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_those_of_the_directory(load_once, file, name):
    assert_same_parameters(*(load_once(path, dtype="float32") for path in (file(name, "whole"), CHECKPOINTS / name)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_metadata_means_what_config_json_means(file, name, form):
    got, want = (open_checkpoint(path).config for path in (file(name, form), CHECKPOINTS / name))
    assert got.split_kv_b == FORMS[form]
    for a, b in zip(fields(got), fields(want), strict=True):
        assert a == pytest.approx(b)


def test_betas_of_yarn_and_a_tenth_of_mscale_all_dim(file):
    got, want = (open_checkpoint(path).config for path in (file(UNLIKE, "split"), CHECKPOINTS / UNLIKE))
    assert got.rope.inv_freq == pytest.approx(want.rope.inv_freq, rel=1e-6)
    assert got.rope.inv_freq != pytest.approx(open_checkpoint(file(UNLIKE, "whole")).config.rope.inv_freq, rel=0.1)
    assert got.softmax_scale == pytest.approx(want.softmax_scale, rel=1e-6)
    assert want.rope.scale != got.rope.scale == 1


@pytest.mark.parametrize(("name", "scoring"), [("v2", "softmax"), ("v3", "sigmoid")])
def test_files_that_do_not_say_how_experts_are_scored(tmp_path, name, scoring):
    convert(CHECKPOINTS / name, tmp_path / "x.gguf", more_metadata={"expert_gating_func": 0})
    assert open_checkpoint(tmp_path / "x.gguf").config.scoring_func == scoring


@pytest.mark.parametrize("mesh", some(["tp=1", "tp=2", "tp=8"], ["tp=2"]))
def test_every_heads_keys_and_values_can_be_kept_instead(monkeypatch, file, mesh):
    naive = replace(DEEPSEEK, model=partial(deepseek, per_head_cache=True))
    monkeypatch.setattr("jaxllm.checkpoint.opening.FAMILIES", [naive])
    # Steps with such a cache do not know which file the weights are from: test_deepseek has them.
    assert_logits(jaxllm.load(file("v3", "split"), mesh=mesh, dtype="float32", progress=False), "v3")


@pytest.mark.parametrize("metadata", [{"block_count": 4, "nextn_predict_layers": 1}, {}])
def test_a_layer_for_multi_token_prediction_is_ignored(load_once, file, tmp_path, metadata):
    """Whether it counts as a block or not."""
    parts = ("attn_norm", "attn_q_a", "nextn.eh_proj", "nextn.enorm", "nextn.shared_head_norm")
    tensors = {f"blk.3.{part}.weight": np.ones((3, 5)) for part in parts}
    convert(CHECKPOINTS / "v3", tmp_path / "x.gguf", more_metadata=metadata, more_tensors=tensors)
    assert_equal(load_once(tmp_path / "x.gguf", dtype="float32"), load_once(file("v3", "split"), dtype="float32"))


def test_parts_beside_kv_b_are_ignored(load_once, file, tmp_path):
    tensors = {f"blk.{i}.attn_{part}_b.weight": np.ones((3, 5)) for i in range(3) for part in "kv"}
    convert(CHECKPOINTS / "v3", tmp_path / "x.gguf", split_kv_b=False, more_tensors=tensors)
    assert_equal(load_once(tmp_path / "x.gguf", dtype="float32"), load_once(file("v3", "whole"), dtype="float32"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"expert_gating_func": 4}, "'expert_gating_func' 4 is not supported"),
        ({"attention.temperature_scale": 0.1}, "'attention.temperature_scale' is not supported"),
        ({"rope.scaling.type": "linear"}, "rope scaling 'linear' is not supported"),
        ({"rope.scaling.type": "other"}, "'rope.scaling.type' is 'other', not one of"),
        ({"rope.dimension_count": 16}, "'rope.dimension_count' is 16, not a whole number from 1 to 15"),
        ({"block_count": "3"}, "'block_count' is '3', not a whole number"),
    ],
)
def test_what_is_not_supported_is_said(tmp_path, metadata, message):
    convert(CHECKPOINTS / "v3", tmp_path / "x.gguf", more_metadata=metadata)
    with pytest.raises(InputError, match=re.escape(message)):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A Hugging Face directory whose weights Q8_0 holds exactly, along rows and along columns.

    They are whole multiples of a power of two, and the largest in a block of 32, either way, is 127 of it. The values
    of two heads make a block of o_proj's columns.
    """
    folder = tmp_path_factory.mktemp("exact")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 16}
    config = json.loads((CHECKPOINTS / "v3" / "config.json").read_text()) | sizes
    rng = np.random.default_rng(0)

    def matrix(out, in_):
        values = rng.integers(-127, 128, (out, in_)).astype(np.float32)
        values[np.add.outer(np.arange(out), np.arange(in_)) % 32 == 0] = 127
        return values * np.float32(2**-10)

    def norm(size):
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    tensors = {"model.embed_tokens": matrix(64, 64) * 4, "lm_head": matrix(64, 64) * 4, "model.norm": norm(64)}
    for i in range(2):
        layer = {"input_layernorm": norm(64), "post_attention_layernorm": norm(64)}
        attention = {"q_a_proj": matrix(32, 64), "q_a_layernorm": norm(32), "q_b_proj": matrix(160, 32)}
        attention |= {"kv_a_proj_with_mqa": matrix(40, 64), "kv_a_layernorm": norm(32), "kv_b_proj": matrix(192, 32)}
        layer |= {f"self_attn.{name}": x for name, x in attention.items()} | {"self_attn.o_proj": matrix(64, 64)}
        blocks = {"mlp": 64} if i == 0 else {"mlp.shared_experts": 32, **{f"mlp.experts.{e}": 32 for e in range(8)}}
        for name, size in blocks.items():
            layer |= {f"{name}.gate_proj": matrix(size, 64), f"{name}.up_proj": matrix(size, 64)}
            layer[f"{name}.down_proj"] = matrix(64, size)
        if i:
            layer["mlp.gate"] = matrix(8, 64)
            tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = rng.uniform(-0.2, 0.2, 8).astype(np.float32)
        tensors |= {f"model.layers.{i}.{name}": x for name, x in layer.items()}
    (folder / "config.json").write_text(json.dumps(config))
    named = {name if name.endswith("_bias") else f"{name}.weight": x for name, x in tensors.items()}
    save_file(named, folder / "model.safetensors")
    for form, split in FORMS.items():
        convert(folder, folder / f"{form}.gguf", split_kv_b=split, quantize="Q8_0")
    return folder


@pytest.fixture(scope="module")
def expected(exact):
    """Tokens and their logits, by the demo's mathematics in numpy."""
    tokens = np.arange(3, 23).reshape(2, 10)
    return tokens, Transformer(*load(exact))(tokens)


@pytest.mark.parametrize(("mesh", "form"), in_turn(some(MESHES, ["tp=2,ep=2", "tp=8"]), *FORMS))
def test_quantized_tensors_stay_as_they_are(load_once, exact, expected, form, mesh):
    tokens, logits = expected
    model = load_once(exact / f"{form}.gguf", mesh=mesh, dtype="float32", weights="packed")
    matrices = [p for p in model.placed if len(p.declaration.shape) > 1]
    held = {p.name.removesuffix(".weight").split(".")[-1]: p.weight.format for p in matrices}
    assert held.pop("gate") == "float32"
    assert set(held.values()) == {"Q8_0"}
    assert ("k_b_proj" in held) == FORMS[form]
    np.testing.assert_allclose(model.logits(tokens), logits, atol=1e-3)
    np.testing.assert_allclose(step_by_step(model, tokens), logits, atol=1e-3)
