"""UQFF against mistral.rs: files of three of its versions, what it computes with them, and what it makes of ours.

tests/reference/uqff_goldens.py wrote the files, uqff_check.py the outcome of ours in mistral.rs.
"""

import json
import re
import shutil
import struct
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import tiny_hf
from compiled import dequantized
from covering import in_turn, some
from quantized_writers import (
    read_safetensors,
    unpack_f8q8,
    unpack_hqq,
    unpack_mlx,
    unpack_mxfp4,
    write_safetensors,
)

import jaxllm
from jaxllm.checkpoint import exports_uqff_legacy as legacy
from jaxllm.checkpoint import uqff, uqff_legacy
from jaxllm.checkpoint.exports_uqff import kind, lay
from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.convert import convert
from jaxllm.errors import InputError
from jaxllm.requantize import quantize

ROOT = Path(__file__).parent / "golden" / "uqff"
PROMPT = [3, 17, 5, 40, 22, 9]
GOLDENS = {
    (str(file.parent.relative_to(ROOT)), type): entry
    for file in sorted(ROOT.glob("*/*/golden.json"))
    for type, entry in json.loads(file.read_text()).items()
}
ANSWERED = [name for name, entry in GOLDENS.items() if "steps" in entry]
# Each model of each version once; what a type decodes to is compared below with decoders that are not ours.
FEW = {name: (name, type) for name, type in ANSWERED}.values()
GGML = {f"q{n}" for n in ("4_0", "4_1", "5_0", "5_1", "8_0", "8_1", "2k", "3k", "4k", "5k", "6k", "8k")}
MESHES = ["tp=2", "tp=4", "tp=8", "ep=2,tp=2"]
SHARDED = [("1.2/llama", "afq4"), ("1.2/llama", "fp8"), ("1.2/llama", "f8q8"), ("1.2/llama", "hqq4")]
SHARDED += [("1.2/qwen3", "q4k"), ("1.2/qwen3_moe", "q4_0"), ("0.1/qwen3_moe", "afq4"), ("0.1/phi3", "fp8")]


def path_of(name: str, type: str) -> Path:
    return ROOT / name / f"{type}-0.uqff"


def tolerance(version: str, type: str) -> float:
    """mistral.rs rounds activations for GGML's types, F8Q8 also their scales; 0.6.0 multiplies HQQ in fewer bits, and
    0.8.4 has AFQ's scales in float16."""
    if type in GGML:
        return 0.15
    return {"f8q8": 0.3, "hqq4": 5e-4 if version == "1.2" else 0.02, "afq4": 2e-3}.get(type, 5e-4)


@pytest.fixture(scope="module")
def decoded():
    """Models whose weights were decoded. Those of a kind differ in nothing but numbers: one's programs do for all."""
    models = {}

    def load(path, **options):
        loaded = jaxllm.load(path, weights="float32", dtype="float32", progress=False, **options)
        kind = repr(loaded.config), *(leaf.shape for leaf in loaded.programs.leaves)
        compiled = models.setdefault(kind, loaded)
        compiled.programs.leaves = loaded.programs.leaves
        return compiled

    return load


@pytest.mark.parametrize(("name", "type"), some(ANSWERED, [*FEW]))
def test_answers_are_those_of_mistral_rs(decoded, name, type):
    steps = GOLDENS[name, type]["steps"]
    tokens = [*PROMPT, *(step["tokens"][0] for step in steps[:-1])]
    got = decoded(path_of(name, type)).logits([tokens])[0, len(PROMPT) - 1 :]
    for step, logits in zip(steps, np.asarray(got), strict=True):
        ours = logits if "logits" in step else logits - np.log(np.exp(logits).sum())
        expected = step["logits" if "logits" in step else "logprobs"]
        np.testing.assert_allclose(ours[step["tokens"]], expected, atol=tolerance(name[:3], type))


@pytest.mark.parametrize(
    ("case", "mesh"), some(in_turn(SHARDED, *MESHES), [(SHARDED[3], "tp=8"), (SHARDED[6], "ep=2,tp=2")])
)
def test_a_mesh_changes_nothing(load_once, decoded, case, mesh):
    alone = decoded(path_of(*case)).logits([PROMPT])
    got = load_once(path_of(*case), dtype="float32", weights="packed", mesh=mesh).logits([PROMPT])
    np.testing.assert_allclose(got, alone, atol=1e-4)


def ggml_values(blocks: np.ndarray, type: str) -> np.ndarray:
    """Rows of bytes as floats; gguf-py has no decoder for the two types that only activations are rounded to."""
    scale = {"Q8_1": np.float16, "Q8_K": np.float32}.get(type)
    if scale is None:
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type])
    size, nbytes, begin = (32, 36, 4) if type == "Q8_1" else (256, 292, 4)
    grid = blocks.reshape(-1, nbytes)
    first = grid[:, : np.dtype(scale).itemsize].copy().view(scale).astype(np.float32)
    return (first * grid[:, begin : begin + size].copy().view(np.int8)).reshape(len(blocks), -1)


def independent(tensors: dict[str, np.ndarray], key: str) -> np.ndarray:
    """A layer of a file of version 1.x, decoded without jaxllm."""
    own = {name.removeprefix(f"{key}.weight"): array for name, array in tensors.items() if name.startswith(f"{key}.w")}
    part = {name.removeprefix("."): array for name, array in own.items()}
    match int(own[".format"]):
        case 0:
            type, shape = gguf.GGMLQuantizationType(int(part["dtype"])).name, part["shape"].tolist()
            return ggml_values(own[""].reshape(np.prod(shape[:-1]), -1), type).reshape(shape)
        case 1:
            return own[""]
        case 2:
            named = {"W_q": own[""], "scale": part["scales"], "zero": part["zeros"], "nbits": part["bits"]}
            return unpack_hqq(named | {name: part[name] for name in ("axis", "group_size", "shape")}, {})
        case 3:
            return own[""].astype(np.float32) * part["dequant_w_scale"]
        case 4:
            words = {"weight": own[""], "scales": part["scales"], "biases": part["biases"]}
            return unpack_mlx(words, {"bits": int(part["bits"])})
        case 5:
            return unpack_f8q8({"blocks": own[""].reshape(-1, 33), "shape": part["shape"]}, {})
        case 6:
            return unpack_mxfp4({"blocks": own[""], "scales": part["scales"]}, {})
    raise AssertionError


@pytest.mark.parametrize(
    ("name", "type"), [(n, t) for n, t in GOLDENS if n in ("1.2/llama", "1.2/qwen3", "1.2/gpt_oss")]
)
@pytest.mark.optimized
def test_values_are_those_of_independent_decoders(name, type):
    weights, (tensors, _) = open_checkpoint(path_of(name, type)).tensors, read_safetensors(path_of(name, type))
    keys = [key.removesuffix(".weight.format") for key in tensors if key.endswith(".weight.format")]
    kinds = {}
    for key in keys:  # one layer of each kind and rank
        weight = weights[f"{key}.weight"]
        kinds[weight.format, len(weight.shape)] = key
    for key in kinds.values():
        ours = dequantized(jax.tree.map(np.asarray, weights[f"{key}.weight"]))
        np.testing.assert_array_equal(ours, independent(tensors, key), err_msg=key)


UNANSWERED = [name for name, entry in GOLDENS.items() if "steps" not in entry]


@pytest.mark.parametrize(("name", "type"), UNANSWERED)
def test_layers_that_mistral_rs_cannot_run_stand_for_the_source(tmp_path, name, type):
    model = name.split("/")[1]
    golden = {"gpt_oss": ROOT.parent / "gpt_oss/mxfp4", "qwen2": ROOT.parent / "checkpoints/qwen2"}.get(model)
    source = open_checkpoint(golden or tiny_hf.write(tmp_path / model, model)).tensors
    checked = 0
    for key, weight in open_checkpoint(path_of(name, type)).tensors.items():
        if len(weight.shape) == 1 or key.endswith(".bias"):
            continue
        single = [key.replace(".experts.", f".experts.{i}.") for i in range(weight.shape[0])]
        known = source.get(key) or source.get(key.removesuffix(".weight"))
        parts = [known] if known is not None else [source[each] for each in single]
        wanted = np.stack([dequantized(jax.tree.map(np.asarray, part)) for part in parts])
        off = dequantized(jax.tree.map(np.asarray, weight)) - wanted.reshape(weight.shape)
        assert np.linalg.norm(off) < 0.25 * np.linalg.norm(wanted), key
        checked += 1
    assert checked > 8


def test_layers_of_every_kind_are_there():
    files = [read_safetensors(path_of(*case))[0] for case in GOLDENS if case[0].startswith("1.2")]
    codes = {int(array) for tensors in files for name, array in tensors.items() if name.endswith(".weight.format")}
    assert codes == set(range(7))
    assert {name[:3] for name, _ in GOLDENS} == {"0.1", "1.0", "1.2"}


@pytest.mark.parametrize(
    ("name", "type"), [case for case in GOLDENS if not case[0].startswith("0") and case[1] != "f8q8"]
)
def test_layers_are_written_as_mistral_rs_writes_them(name, type):
    """Byte for byte. Not HQQ's whose groups run across parts of rows, which are read with a scale for each value; nor
    F8Q8's, whose scales are read as the floats that they stand for."""
    weights, (tensors, _) = open_checkpoint(path_of(name, type)).tensors, read_safetensors(path_of(name, type))
    keys = [key.removesuffix(".weight.format") for key in tensors if key.endswith(".weight.format")]
    compared = 0
    for key in keys:
        weight = weights[f"{key}.weight"]
        if type.startswith("hqq") and (weight.format.startswith("float") or weight.shape[-2] % 64):
            continue
        theirs = {end: array for end, array in tensors.items() if end.startswith(f"{key}.weight")}
        ours = {key + end: array.read() for end, array in lay(weight, weight.shape).items()}
        if theirs[f"{key}.weight.format"] == 1 or tensors.get(f"{key}.weight.dtype") == 0:
            continue  # plain numbers, which we write in the model's dtype
        assert sorted(ours) == sorted(theirs)
        for end, array in theirs.items():
            inverse = end.endswith("quant_scale")  # of a scale, before that is rounded
            np.testing.assert_allclose(ours[end], array, rtol=1e-6 if inverse else 0, err_msg=end)
            assert ours[end].dtype == array.dtype
        compared += 1
    assert compared or (name, type) in (("1.2/phi3", "hqq4"), ("1.2/qwen2", "afq4"))


@pytest.mark.parametrize(("name", "type"), [case for case in GOLDENS if case[0].startswith("0") and case[1] != "hqq4"])
def test_old_layers_are_written_as_mistral_rs_writes_them(name, type):
    tensors, _ = read_safetensors(path_of(name, type))
    weights = uqff_legacy.legacy_weights(*uqff.read_folder(path_of(name, type)))
    named = [key for key in weights if key.endswith(".weight")]
    for number, key in enumerate(named):
        laid = lay(weights[key], weights[key].shape)
        bias = weights.get(key.removesuffix("weight") + "bias")
        ours = legacy.layer(laid, kind(weights[key]).code, None if bias is None else bias.values).read()
        changed = np.flatnonzero(ours[4:] != tensors[str(number)][4:])  # the first word is the version
        inverse = ours.size - 8 - 4 if type == "fp8" else ours.size  # of a scale, before that is rounded
        assert set(changed) <= set(range(inverse, inverse + 4)), key
    assert len(named) == len(tensors)


def blob(code: int, *parts: bytes) -> np.ndarray:
    """A layer of version 0.2 without bias, as the specification has it."""
    return np.frombuffer(struct.pack("<IBB", 0x200, code, 0) + b"".join(parts), np.uint8)


def tensor(array: np.ndarray, code: int) -> bytes:
    data = array.tobytes()
    return struct.pack(f"<III{array.ndim}I", len(data), code, array.ndim, *array.shape) + data


def test_kinds_that_only_version_0_2_has(tmp_path):
    """Files of 0.2 are not to be had: a layer each of F8Q8, MXFP4 and plain numbers, from those of 1.2, by hand."""
    folder = tmp_path / "old"
    shutil.copytree(ROOT / "0.1/llama", folder)
    old = read_safetensors(folder / "fp8-0.uqff")[0]
    f8q8, mxfp4 = (read_safetensors(path_of("1.2/llama", type))[0] for type in ("f8q8", "mxfp4"))
    q, k, v = (f"model.layers.0.self_attn.{p}_proj" for p in "qkv")
    shape, count = (f8q8[f"{q}.weight.{part}"] for part in ("shape", "num_blocks"))
    dims = struct.pack("<III", len(shape), *shape)
    old["1"] = blob(5, struct.pack("<I", int(count)), dims, f8q8[f"{q}.weight"].tobytes())
    old["2"] = blob(6, tensor(mxfp4[f"{k}.weight"], 0), tensor(mxfp4[f"{k}.weight.scales"], 0))
    plain = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    old["3"] = blob(1, tensor(plain, 6))
    write_safetensors(folder / "fp8-0.uqff", old)
    found = open_checkpoint(folder / "fp8-0.uqff").tensors
    for key, there in ((q, independent(f8q8, q)), (k, independent(mxfp4, k)), (v, plain)):
        ours = dequantized(jax.tree.map(np.asarray, found[f"{key}.weight"]))
        np.testing.assert_array_equal(ours, there)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The model that the golden files were made of."""
    path = tiny_hf.write(tmp_path_factory.mktemp("uqff") / "llama", "llama", intermediate_size=64, vocab_size=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "1.2/llama" / name, path)
    return path


@pytest.mark.parametrize("type", some(["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"], ["q4_1", "q8_0"]))
def test_encoders_that_only_round_give_mistral_rs_bytes(llama, tmp_path, type):
    convert(llama, tmp_path / "out", to=type, container="uqff", progress=False)
    ours, theirs = (read_safetensors(f)[0] for f in (tmp_path / f"out/{type}-0.uqff", path_of("1.2/llama", type)))
    keys = [key for key in theirs if ".layers." in key]
    assert len(keys) == 7 * 4
    for key in keys:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


WRITTEN = [("afq4", "1.2"), ("hqq4", "1.2"), ("f8q8", "1.2"), ("q4_0", "0.2"), ("hqq8", "0.2"), ("mxfp4", "0.2")]
WRITTEN = some(WRITTEN, [("afq4", "1.2"), ("hqq4", "1.2"), ("q4_0", "0.2"), ("hqq8", "0.2")])


@pytest.mark.parametrize(("type", "version"), WRITTEN)
def test_what_is_written_is_the_quantized_model(decoded, llama, tmp_path, type, version):
    convert(llama, tmp_path / "out", to=type, container="uqff", uqff_version=version, progress=False)
    got = decoded(tmp_path / "out").logits([PROMPT])
    if type == "hqq4":  # whose groups run across rows in UQFF, and not where we hold them: compared with the source
        expected, most = decoded(llama).logits([PROMPT]), 1.0
    else:
        expected, most = decoded(llama, quantize=type).logits([PROMPT]), 1e-5 if version == "1.2" else 1.0
    np.testing.assert_allclose(got, expected, atol=most)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {f"{type}-0.uqff", "residual.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert ("uqff_report.json" in files) == (version == "1.2")


def test_the_report_says_what_mistral_rs_said(llama, tmp_path):
    convert(llama, tmp_path / "out", to="q8_0", container="uqff", progress=False)
    [ours] = json.loads((tmp_path / "out/uqff_report.json").read_text())["outputs"]
    [theirs] = json.loads((ROOT / "1.2/llama/uqff_report.json").read_text())["outputs"]
    modules = [{detail["module"] for detail in each["layer_details"]} for each in (ours, theirs)]
    assert modules[0] == modules[1]
    assert ours["actual_counts"] == {"q8_0": 9} and ours["shards"] == ["q8_0-0.uqff"]
    assert theirs.keys() - ours.keys() == set()


def test_shards_are_found_and_written(llama, tmp_path):
    convert(llama, tmp_path / "one", to="afq4", container="uqff", progress=False)
    convert(llama, tmp_path / "many", to="afq4", container="uqff", max_shard_size=6000, progress=False)
    files = sorted((tmp_path / "many").glob("*.uqff"))
    assert len(files) > 2
    one, many = (open_checkpoint(tmp_path / name).tensors for name in ("one", "many"))
    assert one.keys() == many.keys()
    for name, weight in one.items():
        pairs = zip(jax.tree.leaves(weight), jax.tree.leaves(many[name]), strict=True)
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
    middle = tmp_path / "many/afq4-1.uqff"
    assert open_checkpoint(middle).tensors.keys() == one.keys()
    middle.unlink()
    with pytest.raises(InputError, match=r"afq4-1\.uqff: missing"):
        open_checkpoint(tmp_path / "many")
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(InputError, match="is in another file already"):
        open_checkpoint(tmp_path / "many")


def test_uqff_becomes_other_checkpoints(load_once, tmp_path):
    """GGML's blocks stay what they are on the way into a GGUF file and back."""
    shutil.copytree(ROOT / "1.2/llama", tmp_path / "source")
    (tmp_path / "source/tokenizer.json").unlink()  # of whole words, which GGUF files do not have
    source = tmp_path / "source/q8_0-0.uqff"
    convert(source, tmp_path / "llama.gguf", to="q8_0", container="gguf", progress=False)
    convert(tmp_path / "llama.gguf", tmp_path / "again", to="q8_0", container="uqff", progress=False)
    ours, theirs = (read_safetensors(f)[0] for f in (tmp_path / "again/q8_0-0.uqff", source))
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_what_we_write_was_read_by_mistral_rs():
    """Where it could not: DeepSeek, MXFP4 beside biases and AFQ experts, it does not run its own files either."""
    outcome = json.loads((ROOT / "check.json").read_text())
    assert len(outcome) > 50
    own = {name.split("/")[1] + " " + type for (name, type), entry in GOLDENS.items() if not entry["loads"]}
    differences = {name: value for name, value in outcome.items() if isinstance(value, float)}
    unread = {name for name in outcome if name not in differences}
    assert {name[4:] for name in unread if name.startswith("1.2")} <= own
    assert max(differences.values()) < 0.3
    exact = [value for name, value in differences.items() if re.match(r"1\.2 (phi3|llama afq)", name)]
    assert len(exact) == 7 and max(exact) < 3e-3


def test_rows_whose_groups_run_across_them_are_looked_up():
    weight = quantize(np.random.default_rng(0).normal(size=(192, 64)).astype(np.float32), "hqq4")
    ids = np.array([[0, 191, 64], [2, 3, 130]])
    tensors = {f"x{end}": array.read() for end, array in lay(weight, weight.shape).items()}
    np.testing.assert_array_equal(weight.take(ids).dequantize(), independent(tensors, "x")[ids])


def test_old_files_have_biases(tmp_path):
    source = ROOT.parent / "checkpoints/qwen2"
    convert(source, tmp_path / "out", to="q8_0", container="uqff", uqff_version="0.2", progress=False)
    ours, theirs = (open_checkpoint(path).tensors for path in (tmp_path / "out", source))
    biases = [name for name in theirs if name.endswith(".bias")]
    assert len(biases) == 6
    for name in biases:
        np.testing.assert_array_equal(np.asarray(ours[name].values), np.asarray(theirs[name].values))


@pytest.mark.parametrize("type", ["hqq4", "fp8", "f8q8"])
def test_stacks_that_uqff_cannot_hold(tmp_path, type):
    source = tiny_hf.write(tmp_path / "moe", "qwen3_moe")
    with pytest.raises(InputError, match="experts.*stack"):
        convert(source, tmp_path / "out", to=type, container="uqff", progress=False)


def test_types_and_versions_that_uqff_does_not_have(llama, tmp_path):
    with pytest.raises(InputError, match="uqff cannot hold nf4"):
        convert(llama, tmp_path / "out", to="nf4", container="uqff")
    with pytest.raises(InputError, match=r"uqff_version '0\.3'"):
        convert(llama, tmp_path / "out", to="q4_0", container="uqff", uqff_version="0.3")
    with pytest.raises(InputError, match=r"uqff_version '0\.2': only UQFF"):
        convert(llama, tmp_path / "out", to="q4_0", container="gguf", uqff_version="0.2")


@pytest.mark.parametrize("type", some(["q8_0", "afq4"], ["afq4"]))
def test_rows_in_the_order_of_gguf(decoded, tmp_path, type):
    """mistral.rs keeps them as they are in a GGUF file that it converts, neighbours being pairs."""
    shutil.copytree(ROOT / "1.2/llama", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"_mistralrs_qk_rope_layout": "adjacent"}))
    file = tmp_path / f"model/{type}-0.uqff"
    tensors, _ = read_safetensors(file)
    for part, heads in (("q", tiny_hf.HEADS), ("k", tiny_hf.KV_HEADS)):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        for key in (name, f"{name}.scales", f"{name}.biases"):
            if key in tensors:
                halves = tensors[key].reshape(heads, 2, tiny_hf.HEAD_DIM // 2, -1)
                tensors[key] = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensors[key].shape)
    write_safetensors(file, tensors)
    before, after = (np.asarray(decoded(path).logits([PROMPT])) for path in (path_of("1.2/llama", type), file))
    np.testing.assert_array_equal(before, after)


def broken(folder: Path, change) -> Path:
    """The file of a copy of llama in Q4_0, with its tensors changed."""
    shutil.copytree(ROOT / "1.2/llama", folder)
    for other in folder.glob("*.uqff"):
        if other.name != "q4_0-0.uqff":
            other.unlink()
    tensors, _ = read_safetensors(folder / "q4_0-0.uqff")
    change(tensors)
    write_safetensors(folder / "q4_0-0.uqff", tensors)
    return folder


def number(name: str, value: int, dtype=np.uint32):
    return lambda tensors: tensors.update({name: np.array(value, dtype)})


Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGES = [
    (number("uqff.version.major", 2), r"UQFF version 2\.2\.0 is not supported; 0\.1 to 1\.2 are"),
    (number("uqff.version.minor", 3), r"UQFF version 1\.3\.0 is not supported"),
    (lambda t: t.pop("uqff.version.major"), "the version is missing"),
    (number(f"{Q}.format", 7, np.uint8), "has the unknown format 7"),
    (lambda t: t.update({f"{Q}.format": np.zeros(0, np.uint8)}), r"is uint8 of shape \[0\], not one byte"),
    (number(f"{Q}.format", np.nan, np.float32), r"is float32 of shape \[\], not one byte"),
    (number(f"{Q}.dtype", 99), "the type of number 99 is not supported"),
    (lambda t: t.pop(f"{Q}.shape"), r"'.*q_proj\.weight\.shape' is missing"),
    (lambda t: t.update({f"{Q}.shape": np.array([64, 65], np.uint32)}), "impossible for Q4_0"),
    (lambda t: t.update({f"{Q}.shape": np.array([64, 32], np.uint32)}), r"has shape \[2304\], expected \[1152\]"),
    (lambda t: t.update({"model.norm.weight": np.ones(64, np.float32)}), "is in residual.safetensors too"),
    (lambda t: [t.pop(key) for key in list(t) if key.startswith(Q)], "missing tensor for layers.0.self_attn.q_proj"),
]


@pytest.mark.parametrize(("change", "says"), DAMAGES)
def test_a_damaged_file_is_one_line(tmp_path, change, says):
    folder = broken(tmp_path / "model", change)
    with pytest.raises(InputError, match=says) as error:
        jaxllm.load(folder, progress=False)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


OLD_DAMAGES = [
    (lambda t: t.pop("3"), "layer 3 of 7 is missing"),
    (lambda t: t.pop("7"), "7 layers, but 8 matrices of the model are not in residual.safetensors"),
    (lambda t: t.update({"1": t["2"]}), r"layer 1 is \[32, 64\], '.*q_proj\.weight' \[64, 64\]"),
    (lambda t: t.update({"1": t["1"][:-5]}), "layer 1: cut short or damaged"),
    (lambda t: t.update({"1": np.append(t["1"], np.uint8(0))}), "layer 1: damaged: 1 bytes behind its end"),
    (lambda t: t.update({"1": np.insert(t["1"][4:], 0, [0, 3, 0, 0])}), r"layer 1: UQFF version 0\.3\.0"),
    (lambda t: t.update({"1": np.insert(t["1"][5:], 0, [0, 1, 0, 0, 9])}), "layer 1: the unknown format 9"),
    (lambda t: t.update({"1": t["1"].view(np.int8)}), "layer 1: damaged: int8 of shape"),
    (lambda t: t.update({"1": t["1"][None]}), r"layer 1: damaged: uint8 of shape \[1, "),
]


@pytest.mark.parametrize(("change", "says"), OLD_DAMAGES)
def test_a_damaged_old_file_is_one_line(tmp_path, change, says):
    folder = tmp_path / "old"
    shutil.copytree(ROOT / "0.1/llama", folder)
    tensors, _ = read_safetensors(folder / "afq4-0.uqff")
    change(tensors)
    write_safetensors(folder / "afq4-0.uqff", tensors)
    with pytest.raises(InputError, match=says) as error:
        open_checkpoint(folder / "afq4-0.uqff")
    assert "\n" not in str(error.value)


def test_files_that_are_missing_or_cut_short(tmp_path):
    folder = broken(tmp_path / "model", lambda tensors: None)
    file = folder / "q4_0-0.uqff"
    data = file.read_bytes()
    for length in (4, 100, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"q4_0-0\.uqff: "):
            open_checkpoint(folder)
    file.write_bytes(data)
    (folder / "q8_0-0.uqff").write_bytes(data)
    with pytest.raises(InputError, match=r"several types; name one of q4_0-0\.uqff, q8_0-0\.uqff"):
        open_checkpoint(folder)
    with pytest.raises(InputError, match=r"q2k-0\.uqff: no such file"):
        open_checkpoint(folder / "q2k-0.uqff")
    (folder / "residual.safetensors").unlink()
    with pytest.raises(InputError, match=r"residual\.safetensors: no such file; UQFF files hold only"):
        open_checkpoint(file)
