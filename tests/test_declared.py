"""What a config declares of each module, and what becomes of checkpoints that contradict it or are damaged.

Bugs that other implementations have had, and where they are looked for here:

    bias of a quantized layer added twice            test_a_bias_is_added_once
    one contiguous cut through fused gate and up     test_quantized_layers: stacks_of_fp8_experts_in_either_orientation
    a result multiplied by the number of devices     test_quantized_layers: experts_multiply_as_those_they_stand_for
    a block of scales lost between gate and up       test_quantized_layers: stacks_of_fp8_experts_in_either_orientation
    zero points of GPTQ version 2 one too large      golden/quantized: gptq_*_v2 (test_quantized)
    GPTQ's group_size of -1                          golden/quantized: gptq_4_one_group
    bitsandbytes' absmax of the wrong block          golden/quantized: bnb_nf4_straddle, bnb_nf4_partial
    FP4's table in the wrong order                   golden/quantized: bnb_fp4, bnb_fp4_nested
    bitsandbytes' INT8 rejected                      golden/quantized: bnb_int8
"""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_hf
from covering import in_turn, some
from quantized_writers import CONFIGS, FORMATS, WRITERS, quantized_checkpoint, read_safetensors, write_safetensors

import jaxllm
from jaxllm.checkpoint.declared import declared
from jaxllm.checkpoint.quantized import assemble, join
from jaxllm.checkpoint.safetensors import open_directory
from jaxllm.errors import InputError
from jaxllm.formats.dense import Dense

Q, K, GATE, HEAD = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.0.mlp.gate_proj",
    "lm_head",
)


def outcome(config, module, **siblings):
    """The scheme of a module, or what leaves it out, or that nothing is said of it."""
    found = declared(config, {name.replace("_json", ".json"): content for name, content in siblings.items()})
    if (entry := found.excluded(module)) is not None:
        return f"out by {entry}"
    schemes = found.schemes(module)
    return schemes[0].name if schemes else "plain"


def entry(method, **more):
    return {"quantization_config": {"quant_method": method, **more}}


def hugging_face(*names):
    return {
        "awq": entry("awq", bits=4, group_size=64, modules_to_not_convert=[*names]),
        "bitsandbytes": entry("bitsandbytes", load_in_8bit=True, llm_int8_skip_modules=[*names]),
        "hqq": entry("hqq", skip_modules=[*names]),
        "fp8": entry("fp8", modules_to_not_convert=[*names]),
        "fp8 of vLLM": entry("fp8", ignored_layers=[*names]),
    }


@pytest.mark.parametrize("tool", hugging_face())
@pytest.mark.parametrize(
    ("name", "out", "kept"),
    [
        ("lm_head", [HEAD], [Q, K, GATE]),
        (Q, [Q], [K, GATE, HEAD, Q.replace("layers.0", "layers.10")]),
        ("model.layers.0", [Q, GATE], [K, HEAD, "model.layers.01.mlp.gate_proj"]),
        ("model.layers.*.self_attn", [Q, K], [GATE, HEAD]),
        (r"model\.layers\.[01]\.mlp", [GATE], [Q, K]),
        ("k_proj", [K], [Q, GATE]),
        ("self_attn.q_proj", [Q], [K, GATE]),
    ],
)
def test_lists_of_names_as_transformers_reads_them(tool, name, out, kept):
    """The whole name, where it begins or ends, or a regular expression for that."""
    config = hugging_face("nothing.like.it", name)[tool]
    assert {outcome(config, module) for module in out} == {f"out by {name}"}
    assert not any(outcome(config, module).startswith("out") for module in kept)


def compressed(groups, **more):
    made = {
        f"group_{i}": {"targets": targets, "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}
        for i, (targets, bits) in enumerate(groups)
    }
    return entry("compressed-tensors", format="pack-quantized", config_groups=made, **more)


GPTQ = {"bits": 4, "group_size": 32}
MLX = {"bits": 4, "group_size": 32}
MIXED = {Q: {"quant_algo": "FP8"}, GATE: {"quant_algo": "NVFP4", "group_size": 16}}
# A config, and of some modules what it says.
RESOLVED = {
    "compressed-tensors' ignore, by name": (
        compressed([(["Linear"], 4)], ignore=[HEAD, Q]),
        {HEAD: f"out by {HEAD}", Q: f"out by {Q}", K: "INT 4-bit"},
    ),
    "compressed-tensors' ignore, no beginning of a name": (
        compressed([(["Linear"], 4)], ignore=["model.layers.0"]),
        {Q: "INT 4-bit"},
    ),
    "compressed-tensors' ignore, by regex": (
        compressed([(["Linear"], 4)], ignore=["re:.*self_attn.*", "re:lm_head"]),
        {Q: "out by re:.*self_attn.*", HEAD: "out by re:lm_head", GATE: "INT 4-bit"},
    ),
    "compressed-tensors: name before regex before Linear": (
        compressed([(["Linear"], 2), (["re:.*q_proj", "re:.*k_proj"], 3), ([Q], 8)]),
        {Q: "INT 8-bit", K: "INT 3-bit", GATE: "INT 2-bit"},
    ),
    "compressed-tensors: the same in another order": (
        compressed([([Q], 8), (["re:.*q_proj", "re:.*k_proj"], 3), (["Linear"], 2)]),
        {Q: "INT 8-bit", K: "INT 3-bit", GATE: "INT 2-bit"},
    ),
    "compressed-tensors: two groups and nothing else": (
        compressed([(["re:.*mlp.*"], 4), (["re:.*self_attn.*"], 8)]),
        {GATE: "INT 4-bit", Q: "INT 8-bit", HEAD: "plain"},
    ),
    "ModelOpt's globs": (
        entry("modelopt", quant_algo="NVFP4", exclude_modules=["lm_head", "*self_attn*"]),
        {HEAD: "out by lm_head", Q: "out by *self_attn*", GATE: "NVFP4"},
    ),
    "ModelOpt's globs match whole names": (
        entry("modelopt", quant_algo="FP8", ignore=["model.layers.0", "model.layers.1.*"]),
        {Q: "FP8", K: "out by model.layers.1.*"},
    ),
    "ModelOpt's mixed precision": (
        entry("modelopt", quant_algo="MIXED_PRECISION", quantized_layers=MIXED, exclude_modules=["*gate_proj"]),
        {Q: "FP8", GATE: "out by *gate_proj", K: "plain"},
    ),
    "ModelOpt's mixed precision, all in": (
        entry("modelopt", quant_algo="MIXED_PRECISION", quantized_layers=MIXED),
        {Q: "FP8", GATE: "NVFP4", HEAD: "plain"},
    ),
    "MLX's paths": (
        {"quantization": MLX | {Q: {"bits": 8, "group_size": 64}, K: False, GATE: True}},
        {Q: "MLX 8-bit", K: f"out by {K}", GATE: "MLX 4-bit", HEAD: "MLX 4-bit"},
    ),
    "MLX's paths with modes": (
        {"quantization": MLX | {"mode": "affine", Q: {"mode": "mxfp4"}, K: {"mode": "nvfp4"}, GATE: {"bits": 3}}},
        {Q: "MXFP4", K: "NVFP4", GATE: "MLX 3-bit"},
    ),
    "GPTQ's dynamic": (
        entry(
            "gptq", **GPTQ, dynamic={"-:.*self_attn.q.*": {}, r"+:.*\.mlp\..*": {"bits": 8}, ".*k_proj": {"bits": 2}}
        ),
        {Q: "out by .*self_attn.q.*", GATE: "GPTQ 8-bit", K: "GPTQ 2-bit", HEAD: "GPTQ 4-bit"},
    ),
    "the first of GPTQ's patterns": (
        entry("gptq", **GPTQ, dynamic={"+:model.*gate.*": {"bits": 3}, "+:model.*mlp.*": {"bits": 8}}),
        {GATE: "GPTQ 3-bit"},
    ),
    "an older name of the key": (
        {"compression_config": compressed([(["Linear"], 4)])["quantization_config"]},
        {Q: "INT 4-bit"},
    ),
    "MLX under both of its keys": ({"quantization": MLX, "quantization_config": MLX}, {Q: "MLX 4-bit"}),
}


@pytest.mark.parametrize("case", RESOLVED)
def test_what_is_said_of_modules(case):
    config, expected = RESOLVED[case]
    assert {module: outcome(config, module) for module in expected} == expected


def test_gptqs_dynamic_changes_groups_as_well():
    """Read with the bits and the group of the pattern, and with no others."""
    config = entry("gptq", **GPTQ, dynamic={"+:other": {"bits": 8, "group_size": 16}})
    rng, w = np.random.default_rng(0), np.random.default_rng(1).normal(size=(32, 64)).astype(np.float32)
    usual, other = (WRITERS[name](w, rng, group=group) for name, group in (("gptq-4", 32), ("gptq-8", 16)))
    tensors = {f"usual.{k}": Dense(v) for k, v in usual.tensors.items()}
    tensors |= {f"other.{k}": Dense(v) for k, v in other.tensors.items()}
    joined = join(tensors, declared(config, {}))
    for name, written in (("usual", usual), ("other", other)):
        decoded = on_host(joined[f"{name}.weight"]).dequantize()
        np.testing.assert_array_equal(np.asarray(decoded), written.dequantized)


def on_host(weight):
    return jax.tree.map(np.asarray, weight, is_leaf=lambda leaf: hasattr(leaf, "map"))


def test_nothing_declared():
    assert declared({}, {}) is None
    assert declared({"quantization_config": None}, {}) is None


# ---- tiny checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_hf.write(tmp_path_factory.mktemp("plain") / "llama", "llama")


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    """A directory of the tiny model in each format, written when it is first asked for."""
    made = {}

    def of(name):
        if name not in made:
            made[name], _ = quantized_checkpoint(plain, tmp_path_factory.mktemp(name), name, np.random.default_rng(1))
        return made[name]

    return of


def changed(folder, target, config=None, tensors=None):
    """A copy of a directory, its config and its tensors changed in place by these."""
    shutil.copytree(folder, target)
    given, (held, _) = json.loads((folder / "config.json").read_text()), read_safetensors(folder / "model.safetensors")
    for change, value in ((config, given), (tensors, held)):
        if change is not None:
            change(value)
    (target / "config.json").write_text(json.dumps(given))
    write_safetensors(target / "model.safetensors", held)
    return target


def refused(folder):
    """The one line with which loading fails."""
    with pytest.raises(InputError) as error:
        jaxllm.load(folder, progress=False)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_config_beside_the_config(quantized, tmp_path):
    """ModelOpt's hf_quant_config.json, where config.json says nothing."""
    folder = changed(quantized("fp8-modelopt"), tmp_path / "x", lambda config: config.pop("quantization_config"))
    with pytest.raises(InputError, match=r"unknown tensor '.*\.(input|weight)_scale'"):
        jaxllm.load(folder, progress=False)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    weights = assemble(open_directory(folder))
    assert weights[f"{Q}.weight"].format == "FP8"
    assert weights["lm_head.weight"].format == "float32"
    assert f"{Q}.weight_scale" not in weights


LISTED = [
    "awq",
    "fp8-tensor",
    "fp8-block",
    "ct-pack-4",
    "nvfp4-modelopt",
    "hqq-4-axis1",
    "bnb-nf4",
    "bnb-int8",
    "mlx-4",
]


@pytest.mark.parametrize("name", [*LISTED, "gptq-4"])
def test_a_module_that_is_left_out_but_quantized(quantized, tmp_path, name):
    def leave_out(config):
        given = config[FORMATS[name].key]
        if name == "gptq-4":
            given["dynamic"] = {f"-:{Q}": {}}
        elif FORMATS[name].skipped:
            given[FORMATS[name].skipped] = [Q]
        else:
            given[Q] = False
            config["quantization_config"] = given

    message = refused(changed(quantized(name), tmp_path / "x", leave_out))
    assert f"'{Q}" in message and f"is left out of the quantization by '{Q}'" in message


@pytest.mark.parametrize("name", ["awq", "fp8-tensor", "fp8-block", "hqq-4-axis1", "bnb-nf4", "bnb-int8"])
def test_a_module_that_is_left_out_by_the_end_of_its_name(quantized, tmp_path, name):
    config = setting(**{FORMATS[name].skipped: ["q_proj"]})
    message = refused(changed(quantized(name), tmp_path / "x", config))
    assert f"'{Q}" in message and "is left out of the quantization by 'q_proj'" in message


@pytest.mark.parametrize("name", [*LISTED, "gptq-4", "mxfp4"])
def test_a_plain_matrix_stays_plain_though_it_could_be_quantized(plain, tmp_path, name):
    folder, _ = quantized_checkpoint(plain, tmp_path, name, np.random.default_rng(1), lambda module: module == Q)

    def list_nothing(config):
        given = config[FORMATS[name].key]
        for key in (FORMATS[name].skipped, Q):
            given.pop(key, None)

    weights = assemble(open_directory(changed(folder, tmp_path / "x", list_nothing)))
    assert weights[f"{Q}.weight"].format == "float32"
    assert not weights[f"{GATE}.weight"].format.startswith("float")


@pytest.fixture(scope="module")
def twins():
    """Models that differ in nothing but their numbers: the programs of the first do for all."""
    loaded = []

    def load(path):
        loaded.append(jaxllm.load(path, dtype="float32", progress=False))
        loaded[0].programs.leaves = loaded[-1].programs.leaves
        return loaded[0]

    return load


BIASED = ["bnb-nf4", "bnb-int8", "mlx-4", "mlx-mxfp4", "gptq-4", "fp8-channel", "ct-pack-4"]


@pytest.mark.parametrize(("name", "mesh"), in_turn(BIASED, "tp=2", "tp=1"))
def test_a_bias_is_added_once(plain, twins, tmp_path, name, mesh):
    """To outputs cut over devices, and to those summed over them: as in the plain model, where no reader of a format
    has a hand in it."""
    rng = np.random.default_rng(3)

    def add(tensors):
        for p, rows in {"q": 64, "k": 32, "v": 32, "o": 64}.items():
            tensors[f"model.layers.0.self_attn.{p}_proj.bias"] = rng.normal(size=rows).astype(np.float32)

    biased = changed(plain, tmp_path / "biased", lambda config: config.update(attention_bias=True), add)
    packed, twin = quantized_checkpoint(biased, tmp_path, name, np.random.default_rng(1))
    ids = np.arange(6, dtype=np.int32)[None]
    got = jaxllm.load(packed, mesh=mesh, dtype="float32", weights="packed", progress=False).logits(ids)
    np.testing.assert_allclose(got, twins(twin).logits(ids), atol=1e-3)


# ---- what cannot be read -------------------------------------------------------------------------------------------


def test_two_scales(quantized, tmp_path):
    def both(tensors):
        tensors[f"{Q}.weight_scale_inv"] = tensors[f"{Q}.weight_scale"]

    message = refused(changed(quantized("fp8-tensor"), tmp_path / "x", tensors=both))
    assert f"'{Q}.weight' is there in two ways" in message


def test_two_scales_of_activations(quantized, tmp_path):
    def both(tensors):
        tensors[f"{Q}.activation_scale"] = tensors[f"{Q}.input_scale"]

    message = refused(changed(quantized("fp8-static"), tmp_path / "x", tensors=both))
    assert f"'{Q}.weight': both 'input_scale' and 'activation_scale'" in message


def drop(suffix):
    return lambda tensors: tensors.pop(f"{Q}.{suffix}")


def put(suffix, change):
    def apply(tensors):
        tensors[f"{Q}.{suffix}"] = np.ascontiguousarray(change(tensors[f"{Q}.{suffix}"]))

    return apply


def less(array):
    """Without its last row, or its last entry."""
    return array[:-1]


def narrower(array):
    return array[:, :-1]


STATE = "weight.quant_state.bitsandbytes__nf4"


def state(**changes):
    def change(array):
        return np.frombuffer(json.dumps(json.loads(array.tobytes()) | changes).encode(), np.uint8)

    return put(STATE, change)


# A format, what is done to the tensors of one module, and what is said of it.
DAMAGED = {
    "GPTQ without scales": ("gptq-4", drop("scales"), "'{q}.scales' is missing"),
    "GPTQ without qzeros": ("gptq-4", drop("qzeros"), "'{q}.qzeros' is missing"),
    "a group that is not there": ("gptq-4", put("g_idx", lambda a: a + 1), "g_idx goes from 1 to 4"),
    "a group below the first": ("gptq-4", put("g_idx", lambda a: a - 1), "g_idx goes from -1"),
    "too few places in g_idx": ("gptq-act-order", put("g_idx", less), "g_idx has shape [63]"),
    "GPTQ's scales too few": ("gptq-4", put("scales", less), "scales has shape [3, 64], expected [4, 64]"),
    "GPTQ's zeros too few": ("gptq-4", put("qzeros", narrower), "qzeros has shape [4, 7], expected [4, 8]"),
    "GPTQ's words in bytes": ("gptq-4", put("qweight", lambda a: a.view(np.uint8)), "expected int32 or uint32"),
    "GPTQ in 3 bits cut": ("gptq-3", put("qweight", less), "does not hold codes of 3 bits"),
    "AWQ without scales": ("awq", drop("scales"), "'{q}.scales' is missing"),
    "AWQ's rows not whole groups": ("awq", put("qweight", less), "groups of 16 do not divide the 63 inputs"),
    "AWQ's scales too narrow": ("awq", put("scales", narrower), "scales has shape [4, 63]"),
    "AWQ's zeros too few": ("awq", put("qzeros", less), "qzeros has shape [3, 8]"),
    "NF4 without absmax": ("bnb-nf4", drop("weight.absmax"), None),
    "NF4 without its map": ("bnb-nf4", drop("weight.quant_map"), "'{q}.weight.quant_map' is missing"),
    "NF4 without its state": ("bnb-nf4", drop(STATE), "its 'quant_state' is missing"),
    "NF4's state is no JSON": ("bnb-nf4", put(STATE, less), "its 'quant_state' makes no sense"),
    "NF4's state is no text": ("bnb-nf4", put(STATE, lambda a: a | 128), "its 'quant_state' makes no sense"),
    "NF4's state without shape": ("bnb-nf4", state(shape=None), "its 'quant_state': 'shape' is missing"),
    "NF4's state of another shape": ("bnb-nf4", state(shape=[64, 128]), "its quant_state says 64 x 128"),
    "NF4's state with blocks of 0": ("bnb-nf4", state(blocksize=0), "quant_state"),
    "NF4's state with a shape in text": ("bnb-nf4", state(shape=["64", "64"]), "quant_state"),
    "NF4's blocks too few": ("bnb-nf4", put("weight.absmax", less), "absmax has shape [63], expected [64]"),
    "NF4 cut": ("bnb-nf4", put("weight", less), "weight has 2047 entries"),
    "NF4's map too short": ("bnb-nf4", put("weight.quant_map", less), "quant_map"),
    "nested without an offset": ("bnb-nf4-nested", state(nested_offset=None), "quant_state"),
    "LLM.int8 in tiles": ("bnb-int8", put("weight_format", lambda a: a + 1), "weight_format is not 0"),
    "LLM.int8's rows too few": ("bnb-int8", put("SCB", less), "SCB has shape [63], expected [64]"),
    "MLX without biases": ("mlx-4", drop("biases"), "'{q}.biases' is missing"),
    "MLX's scales too few": ("mlx-4", put("scales", narrower), "scales has shape [64, 1], expected [64, 2]"),
    "MLX's words cut": ("mlx-4", put("weight", narrower), "not whole groups of 32 4-bit codes"),
    "MLX's words in bytes": ("mlx-4", put("weight", lambda a: a.view(np.uint8)), "of uint8, expected int32 or uint32"),
    "HQQ without its zeros": ("hqq-4-axis1", drop("zero"), "'{q}.zero' is missing"),
    "HQQ in 5 bits": ("hqq-4-axis1", put("nbits", lambda a: a + 1), "5 bits in groups of 64 along axis 1"),
    "HQQ along axis 2": ("hqq-4-axis1", put("axis", lambda a: a + 1), "along axis 2"),
    "HQQ's groups do not divide": ("hqq-4-axis1", put("group_size", lambda a: a + 1), "in groups of 65"),
    "HQQ's scales too few": ("hqq-4-axis0", put("scale", narrower), "scale has shape [1, 63], expected [1, 64]"),
    "HQQ's codes cut": ("hqq-4-axis1", put("W_q", less), "W_q"),
    "FP8 without scales": ("fp8-tensor", drop("weight_scale"), "'{q}.weight' is FP8, but"),
    "FP8's scales neither one nor rows": (
        "fp8-channel",
        put("weight_scale", less),
        "scales of shape [63, 1] for a matrix of [64, 64]",
    ),
    "FP8's grid too small": ("fp8-block", put("weight_scale_inv", less), "grid of scales has shape [1, 4]"),
    "NVFP4 without its second scale": ("nvfp4-modelopt", drop("weight_scale_2"), "scale"),
    "NVFP4 without its global scale": ("ct-nvfp4", drop("weight_global_scale"), "'{q}.weight_global_scale' is missing"),
    "NVFP4's scales too few": ("nvfp4-modelopt", put("weight_scale", narrower), "scales has shape [64, 3]"),
    "MXFP4's scales too few": ("mxfp4", put("scales", narrower), "scales have shape [64, 1], expected [64, 2]"),
    "MXFP4's rows cut": ("mxfp4", put("blocks", narrower), "rows of 62 are not whole blocks of 32"),
    "MXFP8's scales too few": ("mlx-mxfp8", put("scales", narrower), "scales has shape [64, 1]"),
    "INT's shape of another matrix": ("ct-pack-4", put("weight_shape", lambda a: a * 2), "has shape"),
    "INT's words cut": ("ct-pack-4", put("weight_packed", narrower), "weight_packed has shape [64, 7]"),
    "INT's zeros cut": ("ct-pack-4-asym", put("weight_zero_point", less), "zero"),
    "INT without scales": ("ct-pack-4", drop("weight_scale"), "'{q}.weight_scale' is missing"),
    "INT8's scales too few": ("ct-int8", put("weight_scale", less), "scales of shape [63, 1]"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_tensors_are_named_with_the_reason(quantized, tmp_path, case):
    name, damage, reason = DAMAGED[case]
    message = refused(changed(quantized(name), tmp_path / "x", tensors=damage))
    assert Q in message
    if reason:
        assert reason.format(q=Q) in message


def setting(**values):
    return lambda config: next(config[k] for k in ("quantization_config", "quantization") if k in config).update(values)


CONTRADICTED = {
    "bits that there are none of": ("gptq-4", setting(bits=5), "'bits' is 5, not one of 2, 3, 4, 8"),
    "other bits": ("gptq-4", setting(bits=8), "expected"),
    "other bits, in MLX": ("mlx-4", setting(bits=8), "expected"),
    "bits in text": ("gptq-4", setting(bits="4"), "'bits' is '4'"),
    "bits that are true": ("mlx-4", setting(bits=True), "'bits' is True"),
    "AWQ in 3 bits": ("awq", setting(bits=3), "'bits' is 3"),
    "a group that does not divide": ("awq", setting(group_size=48), "groups of 48 do not divide"),
    "a group that does not divide, in MLX": ("mlx-4", setting(group_size=48), "not whole groups of 48"),
    "a group in text": ("gptq-4", setting(group_size="128"), "'group_size' is '128'"),
    "a group of 0": ("gptq-4", setting(group_size=0), "'group_size' is 0"),
    "a group of -2": ("awq", setting(group_size=-2), "'group_size' is -2"),
    "a group beyond reason": ("gptq-4", setting(group_size=10**30), "'group_size' is 1000000"),
    "a group of 1.5": ("mlx-4", setting(group_size=1.5), "'group_size' is 1.5"),
    "no group": ("mlx-4", setting(group_size=None), "'group_size' is missing"),
    "marlin": ("gptq-4", setting(checkpoint_format="marlin"), "GPTQ's 'marlin' files are not supported"),
    "gptq_p": ("gptq-4", setting(checkpoint_format="gptq_p"), "GPTQ's 'gptq_p' files are not supported"),
    "gemv": ("awq", setting(version="gemv"), "AWQ's version 'gemv' is not supported"),
    "a method of others": ("gptq-4", setting(quant_method="aqlm"), "quantization 'aqlm' is not supported; supported: "),
    "a method that is no text": ("gptq-4", setting(quant_method=3), "'quant_method' is 3, not text"),
    "E5M2": ("fp8-block", setting(fmt="e5m2"), "FP8 of the kind 'e5m2'"),
    "a block of one number": ("fp8-block", setting(weight_block_size=[128]), "'weight_block_size' is [128]"),
    "a block of 0": ("fp8-block", setting(weight_block_size=[0, 16]), "'weight_block_size' is [0, 16]"),
    "other blocks": ("fp8-block", setting(weight_block_size=[128, 128]), "the grid of scales has shape"),
    "no list of names": ("fp8-tensor", setting(modules_to_not_convert="lm_head"), "not a list of names"),
    "no regular expression": ("fp8-tensor", setting(modules_to_not_convert=["*"]), "'*' is no regular expression"),
    "no groups": ("ct-pack-4", setting(config_groups={}), "'config_groups' is {}"),
    "a group without weights": ("ct-pack-4", setting(config_groups={"a": {}}), "group 'a' says nothing of weights"),
    "a format of others": ("ct-pack-4", setting(format="marlin-24"), "in the format 'marlin-24' is not supported"),
    "an algorithm of others": ("nvfp4-modelopt", setting(quant_algo="W4A8_AWQ"), "'quant_algo' is 'W4A8_AWQ'"),
    "no layers": ("fp8-modelopt", setting(quant_algo="MIXED_PRECISION"), "'quantized_layers' is missing"),
    "a mode of others": ("mlx-4", setting(mode="ternary"), "mode 'ternary' is not supported"),
    "a threshold of text": ("bnb-int8", setting(llm_int8_threshold="6"), "'llm_int8_threshold' is '6'"),
    "patterns in a list": ("gptq-4", setting(dynamic=["a"]), "'dynamic' is ['a']"),
}


@pytest.mark.parametrize("case", CONTRADICTED)
def test_a_config_that_makes_no_sense_here(quantized, tmp_path, case):
    name, change, reason = CONTRADICTED[case]
    assert reason in refused(changed(quantized(name), tmp_path / "x", change))


@pytest.mark.parametrize("given", ["awq", 4, [1], True])
def test_a_config_that_is_no_object(given):
    with pytest.raises(InputError, match="quantization_config is .*, expected an object"):
        declared({"quantization_config": given}, {})


# ---- anything ------------------------------------------------------------------------------------------------------

ABSURD = (None, True, False, 0, -1, 1, 3, 7, 10**30, -1.5, float("inf"), float("nan"), "", "x", "(", [], [None], {})
ABSURD += ([1, 2], ["lm_head"], {"a": 1}, {"a": {}})
DTYPES = (np.float32, np.float16, np.int64, np.int32, np.int8, np.uint8, np.uint32)


def paths(value, at=()):
    """Every place of a config."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


def mutated_config(rng, name):
    config = json.loads(json.dumps(CONFIGS[name]))
    places = [path for path in paths(config) if path]
    *lead, last = places[rng.integers(len(places))]
    inner = config
    for key in lead:
        inner = inner[key]
    value = ABSURD[rng.integers(len(ABSURD))]
    inner[last] = value
    return config, f"{'.'.join(map(str, (*lead, last)))} = {value!r}"


def mutated_tensor(rng, tensors):
    name = sorted(tensors)[rng.integers(len(tensors))]
    x, kind = tensors[name], rng.integers(6)
    if kind == 0 and x.ndim:
        axis = rng.integers(x.ndim)
        out = np.delete(x, 0, axis)
    elif kind == 1 and x.ndim:
        out = np.concatenate([x, x], rng.integers(x.ndim))
    elif kind == 2:
        out = x.reshape(*x.shape, 1) if rng.integers(2) else x.reshape(1, *x.shape)
    elif kind == 3:
        out = x.reshape(-1)
    elif kind == 4:
        out = np.zeros(x.shape, DTYPES[rng.integers(len(DTYPES))])
    else:
        return {k: v for k, v in tensors.items() if k != name}, f"without {name}"
    return tensors | {
        name: np.ascontiguousarray(out).reshape(out.shape)
    }, f"{name}: {x.dtype} {x.shape} -> {out.dtype} {out.shape}"


@pytest.fixture(scope="module")
def pieces(quantized):
    return {name: read_safetensors(quantized(name) / "model.safetensors")[0] for name in FORMATS}


# What a minute of tests/fuzz tries too, here for every format.
@pytest.mark.parametrize("seed", some(range(300), range(90)))
def test_anything_loads_or_is_refused_in_one_line(quantized, pieces, tmp_path, seed):
    """One entry of the config, or one tensor of a module, changed at random."""
    rng, name = np.random.default_rng(seed), list(FORMATS)[seed % len(FORMATS)]
    tensors, config = pieces[name], json.loads((quantized(name) / "config.json").read_text())
    if rng.integers(2):
        entry, what = mutated_config(rng, name)
        config |= entry
        config = {k: v for k, v in config.items() if k != "quantization_config" or k in entry}
    else:
        of_module = {k: v for k, v in tensors.items() if k.startswith(f"{Q}.")}
        changed_tensors, what = mutated_tensor(rng, of_module)
        tensors = {k: v for k, v in tensors.items() if k not in of_module} | changed_tensors
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    try:
        loaded = jaxllm.load(tmp_path, weights="packed", progress=False)
        [weight] = (p.weight for p in loaded.placed if p.name.endswith("q_proj.weight"))
        assert jax.eval_shape(lambda weight: weight.dequantize(), weight).shape == (64, 64)
    except InputError as error:
        assert "\n" not in str(error), what
    except Exception as error:
        error.add_note(f"{name}: {what}")
        raise


# As they are found in the wild, and read wrongly at first.

MIXED = {"group_size": 32, "bits": 4, "mode": "mxfp4", Q: {"group_size": 64, "bits": 8}}
GROUPS = {
    "group_0": {"targets": ["lm_head"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}},
    "group_1": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": -1}},
}
COMPRESSED = entry("compressed-tensors", format="pack-quantized", config_groups=GROUPS)
DYNAMIC = {"+:.*gate": {"bits": 8}, "-:.*k_proj": {}, "+:.*k_proj": {"bits": 2}}
IN_THE_WILD = {
    "MLX's overrides have MLX's defaults": ({"quantization": MIXED}, {GATE: "MXFP4", Q: "MLX 8-bit"}),
    "a target that is a module is not a class": (COMPRESSED, {HEAD: "INT 8-bit", Q: "INT 4-bit"}),
    "GPTQ's patterns are beginnings, the first counts": (
        entry("gptq", bits=4, group_size=32, dynamic=DYNAMIC),
        {Q: "GPTQ 4-bit", GATE: "GPTQ 8-bit", K: "out by .*k_proj"},
    ),
    "only a cache is quantized": (entry("modelopt", quant_algo=None, kv_cache_quant_algo="FP8"), {Q: "plain"}),
}


@pytest.mark.parametrize("case", IN_THE_WILD)
def test_configs_in_the_wild(case):
    config, expected = IN_THE_WILD[case]
    assert {module: outcome(config, module) for module in expected} == expected


def test_older_tools_wrote_a_file_beside():
    gptq = {"bits": 4, "group_size": 128, "desc_act": True}
    assert outcome({}, Q, quantize_config_json=gptq) == "GPTQ 4-bit"
    awq = {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}
    assert outcome({}, Q, quant_config_json=awq) == "AWQ"


def test_biases_that_older_gptq_files_have_everywhere(quantized, tmp_path):
    source = quantized("gptq-4")
    tensors, config = read_safetensors(source / "model.safetensors")[0], (source / "config.json").read_text()
    out = {n.removesuffix(".qweight"): t.shape[1] for n, t in tensors.items() if n.endswith(".qweight")}
    (tmp_path / "config.json").write_text(config)
    tensors |= {f"{module}.bias": np.full(size, 0.5, np.float16) for module, size in out.items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with_biases = jaxllm.load(tmp_path, dtype="float32", progress=False)
    assert {p.name for p in with_biases.placed} >= {"layers.0.self_attn.o_proj.bias", "layers.0.mlp.down_proj.bias"}
    plain = jaxllm.load(source, dtype="float32", progress=False)
    tokens = np.arange(5)[None]
    assert np.abs(with_biases.logits(tokens) - plain.logits(tokens)).max() > 1e-2
