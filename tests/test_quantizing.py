"""Quantizing while loading and afterwards: the same bits on every mesh."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
import tiny_hf
from compiled import dequantized
from covering import in_turn, some
from forked import Forked
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.encodings import ENCODINGS
from jaxllm.errors import InputError
from jaxllm.layers.parameter import parameters
from jaxllm.loading import load
from jaxllm.recipe import recipe
from jaxllm.requantize import planned
from jaxllm.tracking import Statistics

MODELS = ("llama", "qwen3_moe", "deepseek")
MESHES = ("tp=2", "tp=8", "tp=2,ep=2", "tp=4,ep=2")
# One of each kind of groups: along rows, across rows, by matrix, by blocks of both, by rows.
TYPES = ("q8_0", "q4_0", "hqq4", "hqq8", "fp8", "fp8_block", "nf4", "nvfp4", "mxfp4", "mxfp8", "int8", "afq4", "f8q8")
TYPES = some(TYPES, ("q4_0", "hqq4", "fp8", "fp8_block", "nvfp4", "int8"))
CASES = [(type, MODELS[i % 3], mesh) for i, (type, mesh) in enumerate(in_turn(TYPES, *MESHES))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantizing")
    return {name: tiny_hf.write(folder / name, name) for name in MODELS}


def matrices(model):
    """Every matrix by name, dequantized, in the checkpoint's order."""
    found = {name: (p.declared, p.get_value()) for name, p in parameters(model.model).items()}
    return {name: d.restore(dequantized(w)) for name, (d, w) in found.items() if len(d.shape) > 1}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.fixture(scope="module")
def on_one_device(folders):
    made = {}

    def loaded(type, name):
        if (type, name) not in made:
            made[type, name] = matrices(load(folders[name], dtype="float32", quantize=type, weights="packed"))
        return made[type, name]

    return loaded


@pytest.mark.parametrize(("type", "name", "mesh"), CASES)
def test_a_mesh_does_not_change_the_bits(folders, on_one_device, type, name, mesh):
    there = load(folders[name], dtype="float32", quantize=type, mesh=mesh, weights="packed", progress=False)
    assert_same(matrices(there), on_one_device(type, name))
    for p in there.placed:
        leaves = jax.tree.leaves(p.weight)
        assert all(len(leaf.addressable_shards) == there.mesh.devices.size for leaf in leaves)


@pytest.mark.parametrize(("type", "name", "mesh"), some(CASES[::2], CASES[2:5:2]))  # both kinds of experts
def test_a_loaded_model_is_quantized_where_it_lies(folders, on_one_device, type, name, mesh):
    model = load(folders[name], dtype="float32", mesh=mesh, weights="packed", progress=False)
    tokens = [[1, 2, 3]]
    before = np.asarray(model.logits(tokens))
    plan = model.quantize(type, progress=False)
    expected = on_one_device(type, name)
    assert [row.name for row in plan.rows] == [
        p.name for p in model.placed if p.name in expected and not p.declaration.keep
    ]
    exact = {row.name for row in plan.rows if row.result.format == planned_format(type, row)}
    found = matrices(model)
    assert exact
    assert_same({n: found[n] for n in exact}, {n: expected[n] for n in exact})
    after = np.asarray(model.logits(tokens))
    assert np.abs(after - before).max() < 1.5 * np.abs(before).max()
    assert not np.array_equal(after, before)


def planned_format(type, row):
    """What loading makes of this matrix; a live one falls back where the shards that are there would split blocks."""
    return planned(row.result.shape, recipe(type).choose(row.name, row.name, row.result.shape).type).format


def test_a_topology_and_an_organization_while_loading(folders, tmp_path):
    (tmp_path / "t.yml").write_text("'/q_proj/': {isq: q8_0}\n0-1: {isq: hqq4}\n")
    model = load(folders["llama"], quantize="q4_0", topology=tmp_path / "t.yml", progress=False)
    formats = {p.name: p.encoded.format for p in model.placed}
    assert formats["layers.0.self_attn.q_proj.weight"] == "Q8_0"
    assert formats["layers.0.mlp.up_proj.weight"] == "HQQ 4-bit"
    assert formats["embed_tokens.weight"] == "Q8_0" or formats["embed_tokens.weight"] == "Q6_K"
    model = load(folders["qwen3_moe"], quantize=4, organization="moqe", progress=False)
    formats = {p.name: p.encoded.format for p in model.placed if len(p.declaration.shape) > 1}
    assert {("experts" in name) for name, format in formats.items() if format != "float32"} == {True}


def test_every_type_is_taken_and_the_number_of_bits(folders):
    for type in (2, 3, 4, 5, 6, 8):
        jaxllm.load(folders["llama"], quantize=type, progress=False)
    with pytest.raises(InputError, match="cannot quantize to 'q9'; known are .*q4_k.*hqq4.*nf4"):
        jaxllm.load(folders["llama"], quantize="q9")
    assert {"q4_k", "hqq4", "hqq8", "fp8", "afq2", "afq3", "afq4", "afq6", "afq8", "f8q8", "mxfp4"} <= ENCODINGS.keys()


def test_a_type_that_needs_importance_says_so(folders):
    model = jaxllm.initialize(
        {"model_type": "llama", "vocab_size": 8, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 8},
        dtype="float32",
    )
    with pytest.raises(
        InputError, match=r"iq2_xs needs to know which inputs of layers\.0.* matter: give an importance"
    ):
        model.quantize("iq2_xs")
    known = {p.name: Statistics(np.ones(p.declaration.shape[-1], np.float32), np.int32(1)) for p in model.placed}
    plan = model.quantize("iq2_xs", importance=known, progress=False)
    assert {row.result.format for row in plan.rows if row.name.startswith("layers.")} == {"IQ2_XS"}
    with pytest.raises(InputError, match="nothing to do: give a type or a topology"):
        model.quantize(None)


def test_values_that_are_not_finite_are_named(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = np.inf
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(InputError, match=r"bad: layers\.0\.mlp\.up_proj\.weight: values that are NaN"):
        jaxllm.load(tmp_path / "bad", quantize="q4_0", progress=False)


HIDDEN, INNER, VOCABULARY, LAYERS = 1024, 4096, 8000, 4
LARGEST = 4 * VOCABULARY * HIDDEN  # the embedding table as float32


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """70 million weights of zero, in a file that takes no space."""
    folder = tmp_path_factory.mktemp("large")
    config = (
        tiny_hf.COMMON | tiny_hf.LLAMA | {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCABULARY}
    )
    config |= {"num_attention_heads": 8, "head_dim": 128, "num_key_value_heads": 4, "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    shapes = {"embed_tokens": (VOCABULARY, HIDDEN), "norm": (HIDDEN,)}
    for at in (f"layers.{i}" for i in range(LAYERS)):
        shapes |= {f"{at}.self_attn.{n}_proj": (512 if n in "kv" else HIDDEN, HIDDEN) for n in "qkvo"}
        shapes |= {f"{at}.mlp.{n}_proj": (INNER, HIDDEN) for n in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (HIDDEN, INNER)}
        shapes |= {f"{at}.{n}_layernorm": (HIDDEN,) for n in ("input", "post_attention")}
    ends = np.cumsum([0, *(2 * math.prod(shape) for shape in shapes.values())]).tolist()
    header = {
        f"model.{name}.weight": {"dtype": "BF16", "shape": shape, "data_offsets": ends[i : i + 2]}
        for i, (name, shape) in enumerate(shapes.items())
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + ends[-1])
    return folder


STREAMED = {
    "loaded": (
        "made = jaxllm.load({source!r}, quantize='q8_0', progress=False).placed",
        "sum(p.encoded.nbytes for p in made)",
    ),
    "written": ("jaxllm.convert.convert({source!r}, {out!r}, to='q8_0', progress=False)", "0"),
}


@pytest.mark.parametrize("name", STREAMED)
def test_memory_is_bounded_while_quantizing(large, folders, tmp_path, name):
    """By what is placed, two of the largest matrix as floats, and 150 MB more than after a tiny model; the file has
    140 MB, and as floats it would be twice that."""
    action, placed = STREAMED[name]
    tiny, measured = (
        action.format(source=str(source), out=str(tmp_path / out))
        for source, out in ((folders["llama"], "tiny.gguf"), (large, "a.gguf"))
    )
    code = f"""if True:
        import pathlib, re, jaxllm.convert
        def memory(kind):
            return 1024 * int(re.search(kind + r":\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
        {tiny}
        before = memory("VmRSS")
        {measured}
        print(memory("VmHWM") - before, {placed})"""
    optimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # of so many weights, encoding takes longer than compiling
    done = Forked(code, environment=optimized).finished()
    assert done.returncode == 0, done.stderr
    more, nbytes = map(int, done.stdout.split())
    (tmp_path / "a.gguf").unlink(missing_ok=True)
    assert more < nbytes + 2 * LARGEST + 150e6
