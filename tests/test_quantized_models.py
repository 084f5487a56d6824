"""Whole models in every prequantized format: the logits of their dequantized twins, on 1 and 8 devices."""

import re

import numpy as np
import pytest
import tiny_hf
from covering import in_turn, some
from quantized_writers import FORMATS, quantized_checkpoint, read_safetensors, write_safetensors

import jaxllm

TOKENS = np.random.default_rng(0).integers(0, tiny_hf.VOCAB, (1, 12)).astype(np.int32)
# Words of three-bit codes do not fit 80 rows, which DeepSeek's latents with their rotary keys have.
UNFIT = {("deepseek", "gptq-3")}
# One of each way in which names and shapes of tensors differ. What else config.json can say, and numbers of bits,
# test_quantized_layers has of every format.
FEW = ["gptq-3", "gptq-act-order", "awq", "bnb-nf4-nested", "mlx-4", "hqq-4-axis0", "fp8-tensor", "fp8-block"]
FEW += ["nvfp4-modelopt", "ct-pack-4-asym", "ct-fp8-block", "ct-nvfp4", "mxfp4"]
FEW = [name for name in FORMATS if name in FEW]
# DeepSeek has twice the layers, but no other names.
TURNS = some(in_turn(FORMATS, *tiny_hf.MODELS), in_turn(FEW, "llama", "qwen3_moe", "deepseek", "llama", "qwen3_moe"))
CASES = [(model, name) for name, model in TURNS if (model, name) not in UNFIT]
MESHES = {"llama": ("tp=1", "tp=8"), "qwen3_moe": ("tp=1", "tp=2,ep=4"), "deepseek": ("tp=1", "tp=2,ep=4")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return {name: tiny_hf.write(folder / name, name) for name in tiny_hf.MODELS}


@pytest.fixture(scope="module")
def logits_of():
    """Logits of dequantized checkpoints. Those of a model differ in nothing but numbers: its programs do for all."""
    models = {}

    def logits(model, path):
        loaded = jaxllm.load(path, dtype="float32", progress=False)
        compiled = models.setdefault(model, loaded)
        compiled.programs.leaves = loaded.programs.leaves
        return np.asarray(compiled.logits(TOKENS))

    return logits


@pytest.mark.parametrize(("model", "name"), CASES)
def test_logits_are_those_of_the_dequantized_model(load_once, plain, logits_of, tmp_path, model, name):
    packed, twin = quantized_checkpoint(plain[model], tmp_path, name, np.random.default_rng(1))
    expected = logits_of(model, twin)
    # One device alone is what test_quantized_layers has for every format.
    for mesh in some(MESHES[model], MESHES[model][1:]):
        loaded = load_once(packed, mesh=mesh, dtype="float32", weights="packed")
        formats = {p.weight.format for p in loaded.placed if p.name.endswith("down_proj") or "_proj." in p.name}
        assert not any(f.startswith(("float", "bfloat")) for f in formats), formats
        np.testing.assert_allclose(loaded.logits(TOKENS), expected, atol=1e-3)


ROUNDED = {"fp8-static": "fp8", "ct-fp8": "fp8", "fp8-tensor": "fp8", "ct-int8": "int8", "bnb-int8": "int8"}
FEW_ROUNDED = ["fp8-static", "ct-int8", "bnb-int8"]  # with a scale that is given, for all rows; and made, for each row


@pytest.mark.parametrize(("name", "model"), in_turn(some([*ROUNDED], FEW_ROUNDED), "llama", "qwen3_moe"))
def test_activations_are_rounded_alike_on_any_mesh(load_once, plain, logits_of, tmp_path, model, name):
    """A row's scale is that of the whole row, wherever its parts lie."""
    packed, twin = quantized_checkpoint(plain[model], tmp_path, name, np.random.default_rng(1))

    def logits(**options):
        return np.asarray(load_once(packed, dtype="float32", **options).logits(TOKENS))

    as_they_are, one = logits_of(model, twin), logits(mesh="tp=1", matmul=ROUNDED[name])
    assert np.abs(as_they_are - one).max() > 1e-3
    np.testing.assert_allclose(as_they_are, one, atol=1.0)
    many = logits(mesh=MESHES[model][1], matmul=ROUNDED[name])
    # A value at a rounding border may fall on either side, as sums are taken in another order.
    assert np.quantile(np.abs(many - one), 0.5) < 1e-3
    np.testing.assert_allclose(many, one, atol=0.1)


def restacked(names):
    """A checkpoint's experts as stacks `experts.gate_proj` and so on, which mistral.rs reads, and MXFP4's parts too."""
    stacks = {}
    for key, value in names.items():
        module, dot, expert, rest = re.fullmatch(r"(.*?)(\.experts\.)(\d+)\.(.*)", key).groups()
        stacks.setdefault(f"{module}.experts.{rest}", {})[int(expert)] = value
    return {key: np.stack([parts[e] for e in sorted(parts)]) for key, parts in stacks.items()}


@pytest.mark.parametrize(("name", "model"), in_turn(["mxfp4", "mlx-4"], "qwen3_moe", "deepseek"))
def test_stacks_of_experts_by_mistral_rs_names(load_once, plain, logits_of, tmp_path, model, name):
    packed, twin = quantized_checkpoint(plain[model], tmp_path, name, np.random.default_rng(1))
    tensors = read_safetensors(packed / "model.safetensors")[0]
    if name == "mxfp4":
        single = {key: value for key, value in tensors.items() if re.search(r"\.experts\.\d+\.", key)}
        tensors = {key: value for key, value in tensors.items() if key not in single} | restacked(single)
    else:  # MLX stacks them already, under another name
        tensors = {key.replace("switch_mlp", "experts"): value for key, value in tensors.items()}
    assert any(re.search(r"\.experts\.gate_proj\.", key) for key in tensors)
    write_safetensors(packed / "model.safetensors", tensors)
    expected = logits_of(model, twin)
    got = load_once(packed, mesh=MESHES[model][1], dtype="float32", weights="packed").logits(TOKENS)
    np.testing.assert_allclose(got, expected, atol=1e-3)
