"""Gemma 3n and its MatFormer slices, against transformers' logits and tokens for the same weights and slice."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled import dequantized
from covering import in_turn, some
from hf_to_gguf import convert as as_gguf
from quantized_writers import write_safetensors
from safetensors.numpy import load_file
from same_model import assert_same_parameters

import jaxllm
from jaxllm.checkpoint.matformer import sliced
from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.cli import main
from jaxllm.convert import convert
from jaxllm.errors import InputError
from jaxllm.formats.dense import Dense
from jaxllm.models.gemma3n.config import PRESETS, Gemma3nConfig
from jaxllm.requantize import quantize

FOLDER = Path(__file__).parent / "golden" / "checkpoints" / "gemma3n"
CSV = FOLDER / "matformer.csv"
GOLDEN = np.load(FOLDER / "golden.npz")
MESHES = some([f"tp={n}" for n in range(1, 9)], ["tp=3"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The checkpoint as a Hugging Face directory and as a GGUF file."""
    file = tmp_path_factory.mktemp("gguf") / "gemma3n.gguf"
    as_gguf(FOLDER, file)
    return {"hf": FOLDER, "gguf": file}


def check(model, what="logits", tokens="tokens"):
    np.testing.assert_allclose(model.logits(GOLDEN[tokens]), GOLDEN[what], atol=1e-3)


def assert_same(model, other):
    assert model.config == other.config
    assert_same_parameters(model, other)


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_on_meshes(load_once, mesh):
    """The sparse gates' statistics are of all devices; tp=3 pads their width of 40."""
    check(load_once(FOLDER, mesh=mesh, dtype="float32"))


def test_prompts_in_chunks_and_steps(load_once, monkeypatch):
    """Layers that share a cache find there what other chunks wrote, while others with a window keep only that."""
    monkeypatch.setattr("jaxllm.decoding.CHUNK", 16)
    monkeypatch.setattr("jaxllm.layers.cache.REWIND", 0)
    model = load_once(FOLDER, dtype="float32")
    prompts = [GOLDEN["tokens"][0].tolist(), GOLDEN["tokens"][1, :5].tolist()]
    assert model.generate(prompts, 12)[0].tokens == GOLDEN["greedy"].tolist()


def test_ids_beyond_the_table_of_per_layer_embeddings(load_once):
    assert (GOLDEN["tokens_beyond"] >= 60).any()
    check(load_once(FOLDER, mesh="tp=3", dtype="float32"), "logits_beyond", "tokens_beyond")


def test_the_published_layout(load_once, tmp_path):
    """Text beside vision and audio, keys and values that no layer uses, and a config.json of transformers 4."""
    config = json.loads((FOLDER / "config.json").read_text())
    ropes = config.pop("rope_parameters")
    config["rope_theta"] = ropes["full_attention"]["rope_theta"]
    config["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": config}))
    tensors = load_file(FOLDER / "model.safetensors")
    tensors |= {
        f"model.layers.{i}.self_attn.{p}_proj.weight": np.ones((32, 32), np.float16) for i in (4, 5) for p in "kv"
    }
    tensors |= {f"model.layers.{i}.self_attn.k_norm.weight": np.ones(16, np.float16) for i in (4, 5)}
    tensors = {name.replace("model.", "model.language_model.", 1): x for name, x in tensors.items()}
    tensors |= {f"model.{name}.weight": np.ones(2, np.float16) for name in ("vision_tower.a.b", "embed_audio.norm")}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert_same(load_once(tmp_path, dtype="float32"), load_once(FOLDER, dtype="float32"))


def test_written_as_a_directory(load_once, files, tmp_path):
    convert(files["gguf"], tmp_path / "out", to="float32", container="huggingface", progress=False)
    model, expected = (load_once(path, dtype="float32") for path in (tmp_path / "out", files["gguf"]))
    assert_same_parameters(model, expected)
    said, given = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", FOLDER))
    assert {key: given[key] for key in given.keys() & said.keys() - {"architectures", "dtype"}}.items() <= {
        **said,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "vocab_size_per_layer_input": 60,  # the GGUF file's table is longer
    }.items()
    with pytest.raises(InputError, match="models like Gemma 3n cannot be written from GGUF files as GGUF files"):
        convert(files["gguf"], tmp_path / "x.gguf", to="q8_0", progress=False)


def test_statistics_are_of_real_tokens(load_once):
    """A prompt of five tokens is padded; its padding counts neither inside layers nor before them."""
    model = load_once(FOLDER, dtype="float32")
    model.begin_track_stats()
    model.logits(GOLDEN["tokens"][:1, :5])
    stats = model.end_track_stats()
    for name in ("ends.per_layer_model_projection.weight", "layers.4.self_attn.q_proj.weight"):
        assert stats[name].counts == 5, name


@pytest.mark.parametrize(("kind", "mesh"), in_turn(["hf", "gguf"], "tp=3", "tp=2"))
def test_a_slice_is_transformers_slice(load_once, files, kind, mesh):
    check(load_once(files[kind], mesh=mesh, dtype="float32", matformer=(CSV, "small")), "logits_sliced")


def test_a_slice_of_everything_is_the_model(load_once):
    assert_same(load_once(FOLDER, dtype="float32", matformer=(CSV, "all")), load_once(FOLDER, dtype="float32"))


@pytest.mark.parametrize("kind", some(["hf", "gguf"], ["gguf"]))
def test_a_slice_is_written(load_once, files, tmp_path, kind):
    arguments = [str(files[kind]), str(tmp_path / "out"), "--to", "float32", "--container", "huggingface"]
    assert main(["convert", *arguments, "--matformer", f"{CSV}:small"]) == 0
    model = load_once(tmp_path / "out", dtype="float32")
    assert_same_parameters(model, load_once(files[kind], dtype="float32", matformer=(CSV, "small")))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_kv_shared_layers"]) == ([48, 32, 32, 24], 1)


def test_the_published_e2b_is_a_slice_of_e4b(tmp_path):
    """The line is mistral.rs's."""
    whole, small = (Gemma3nConfig.from_hf(PRESETS[f"gemma-3n-{size}"]) for size in ("e4b", "e2b"))
    widths, file = ", ".join(["2_048 * 4"] * 30), tmp_path / "gemma3n.csv"
    file.write_text(HEADER + f'Config for official E2B Model,30,1.91,50.90%,"[{widths}]","[20, 21, 22, 23, 24]"\n')
    checkpoint = replace(open_checkpoint(FOLDER), config=whole, tensors={})
    assert sliced(checkpoint, file, "Config for official E2B Model").config == small


def test_a_slice_is_asked_for_on_the_command_line(monkeypatch):
    """What is loaded then answers as the tests above say."""
    asked = []
    monkeypatch.setattr("jaxllm.generate.load", lambda path, **options: asked.append(options) or sys.exit(3))
    with pytest.raises(SystemExit):
        main(["generate", "--model", str(FOLDER), "--prompt-ids", "1,2,3", "--matformer", f"{CSV}:small"])
    assert [(Path(file), name) for file, name in [options["matformer"] for options in asked]] == [(CSV, "small")]


def changed(**tensors):
    """The checkpoint with other tensors in layer 2, which a slice keeps 32 of 40 columns of."""
    checkpoint = open_checkpoint(FOLDER)
    made = {f"model.layers.2.mlp.{name}.weight": weight for name, weight in tensors.items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **made})


@pytest.mark.parametrize("type", ["q8_0", "afq4", "nf4", "fp8_block"])
def test_complete_blocks_of_packed_matrices_are_kept(type):
    rng = np.random.default_rng(3)
    shapes = (40, 64), (64, 64)
    gate, down = (jax.tree.map(np.asarray, quantize(rng.normal(size=shape), type)) for shape in shapes)
    tensors = sliced(changed(gate_proj=gate, down_proj=down), CSV, "small").tensors
    for name, whole, rows, cols in (("gate_proj", gate, 32, None), ("down_proj", down, None, 32)):
        weight = tensors[f"model.layers.1.mlp.{name}.weight"]
        np.testing.assert_array_equal(dequantized(jax.tree.map(np.asarray, weight)), dequantized(whole)[:rows, :cols])


def test_blocks_are_not_split():
    down = quantize(np.ones((32, 256), np.float32), "q4_k")
    message = r"gemma3n: tensor '.*\.2\.mlp\.down_proj\.weight': 32 of its 256 columns .* in Q4_K: .* blocks of 256"
    with pytest.raises(InputError, match=message):
        sliced(changed(down_proj=down), CSV, "small")


def test_a_tensor_that_is_too_small_is_named():
    with pytest.raises(InputError, match=r"'model.layers.2.mlp.gate_proj.weight' has 16 rows, but the slice wants"):
        sliced(changed(gate_proj=Dense(np.ones((16, 32), np.float32))), CSV, "small")


HEADER = "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
REFUSED = {  # the file, and what is said
    "another slice": (CSV.read_text(), "no slice 's'; it has 'all', 'small'"),
    "no slice": (HEADER, "no slice 's'; it has none"),
    "nothing": ("", "no column 'name'; the columns of such a file are name, # Layers"),
    "a column too few": ("name,FFN Hidden Dims\ns,[1]\n", "no column 'Layers Skipped'"),
    "a column too many": (HEADER.replace("name", "name,seed"), "an unknown column 'seed'"),
    "bytes": (b"\xff\xfe\x00", "not a CSV file"),
    "words": (HEADER + "s,6,1,1,many,\n", "'FFN Hidden Dims' is 'many', not a list such as"),
    "a hole": (HEADER + 's,6,1,1,"[48, , 48]",\n', r"'FFN Hidden Dims' is '\[48, , 48\]', not a list"),
    "nothing there": (HEADER + "s,6\n", "'FFN Hidden Dims' is None, not a list"),
    "a width too few": (HEADER + 's,6,1,1,"[48, 48]",\n', "'FFN Hidden Dims' has 2 numbers for 6 layers"),
    "a width for none": (HEADER + f's,5,1,1,"{[48] * 6}",[0]\n', "'FFN Hidden Dims' has 6 numbers for 5 layers"),
    "a width too large": (
        HEADER + f's,6,1,1,"{[48] * 6}",\n',
        "layer 2: its feed-forward block is 40 wide, so that 48",
    ),
    "no width": (HEADER + 's,6,1,1,"[8, 8, 0, 8, 8, 8]",\n', "layer 2: its feed-forward block is 40 wide, so that 0"),
    "a layer too many": (HEADER + f's,6,1,1,"{[48] * 6}",[6]\n', "skips layer 6, but the model has 6 layers"),
    "no layer": (HEADER + 's,0,1,1,[],"[0, 1, 2, 3, 4, 5]"\n', "slice 's' skips all layers"),
    "keys that others read": (HEADER + f's,5,1,1,"{[24] * 5}",[3]\n', "layer 3 cannot be skipped: layer 5 reads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_without_the_slice_is_refused(tmp_path, name):
    text, message = REFUSED[name]
    file = tmp_path / "slices.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as error:
        sliced(open_checkpoint(FOLDER), file, "s")
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_other_refusals(tmp_path, capsys):
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / 'x.csv'))}: No such file"):
        jaxllm.load(FOLDER, matformer=(tmp_path / "x.csv", "small"))
    with pytest.raises(InputError, match="'small' means nothing for models like Llama, only for Gemma 3n"):
        jaxllm.load(FOLDER.parent / "llama", matformer=(CSV, "small"))
    assert main(["generate", "--model", "demo", "--prompt", "x", "--matformer", "small"]) == 2
    assert "--matformer: 'small' is not CSV:SLICE, a file and the name" in capsys.readouterr().err
    with pytest.raises(InputError, match="matformer 'small': 'demo' changes no model"):
        convert(FOLDER, tmp_path / "out", to="demo", model_parallel=1, matformer=(CSV, "small"))


def test_what_is_too_narrow_for_a_type_stays_plain(tmp_path):
    """Also tables, which get the general type in MLX's directories: those by layer have rows of 48."""
    plan = convert(FOLDER, tmp_path / "made", to="afq8", dry_run=True, progress=False)
    types = {row.name: row.result.format for row in plan.rows}
    assert types["model.embed_tokens_per_layer.weight"] == "float16"
    assert types["model.embed_tokens.weight"] == "MLX 8-bit"
