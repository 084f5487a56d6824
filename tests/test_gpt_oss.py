"""GPT-OSS against transformers, from every layout of its weights, and its chat template."""

import json
import re
import shutil
from datetime import datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (safetensors reads bfloat16 with it)
import numpy as np
import pytest
from compiled import decode_steps, dequantized
from covering import in_turn, some
from flax import nnx
from hf_to_gguf import convert
from safetensors.numpy import load_file, save_file
from same_model import assert_same_parameters

import jaxllm
from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.kernels.cpu import library
from jaxllm.layers.experts import MoE, TopKRouter
from jaxllm.layers.mlp import ClampedSwiGLU
from jaxllm.layers.parameter import parameters
from jaxllm.models.gpt_oss.config import PRESETS, GptOssConfig
from jaxllm.models.gpt_oss.model import gpt_oss
from jaxllm.parallel import make_mesh
from jaxllm.placing import Source, place
from jaxllm.plan import collectives, dense, fill_with_shapes
from jaxllm.tokenizer import Tokenizer

CHECKPOINTS = Path(__file__).parent / "golden" / "gpt_oss"
NAMES = ("bf16", "mxfp4", "square", "square_gate_up")
# Experts of 96 are 3 blocks: over 2, 4 or 8 devices they are padded with blocks of zeros.
CASES = [*in_turn(NAMES, "tp=8", "tp=2,ep=4"), *(("mxfp4", mesh) for mesh in some(["tp=2", "tp=4", "ep=4"], []))]


def golden(name):
    return np.load(CHECKPOINTS / name / "golden.npz")


def check_logits(model, name):
    np.testing.assert_allclose(model.logits(golden(name)["tokens"]), golden(name)["logits"], atol=1e-3)


GENERATED = some(CASES, [("mxfp4", "tp=2,ep=4")])


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_logits_and_tokens_are_those_of_transformers(load_once, name, mesh):
    """How weights are read, decode steps do not know; and those with rings, test_cache has on another mesh."""
    model = load_once(CHECKPOINTS / name, mesh=mesh, dtype="float32", weights="packed")
    check_logits(model, name)
    if (name, mesh) in GENERATED:
        expected = golden(name)
        assert model.generate(expected["tokens"][0].tolist(), 12).tokens == expected["greedy"].tolist()


def test_decoded_once(load_once):
    made, packed = (load_once(CHECKPOINTS / "mxfp4", dtype="float32", weights=name) for name in ("float32", "packed"))
    assert not any(isinstance(p.weight, MXFP4) for p in made.placed)
    for p, q in zip(made.placed, packed.placed, strict=True):
        if isinstance(q.weight, MXFP4):
            np.testing.assert_array_equal(p.weight.values, dequantized(q.weight))


def test_experts_stay_packed(load_once):
    model = load_once(CHECKPOINTS / "mxfp4", mesh="tp=4", dtype="float32", weights="packed")
    packed = {p.name.split(".")[-1] for p in model.placed if isinstance(p.weight, MXFP4)}
    assert packed == {"gate_proj", "up_proj", "down_proj"}
    for p in model.placed:
        if isinstance(p.weight, MXFP4) and p.name.endswith("down_proj"):
            assert {s.data.shape for s in p.weight.blocks.addressable_shards} == {(4, 64, 16)}  # a block on each device
            assert {s.data.shape for s in p.weight.scales.addressable_shards} == {(4, 64, 1)}
    assert "MXFP4" in str(model.summary())


@pytest.mark.parametrize("mesh", some(["tp=2", "tp=2,ep=4"], ["tp=2,ep=4"]))
def test_a_block_sums_twice(load_once, mesh):
    model = load_once(CHECKPOINTS / "mxfp4", mesh=mesh, dtype="float32", weights="packed")
    model.generate(golden("mxfp4")["tokens"][0].tolist(), 12)  # as above, with the same programs
    [step] = decode_steps(model)
    assert collectives(step.as_text()) == {"all-reduce": 2 * 3 + 1, "all-gather": 1}


def test_the_older_spelling_of_a_config_means_the_same(tmp_path):
    shutil.copytree(CHECKPOINTS / "mxfp4", tmp_path / "old")
    shutil.move(tmp_path / "old" / "config_old.json", tmp_path / "old" / "config.json")
    assert open_checkpoint(tmp_path / "old").config == open_checkpoint(CHECKPOINTS / "mxfp4").config


@pytest.mark.parametrize(("name", "mesh"), in_turn(["bf16", "mxfp4"], "tp=1", "tp=2,ep=2"))
def test_gguf(load_once, tmp_path_factory, name, mesh):
    """With the ends of YaRN's ramp as they are. llama.cpp rounds them, which costs up to 0.5 of a logit here."""
    file = tmp_path_factory.getbasetemp() / f"gpt_oss_{name}.gguf"
    if not file.exists():
        convert(CHECKPOINTS / name, file)
    model = load_once(file, mesh=mesh, dtype="float32", weights="packed")
    check_logits(model, name)  # a decode step does not know which file the weights are from
    held = {p.source.format: type(p.weight) for p in model.placed}
    # The file's own bits, or, for kernels that want it so, in the order of the others.
    kind = MXFP4 if library.missing() else GGML
    assert held.get("MXFP4") is (kind if name == "mxfp4" else None)


# The same experts as others store them.


def rewritten(tmp_path, change, quantization):
    """A copy of the MXFP4 checkpoint with the tensors of every layer's experts as `change` makes them."""
    tensors = load_file(CHECKPOINTS / "mxfp4" / "model.safetensors")
    out = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for i in range(3):
        prefix = f"model.layers.{i}.mlp.experts."
        out |= change(prefix, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    config = json.loads((CHECKPOINTS / "mxfp4" / "config.json").read_text())
    del config["quantization_config"]
    save_file({name: np.ascontiguousarray(t) for name, t in out.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | quantization))
    return tmp_path


def apart(prefix, experts, blocks, scales, bytes_of):
    """Gate and up by themselves, blocks and scales under other names."""
    out = {}
    parts = {"gate_proj": ("gate_up_proj", slice(0, None, 2)), "up_proj": ("gate_up_proj", slice(1, None, 2))}
    for name, (source, rows) in (parts | {"down_proj": ("down_proj", slice(None))}).items():
        packed = np.ascontiguousarray(experts[f"{source}_blocks"][:, rows])
        out[f"{prefix}{name}{blocks}"] = bytes_of(packed.reshape(*packed.shape[:2], -1))
        out[f"{prefix}{name}{scales}"] = experts[f"{source}_scales"][:, rows]
        out[f"{prefix}{name}.bias"] = experts[f"{source}_bias"][:, rows]
    return out


LAYOUTS = {
    "generic": (".blocks", ".scales", lambda b: b, {"quantization_config": {"quant_method": "mxfp4"}}),
    "mlx": (
        ".weight",
        ".scales",
        lambda b: b.view(np.uint32),
        {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}},
    ),
    "compressed-tensors": (
        ".weight_packed",
        ".weight_scale",
        lambda b: b,
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "mxfp4-pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}},
            }
        },
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts(load_once, tmp_path, name):
    blocks, scales, bytes_of, config = LAYOUTS[name]
    path = rewritten(tmp_path, lambda p, e: apart(p, e, blocks, scales, bytes_of), config)
    model = load_once(path, mesh="tp=2", dtype="float32", weights="packed")
    assert sum(isinstance(p.weight, MXFP4) for p in model.placed) == 9
    assert_same_parameters(model, load_once(CHECKPOINTS / "mxfp4", mesh="tp=2", dtype="float32", weights="packed"))


def test_declared_mxfp4_but_plain(load_once, tmp_path):
    """As mistral.rs does: what is plain is taken as it is."""
    shutil.copytree(CHECKPOINTS / "bf16", tmp_path / "plain")
    config = json.loads((CHECKPOINTS / "bf16" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    model, expected = (load_once(path, dtype="float32") for path in (tmp_path / "plain", CHECKPOINTS / "bf16"))
    assert model.config == expected.config
    assert_same_parameters(model, expected)


E0 = "model.layers.0.mlp.experts."
DAMAGE = {
    "no scales": (
        lambda t, c: t.pop(E0 + "down_proj_scales"),
        "'model.layers.0.mlp.experts.down_proj_blocks' is there, but .*down_proj_scales' is missing",
    ),
    "no blocks": (lambda t, c: t.pop(E0 + "down_proj_blocks"), "unknown tensor '.*down_proj_scales'"),
    "scales of another size": (
        lambda t, c: t.update({E0 + "down_proj_scales": np.zeros((4, 64, 2), np.uint8)}),
        r"experts.down_proj': scales have shape \[4, 64, 2\], expected \[4, 64, 3\]: one for 32 values",
    ),
    "rows that are not whole blocks": (
        lambda t, c: t.update({E0 + "down_proj_blocks": np.zeros((4, 64, 24), np.uint8)}),
        "experts.down_proj': rows of 48 are not whole blocks of 32",
    ),
    "floats": (
        lambda t, c: t.update({E0 + "down_proj_blocks": np.zeros((4, 64, 3, 16), np.float32)}),
        "_blocks. is of float32, expected uint32 or uint8",
    ),
    "another number of experts": (
        lambda t, c: t.update({E0 + "down_proj_bias": np.zeros((3, 64), np.float32)}),
        r"tensor '.*down_proj_bias' has shape \[3, 64, 1\], expected \[4, 64, 1\]",
    ),
    "no sinks": (lambda t, c: t.pop("model.layers.1.self_attn.sinks"), "missing tensor for layers.1.self_attn.sinks"),
    "a kind of layer that is unknown": (
        lambda t, c: c.update(layer_types=["full_attention", "chunked_attention", "full_attention"]),
        "'layer_types' with 'chunked_attention' are not supported",
    ),
    "more chosen than there are": (lambda t, c: c.update(num_experts_per_tok=5), "'num_experts_per_tok' is 5"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_says_why(tmp_path, name):
    damage, message = DAMAGE[name]
    tensors = load_file(CHECKPOINTS / "mxfp4" / "model.safetensors")
    config = json.loads((CHECKPOINTS / "mxfp4" / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(jaxllm.InputError, match=message) as error:
        jaxllm.load(tmp_path, progress=False)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path))


# The published sizes.


@pytest.mark.parametrize("tp", some([2, 4, 8], [8]))
def test_the_published_width_over_any_number_of_devices(tp):
    """2880 is 90 blocks of 32, which do not divide over 4 or 8 devices."""
    hidden, width, experts, rng = 32, 2880, 4, np.random.default_rng(0)
    tensors = {
        name: np.asarray(rng.normal(size=shape), np.float32) / (shape[-1] ** 0.5 if shape[-1] > 1 else 1)
        for name, shape in {
            "gate.weight": (experts, hidden),
            "gate.bias": (experts,),
            "experts.gate_proj": (experts, width, hidden),
            "experts.up_proj": (experts, width, hidden),
            "experts.down_proj": (experts, hidden, width),
            "experts.gate_bias": (experts, width, 1),
            "experts.up_bias": (experts, width, 1),
            "experts.down_bias": (experts, hidden, 1),
        }.items()
    }

    stacks = {name: tensor for name, tensor in tensors.items() if name.endswith("proj")}
    encoded = jax.device_get(jax.jit(lambda stacks: {name: MXFP4.encoded(w) for name, w in stacks.items()})(stacks))

    def outputs(text):
        mesh = make_mesh(text)
        size = mesh.shape["tp"], mesh.shape["ep"]
        route, activation = TopKRouter(2, True), ClampedSwiGLU(1.702, 7.0)
        moe = MoE(hidden, experts, width, route, 32, *size, bias=True, activation=activation)
        for name, param in parameters(moe).items():
            source = encoded.get(name) or Dense(tensors[name])
            placed = place(Source(name, (source,)), param.get_value(), mesh)
            param.set_value(placed.values if len(param.get_value().shape) == 1 else placed)
        graph, state = nnx.split(moe)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(7, hidden)), jnp.float32)
        with jax.set_mesh(mesh):
            return np.asarray(jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, x))

    np.testing.assert_allclose(outputs(f"tp={tp}"), outputs("tp=1"), rtol=1e-4, atol=1e-5)


def as_published(name, shape):
    """The formats of gpt-oss-20b and -120b: experts in MXFP4, the rest in bfloat16."""
    if not re.search(r"experts\.(gate|up|down)_proj$", name):
        return dense(jnp.bfloat16)(name, shape)
    *lead, in_ = shape
    return MXFP4(*(jax.ShapeDtypeStruct((*lead, in_ // n), jnp.uint8) for n in (2, 32)))


# GiB of weights on each device: the table of docs/planning.md. Their model card says 12.8 and 60.8 for the whole.
GIB = {
    "20b": {"tp=1": 12.82, "tp=2": 6.41, "tp=4": 3.26, "tp=8": 1.69, "ep=8": 4.53, "tp=2,ep=4": 2.86},
    "120b": {"tp=1": 60.77, "tp=2": 30.41, "tp=4": 15.55, "tp=8": 8.11, "ep=8": 11.06, "tp=2,ep=4": 9.1},
}


@pytest.mark.parametrize("size", GIB)
def test_bytes_of_the_published_models(size):
    config = GptOssConfig.from_hf(PRESETS[f"gpt-oss-{size}"])
    expected = {text: GIB[size][text] for text in some([*GIB[size]], ["tp=1", "tp=8", "tp=2,ep=4"])}
    got = {}
    for text in expected:
        mesh = make_mesh(text)
        held = fill_with_shapes(gpt_oss(config, mesh, 32), mesh, as_published)
        got[text] = round(sum(held.values()) / 2**30, 2)
    assert got == expected


# Harmony, the models' chat format.

HARMONY = CHECKPOINTS / "harmony"


@pytest.fixture(scope="module")
def tokenizer():
    config, generation = (
        json.loads((HARMONY / f"{n}.json").read_text()) for n in ("tokenizer_config", "generation_config")
    )
    return Tokenizer.from_directory(HARMONY, config, generation["eos_token_id"])


def test_conversations_are_rendered_as_by_transformers(tokenizer, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls):
            return cls(2031, 7, 5)

    monkeypatch.setattr("jaxllm.tokenizer.chat.datetime", Clock)
    renderings = json.loads((HARMONY / "renderings.json").read_text())
    assert len(renderings) > 10
    for r in renderings:
        options = {"add_generation_prompt": False} | r["kwargs"]
        got = tokenizer.chat_template.render(r["messages"], **options)
        assert got == r["text"].replace("{DATE}", "2031-07-05")


def test_o200k_style_ids(tokenizer):
    for case in json.loads((HARMONY / "tokens.json").read_text()):
        assert tokenizer.encode(case["text"]) == case["ids"]


def test_an_answer_ends_after_its_last_channel(tokenizer):
    names = {tokenizer.backend.id_to_token(i) for i in tokenizer.eos_ids}
    assert names == {"<|return|>", "<|call|>", "<|endoftext|>"}  # not <|end|>, which ends a channel
