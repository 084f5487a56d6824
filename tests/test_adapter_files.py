"""Files of adapters: what each changes, against peft's own products of A and B; and files that cannot be read."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from hf_to_gguf import neighbours
from quantized_writers import write_safetensors
from safetensors.numpy import load_file

from jaxllm.checkpoint.adapter_files import read_adapter
from jaxllm.errors import InputError

ADAPTERS = Path(__file__).parent / "golden" / "adapters"
NAMES = sorted(path.name for path in ADAPTERS.iterdir() if (path / "adapter_model.safetensors").is_file())


def delta(change):
    """What is added, in numpy, float64."""
    a, b, scale = (np.asarray(leaf, np.float64) for leaf in (change.a, change.b, change.scale))
    return b * scale[..., None, :] @ a


def expected(name):
    """For each tensor, what peft adds to it, as one number; see tests/reference/adapter_goldens.py."""
    with np.load(ADAPTERS / name / "golden.npz") as golden:
        return {key.removeprefix("delta:"): golden[key] for key in golden.files if key.startswith("delta:")}


def summed(values):
    return values.ravel() @ np.cos(np.arange(values.size))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "each_expert"])
def test_peft_changes_what_peft_itself_changes(name):
    file, want = read_adapter(ADAPTERS / name), expected(name)
    assert file.changes.keys() == want.keys()
    for key, change in file.changes.items():
        np.testing.assert_allclose(summed(delta(change)), want[key], atol=1e-5, err_msg=key)


def test_experts_one_by_one_are_the_stacks_that_peft_makes_of_them():
    changes, want = dict(read_adapter(ADAPTERS / "each_expert").changes), expected("each_expert")
    for layer in range(2):
        block, found = f"model.layers.{layer}.block_sparse_moe.experts", {}
        for part in ("w1", "w2", "w3"):
            found[part] = np.stack([delta(changes.pop(f"{block}.{e}.{part}.weight")) for e in range(4)])
        stacks = {"gate_up": np.concatenate([found["w1"], found["w3"]], 1), "down": found["w2"]}
        for part, stack in stacks.items():
            got = want[f"model.layers.{layer}.mlp.experts.{part}_proj"]
            np.testing.assert_allclose(summed(stack), got, atol=1e-5)
    assert sorted(changes) == [f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2)]


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("biases", [f"model.layers.{i}.self_attn.{part}_proj.bias" for i in range(2) for part in "kq"]),
        ("modules", ["lm_head.weight", *(f"model.layers.{i}.self_attn.q_norm.weight" for i in range(2))]),
        ("ends", []),  # its tables are the base's own, unchanged
    ],
)
def test_tensors_trained_as_a_whole_are_as_stored(name, replaced):
    stored = load_file(ADAPTERS / name / "adapter_model.safetensors")
    got = read_adapter(ADAPTERS / name).replaced
    assert sorted(got) == replaced
    for key, values in got.items():
        module, _, leaf = key.rpartition(".")
        twins = [f"base_model.model.{module}{inner}.{leaf}" for inner in ("", ".base_layer")]
        assert any(twin in stored and np.array_equal(values, stored[twin]) for twin in twins), key


@pytest.mark.parametrize("name", ["second", "ends"])
def test_gguf_changes_what_it_was_converted_from(name):
    file, source = read_adapter(ADAPTERS / "gguf" / f"{name}.gguf"), read_adapter(ADAPTERS / name).changes
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert (file.name, file.kind, file.dialect, file.replaced) == (name, "llama", "GGUF", {})
    assert len(file.changes) == len(source)
    for key, change in source.items():
        values = delta(change)
        values = neighbours(values, 4) if "q_proj" in key else values
        np.testing.assert_allclose(delta(file.changes[names.get_name(key, (".weight",))]), values, atol=1e-6)


@pytest.mark.parametrize("name", ["ends", "experts"])
def test_mlx_changes_are_as_it_fuses_them(name):
    """`fuse` of `mlx_lm/tuner/lora.py`, once more."""
    stored = load_file(ADAPTERS / "mlx" / name / "adapters.safetensors")
    changes = read_adapter(ADAPTERS / "mlx" / name).changes
    assert 2 * len(changes) == len(stored)
    for key, change in changes.items():
        a, b = (stored[key.removesuffix("weight") + f"lora_{side}"].astype(np.float64) for side in "ab")
        fused = b @ a if a.ndim == 3 else a @ b if "embed_tokens" in key else b.T @ a.T
        np.testing.assert_allclose(delta(change), 5.0 * fused, atol=1e-6)


def write_gguf(path, tensors, *, type="adapter", alpha=8.0, kind="lora", q8=()):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", type)
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, values in tensors.items():
        q8_0 = gguf.GGMLQuantizationType.Q8_0
        if name in q8:
            writer.add_tensor(name, gguf.quants.quantize(values, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_gguf_stacks_norms_blocks_and_no_alpha(tmp_path):
    tensors = {
        "blk.0.ffn_up_exps.weight.lora_a": random(3, 2, 32),
        "blk.0.ffn_up_exps.weight.lora_b": random(3, 16, 2, seed=1),
        "blk.0.attn_norm.weight": random(32),
    }
    q8 = "blk.0.ffn_up_exps.weight.lora_a"
    a = gguf.quants.dequantize(gguf.quants.quantize(tensors[q8], gguf.GGMLQuantizationType.Q8_0), 8)
    for alpha, scale in ((8.0, 4.0), (0.0, 1.0)):
        file = read_adapter(write_gguf(tmp_path / f"{alpha}.v2.gguf", tensors, alpha=alpha, q8=[q8]))
        got = delta(file.changes["blk.0.ffn_up_exps.weight"])
        np.testing.assert_allclose(got, scale * tensors["blk.0.ffn_up_exps.weight.lora_b"] @ a, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(file.replaced["blk.0.attn_norm.weight"], tensors["blk.0.attn_norm.weight"])
        assert file.name == f"{alpha}.v2"


PAIR = {
    "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": random(2, 4),
    "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": random(6, 2),
}
A, B = PAIR
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def write_peft(path, tensors=PAIR, **config):
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    write_safetensors(path / "adapter_model.safetensors", tensors)
    return path


def without(name, **more):
    return {key: values for key, values in PAIR.items() if key != name} | more


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": -1.5}, -0.75),
        ({"use_rslora": True}, 4 / 2**0.5),
        ({"r": 8, "rank_pattern": {"proj": 4, "up_proj": 2, "mlp.up_proj": 8}}, 2.0),  # parts between dots, in order
        ({"alpha_pattern": {"up": 1, r"0\.mlp\.(up|down)_proj": 6}}, 3.0),
        ({"fan_in_fan_out": True, "layers_to_transform": [0], "velora_config": {"rank": 1}}, 2.0),  # change no product
    ],
)
def test_scales(tmp_path, config, scale):
    (change,) = read_adapter(write_peft(tmp_path / "a", **config)).changes.values()
    np.testing.assert_allclose(change.scale, np.float32([scale, scale]))


def test_names_with_the_adapters_name_or_without_a_prefix(tmp_path):
    tensors = {
        "model.layers.0.mlp.up_proj.lora_A.default.weight": PAIR[A],
        "model.layers.0.mlp.up_proj.lora_B.default.weight": PAIR[B],
    }
    file = read_adapter(write_peft(tmp_path / "tuned.v1", tensors))
    assert (file.name, list(file.changes)) == ("tuned.v1", ["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (PAIR, {"peft_type": "LOHA"}, "'LOHA'; of PEFT's, only LORA is read"),
        (PAIR, {"use_dora": True}, "'use_dora' is set: DoRA is not read"),
        (PAIR, {"use_qalora": True}, "QALoRA is not read"),
        (PAIR, {"lora_bias": True}, "biases of its own is not read"),
        (PAIR, {"trainable_token_indices": [1]}, "trained tokens is not read"),
        (PAIR, {"layer_replication": [[0, 1]]}, "repeated layers is not read"),
        (PAIR, {"alora_invocation_tokens": [1]}, "Activated LoRA is not read"),
        (PAIR, {"init_lora_weights": "pissa_niter_4"}, "began as 'pissa_niter_4', on a base that was changed"),
        (PAIR, {"r": 0}, "'r' is 0, not a whole number from 1"),
        (PAIR, {"lora_alpha": None}, "'lora_alpha' is missing"),
        (PAIR, {"rank_pattern": {"(": 2}}, "'rank_pattern': '(' is no regular expression"),
        (PAIR, {"alpha_pattern": {"(?i)up": 2}}, "'(?i)up' is no regular expression"),
        (PAIR, {"rank_pattern": {"up_proj": "2"}}, "rank_pattern: 'up_proj' is '2', not a whole number"),
        (PAIR, {"target_parameters": "experts"}, "'target_parameters' is 'experts', not a list of names"),
        (PAIR, {"r": 4}, "mlp.up_proj.weight': the rank is 2, but should be 4 by its configuration"),
        (without(A), {}, "up_proj.lora_B.weight' has no partner A"),
        (without(B), {}, "up_proj.lora_A.weight' has no partner B"),
        (without(A, **{A: random(3, 4)}), {}, "A of shape [3, 4] and B of shape [6, 2] do not fit together"),
        (without(A, **{A: random(4)}), {}, "of float32 and shape [4] cannot be a part of an adapter"),
        (without(A, **{A: np.zeros((2, 4), np.int32)}), {}, "of int32 and shape [2, 4] cannot be a part"),
        (PAIR | {"lm_head.weight": np.zeros((0, 4), np.float32)}, {}, "'lm_head.weight' of float32 and shape [0, 4]"),
        (PAIR | {A.replace("A.weight", "A.default.weight"): PAIR[A]}, {}, "are for the same matrix"),
        (PAIR | {A.replace("lora_A.weight", "lora_magnitude_vector"): random(6)}, {}, "vector' is not of plain LoRA"),
        (
            {name.replace("mlp.up_proj", "mlp.experts.base_layer"): values for name, values in PAIR.items()},
            {"target_parameters": ["mlp.experts.down_proj"]},
            "more of model.layers.0.mlp.experts is adapted than 'target_parameters' names: down_proj",
        ),
    ],
)
def test_a_peft_adapter_that_is_damaged_or_more_than_lora(tmp_path, tensors, config, message):
    path = write_peft(tmp_path / "a", tensors, **config)
    refused(path, message)


def test_a_target_without_a_module_means_stacks_alone(tmp_path):
    """As peft 0.21 writes it for models with experts."""
    read = read_adapter(write_peft(tmp_path / "a", PAIR, target_parameters=["down_proj"]))
    assert [name.rpartition("layers.0.")[2] for name in read.changes] == ["mlp.up_proj.weight"]


def refused(path, message):
    with pytest.raises(InputError) as error:
        read_adapter(path)
    text = str(error.value)
    assert message in text and str(path) in text and "\n" not in text


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "target_parameters"])
@pytest.mark.parametrize("value", ["x\ny", [1], {"x\ny": "z"}, float("nan"), 1e300, -1])
def test_an_entry_of_another_kind_is_named(tmp_path, key, value):
    path = write_peft(tmp_path / "a", **{key: value})
    if (key, value) == ("lora_alpha", -1):
        assert read_adapter(path)
    else:
        refused(path, "type" if key == "peft_type" else key)


def test_files_that_are_missing_or_pickles(tmp_path):
    refused(tmp_path / "none", "there is no such adapter")
    path = write_peft(tmp_path / "a")
    refused(path / "adapter_model.safetensors", "name its directory")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    refused(path, "only a pickle (adapter_model.bin), which can run code and is not read")
    (path / "adapter_model.bin").unlink()
    refused(path, "adapter_model.safetensors: No such file")
    (path / "adapter_config.json").unlink()
    refused(path, "adapter_config.json: No such file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_tune_type": "dora"}, "'fine_tune_type' is 'dora', not lora"),
        ({"lora_parameters": {"rank": 2}}, "lora_parameters: 'scale' is missing"),
        ({"lora_parameters": {"rank": 3, "scale": 1.0}}, "the rank is 2, but should be 3"),
        ({"lora_parameters": None}, "'lora_parameters' is missing"),
    ],
)
def test_an_mlx_adapter_that_cannot_be_read(tmp_path, change, message):
    shutil.copytree(ADAPTERS / "mlx" / "ends", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | change
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    refused(tmp_path / "a", message)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("blk.0.attn_q.weight.lora_a", {"type": "model"}, "its type is 'model': not an adapter"),
        ("blk.0.attn_q.weight.lora_a", {"kind": "control_vector"}, "'control_vector'"),
        ("blk.0.attn_q.weight.lora_a", {"alpha": -1.0}, "'adapter.lora.alpha' is -1.0"),
        ("blk.0.attn_q.weight.lora_a", {}, "has no partner B"),
        ("blk.0.attn_q.weight", {}, "'blk.0.attn_q.weight' is not of plain LoRA"),
    ],
)
def test_a_gguf_adapter_that_cannot_be_read(tmp_path, name, options, message):
    refused(write_gguf(tmp_path / "a.gguf", {name: random(2, 4)}, **options), message)
