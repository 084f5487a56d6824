"""The files of DeepSeek's inference demo: read on any mesh, written and read back bit for bit; FP8 made plain."""

import json
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from covering import in_turn, some
from deepseek_numpy import E4M3, Transformer, demo_names, load, model_args, read_safetensors, weight_dequant
from safetensors.numpy import save_file

import jaxllm.generate
from jaxllm.checkpoint.demo import demo_tensors
from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.cli import execute
from jaxllm.convert import DEMO_CONFIG, convert
from jaxllm.errors import InputError
from jaxllm.formats.scaled import Scaled
from jaxllm.placing import FileArray, JoinedArray, _read

CHECKPOINTS = Path(__file__).parent / "golden" / "deepseek"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
SAYABLE = ("v2", "v2_lite", "v3", "v3_no_q_lora")  # with ModelArgs
UNSAYABLE = {"v3_half_rope": "interleaved", "v3_plain_rope": "rms_norm_eps", "v3_unlike_demo": "norm_topk_prob, rope"}
CUT = {"embed": 0, "wq": 0, "wq_b": 0, "wkv_b": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "head": 0}  # convert.py


def demo_files(path, tensors, n, experts=8):
    """What the demo's convert.py would write of tensors by the demo's names, told once more."""
    path.mkdir(parents=True, exist_ok=True)
    files = [{} for _ in range(n)]
    for name, x in tensors.items():
        parts = name.split(".")
        if "experts" in parts:
            files[int(parts[-3]) // (experts // n)][name] = x
            continue
        axis = CUT.get(parts[-2])
        for i, file in enumerate(files):
            file[name] = x if axis is None else np.ascontiguousarray(np.split(x, n, axis)[i])
    for i, file in enumerate(files):
        save_file(file, path / f"model{i}-mp{n}.safetensors")
    return path


def fields(name):
    """ModelArgs of a golden checkpoint."""
    config = json.loads((CHECKPOINTS / name / "config.json").read_text())
    args, ours = model_args(config), ("block", "norm_eps", "mscale_all_dim", "norm_topk_prob", "rope_interleave")
    given = {key: value for key, value in vars(args).items() if key not in (*ours, "masked_score")}
    sizes = {"vocab_size": "vocab_size", "dim": "hidden_size", "inter_dim": "intermediate_size"}
    sizes |= {"moe_inter_dim": "moe_intermediate_size", "n_shared_experts": "n_shared_experts"}
    return given | {key: config[theirs] for key, theirs in sizes.items()}


def made(tmp_path, name="v3", n=2, **changes):
    tensors, _ = load(CHECKPOINTS / name)
    path = demo_files(tmp_path / f"{name}-{n}", tensors, n)
    (path / "config_671B.json").write_text(json.dumps(fields(name) | changes))
    return path


def raw(path):
    """Every tensor as its dtype, shape and bytes, a list for each file."""
    files = sorted(path.glob("*.safetensors"))
    return [{n: (t["dtype"], t["shape"], t["data"]) for n, t in safetensors.deserialize(f.read_bytes())} for f in files]


def whole(path):
    return {name: t for file in raw(path) for name, t in file.items()}


def converted_by(*args):
    """The exit code of `python -m jaxllm.convert`; tests/test_convert.py has processes of its own."""
    return execute(jaxllm.convert.parser(), jaxllm.convert.run, [*map(str, args)])


@pytest.mark.parametrize(("name", "mesh"), in_turn(["v3", "v3_no_q_lora"], "tp=2,ep=2", "tp=1", *some(["tp=2"], [])))
def test_logits_are_those_of_transformers_whatever_n_was(tmp_path, name, mesh):
    golden, options = np.load(CHECKPOINTS / name / "golden.npz"), {"dtype": "float32", "weights": "packed"}
    first, *others = [jaxllm.load(made(tmp_path, name, n), mesh=mesh, progress=False, **options) for n in (4, 2, 1)]
    np.testing.assert_allclose(first.logits(golden["tokens"]), golden["logits"], atol=1e-3)
    for other in others:  # the same parameters on the same devices
        for p, q in zip(first.placed, other.placed, strict=True):
            for x, y in zip(*(jax.tree.leaves(placed.weight) for placed in (p, q)), strict=True):
                assert x.sharding == y.sharding
                np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A Hugging Face directory of V3 in FP8, whose cut matrices have two blocks of 128 or more along the cut."""
    path, rng = tmp_path_factory.mktemp("fp8") / "hf", np.random.default_rng(0)
    config = json.loads((CHECKPOINTS / "v3_fp8" / "config.json").read_text())
    config |= {"hidden_size": 136, "intermediate_size": 256, "moe_intermediate_size": 128, "n_shared_experts": 2}
    config |= {"q_lora_rank": 24, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
    config |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    tensors = {}

    def add(name, *shape):
        x = rng.normal(size=shape)
        if name.endswith("_proj") or "kv_a" in name and len(shape) > 1:
            tensors[f"{name}.weight"] = (x * 100).clip(-448, 448).astype(E4M3)
            grid = [-(-n // 128) for n in shape]
            tensors[f"{name}.weight_scale_inv"] = rng.uniform(5e-4, 2e-3, grid).astype(np.float32)
        else:
            tensors[f"{name}.weight"] = (x if len(shape) > 1 else 1 + x / 8).astype(ml_dtypes.bfloat16)

    def mlp(name, inner):
        for which, shape in (("gate", (inner, 136)), ("up", (inner, 136)), ("down", (136, inner))):
            add(f"{name}.{which}_proj", *shape)

    add("model.embed_tokens", 64, 136)
    add("lm_head", 64, 136)
    add("model.norm", 136)
    for layer in range(3):  # the last is for multi-token prediction
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"{at}.{name}", 136)
        matrices = {"q_a_proj": (24, 136), "q_b_proj": (512, 24), "kv_a_proj_with_mqa": (80, 136), "o_proj": (136, 256)}
        for name, shape in (
            matrices | {"kv_b_proj": (512, 16), "q_a_layernorm": (24,), "kv_a_layernorm": (16,)}
        ).items():
            add(f"{at}.self_attn.{name}", *shape)
        if not layer:
            mlp(f"{at}.mlp", 256)
            continue
        add(f"{at}.mlp.gate", 8, 136)
        tensors[f"{at}.mlp.gate.e_score_correction_bias"] = rng.normal(size=8).astype(np.float32)
        mlp(f"{at}.mlp.shared_experts", 256)
        for expert in range(8):
            mlp(f"{at}.mlp.experts.{expert}", 128)
    add("model.layers.2.eh_proj", 136, 272)
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


TOKENS = np.arange(20).reshape(2, 10) * 7 % 64


@pytest.mark.parametrize(("n", "mesh"), some([(1, "tp=1"), (2, "tp=2,ep=2")], [(2, "tp=2,ep=2")]))
def test_fp8_files_give_the_demos_logits(tmp_path, fp8, n, mesh):
    params, args = load(fp8)
    convert(fp8, tmp_path / "demo", to="demo", model_parallel=n, progress=False)
    model = jaxllm.load(tmp_path / "demo", mesh=mesh, dtype="float32", weights="packed", progress=False)
    expected = Transformer(params, args)(TOKENS)
    np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-3 * np.abs(expected).max())
    assert {p.weight.format for p in model.placed if p.name.endswith("o_proj.weight")} == {"FP8 128x128"}


def without_mtp(tensors, layers):
    return {name: x for name, x in tensors.items() if not name.startswith(f"model.layers.{layers}.")}


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("name", [*SAYABLE, *UNSAYABLE])
def test_there_and_back_is_byte_identical(tmp_path, name, n):
    """And the files there are those of the demo's own script, bit for bit."""
    source, own = CHECKPOINTS / name, None
    if name in SAYABLE:
        convert(source, tmp_path / "there", to="demo", model_parallel=n, progress=False)
        said = json.loads((tmp_path / "there" / DEMO_CONFIG).read_text())
        assert fields(name).items() >= {k: v for k, v in said.items() if k != "dtype" and "rope_f" not in k}.items()
    else:
        own = source / "config.json"
        with pytest.warns(UserWarning, match=f"ModelArgs cannot say this model's {UNSAYABLE[name]}; none are written"):
            convert(source, tmp_path / "there", to="demo", model_parallel=n, progress=False)
    expected = demo_files(tmp_path / "expected", load(source)[0], n)
    assert raw(tmp_path / "there") == raw(expected)
    convert(tmp_path / "there", tmp_path / "back", to="huggingface", config=own, progress=False)
    assert whole(tmp_path / "back") == whole(source)
    files = {"generation_config.json", "config.json", "model.safetensors"}
    assert {file.name for file in (tmp_path / "back").iterdir()} == files


@pytest.mark.parametrize("n", [1, 2])
def test_fp8_there_and_back_is_byte_identical(tmp_path, fp8, n):
    convert(fp8, tmp_path / "there", to="demo", model_parallel=n, progress=False)
    assert raw(tmp_path / "there") == raw(demo_files(tmp_path / "expected", load(fp8)[0], n))
    convert(tmp_path / "there", tmp_path / "back", to="huggingface", progress=False)
    assert whole(tmp_path / "back") == without_mtp(whole(fp8), 2)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"


def test_scale_fmt_comes_along(tmp_path, fp8):
    """In the words of both configs, and it reaches the weights."""
    source = tmp_path / "source"
    source.mkdir()
    for file in fp8.iterdir():
        shutil.copy(file, source)
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "there", to="demo", model_parallel=1, progress=False)
    [args] = (tmp_path / "there").glob("config*.json")
    assert json.loads(args.read_text())["scale_fmt"] == "ue8m0"
    convert(tmp_path / "there", tmp_path / "back", to="huggingface", progress=False)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    for path, expected in ((source, True), (tmp_path / "there", True), (tmp_path / "back", True), (fp8, False)):
        tensors = open_checkpoint(path).tensors.values()
        assert {w.activations.power_of_two for w in tensors if isinstance(w, Scaled)} == {expected}
    args.write_text(args.read_text().replace("ue8m0", "e8"))
    with pytest.raises(InputError, match="'scale_fmt' is 'e8', not one of ue8m0, float"):
        open_checkpoint(tmp_path / "there")


@pytest.mark.parametrize("name", [*SAYABLE, "fp8"])
def test_what_comes_back_is_the_same_model(tmp_path, fp8, name):
    source = fp8 if name == "fp8" else CHECKPOINTS / name
    convert(source, tmp_path / "there", to="demo", model_parallel=2, progress=False)
    convert(tmp_path / "there", tmp_path / "back", to="huggingface", max_shard_size=60_000, progress=False)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert open_checkpoint(source).config == open_checkpoint(tmp_path / "back").config


def test_the_config_may_be_elsewhere(tmp_path):
    path = made(tmp_path)
    (path / "config_671B.json").rename(tmp_path / "c.json")
    model = jaxllm.load(path, config=str(tmp_path / "c.json"), dtype="float32", progress=False)
    assert (model.config.rope.rotary_dim, model.config.has_correction_bias) == (8, True)
    convert(path, tmp_path / "back", to="huggingface", config=tmp_path / "c.json", progress=False)
    assert open_checkpoint(tmp_path / "back").config == open_checkpoint(CHECKPOINTS / "v3").config


def test_no_more_prompts_are_answered_together_than_the_config_says(tmp_path, monkeypatch):
    """That an engine answers no more than it has slots, tests/test_engine.py says."""

    def engine(model, count, *rest):
        raise InputError(f"{count} slots")

    monkeypatch.setattr("jaxllm.language_model.Engine", engine)
    path, options = made(tmp_path, max_batch_size=3), {"max_batch_size": 5}
    for source, given, slots in ((path, {}, 3), (path, options, 5), (CHECKPOINTS / "v3", {}, 8)):
        with pytest.raises(InputError, match=f"^{slots} slots$"):
            jaxllm.load(source, progress=False, **given).generate([[1, 2]] * 9, 1)


def test_tokenizer_files_come_along(tmp_path):
    source = tmp_path / "a"
    source.mkdir()
    for file in (CHECKPOINTS / "v3").glob("*.*"):
        shutil.copy(file, source)
    (source / "tokenizer_config.json").write_text("{}")
    (source / "tokenizer.model").write_bytes(b"\x0a")
    convert(source, tmp_path / "b", to="demo", model_parallel=1, progress=False)
    names = ["config_demo.json", "generation_config.json", "model0-mp1.safetensors", "tokenizer.model"]
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == [*names, "tokenizer_config.json"]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("positions", [None, np.arange(3, 11), np.array([9, 0, 4, 4, 11, -1, 3]), np.array([5])])
def test_of_a_joined_array_the_right_parts_are_read(tmp_path, axis, positions):
    x, parts = np.random.default_rng(0).normal(size=(12, 12)), []
    for i, part in enumerate(np.split(x, 3, axis)):
        np.ascontiguousarray(part).tofile(tmp_path / str(i))
        parts.append(FileArray(tmp_path / str(i), 0, part.shape, x.dtype))
    joined = JoinedArray(tuple(parts), axis)
    assert (joined.shape, joined.ndim, joined.dtype) == (x.shape, 2, x.dtype)
    np.testing.assert_array_equal(np.asarray(joined), x)
    for index in ([positions, None], [None, positions]):
        for part in ((slice(0, 12), slice(0, 12)), (slice(0, 1), slice(2, 7)), (slice(1, 7), slice(0, 1))):
            sizes = [12 if i is None else len(i) for i in index]
            section = tuple(slice(s.start % n, min(s.stop, n)) for s, n in zip(part, sizes, strict=True))
            want = x
            for a, i in enumerate(index):
                if i is not None:
                    zeros = np.expand_dims(i < 0, 1 - a)
                    want = np.where(zeros, 0, want.take(i, a))
            np.testing.assert_array_equal(_read([joined], False, index, tuple(sizes), section), want[section])


def test_only_what_is_asked_for_is_read(tmp_path):
    """Of a part that is not asked for, not even the file is there."""
    np.ones((4, 6), np.float32).tofile(tmp_path / "1")
    parts = [
        FileArray(tmp_path / "1", 0, (4, 6), np.dtype(np.float32)),
        np.broadcast_to(np.float32(0), (2**40, 6)),
    ]
    joined = JoinedArray(tuple(parts), 0)
    np.testing.assert_array_equal(joined.read((slice(1, 4), slice(2, 4))), np.ones((3, 2)))
    np.testing.assert_array_equal(joined.read((slice(3, 5),))[:, 0], [1, 0])


def fp8_made_plain(source, to, kept=()):
    """What fp8_cast_bf16.py does with each tensor, but for the dtype and the size of blocks."""
    config, expected = json.loads((source / "config.json").read_text()), {}
    for key, x in (tensors := read_safetensors(source / "model.safetensors")).items():
        if x.dtype == E4M3 and key not in kept:
            block = config["quantization_config"]["weight_block_size"]
            x = weight_dequant(x, tensors[f"{key}_scale_inv"], block).astype(to)
        if not key.endswith("_scale_inv"):
            expected[key] = x
    return expected


def check(path, expected):
    got = {k: v for file in path.glob("*.safetensors") for k, v in read_safetensors(file).items()}
    assert got.keys() == expected.keys()
    for key, x in expected.items():
        assert got[key].dtype == x.dtype, key
        assert got[key].tobytes() == x.tobytes(), key


@pytest.mark.parametrize("to", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["v3_fp8", "v3_fp8_small_blocks", "fp8"])
def test_fp8_made_plain_is_numpys(tmp_path, monkeypatch, fp8, name, to):
    """And everything else is what it was, the router's correction bias in float32 included."""
    monkeypatch.setattr("jaxllm.checkpoint.writing.PIECE", 1000)  # several bands a tensor
    source = fp8 if name == "fp8" else CHECKPOINTS / name
    config = json.loads((source / "config.json").read_text())
    convert(source, tmp_path / "b", to=to, max_shard_size=100_000, progress=False)
    expected = fp8_made_plain(source, to)
    check(tmp_path / "b", expected)
    assert {x.dtype for k, x in expected.items() if "correction_bias" in k} == {np.dtype(np.float32)}
    del config["quantization_config"]
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config | {"dtype": to}
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()


@pytest.mark.filterwarnings("default")  # printed, as by a process of its own
@pytest.mark.parametrize("declared", [True, False])
def test_fp8_without_scales_is_kept_and_warned_about(tmp_path, capsys, declared):
    """By the options of the demo's own script. What was written then still says that it has FP8."""
    kept = [DOWN, "model.layers.1.self_attn.o_proj.weight"]
    source = hf(tmp_path, "v3_fp8", without(*(f"{name}_scale_inv" for name in kept)))
    expected = fp8_made_plain(source, "bfloat16", kept)
    said = json.loads((source / "config.json").read_text())
    if not declared:
        block = said.pop("quantization_config")["weight_block_size"]
        assert block == [128, 128]
        (source / "config.json").write_text(json.dumps(said))
    code = converted_by("--output-bf16-hf-path", tmp_path / "b", "--input-fp8-hf-path", source)
    out, err = capsys.readouterr()
    assert (code, out) == (0, "")
    *warned, _ = err.splitlines()
    assert sorted(warned) == sorted(
        f"warning: '{name}' is FP8, but '{name}_scale_inv' is missing; it stays FP8" for name in kept
    )
    check(tmp_path / "b", expected)
    got = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert (got["quant_method"], got["weight_block_size"]) == ("fp8", [128, 128])
    before = read_safetensors(source / "model.safetensors")
    fp8 = {name.removesuffix(".weight") for name, x in before.items() if x.dtype == E4M3 and name not in kept}
    assert (set(got["modules_to_not_convert"]), len(got["modules_to_not_convert"])) == (fp8, len(fp8))
    with pytest.raises(jaxllm.InputError, match=f"'{DOWN}' is FP8, but '{DOWN}_scale_inv' is missing"):
        jaxllm.load(tmp_path / "b", progress=False)


def hf(tmp_path, name="v3", change=None, **config):
    """A golden checkpoint with other tensors or another config."""
    path = tmp_path / "hf"
    path.mkdir()
    tensors = read_safetensors(CHECKPOINTS / name / "model.safetensors")
    if change:
        change(tensors)
    save_file(tensors, path / "model.safetensors")
    given = json.loads((CHECKPOINTS / name / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(given))
    return path


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def damaged(tmp_path, damage, **options):
    path = made(tmp_path, **options)
    damage(path)
    return path


def spoil(file, change):
    def damage(path):
        tensors = read_safetensors(path / file)
        change(tensors)
        save_file(tensors, path / file)

    return damage


EXPERT = "model.layers.1.mlp.experts.8.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
LOAD = {  # a damaged directory, the arguments of generate, and what is said
    "a file is missing": (
        lambda p: damaged(p, lambda d: (d / "model1-mp2.safetensors").unlink()),
        [],
        "model1-mp2.*miss",
    ),
    "two sets of files": (
        lambda p: damaged(p, lambda d: (d / "model0-mp4.safetensors").touch()),
        [],
        "mp2 and mp4 of the demo's",
    ),
    "no config": (lambda p: damaged(p, lambda d: (d / "config_671B.json").unlink()), [], "no config.*json with fields"),
    "an unknown field": (made, ["--config", CHECKPOINTS / "v3" / "config.json"], "'architectures' is not a field"),
    "an impossible field": (lambda p: made(p, n_heads="many"), [], "'n_heads' is 'many', not a whole number"),
    "a config for another kind": (
        lambda p: CHECKPOINTS / "v3",
        ["--config", "x.json"],
        "only for files of DeepSeek's demo",
    ),
    "a tensor is missing": (
        lambda p: damaged(p, spoil("model1-mp2.safetensors", without("layers.0.attn.wo.weight"))),
        [],
        "model1-mp2.safetensors: tensor 'layers.0.attn.wo.weight' is missing, which model0-mp2.safetensors has",
    ),
    "an expert is missing": (
        lambda p: damaged(p, spoil("model1-mp2.safetensors", without("layers.1.ffn.experts.5.w2.weight"))),
        [],
        "needs experts 0 to 7",
    ),
    "an expert is there twice": (
        lambda p: damaged(
            p, spoil("model1-mp2.safetensors", lambda t: t.update({"layers.1.ffn.experts.0.w2.weight": np.ones(2)}))
        ),
        [],
        "'layers.1.ffn.experts.0.w2.weight' is in model0-mp2.safetensors already",
    ),
    "parts of other shapes": (
        lambda p: damaged(
            p, spoil("model0-mp2.safetensors", lambda t: t.update({"head.weight": t["head.weight"][1:]}))
        ),
        [],
        "model1-mp2.safetensors: tensor 'head.weight' has another shape",
    ),
    "a scale is missing": (
        lambda p: damaged(p, spoil("model0-mp1.safetensors", without("layers.0.ffn.w2.scale")), name="v3_fp8", n=1),
        [],
        "'layers.0.ffn.w2.weight' is FP8, but 'layers.0.ffn.w2.scale' is missing",
    ),
}
CONVERT = {
    "3 files": (hf, ["--to", "demo", "--model-parallel", 3], "3 does not divide the model's num_attention_heads, 4"),
    "8 files": (hf, ["--model-parallel", 8], "8 does not divide the model's num_attention_heads, 4"),
    "experts": (
        lambda p: hf(p, n_routed_experts=6, n_group=3),
        ["--model-parallel", 4],
        "4 does not divide the model's n_routed_experts, 6",
    ),
    "0 files": (hf, ["--to", "demo", "--model-parallel", 0], "model_parallel 0: give a number"),
    "other experts": (hf, ["--model-parallel", 2, "--n-experts", 16], "n_experts 16: the model has 8"),
    "a vocabulary": (
        lambda p: hf(p, change=lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:63]})),
        ["--model-parallel", 2],
        r"'lm_head.weight' of shape \[63, 32\]: 2 parts do not divide dimension 0",
    ),
    "blocks": (
        lambda p: CHECKPOINTS / "v3_fp8",
        ["--model-parallel", 2],
        "'model.*weight': dimension . of .* is not 2 parts of whole FP8 blocks of 128",
    ),
    "small blocks": (
        lambda p: CHECKPOINTS / "v3_fp8_small_blocks",
        ["--model-parallel", 1],
        r"\(16, 8\); the demo's are",
    ),
    "no head": (lambda p: hf(p, change=without("lm_head.weight")), ["--model-parallel", 1], "no 'lm_head.weight'"),
    "no number": (hf, ["--to", "demo"], "'demo' needs model_parallel"),
    "nothing to do": (hf, [], "give --to"),
    "a number too many": (hf, ["--to", "bfloat16", "--model-parallel", 2], "nothing else takes it"),
    "a config too many": (hf, ["--to", "bfloat16", "--config", "x"], "only to 'huggingface' takes one"),
    "not the demo's": (hf, ["--to", "huggingface"], "no file of the demo's model"),
    "an expert too many": (
        lambda p: hf(p, change=lambda t: t.update({EXPERT: np.ones(2)})),
        ["--model-parallel", 2],
        f"'{EXPERT}': the model has 8 experts only",
    ),
    "a tensor without a place": (
        lambda p: hf(p, change=lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": np.ones(2)})),
        ["--model-parallel", 2],
        "'model.layers.0.self_attn.o_proj.bias' has no place in the demo's files",
    ),
    "no scales, on the way back": (
        lambda p: damaged(p, spoil("model0-mp1.safetensors", without("layers.0.ffn.w2.scale")), name="v3_fp8", n=1),
        ["--to", "huggingface"],
        "v3_fp8-1: 'layers.0.ffn.w2.weight' is FP8, but 'layers.0.ffn.w2.scale' is missing",
    ),
    "what a config.json cannot say": (
        lambda p: made(p, name="v2", score_func="sigmoid"),
        ["--to", "huggingface"],
        "v2-2: a config.json cannot say this model's group_score; give one with --config",
    ),
    "another model": (
        lambda p: hf(p, model_type="llama"),
        ["--model-parallel", 1],
        "model_type 'llama': the demo knows",
    ),
    "scales of nothing": (
        lambda p: hf(p, "v3_fp8", without(DOWN)),
        ["--to", "bfloat16"],
        rf"'{DOWN}_scale_inv' is there, but '{DOWN.removesuffix('.weight')}(.weight)?' is missing",  # a stack has none
    ),
    "no scales": (
        lambda p: hf(p, "v3_fp8", without(f"{DOWN}_scale_inv")),
        ["--model-parallel", 1],
        f"'{DOWN}' is FP8, but '{DOWN}_scale_inv' is missing",
    ),
}


@pytest.mark.parametrize("name", [*LOAD, *CONVERT])
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path, capsys, name):
    make, options, message = (LOAD | CONVERT)[name]
    source = make(tmp_path)
    if name in LOAD:
        module, argv = jaxllm.generate, ["--model", source, "--prompt", "x", *options]
    else:
        module, argv = jaxllm.convert, [*options, "--hf-ckpt-path", source, "--save-path", tmp_path / "out"]
    code = execute(module.parser(), module.run, [*map(str, argv)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert re.search(message, err), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default")
def test_the_flags_of_the_demos_own_script(tmp_path, capsys):
    paths = ["--hf-ckpt-path", CHECKPOINTS / "v3", "--save-path", tmp_path / "b"]
    code, (out, err) = converted_by(*paths, "--n-experts", 8, "--model-parallel", 2), capsys.readouterr()
    assert (code, out, err.count("\n")) == (0, "", 1)
    assert sorted(file.name for file in (tmp_path / "b").glob("*.safetensors")) == [
        "model0-mp2.safetensors",
        "model1-mp2.safetensors",
    ]
    assert converted_by(CHECKPOINTS / "v3_half_rope", "--to", "demo", tmp_path / "c", "--model-parallel", 1) == 0
    assert capsys.readouterr().err.startswith("warning: the demo's ModelArgs cannot say this model's interleaved")


def test_blocks_that_lie_across_files_are_refused(tmp_path):
    """As the demo's own script makes them where the number of scales divides, but that of rows to a scale does not."""
    tensors = {"layers.0.ffn.w1.weight": np.ones((192, 4), E4M3), "layers.0.ffn.w1.scale": np.ones((2, 1), np.float32)}
    path = demo_files(tmp_path / "a", tensors, 2)
    with pytest.raises(jaxllm.InputError, match="w1.weight': dimension 0 of 192 is not 2 parts of whole FP8 blocks"):
        demo_tensors(path)


def test_names_are_those_of_the_oracle(tmp_path, fp8):
    convert(fp8, tmp_path / "b", to="demo", model_parallel=1, progress=False)
    assert whole(tmp_path / "b").keys() == demo_names(read_safetensors(fp8 / "model.safetensors"), 2).keys()
