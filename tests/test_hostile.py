"""What strangers may put into files, and what the harness (tests/fuzz) found: each is an answer or one line."""

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_demo_layout
import tiny_hf
from covering import FULL
from quantized_writers import quantized_checkpoint, read_safetensors, write_safetensors
from test_tokenizer import HELLO, render
from tiny_tokenizer import tokenizer as tiny_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models

import jaxllm
from jaxllm.checkpoint.adapter_files import read_adapter
from jaxllm.checkpoint.adapter_pairs import low_rank
from jaxllm.checkpoint.adapting import adapter
from jaxllm.checkpoint.gguf import MOST_ENTRIES, MOST_ITEMS, open_gguf
from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.confined import ask
from jaxllm.errors import InputError
from jaxllm.files import MOST_TEXT, part_of, read_small
from jaxllm.finetuning.data import read_examples
from jaxllm.importance import read_importance
from jaxllm.layers.parameter import parameters
from jaxllm.parallel import make_mesh
from jaxllm.patterns import matches, occurs
from jaxllm.placing import FileArray
from jaxllm.tokenizer import Tokenizer
from jaxllm.tokenizer.gguf import LONGEST, build
from jaxllm.topology import Topology

TESTS = Path(__file__).parent
LLAMA = TESTS / "golden" / "checkpoints" / "llama"


def test_messages_are_one_line_that_steers_no_terminal():
    assert str(InputError("a\nb\x1b[2J\u2028\ud800é")) == r"a\nb\x1b[2J\u2028\ud800é"
    cut = str(InputError("a" * 9000 + "b" * 9000))
    assert re.fullmatch(r"a+ \.\.\. b+", cut) and len(cut) < 1600


# ---- files ----------------------------------------------------------------------------------------------------------


def checkpoint(path):
    path.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (path / name).write_bytes((LLAMA / name).read_bytes())
    return path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_link_leads_outside(tmp_path, name):
    inside, outside = checkpoint(tmp_path / "in"), checkpoint(tmp_path / "out")
    (inside / name).unlink()
    (inside / name).symlink_to(outside / name)
    with pytest.raises(InputError, match=re.escape(f"{name}: a link to {outside / name}, outside of the checkpoint")):
        open_checkpoint(inside)
    (inside / name).unlink()
    (inside / f"another-{name}").write_bytes((outside / name).read_bytes())
    (inside / name).symlink_to(f"another-{name}")
    assert open_checkpoint(inside).tensors


def test_what_is_linked_in_the_hubs_cache_is_read(tmp_path):
    folder, blobs = checkpoint(tmp_path / "models--a--b" / "snapshots" / "0123"), tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(folder.iterdir()):
        file.rename(blobs / f"{number}")
        file.symlink_to(f"../../blobs/{number}")
    assert open_checkpoint(folder).tensors
    (tmp_path / "x.json").write_text("{}")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../../../x.json")
    with pytest.raises(InputError, match="outside of the checkpoint"):
        open_checkpoint(folder)


def test_an_index_does_not_lead_outside_by_a_link(tmp_path):
    inside, outside = checkpoint(tmp_path / "in"), checkpoint(tmp_path / "out")
    names = list(read_safetensors(inside / "model.safetensors")[0])
    (inside / "model.safetensors").unlink()
    (inside / "x.safetensors").symlink_to(outside / "model.safetensors")
    (inside / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "x.safetensors")})
    )
    with pytest.raises(InputError, match="x.safetensors: a link to .*, outside of the checkpoint"):
        open_checkpoint(inside)


@pytest.mark.parametrize("name", ["a" * 5000, "\ud800", "nul\0l"])
def test_an_index_names_what_is_no_name_of_a_file(tmp_path, name):
    folder = checkpoint(tmp_path / "in")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(InputError, match="tensor 'x' is said to be in .*, which does not exist"):
        open_checkpoint(folder)


def test_a_config_that_the_user_names_may_be_a_link(tmp_path):
    path = test_demo_layout.made(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "args.json").symlink_to(path / "config_671B.json")
    assert open_checkpoint(path, config=tmp_path / "elsewhere" / "args.json").tensors


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="config.json: a pipe or a device, not a file"):
        read_small(tmp_path / "config.json")
    with pytest.raises(InputError, match="a pipe or a device"):
        part_of(Path("/dev/zero"))


def test_what_is_parsed_as_a_whole_has_a_limit(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MOST_TEXT + 1)
    with pytest.raises(InputError, match="config.json: larger than 24 MiB"):
        read_small(tmp_path / "config.json")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((MOST_TEXT + 1).to_bytes(8, "little"))
        file.truncate(MOST_TEXT + 100)
    (tmp_path / "config.json").write_bytes((LLAMA / "config.json").read_bytes())
    with pytest.raises(InputError, match="a header of 25165825 bytes, which no such file has"):
        open_checkpoint(tmp_path)


def test_a_file_that_is_cut_after_it_was_opened(tmp_path):
    (tmp_path / "x").write_bytes(bytes(64))
    array = FileArray(tmp_path / "x", 0, (16,), np.dtype(np.float32))
    (tmp_path / "x").write_bytes(bytes(63))
    with pytest.raises(InputError, match="x: was cut short while it was read"):
        array.read()


# ---- counts ---------------------------------------------------------------------------------------------------------


def gguf_header(path, tensors, keys, rest=b"", size=0):
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest)
        file.truncate(max(size, file.tell()))
    return path


def ints(key, count):
    return struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, count)


def test_counts_that_would_take_for_ever_are_refused(tmp_path):
    size, many = 1 << 26, MOST_ENTRIES + 1
    for tensors, keys in ((many, 0), (0, many)):
        with pytest.raises(InputError, match=f"{many} announced before offset"):
            open_gguf(gguf_header(tmp_path / "x.gguf", tensors, keys, size=size))
    half = MOST_ITEMS // 2 + 1  # no list has too many items, but all together have
    rest = ints(b"a", half) + bytes(half) + ints(b"b", half)
    with pytest.raises(InputError, match=f"{half} announced before offset"):
        open_gguf(gguf_header(tmp_path / "x.gguf", 0, 2, rest, size))
    with (tmp_path / "i.imatrix").open("wb") as file:
        file.write(struct.pack("<ii", many, 1))
        file.truncate(size)
    with pytest.raises(InputError, match=f"{many} announced before offset"):
        read_importance(tmp_path / "i.imatrix")


def test_tokens_are_not_longer_than_merges_can_be_found_for():
    key = "tokenizer.ggml."
    metadata = {key + "model": "llama", key + "tokens": ["<unk>", "a" * (LONGEST + 1)], key + "scores": [0.0, 0.0]}
    with pytest.raises(InputError, match=f"tokens has one of {LONGEST + 1} characters"):
        build(metadata)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "suffix"), [("gptq-4", "scales"), ("bnb-nf4", "weight.absmax"), ("mlx-4", "biases")]
)
def test_scales_that_are_not_finite_are_named(tmp_path, format, suffix):
    plain = tiny_hf.write(tmp_path / "source", "llama")
    folder, _ = quantized_checkpoint(plain, tmp_path, format, np.random.default_rng(0))
    file = next(folder.glob("*.safetensors"))
    tensors = read_safetensors(file)[0]
    name = f"model.layers.0.mlp.down_proj.{suffix}"
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = np.inf
    write_safetensors(file, tensors)
    message = r"tensor 'model.layers.0.mlp.down_proj.weight': 1 of the numbers in its (scales|biases) are inf"
    with pytest.raises(InputError, match=message):
        jaxllm.load(folder, progress=False)


def test_bytes_of_four_bit_codes_are_counted(tmp_path):
    """16 * 16 * 4 bytes are right for 64 x 32 codes, but a tensor with one axis of 16 has 64."""
    plain = tiny_hf.write(tmp_path / "source", "llama")
    folder, _ = quantized_checkpoint(plain, tmp_path, "bnb-nf4", np.random.default_rng(0))
    file = next(folder.glob("*.safetensors"))
    tensors = dict(read_safetensors(file)[0])
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros(16, np.float32)
    write_safetensors(file, tensors)
    with pytest.raises(InputError, match="weight has 16 entries of float32, but its quant_state says 32 x 64"):
        open_checkpoint(folder)


# ---- patterns -------------------------------------------------------------------------------------------------------

NAME = "model.layers.10.self_attn.q_proj"


PATTERNS = (".*q_proj", "q_proj", r"model\.layers\.(9|10)\..*(q|k|v)_proj$", "((((mo?)*d)+)*)el", "^((?!lm_head).)*$")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_mean_in_python(pattern):
    for text in (NAME, "lm_head", ""):
        assert matches(pattern, text) == (re.match(pattern, text) is not None)
        assert occurs(pattern, text) == (re.search(pattern, text) is not None)


def test_a_pattern_that_could_go_on_for_ever_ends():
    with pytest.raises(
        InputError, match="the pattern '.*': takes more than 2 seconds of computing, or more than 512 MiB"
    ):
        matches("(.|.)*!", NAME)
    with pytest.raises(InputError, match=r"the pattern '.*': takes \d\.\d seconds of computing for one name"):
        matches("(a|a)*!", "a" * 22)


@pytest.mark.parametrize("pattern", ["(", "(" * 3000, "a{99999999999}", "a" * 3000])
def test_what_is_no_pattern_is_one_line(pattern):
    with pytest.raises(InputError, match="is no regular expression|which no pattern of names is"):
        matches(pattern, NAME)


# ---- templates ------------------------------------------------------------------------------------------------------

DOUBLED = "{% set ns = namespace(x='x' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
HOSTILE = {
    "endless loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "2 seconds"),
    "powers": ("{{ 10 ** 10 ** messages | length }}{% set n = 10 ** 9 %}{{ 10 ** n }}", "2 seconds"),
    "text": ("{{ 'x' * 10 ** 10 }}", "memory"),
    "filters": ("{{ 'x' | center(10 ** 10) }}", "memory"),
    "doubled text": (DOUBLED, "memory"),
    "lists": ("{{ [0] * 10 ** 10 }}", "memory"),
    "much text": ("{{ 'x' * 10 ** 7 }}", "writes 10000000 characters"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "nested text": ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "recursion|nested|memory"),
}


# Of what takes for ever, 2 seconds each, the pattern above is one: all requests have the same limits.
@pytest.mark.parametrize("name", [name for name in HOSTILE if HOSTILE[name][1] != "2 seconds" or FULL])
def test_a_template_cannot_take_all_time_or_memory(name):
    source, message = HOSTILE[name]
    with pytest.raises(InputError, match=f"chat template: .*({message})"):
        render(source)
    assert render("{{ messages[0].content }}") == HELLO[0]["content"]  # it works again


def test_only_what_json_can_say_is_given_to_a_template():
    with pytest.raises(InputError, match="only what JSON can say can be given: "):
        render("{{ x }}", x=object())


def test_the_process_with_limits_ends_with_its_parent():
    code = "from jaxllm.confined import _running, ask; ask('search', pattern='a', text='a', match=True)"
    code += "; print(*(p.pid for p in _running.values()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert not Path("/proc", done.stdout.strip()).exists() and done.stderr == ""
    assert ask("search", pattern="a", text="b", match=False) is False


# ---- tokenizers -----------------------------------------------------------------------------------------------------

GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
REPEATED = {"type": "Split", "pattern": {"Regex": "(a+)+c"}, "behavior": "Isolated", "invert": False}
PADDING = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>", "pad_to_multiple_of": None}


def tokenizer_with(folder, **parts):
    backend = json.loads(Backend(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")).to_str())
    (folder / "tokenizer.json").write_text(json.dumps(backend | parts))
    return Tokenizer.from_directory(folder, {}, None)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [GROWING] * 2}}, "a text 10000 times as long"),
        ({"decoder": {"type": "Sequence", "decoders": [GROWING] * 2}}, "a text 10000 times as long"),
        ({"pre_tokenizer": REPEATED}, "retry-limit"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "?"}}, "Missing .UNK. token"),
    ],
)
def test_a_tokenizer_that_would_end_the_process(tmp_path, parts, message):
    with pytest.raises(InputError, match=f"tokenizer.json: .*{message}"):
        tokenizer_with(tmp_path, **parts).encode("a" * 5000 + "b")


def test_padding_and_truncation_are_of_training(tmp_path):
    padding = PADDING | {"strategy": {"Fixed": 10**9}}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    assert tokenizer_with(tmp_path, padding=padding, truncation=truncation).encode("a") == [1]


@pytest.mark.parametrize("record", [{"text": "a \ud800"}, {"prompt": "a", "completion": "\udc00"}])
def test_half_a_character_is_no_text(record):
    with pytest.raises(InputError, match=r"record 1: the text has half a character, '\\u(d800|dc00)'"):
        read_examples([record], tiny_tokenizer())


# ---- topologies -----------------------------------------------------------------------------------------------------

LAUGHS = "0: {isq: &a [x,x,x,x,x,x,x,x]}\n" + "".join(
    f"{i + 1}: {{isq: &{'bcdefghij'[i]} [{', '.join([f'*{old}'] * 8)}]}}\n" for i, old in enumerate("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "'isq' of entry '0' is not the name of a type"),
        ("0: &a {isq: *a}", "unconstructable recursive node"),
        ("2001-99-99: {isq: q8_0}", "'2001-99-99' is no layer"),
        ("9" * 900 + ": {isq: q8_0}", "is no layer"),
        ("0: {isq: " + "9" * 5000 + "}", "cannot quantize to"),
        ("0: " + "[" * 2000, "not YAML"),
        ("0: !!int x", "is not of the form"),
        ("!!python/object/apply:os.system [ls]", "expected entries such as"),
        ("'/(/': {isq: q8_0}", "no regular expression"),
    ],
)
def test_a_topology_is_only_text(text, message):
    with pytest.raises(InputError, match=message) as error:
        Topology.parse(text)
    assert len(str(error.value)) < 1600


# ---- adapters -------------------------------------------------------------------------------------------------------


def test_an_adapters_experts_are_of_one_shape():
    base = open_checkpoint(TESTS / "golden" / "checkpoints" / "mixtral")
    model = base.family.model(base.config, make_mesh(), 1)
    declared = {name: param.get_value() for name, param in parameters(model).items()}
    file = read_adapter(TESTS / "golden" / "adapters" / "each_expert")
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    turned = file.changes[name.format(2)]
    turned = low_rank("", turned.b.T.copy(), turned.a.T.copy(), turned.rank, 1.0)
    damaged = dataclasses.replace(file, changes=file.changes | {name.format(2): turned})
    message = f"'{name.format(2)}' and '{name.format(0)}' are for matrices of different shapes"
    with pytest.raises(InputError, match=re.escape(message)):
        adapter(damaged, base.config, declared)


def test_an_adapter_without_rows_that_are_put_in_order():
    """Those of llama.cpp's queries and keys."""
    base = open_checkpoint(TESTS / "golden" / "checkpoints" / "qwen2_moe")
    model = base.family.model(base.config, make_mesh(), 1)
    declared = {name: param.get_value() for name, param in parameters(model).items()}
    file, name = read_adapter(TESTS / "golden" / "adapters" / "gguf" / "experts.gguf"), "blk.0.attn_k.weight"
    whole = file.changes[name]
    cut = low_rank("", np.asarray(whole.a), np.asarray(whole.b)[:7], whole.rank, 1.0)
    with pytest.raises(InputError, match=f"tensor '{name}' has 7 rows, expected {len(whole.b)}"):
        adapter(dataclasses.replace(file, changes=file.changes | {name: cut}), base.config, declared)


# ---- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_a_tensor_without_axes_has_another_shape(tmp_path, name):
    source = LLAMA.parent / "phi3"
    tensors = read_safetensors(source / "model.safetensors")[0]
    write_safetensors(tmp_path / "model.safetensors", tensors | {name: np.float32(1)[None].reshape(())})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(InputError, match=rf"tensor '{name}' has shape \[\], expected "):
        jaxllm.load(tmp_path, progress=False)
