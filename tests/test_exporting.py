"""Models written as other checkpoints: the same logits, the same bits, and files that say what they are."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
import tiny_hf
from compiled import dequantized
from covering import some
from quantized_writers import write_safetensors
from safetensors.numpy import load_file
from same_model import assert_same_config, assert_same_parameters

import jaxllm
from jaxllm.checkpoint.exports import EXPORTS
from jaxllm.convert import convert
from jaxllm.errors import InputError
from jaxllm.exporting.target import target
from jaxllm.layers.parameter import parameters

GOLDEN = Path(__file__).parent / "golden"
TOKENS = np.array([[1, 5, 9, 2, 33, 7]])
OTHERS = ("granite", "smollm3", "olmo2", "glm4", "glm4_moe_groups")
SOURCES = {
    "phi3": GOLDEN / "checkpoints" / "phi3",
    "qwen2": GOLDEN / "checkpoints" / "qwen2",
    "mixtral": GOLDEN / "checkpoints" / "mixtral",
    "llama3_rope": GOLDEN / "checkpoints" / "llama3_rope",
    "gpt_oss": GOLDEN / "gpt_oss" / "bf16",
    "gemma3_text": GOLDEN / "checkpoints" / "gemma3_text",
    **{name: GOLDEN / "checkpoints" / name for name in OTHERS},
}
TINY = ("llama", "qwen3_moe", "deepseek")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exporting")
    few_shapes = {"num_key_value_heads": tiny_hf.HEADS, "vocab_size": 64}  # encoders are compiled for each
    return SOURCES | {name: tiny_hf.write(folder / name, name, **few_shapes) for name in TINY}


def load(path, **options):
    return jaxllm.load(path, dtype="float32", weights="packed", progress=False, **options)


def matrices(model):
    """Every parameter by name, dequantized, in the checkpoint's order."""
    return {
        name: p.declared.restore(dequantized(w) if hasattr(w := p.get_value(), "dequantize") else np.asarray(w))
        for name, p in parameters(model.model).items()
    }


def assert_near(model, expected):
    """Matrices of 8 or 4 bits for each number, in the checkpoint's order."""
    theirs = matrices(expected)
    for name, values in matrices(model).items():
        assert np.linalg.norm(values - theirs[name]) < 0.2 * np.linalg.norm(theirs[name]), name


# GGUF files hold Gemma's norms and DeepSeek's latents in another way than directories do.
OTHERWISE = ["gemma3_text", "deepseek"]
COMPUTED = some([*SOURCES, *TINY], OTHERWISE)


@pytest.mark.parametrize(
    "name", some([*SOURCES, *TINY], ["phi3", "gpt_oss", "gemma3_text", "qwen3_moe", "deepseek", "glm4_moe_groups"])
)
def test_to_gguf_and_back_is_the_same_model(load_once, sources, tmp_path, name):
    model = load_once(sources[name], dtype="float32", weights="packed")
    convert(sources[name], tmp_path / "a.gguf", to="float32", container="gguf", progress=False)
    there = load(tmp_path / "a.gguf")
    if name in COMPUTED:
        np.testing.assert_allclose(there.logits(TOKENS), model.logits(TOKENS), rtol=1e-4, atol=1e-4)
    else:  # the logits follow
        assert_same_parameters(there, model)
        assert_same_config(there.config, model.config)
    convert(tmp_path / "a.gguf", tmp_path / "b", to="float32", progress=False)
    back = load(tmp_path / "b")
    assert_same_parameters(back, model)
    assert back.config == model.config
    assert not [path for path in tmp_path.iterdir() if path.name not in ("a.gguf", "b")]


@pytest.mark.parametrize(
    ("name", "type"),
    [("llama", "q5_1"), ("qwen3_moe", "q4_0"), ("deepseek", "q8_0"), ("llama", "mxfp4"), ("phi3", "q4_k")],
)
def test_a_gguf_file_holds_what_quantizing_while_loading_makes(sources, tmp_path, name, type):
    plan = convert(sources[name], tmp_path / "a.gguf", to=type, container="gguf", progress=False)
    there = matrices(load(tmp_path / "a.gguf"))
    for path, values in matrices(load(sources[name], quantize=type)).items():
        if path.endswith("kv_b_proj.weight"):  # GGUF files have two stacks in its place
            assert path not in there
        else:
            np.testing.assert_array_equal(values, there[path], err_msg=path)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert all(types[row.name] == {"float16": "F16"}.get(row.result.format, row.result.format) for row in plan.rows)
    assert {kind for tensor, kind in types.items() if "norm" in tensor or "ffn_gate_inp" in tensor} == {"F32"}


HELD = ["fp8_block", "fp8", "int4", "int8", "mxfp4", "nf4", "nvfp4"]


@pytest.mark.parametrize(
    ("name", "type"), [("llama", t) for t in HELD] + [("qwen3_moe", "int4"), ("deepseek", "fp8_block")]
)
def test_a_directory_holds_what_quantizing_makes(load_once, sources, tmp_path, name, type):
    convert(sources[name], tmp_path / "a", to=type, progress=False)
    said = json.loads((tmp_path / "a" / "config.json").read_text())
    assert said["quantization_config"]["quant_method"]
    there, ours, plain = (
        matrices(model)
        for model in (
            load(tmp_path / "a"),
            load(sources[name], quantize=type),
            load_once(sources[name], dtype="float32", weights="packed"),
        )
    )
    kept = 0
    for path, values in there.items():
        expected = ours if path.startswith("layers.") else plain
        if np.array_equal(values, plain[path]):
            kept += 1
        np.testing.assert_allclose(values, expected[path], rtol=1e-6, err_msg=path)
    assert kept < len(there) / 2 + 3


def test_gpt_oss_has_its_experts_in_mxfp4(tmp_path):
    source = GOLDEN / "gpt_oss" / "square"
    convert(source, tmp_path / "a", to="mxfp4", progress=False)
    there = load(tmp_path / "a")
    formats = {p.source.format for p in there.placed if ".experts." in p.name and p.name.endswith("proj")}
    assert formats == {"MXFP4"}
    expected = matrices(load(source, quantize="mxfp4", organization="moqe"))
    for path, values in matrices(there).items():
        np.testing.assert_array_equal(values, expected[path], err_msg=path)


@pytest.mark.parametrize("type", some(["afq4", "afq8", "mxfp8"], ["afq8", "mxfp8"]))  # experts below are in afq4
def test_a_directory_of_mlx(load_once, sources, tmp_path, type):
    convert(sources["llama"], tmp_path / "a", to=type, container="mlx", progress=False)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization"]["bits"] == int(type[-1])
    assert_near(load(tmp_path / "a"), load_once(sources["llama"], dtype="float32", weights="packed"))


def test_what_is_in_its_type_already_keeps_its_bits(tmp_path):
    tiny_gguf.write(tmp_path / "a.gguf", tiny_gguf.Tiny())
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", to="q8_0", progress=False)
    before, after = ({t.name: t for t in gguf.GGUFReader(tmp_path / f).tensors} for f in ("a.gguf", "b.gguf"))
    assert before.keys() == after.keys()
    unchanged = [n for n, t in before.items() if t.tensor_type == after[n].tensor_type]
    assert unchanged
    for name in unchanged:
        np.testing.assert_array_equal(before[name].data, after[name].data)


def test_a_dry_run_writes_nothing_and_says_what_would_be(sources, tmp_path):
    plan = convert(sources["llama"], tmp_path / "a.gguf", to="q4_k", dry_run=True, progress=False)
    assert not list(tmp_path.iterdir())
    lines = str(plan).splitlines()
    assert lines[0].split() == ["matrix", "from", "to", "why", "bits"]
    assert any("rows of 64 are not whole blocks of 256 (q4_k)" in line and "Q5_0" in line for line in lines)
    assert lines[-1].endswith("bits per weight")


@pytest.mark.parametrize(
    ("to", "container", "found"),
    [
        ("Q4K", None, ("q4_k", "gguf")),
        (4, None, ("q4_k", "gguf")),
        ("afq4", None, ("afq4", "mlx")),
        ("mxfp4", None, ("mxfp4", "huggingface")),
        ("mxfp4", "gguf", ("mxfp4", "gguf")),
        ("bf16", "gguf", ("bfloat16", "gguf")),
        ("gptq4", None, ("gptq4", "huggingface")),
        ("hqq4", None, ("hqq4", "uqff")),
        ("q4k", "uqff", ("q4_k", "uqff")),
    ],
)
def test_the_container_of_a_type(to, container, found):
    assert target(to, container) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "hqq2"}, "no container holds hqq2"),
        ({"to": "q4_k", "container": "mlx"}, "mlx cannot hold q4_k; gguf, uqff can"),
        ({"to": "q4_k", "container": "onnx"}, "container 'onnx': choose one of huggingface, mlx, gguf, uqff"),
        ({"to": "gptq4"}, r"gptq4 calibrates on a text: give one \(--text\)"),
        ({"to": "int4", "text": "a"}, "text 'a': int4 is not calibrated"),
        ({"to": "q4_k", "organization": "moqe"}, "moqe: the model has no routed experts"),
    ],
)
def test_what_cannot_be_written(sources, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        convert(sources["llama"], tmp_path / "a", progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_shards_have_an_index(sources, tmp_path):
    convert(sources["llama"], tmp_path / "a", to="int8", max_shard_size="40KB", progress=False)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    there = {name: file.name for file in (tmp_path / "a").glob("*.safetensors") for name in load_file(file)}
    assert there == index
    assert len(set(index.values())) > 2


NAMED = ["phi3", "mixtral", "mixtral_transposed", "mixtral_stacked", "qwen3_moe", "odd"]


@pytest.mark.parametrize("name", some(NAMED, ["phi3", "mixtral", "mixtral_transposed"]))
def test_a_directory_keeps_the_names_of_its_source(tmp_path, name):
    source = GOLDEN / "checkpoints" / name
    convert(source, tmp_path / "a", to="float16", progress=False)
    before, after = ({n for file in p.glob("*.safetensors") for n in load_file(file)} for p in (source, tmp_path / "a"))
    assert after == before
    plan = convert(source, tmp_path / "b", to="int8", progress=False)
    assert {row.name for row in plan.rows} <= before
    assert_near(load(tmp_path / "b"), load(source))


EVERYWHERE = [(c, t) for c, t in EXPORTS if "gptq" not in t and t not in ("awq", "mxfp4_experts")]
FEW = [("huggingface", "fp8_block"), ("mlx", "afq4")]


@pytest.mark.parametrize(("container", "type"), some(EVERYWHERE, FEW))
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "deepseek"])
def test_every_directory_of_experts_is_read_again(load_once, sources, tmp_path, name, container, type):
    convert(sources[name], tmp_path / "a", to=type, container=container, progress=False)
    assert_near(load(tmp_path / "a"), load_once(sources[name], dtype="float32", weights="packed"))
    if container == "mlx" and name != "gpt_oss":
        assert any("switch_mlp" in n for n in load_file(tmp_path / "a" / "model.safetensors"))


def test_gptq_of_fused_matrices(tmp_path, monkeypatch):
    """Phi-3 has queries, keys and values in one tensor; each was calibrated on its own."""
    monkeypatch.setattr(jaxllm.convert, "text_chunks", lambda model, text: np.repeat(TOKENS, 4, axis=0))
    (tmp_path / "text").write_text("text")
    source = tiny_hf_of_64(tmp_path)
    plan = convert(source, tmp_path / "a", to="gptq4", text=tmp_path / "text", dry_run=True, progress=False)
    assert {row.result.format for row in plan.rows if ".layers." in row.name} == {"GPTQ 4-bit"}
    convert(source, tmp_path / "a", to="gptq4", text=tmp_path / "text", progress=False)
    assert_near(load(tmp_path / "a"), load(source))


def tiny_hf_of_64(folder):
    """The tiny Llama as Phi-3 has it."""
    llama = tiny_hf.write(folder / "llama", "llama")
    tensors, config = load_file(llama / "model.safetensors"), json.loads((llama / "config.json").read_text())
    at = "model.layers.0."
    fused = {
        f"{at}self_attn.qkv_proj.weight": [tensors.pop(f"{at}self_attn.{n}_proj.weight") for n in "qkv"],
        f"{at}mlp.gate_up_proj.weight": [tensors.pop(f"{at}mlp.{n}_proj.weight") for n in ("gate", "up")],
    }
    (folder / "phi3").mkdir()
    write_safetensors(folder / "phi3" / "model.safetensors", tensors | {n: np.concatenate(p) for n, p in fused.items()})
    (folder / "phi3" / "config.json").write_text(json.dumps(config | {"model_type": "phi3", "pad_token_id": 0}))
    return folder / "phi3"


def test_a_value_beyond_float16_is_named(sources, tmp_path):
    shutil.copytree(sources["llama"], tmp_path / "big")
    tensors = load_file(tmp_path / "big" / "model.safetensors")
    wrong = (1e6, "float16", "up_proj.weight: values over 65504"), (np.nan, "q8_0", "ffn_up.weight: .*NaN")
    for value, to, message in wrong:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = value
        write_safetensors(tmp_path / "big" / "model.safetensors", tensors)
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "big", tmp_path / "a", to=to, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["big"]
