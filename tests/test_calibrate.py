"""Calibrating: importance matrices of a model, and GPTQ and AWQ layer by layer."""

import re
import struct

import covering
import gguf
import numpy as np
import pytest
import tiny_chat
import tiny_hf

import jaxllm
from jaxllm.calibrated import common_group, with_awq, with_gptq
from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.cli import main
from jaxllm.errors import InputError
from jaxllm.formats.rtn import rtn
from jaxllm.imatrix import importance_for, named, parameter_shapes
from jaxllm.importance import read_importance, write_cimatrix, write_gguf
from jaxllm.layers.held import dequantized
from jaxllm.layers.parameter import parameters
from jaxllm.models.family import GGUF, HUGGING_FACE
from jaxllm.placing import Source, place
from jaxllm.programs import Programs
from jaxllm.tracking import Statistics

TOKENS = np.random.default_rng(5).integers(0, 96, (6, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrating")
    return {name: tiny_hf.write(folder / name, name) for name in ("llama", "qwen3_moe")}


def some(shapes):
    """Statistics for each matrix of the blocks, all different."""
    made = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if name.startswith("layers.") and len(shape) > 1 and "mlp.gate.weight" not in name:
            lead = shape[:-2]
            squares = np.arange(1, 1 + np.prod((*lead, shape[-1])), dtype=np.float32).reshape(*lead, shape[-1]) + i
            made[name] = Statistics(squares, np.full(lead, 3 + i, np.int64))
    return made


@pytest.mark.parametrize("form", ["gguf", "cimatrix", "positions", "as it is"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_an_importance_matrix_comes_back_by_parameter(folders, tmp_path, name, form):
    checkpoint = open_checkpoint(folders[name])
    known = some(parameter_shapes(checkpoint))
    path = tmp_path / "matrix"
    if form == "gguf":
        write_gguf(path, named(known, checkpoint, GGUF), ["text"], 1, 16)
        assert "blk.0.attn_q.weight.in_sum2" in {t.name for t in gguf.GGUFReader(path).tensors}
    elif form == "cimatrix":
        entries = named(known, checkpoint, HUGGING_FACE)
        write_cimatrix(path, {n.removesuffix(".weight"): s for n, s in entries.items()})
        assert "model.layers.0.self_attn.q_proj" in read_importance(path)
    elif form == "positions":
        order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        rows = {p.split(".")[-2]: s for p, s in known.items()}
        data = struct.pack("<Q", 8) + struct.pack("<QB", 0, 0)
        for i, module in enumerate(order, 1):
            values = rows[module].importance if module in rows else np.ones(64, np.float32)
            data += struct.pack("<QBQ", i, 1, values.size) + values.astype("<f4").tobytes()
        path.write_bytes(data)
    given = known if form == "as it is" else path
    if form == "positions" and name == "qwen3_moe":
        with pytest.raises(InputError, match="matrix: it numbers its layers, .*without experts only"):
            importance_for(given, checkpoint)
        return
    found = importance_for(given, checkpoint)
    assert found.keys() == known.keys()
    for path_, statistics in known.items():
        np.testing.assert_allclose(found[path_].importance, statistics.importance, rtol=1e-6, err_msg=path_)


def test_an_importance_matrix_of_another_model_is_refused_with_every_mismatch(folders, tmp_path):
    checkpoint = open_checkpoint(folders["llama"])
    ones = Statistics(np.ones(7, np.float32), np.int64(1))
    write_gguf(tmp_path / "a.gguf", dict.fromkeys(["blk.7.attn_q.weight", "blk.0.no_such.weight"], ones), ["t"], 1, 1)
    with pytest.raises(
        InputError, match=r"a\.gguf: 'blk.0.no_such.weight' has no.*; 'blk.7.attn_q.weight' has no place"
    ):
        importance_for(tmp_path / "a.gguf", checkpoint)
    write_gguf(tmp_path / "b.gguf", dict.fromkeys(["blk.0.attn_q.weight", "blk.0.attn_v.weight"], ones), ["t"], 1, 1)
    with pytest.raises(
        InputError, match=r"another model: layers.0.self_attn.q_proj.weight is .*; layers.0.self_attn.v_"
    ):
        importance_for(tmp_path / "b.gguf", checkpoint)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A tiny model with a tokenizer."""
    return tiny_chat.write_chat(tmp_path_factory.mktemp("calibrate") / "model.gguf")


def test_the_command_writes_what_loading_reads(talker, tmp_path, capsys):
    (tmp_path / "text").write_text("The sea is wide, and the boat is small. " * 12, encoding="utf-8")
    for out in ("a.gguf", "a.cimatrix"):
        options = ["--model", str(talker), "--text", str(tmp_path / "text"), "--chunk", "32", "--chunks", "2"]
        assert main(["calibrate", *options, "--out", str(tmp_path / out)]) == 0
        assert capsys.readouterr().err.splitlines()[-1] == f"{tmp_path / out}: 14 matrices, 64 tokens"
    first, second = (read_importance(tmp_path / out) for out in ("a.gguf", "a.cimatrix"))
    assert first["blk.1.ffn_down.weight"].counts == 64
    np.testing.assert_allclose(
        first["blk.1.ffn_down.weight"].importance, second["model.layers.1.mlp.down_proj"].importance, rtol=1e-6
    )
    plain, helped = (
        jaxllm.load(talker, quantize="q4_1", imatrix=imatrix, progress=False).placed
        for imatrix in (None, tmp_path / "a.gguf")
    )
    differ = [
        p.name
        for p, q in zip(plain, helped, strict=True)
        if len(p.declaration.shape) > 1 and not np.array_equal(p.weight.leaf("blocks"), q.weight.leaf("blocks"))
    ]
    assert len(differ) == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "a.txt"], r"a\.txt: name it \.gguf"),
        (["--out", "b/a.gguf"], "b is not a directory"),
        (
            ["--out", "a.gguf", "--chunk", "40000"],
            "chunk 40000, chunks None: must be 1 or above, and a chunk at most 1024",
        ),
        (["--out", "a.gguf", "--text", "none"], "none: .*No such file"),
        (["--out", "a.gguf"], "a text of 16 tokens is shorter than a chunk of 512"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line_and_exit_code_2(talker, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("The sea is wide.")
    assert main(["calibrate", "--model", str(talker), "--text", "text", *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["text"]


def error(model, expected):
    return float(np.square(np.asarray(model.logits(TOKENS)) - expected).mean())


@pytest.mark.parametrize(
    ("name", "mesh"), covering.some([("llama", ""), ("qwen3_moe", "tp=2,ep=2")], [("qwen3_moe", "tp=2,ep=2")])
)
def test_gptq_is_better_than_rounding_on_what_it_is_calibrated_on(folders, name, mesh):
    options = {"dtype": "float32", "weights": "packed", "mesh": mesh, "progress": False}
    model = jaxllm.load(folders[name], **options)
    expected = np.asarray(model.logits(TOKENS))
    held = {path: param for path, param in parameters(model.model).items() if len(param.declared.shape) > 1}
    plain = {path: np.asarray(dequantized(param)) for path, param in held.items()}
    made = with_gptq(model, TOKENS, 4, common_group(parameter_shapes(open_checkpoint(folders[name]))), True).made
    matrices = {p.name for p in model.placed if p.name.startswith("layers.") and len(p.declaration.shape) > 1}
    assert made.keys() == {n for n in matrices if not n.endswith("mlp.gate.weight")}
    assert {weight.format for weight in made.values()} == {"GPTQ 4-bit"}
    model.programs = Programs(model.model, model.mesh, model.dtype)
    calibrated = error(model, expected)
    for path, param in parameters(model.model).items():
        if path in made:
            w = plain[path]
            parts = tuple(rtn(m, 4, 64, True) for m in w.reshape(-1, *w.shape[-2:]))
            param.set_value(place(Source(path, parts, stacked=w.ndim == 3), param.declared, model.mesh))
    model.programs.refresh()
    assert calibrated < 0.8 * error(model, expected)


def test_awq_folds_its_factors_into_norms_and_rows(folders):
    model = jaxllm.load(folders["llama"], dtype="float32", weights="packed", progress=False)
    expected = np.asarray(model.logits(TOKENS))
    result = with_awq(model, TOKENS, 64)
    assert result.changed.keys() == {f"layers.0.{n}_layernorm.weight" for n in ("input", "post_attention")}
    model.programs = Programs(model.model, model.mesh, model.dtype)
    assert error(model, expected) < 0.08 * np.square(expected).mean()  # 4 bits; factors that do not cancel give 1


def test_awq_is_refused_where_no_norm_can_take_it_up(folders):
    model = jaxllm.load(folders["qwen3_moe"], dtype="float32", weights="packed", progress=False)
    with pytest.raises(InputError, match="AWQ is for dense models like Llama, whose layers do not have mlp.experts"):
        with_awq(model, TOKENS, 64)
