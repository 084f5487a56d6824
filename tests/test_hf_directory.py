"""Hugging Face directories: what is wrong with a bad one, the tokenizer beside the weights, and how little is read."""

import itertools
import json
import math
import pickle
import re
import shutil
import struct
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from forked import Forked
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel

import jaxllm
from jaxllm.checkpoint import filling
from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.checkpoint.safetensors import open_directory
from jaxllm.cli import main
from jaxllm.errors import InputError
from jaxllm.models.llama.config import LlamaConfig
from jaxllm.placing import FileArray
from jaxllm.sampling import Sampling

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
INDEX, SINGLE, PART = "model.safetensors.index.json", "model.safetensors", "model-00002-of-00003.safetensors"
UP, NORM, EMBED = "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


def copied(name, tmp_path, *damage):
    """A golden checkpoint of one's own, damaged."""
    folder = tmp_path / name
    shutil.copytree(CHECKPOINTS / name, folder, ignore=shutil.ignore_patterns("golden.npz", "config_old.json"))
    for change in damage:
        change(folder)
    return folder


# Ways to damage a directory: functions of its path.


def json_file(name, edit):
    """Change the object in a JSON file, which is made if there is none."""

    def damage(folder):
        file = folder / name
        value = json.loads(file.read_text()) if file.exists() else {}
        edit(value)
        file.write_text(json.dumps(value))

    return damage


def update(name, changes):
    """Change entries of a JSON file; `...` takes one out."""

    def edit(value):
        value |= changes
        for key in [key for key, new in changes.items() if new is ...]:
            del value[key]

    return json_file(name, edit)


def config(**changes):
    return update("config.json", changes)


def rope(**parameters):
    return config(rope_parameters={"rope_theta": 1000.0, **parameters})


def in_index(**files):
    """What the index says of tensors."""
    return json_file(INDEX, lambda value: value["weight_map"].update(files))


def header(edit, file=SINGLE):
    """Change the header of a safetensors file; `edit` may give back another object, or bytes."""

    def damage(folder):
        data = (folder / file).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        value = json.loads(data[8:end])
        changed = edit(value)
        changed = value if changed is None else changed
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])

    return damage


def entry(name=UP, file=SINGLE, **changes):
    return header(lambda value: value[name].update(changes), file)


def without(name):
    """The data of a tensor stays, but the header does not mention it."""
    return header(lambda value: {other: entry for other, entry in value.items() if other != name})


def offsets(name, begin, end, file=SINGLE):
    """Move where the data of a tensor begins and ends."""

    def edit(value):
        old = value[name]["data_offsets"]
        value[name]["data_offsets"] = [old[0] + begin, old[1] + end]

    return header(edit, file)


def tensors(edit, file=SINGLE):
    def damage(folder):
        values = load_file(folder / file)
        edit(values)
        save_file(values, folder / file)

    return damage


def add(**arrays):
    return tensors(lambda values: values.update(arrays))


def drop(*names):
    return tensors(lambda values: [values.pop(name) for name in names])


def text(name, content):
    def damage(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def cut(file, size):
    """Keep the first `size` bytes; below zero, leave out so many."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def remove(name):
    return lambda folder: (folder / name).unlink()


def zeros(*shape):
    return np.zeros(shape, np.float32)


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def twice(old, new):
    """The entry of one tensor under the name of another as well."""
    return header(lambda value: json.dumps(value).replace(old, new).encode())


# A tokenizer that fits into the 64 tokens of the tiny models: bytes of small letters, and a merged word.

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
TOKENS = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", *["Ġ", "he", "ll", "hell", "hello", "<tool>"]]
ID = {token: i for i, token in enumerate(TOKENS)}
HELLO = [{"role": "user", "content": "hello"}]


def tokenizer(folder):
    """Write tokenizer.json, whose post-processor puts <s> first."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    backend = tokenizers.Tokenizer(models.BPE({t: i for t, i in ID.items() if t != "<tool>"}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ID["<s>"])])
    backend.save(str(folder / "tokenizer.json"))


def settings(**values):
    """tokenizer.json and tokenizer_config.json."""
    return both(tokenizer, update("tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", **values}))


def generation(**values):
    return update("generation_config.json", values)


def ids(*tokens):
    return [ID[token] for token in tokens]


BAD = {
    # the index and the files it names
    "index points up": ("odd", in_index(x="../x.safetensors"), "'x' is said to be in '../x.safetensors', outside"),
    "index points anywhere": ("odd", in_index(x="/etc/passwd"), "'x' is said to be in '/etc/passwd', outside"),
    "index points to the parent": ("odd", in_index(x=".."), "'x' is said to be in '..'"),
    "index names a number": ("odd", in_index(x=1), "'x' is said to be in 1, outside"),
    "index names a missing file": ("odd", in_index(x="y.safetensors"), "'x' is said to be in 'y.saf.*does not exist"),
    "a part is missing": ("odd", remove(PART), f"said to be in '{PART}', which does not exist"),
    "index names two lines": ("odd", in_index(x="y\nz"), r"'x' is said to be in 'y\\nz'"),
    "index names nothing": ("odd", in_index(x="y\0z"), r"'x' is said to be in 'y\\x00z'"),
    "index without a map": ("odd", update(INDEX, {"weight_map": ...}), f"{INDEX}: no 'weight_map'"),
    "index with an odd map": ("odd", update(INDEX, {"weight_map": ["x"]}), f"{INDEX}: no 'weight_map'"),
    "index with an empty map": ("odd", update(INDEX, {"weight_map": {}}), f"{INDEX}: no 'weight_map'"),
    "index is no JSON": ("odd", text(INDEX, "{"), f"{INDEX}: not JSON: "),
    "index knows too much": ("odd", in_index(x=PART), f"{PART}: the index says that tensor 'x' is here, but"),
    "index knows two lines": (
        "odd",
        json_file(INDEX, lambda value: value["weight_map"].update({"a\nb": PART})),
        rf"{PART}: the index says that tensor 'a\\nb' is here",
    ),
    "tensor in two files": (
        "odd",
        tensors(lambda values: values.update({NORM: zeros(48)}), PART),
        f"{NORM}' is in another file already",
    ),
    "no weights": ("llama", remove(SINGLE), f"neither {SINGLE} nor {INDEX}"),
    # what is in a file
    "empty": ("llama", text(SINGLE, ""), "cut short or damaged: a header of 0 bytes in a file of 0"),
    "cut in the length": ("llama", cut(SINGLE, 7), "cut short or damaged"),
    "cut in the header": ("llama", cut(SINGLE, 100), r"cut short or damaged: a header of \d+ bytes in a file of 100"),
    "cut in the data": ("llama", cut(SINGLE, -100), r"cut short: tensor '\S+' ends 100 bytes after the file"),
    "a part cut short": ("odd", cut(PART, -2), rf"{PART}: cut short: tensor '\S+' ends 2 bytes after the file"),
    "absurd header": ("llama", text(SINGLE, struct.pack("<Q", 2**60) + b"{}"), "a header of 1152921504606846976 bytes"),
    "header is no JSON": ("llama", header(lambda _: b'{"x": '), "damaged header: "),
    "header is no text": ("llama", header(lambda _: b"\xff\xfe{}"), "damaged header: "),
    "header is a list": ("llama", header(lambda _: b"[]"), "damaged header: "),
    "header without end": ("llama", header(lambda _: b'{"x": ' + 10**5 * b"["), "damaged header: "),
    "entry is a number": ("llama", header(lambda value: value.update(x=1)), "tensor 'x' "),
    "entry without dtype": ("llama", header(lambda value: value.update(x={})), "tensor 'x' "),
    "entry of three offsets": ("llama", entry(data_offsets=[0, 1, 2]), f"tensor '{UP}' "),
    "unknown dtype": ("llama", entry(dtype="F4"), f"tensor '{UP}' has the unknown dtype 'F4'"),
    "dtype is a list": ("llama", entry(dtype=["F32"]), f"tensor '{UP}' "),
    "shape too large": (
        "llama",
        entry(shape=[48, 33]),
        rf"tensor '{UP}' of shape \[48, 33\] .* cannot have 6144 bytes",
    ),
    "shape is text": ("llama", entry(shape="48"), f"tensor '{UP}' has an impossible"),
    "shape is negative": ("llama", entry(shape=[-48, -32]), f"tensor '{UP}' has an impossible"),
    "shape of truths": ("llama", entry(shape=[True, 48, 32]), f"tensor '{UP}' has an impossible"),
    "shape of fractions": ("llama", entry(shape=[48.0, 32]), f"tensor '{UP}' has an impossible"),
    "offsets are negative": ("llama", offsets(EMBED, -(10**6), -(10**6)), f"tensor '{EMBED}' has an impossible"),
    "offsets go backwards": (
        "llama",
        header(lambda value: value[UP]["data_offsets"].reverse()),
        f"tensor '{UP}' .* cannot have -6144 bytes",
    ),
    "overlap": (
        "llama",
        offsets(UP, -4, -4),
        rf"tensor '{UP}' begins at byte \d+ of the data, but what is before it ends at",
    ),
    "hole": ("llama", without(UP), r"begins at byte \d+ of the data, but what is"),
    "more than the header says": (
        "llama",
        without(NORM),
        "128 bytes after the last tensor",
    ),
    "one name twice": ("llama", twice(UP, NORM), r"begins at byte \d+ of the data, but what is before it ends at"),
    "name of two lines": ("llama", header(lambda v: v.update({"a\nb": v.pop(UP)})), r"a tensor with the name 'a\\nb'"),
    # the configuration
    "no config": ("llama", remove("config.json"), "config.json: No such file"),
    "config is no JSON": ("llama", text("config.json", "{"), "config.json: not JSON"),
    "config is no text": ("llama", text("config.json", b"\xff\xfe"), "config.json: not JSON"),
    "config is a list": ("llama", text("config.json", "[]"), "config.json: not a JSON object"),
    "config without end": ("llama", text("config.json", 10**5 * "["), "config.json: not JSON"),
    "no model_type": ("llama", config(model_type=...), "config.json: no 'model_type'"),
    "model_type is a list": ("llama", config(model_type=["llama"]), "config.json: no 'model_type'"),
    "unknown model_type": ("llama", config(model_type="mamba"), "models of type 'mamba' are not supported; .*llama"),
    "model_type of two lines": ("llama", config(model_type="a\nb"), r"models of type 'a\\nb' are not supported"),
    "no hidden_size": ("llama", config(hidden_size=...), "'hidden_size' is missing"),
    "hidden_size null": ("llama", config(hidden_size=None), "'hidden_size' is missing"),
    "layers in words": ("llama", config(num_hidden_layers="two"), "'num_hidden_layers' is 'two', not a whole number"),
    "no layers": ("llama", config(num_hidden_layers=0), "'num_hidden_layers' is 0, not a whole number"),
    "layers below zero": ("llama", config(num_hidden_layers=-1), "'num_hidden_layers' is -1, not a whole number"),
    "layers without end": ("llama", config(num_hidden_layers=10**9), "'num_hidden_layers' is 1000000000"),
    "too many layers": ("llama", config(num_hidden_layers=3), "missing tensor for layers.2."),
    "hidden_size in words": ("llama", config(hidden_size="32"), "'hidden_size' is '32', not a whole number"),
    "hidden_size a fraction": ("llama", config(hidden_size=32.5), "'hidden_size' is 32.5, not a whole number"),
    "hidden_size true": ("llama", config(hidden_size=True), "'hidden_size' is True, not a whole number"),
    "no heads": ("llama", config(num_attention_heads=0), "'num_attention_heads' is 0, not a whole number"),
    "heads without end": ("llama", config(num_attention_heads=10**12), "'num_attention_heads' is 10{12}, not"),
    "no kv heads": ("llama", config(num_key_value_heads=0), "'num_key_value_heads' is 0, not a whole number"),
    "kv heads in words": ("llama", config(num_key_value_heads="2"), "'num_key_value_heads' is '2', not a whole number"),
    "head_dim zero": ("llama", config(head_dim=0), "'head_dim' is 0, not a whole number"),
    "head_dim odd": ("llama", config(head_dim=15), "embeddings of 15 of 15 dimensions, which must be even"),
    "vocab_size below zero": ("llama", config(vocab_size=-64), "'vocab_size' is -64, not a whole number"),
    "no intermediate_size": ("llama", config(intermediate_size=...), "'intermediate_size' is missing"),
    "intermediate_size a list": (
        "llama",
        config(intermediate_size=[48]),
        r"'intermediate_size' is \[48\], not a whole",
    ),
    "positions in words": ("llama", config(max_position_embeddings="many"), "'max_position_embeddings' is 'many', not"),
    "heads that do not share": ("llama", config(num_key_value_heads=3), "4 query heads cannot share 3 key/value heads"),
    "eps in words": ("llama", config(rms_norm_eps="small"), "'rms_norm_eps' is 'small', not a number"),
    "eps below zero": ("llama", config(rms_norm_eps=-1.0), "'rms_norm_eps' is -1.0, not a number"),
    "eps true": ("llama", config(rms_norm_eps=True), "'rms_norm_eps' is True, not a number"),
    "eps without end": ("llama", config(rms_norm_eps=math.inf), "'rms_norm_eps' is inf, not a number"),
    "eps not a number": ("llama", config(rms_norm_eps=math.nan), "'rms_norm_eps' is nan, not a number"),
    "truth in words": ("llama", config(tie_word_embeddings="false"), "'tie_word_embeddings' is 'false', not true or"),
    "gelu": ("llama", config(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "activation of two lines": ("llama", config(hidden_act="a\nb"), r"hidden_act 'a\\nb' is not supported"),
    "window in words": ("mistral", config(sliding_window="8"), "'sliding_window' is '8', not a whole number"),
    "window below zero": ("mistral", config(sliding_window=-8), "'sliding_window' is -8, not a whole number"),
    "a layer type too few": ("qwen2_window", config(layer_types=["full_attention"]), "'layer_types'"),
    "layer types in words": ("qwen2_window", config(layer_types="full_attention"), "'layer_types'"),
    "unknown layer type": ("qwen2_window", config(layer_types=["linear_attention"] * 2), "'layer_types'"),
    "window in layers in words": (
        "qwen2_window",
        config(layer_types=..., max_window_layers="1"),
        "'max_window_layers' is '1', not a whole number",
    ),
    # rotary embeddings
    "unknown rope scaling": ("llama", rope(rope_type="spiral"), "rope scaling 'spiral' is not supported"),
    "rope scaling of two lines": ("llama", rope(rope_type="a\nb"), r"rope scaling 'a\\nb' is not supported"),
    "rope scaling without factor": ("llama", rope(rope_type="linear"), "rope scaling 'linear' without 'factor'"),
    "yarn without factor": ("llama", rope(rope_type="yarn"), "rope scaling 'yarn' without 'factor'"),
    "llama3 without low_freq_factor": (
        "llama3_rope",
        rope(rope_type="llama3", factor=8.0, high_freq_factor=4.0),
        "rope scaling 'llama3' without 'low_freq_factor'",
    ),
    "llama3 with like factors": (
        "llama3_rope",
        rope(rope_type="llama3", factor=8.0, high_freq_factor=4.0, low_freq_factor=4.0),
        "rope|rotary",
    ),
    "rope factor zero": ("llama", rope(rope_type="linear", factor=0), "'factor' is 0, not a number"),
    "rope factor in words": ("llama", rope(rope_type="linear", factor="2"), "'factor' is '2', not a number"),
    "rope theta in words": ("llama", rope(rope_theta="big"), "'rope_theta' is 'big', not a number"),
    "rope theta zero": ("llama", rope(rope_theta=0), "'rope_theta' is 0, not a number"),
    "rope theta below zero": ("llama", rope(rope_theta=-1e4), "'rope_theta' is -10000.0, not a number"),
    "yarn with theta one": ("llama_yarn", rope(rope_type="yarn", factor=4.0, rope_theta=1.0), "rope|rotary"),
    "yarn of a context below zero": (
        "llama_yarn",
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=-1),
        "'original_max_position_embeddings' is -1, not",
    ),
    "rope is a list": ("llama", config(rope_parameters=[1]), "'rope_parameters' is"),
    "rope by layer type": (
        "llama",
        config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        "rope|rotary",
    ),
    "too much rotation": ("phi3", rope(rope_type="default", partial_rotary_factor=2.0), "'partial_rotary_factor' is"),
    "too few factors": (
        "phi3_longrope",
        rope(rope_type="longrope", short_factor=[1.0], long_factor=[1.0, 2.0], original_max_position_embeddings=16),
        "'long_factor'",
    ),
    "factors in words": (
        "phi3_longrope",
        rope(rope_type="longrope", short_factor=6 * ["1"], long_factor=6 * ["1"], original_max_position_embeddings=16),
        "'long_factor'",
    ),
    "no short factors": (
        "phi3_longrope",
        rope(rope_type="longrope", long_factor=6 * [1.0], original_max_position_embeddings=16),
        "rope_parameters: 'short_factor' is missing",
    ),
    # experts
    "no experts": ("mixtral", config(num_local_experts=0), "unknown|no place"),
    "experts in words": ("mixtral", config(num_local_experts="4"), "'num_local_experts' is '4', not a whole number"),
    "fewer experts": ("mixtral", config(num_local_experts=3), "experts 0 to 2, found 0, 1, 2, 3"),
    "more used than there are": ("mixtral", config(num_experts_per_tok=5), "'num_experts_per_tok' is 5"),
    "sparse steps of zero": ("qwen3_moe", config(decoder_sparse_step=0), "'decoder_sparse_step' is 0, not a whole"),
    "dense layers in words": ("qwen3_moe", config(mlp_only_layers=3), "'mlp_only_layers' is 3, not a list"),
    "an expert is missing": (
        "mixtral",
        drop("model.layers.1.block_sparse_moe.experts.2.w2.weight"),
        r"layers.1.mlp.experts.down_proj needs experts 0 to 3, found 0, 1, 3",
    ),
    "an expert is smaller": (
        "mixtral",
        add(**{"model.layers.1.block_sparse_moe.experts.2.w2.weight": zeros(32, 23)}),
        r"experts of one layer differ|has shape \[32, 23\]",
    ),
    # tensors that do not fit the model
    "unknown tensor": ("llama", add(surprise=zeros(2)), "unknown tensor 'surprise'"),
    "a layer too many": (
        "llama",
        add(**{"model.layers.7.mlp.up_proj.weight": zeros(48, 32)}),
        "tensor 'model.layers.7.mlp.up_proj.weight' has no place",
    ),
    "missing tensor": ("llama", drop(UP), "missing tensor for layers.0.mlp.up_proj.weight"),
    "mis-shaped tensor": ("llama", add(**{NORM: zeros(8)}), rf"'{NORM}' has shape \[8\], expected \[32\]"),
    "matrix for a vector": ("llama", add(**{NORM: zeros(32, 1)}), rf"'{NORM}' has shape \[32, 1\], expected \[32\]"),
    "a number for a vector": ("llama", add(**{NORM: zeros()}), rf"'{NORM}' has shape \[\], expected \[32\]"),
    "all at once": (
        "llama",
        tensors(lambda values: (values.pop(UP), values.update({"x": zeros(2), NORM: zeros(8)}))),
        rf"unknown tensor 'x'; missing tensor for layers.0.mlp.up_proj.weight; tensor '{NORM}' has shape",
    ),
    "whole numbers": ("llama", add(**{UP: np.zeros((48, 32), np.int32)}), f"tensor '{UP}' .* int32"),
    # generation and tokenizer
    "generation is no JSON": ("llama", text("generation_config.json", "{"), "generation_config.json: not JSON"),
    "sampling in words": (
        "llama",
        generation(do_sample=True, temperature="hot"),
        "generation_config.json: 'temperature' is 'hot', not a number",
    ),
    "sampling outside its range": (
        "llama",
        generation(do_sample=True, top_p=2.0),
        "generation_config.json: top_p=2.0: ",
    ),
    "sampling or not": (
        "llama",
        generation(do_sample="no"),
        "generation_config.json: 'do_sample' is 'no', not true or",
    ),
    "end in words": ("llama", both(settings(), generation(eos_token_id="2")), "'eos_token_id' is '2', not a token id"),
    "ends in words": (
        "llama",
        both(settings(), generation(eos_token_id=[2, "3"])),
        r"'eos_token_id' is \[2, '3'\], not",
    ),
    "broken tokenizer": ("llama", text("tokenizer.json", '{"model": 1}'), "tokenizer.json: "),
    "tokenizer cut short": ("llama", text("tokenizer.json", '{"model": '), "tokenizer.json: "),
    "tokenizer is no text": ("llama", text("tokenizer.json", b"\xff\xfe"), "tokenizer.json: "),
    "settings are no JSON": (
        "llama",
        both(tokenizer, text("tokenizer_config.json", "{")),
        "tokenizer_config.json: not",
    ),
    "template is none": ("llama", settings(chat_template="{% if %}"), "chat template: "),
    "template is a number": ("llama", settings(chat_template=5), "'chat_template' is neither text nor a list of named"),
    "templates are numbers": ("llama", settings(chat_template=[{"name": "default", "template": 5}]), "is neither text"),
    "templates without names": (
        "llama",
        settings(chat_template=["x"]),
        "'chat_template' is neither text nor a list of",
    ),
    "template is no text": ("llama", both(settings(), text("chat_template.jinja", b"\xff")), "chat_template.jinja: "),
    "eos_token is a number": ("llama", settings(eos_token=5), "tokenizer_config.json: 'eos_token' is not text"),
    "bos_token is a list": ("llama", settings(bos_token=["<s>"]), "tokenizer_config.json: 'bos_token' is not text"),
    "template in a file is none": ("llama", both(settings(), text("chat_template.jinja", "{{")), "chat template: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_directory_is_one_line(tmp_path, name):
    checkpoint, damage, message = BAD[name]
    folder = copied(checkpoint, tmp_path, damage)
    with pytest.raises(InputError, match=message) as error:
        jaxllm.load(folder, progress=False)
    said = str(error.value)
    assert said.startswith(str(folder))
    assert said.count(str(folder)) == 1
    assert said.isprintable()


def test_a_bad_directory_on_the_command_line(tmp_path, capsys):
    folder = copied("odd", tmp_path, remove(PART))
    code = main(["generate", "--model", str(folder), "--prompt", "x"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {folder}")
    assert err.count("\n") == 1


class Mine:
    """What a pickle can do: unpickling it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_never_read(tmp_path, name):
    mark = tmp_path / "executed"
    folder = copied("llama", tmp_path, remove(SINGLE), text(name, pickle.dumps(Mine(mark))))
    with pytest.raises(InputError, match=rf"only pickles \({name}\), which can run code") as error:
        jaxllm.load(folder, progress=False)
    assert str(error.value).startswith(str(folder))
    assert not mark.exists()
    pickle.loads((folder / name).read_bytes())
    assert mark.exists()  # so it would have shown


@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch, name):
    folder, really = copied("llama", tmp_path), Path.open

    def refuse(path, *args, **options):
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return really(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=f"/{name}: Permission denied$"):
        jaxllm.load(folder, progress=False)


BUFFERS = [*(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)), "model.rotary_emb.inv_freq"]
EXTRAS = {
    "rotary buffers": add(**{name: zeros(8) for name in BUFFERS}),
    "an index that nobody needs": text(INDEX, "{"),
    "a pickle beside the tensors": text("pytorch_model.bin", "x"),
    "a head although it is tied": config(tie_word_embeddings=True),  # the head counts, as in transformers
}


@pytest.mark.parametrize("name", EXTRAS)
def test_known_extras_change_nothing(tmp_path, name):
    expected = np.load(CHECKPOINTS / "llama" / "golden.npz")
    model = jaxllm.load(copied("llama", tmp_path, EXTRAS[name]), dtype="float32", progress=False)
    np.testing.assert_allclose(model.logits(expected["tokens"]), expected["logits"], atol=1e-3)


WINDOW = {"sliding_window": 8}
WINDOWS = {  # by layer, as transformers' configuration_*.py and modeling_*.py have it
    "llama has none": ("llama", WINDOW, [None, None]),
    "mistral": ("mistral", {}, [8, 8]),
    "mistral without": ("mistral", {"sliding_window": None}, [None, None]),
    "mixtral": ("mixtral", WINDOW, [8, 8]),
    "phi3": ("phi3", WINDOW, [8, 8]),
    "qwen2 by type": ("qwen2_window", {}, [None, 8]),
    "qwen2 by number": ("qwen2_window", {"layer_types": None, "max_window_layers": 0}, [8, 8]),
    "qwen2 of few layers": ("qwen2_window", {"layer_types": None, "max_window_layers": None}, [None, None]),
    "qwen2 unless asked for": ("qwen2_window", {"use_sliding_window": None}, [None, None]),
    "qwen3 unless asked for": ("qwen3", WINDOW, [None, None]),
    "qwen2_moe": (
        "qwen2_moe",
        {**WINDOW, "use_sliding_window": True, "layer_types": None, "num_hidden_layers": 4, "max_window_layers": 3},
        [8, None, 8, None],
    ),
    "qwen3_moe": ("qwen3_moe", {**WINDOW, "use_sliding_window": True, "max_window_layers": 3}, [8, 8, 8, 8]),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_layers_have_the_windows_of_transformers(name):
    checkpoint, changes, windows = WINDOWS[name]
    given = json.loads((CHECKPOINTS / checkpoint / "config.json").read_text())
    assert [layer.sliding_window for layer in LlamaConfig.from_hf(given | changes).layers] == windows


def template(mark):
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    return "{{ bos_token }}" + mark + turns


NAMED = [{"name": "rag", "template": template("r")}, {"name": "default", "template": template("d")}]
TEMPLATES = {
    "a string": (settings(chat_template=template("s")), "s"),
    "a list": (settings(chat_template=NAMED), "d"),
    "a list without default": (settings(chat_template=NAMED[:1]), "r"),
    "a file": (both(settings(), text("chat_template.jinja", template("f"))), "f"),
    "a file of the other name": (both(settings(), text("chat_template.jinja2", template("f"))), "f"),
    "a file and a string": (
        both(settings(chat_template=template("s")), text("chat_template.jinja", template("f"))),
        "f",
    ),
    "special tokens with settings": (settings(chat_template=template("s"), bos_token={"content": "<s>"}), "s"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_chat_template_is_found(tmp_path, name):
    damage, mark = TEMPLATES[name]
    tokenizer = open_checkpoint(copied("llama", tmp_path, damage)).texts.tokenizer
    assert tokenizer.encode_chat(HELLO) == ids("<s>", mark, "<|user|>", "hello", "<|end|>")  # one <s>
    assert ID["<|end|>"] in tokenizer.eos_ids


def test_a_template_that_writes_no_bos_gets_none(tmp_path):
    tokenizer = open_checkpoint(
        copied("llama", tmp_path, settings(chat_template="{{ messages[0].content }}"))
    ).texts.tokenizer
    assert tokenizer.encode_chat(HELLO) == ids("hello")


def test_templates_know_the_end_token_of_the_tokenizer(tmp_path):
    """Not another of those that end answers."""
    damage = both(settings(chat_template="{{ eos_token }}"), generation(eos_token_id=[1, 7]))
    tokenizer = open_checkpoint(copied("llama", tmp_path, damage)).texts.tokenizer
    assert tokenizer.encode_chat(HELLO) == ids("</s>")


def test_raw_text_gets_what_the_post_processor_adds(tmp_path):
    tokenizer = open_checkpoint(copied("llama", tmp_path, settings())).texts.tokenizer
    assert tokenizer.encode("hello ab<tool>c") == ids("<s>", "hello", "Ġ", "a", "b", "<tool>", "c")
    assert tokenizer.encode("hello<|end|>") == ids("<s>", "hello", "<|end|>")
    assert tokenizer.decode(ids("<s>", "hello", "Ġ", "a", "<tool>", "</s>")) == "hello a<tool>"
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (ID["<s>"], len(TOKENS))
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.encode_chat(HELLO)


ENDS = {
    "of the tokenizer": (both(settings(), generation(eos_token_id=...), config(eos_token_id=...)), {2}),
    "with settings": (
        both(settings(eos_token={"content": "<|end|>", "special": True}), generation(eos_token_id=[])),
        {5},
    ),
    "of the generation": (both(settings(eos_token=None), generation(eos_token_id=9), config(eos_token_id=8)), {9}),
    "several": (both(settings(), generation(eos_token_id=[7, 9]), config(eos_token_id=8)), {2, 7, 9}),
    "of the model": (both(settings(eos_token=...), generation(eos_token_id=None), config(eos_token_id=[7, 8])), {7, 8}),
    "none": (both(tokenizer, generation(eos_token_id=-1)), set()),
    "unknown": (both(settings(eos_token="<|eot|>"), generation(eos_token_id=63)), {63}),
}


@pytest.mark.parametrize("name", ENDS)
def test_tokens_that_end_answers(tmp_path, name):
    damage, expected = ENDS[name]
    assert open_checkpoint(copied("llama", tmp_path, damage)).texts.tokenizer.eos_ids == expected


def test_any_end_token_ends_an_answer(tmp_path):
    expected = np.load(CHECKPOINTS / "llama" / "golden.npz")
    prompt, greedy = expected["tokens"][0].tolist(), expected["greedy"].tolist()
    end = greedy[4]
    assert end not in greedy[:4]
    folder = copied("llama", tmp_path, settings(), generation(eos_token_id=[0, end]))
    answer = jaxllm.load(folder, dtype="float32", progress=False).generate(prompt, 12)
    assert (answer.tokens, answer.finish_reason) == (greedy[:5], "stop")
    known = [token for token in greedy[:4] if token < len(TOKENS)]  # the model has more tokens than the tokenizer
    assert answer.text == open_checkpoint(folder).texts.tokenizer.decode(known)


SAMPLING = {
    "nothing": ({}, {}),
    "not drawn": ({"temperature": 0.7, "top_k": 5}, {}),
    "said not to be drawn": ({"do_sample": False, "temperature": 0.7}, {}),
    "drawn": ({"do_sample": True}, {"temperature": 1.0}),
    "nulls": ({"do_sample": True, "temperature": None, "top_p": None}, {"temperature": 1.0}),
    "everything": (
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
    ),
    "numbers for not at all": ({"do_sample": True, "top_k": 0, "min_p": 0.0}, {"temperature": 1.0}),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_what_the_checkpoint_says_of_sampling(tmp_path, name):
    given, expected = SAMPLING[name]
    assert open_checkpoint(copied("llama", tmp_path, generation(**given))).texts.sampling == Sampling(**expected)


def test_sampling_is_as_the_checkpoint_says_unless_the_caller_does(tmp_path, load_once):
    expected = np.load(CHECKPOINTS / "llama" / "golden.npz")
    folder = copied("llama", tmp_path, generation(do_sample=True, temperature=0.7, top_k=5))
    plain = load_once(CHECKPOINTS / "llama", dtype="float32")
    drawing = jaxllm.load(folder, dtype="float32", progress=False)

    def tokens(model, **options):
        return model.generate(expected["tokens"][0].tolist(), 12, seed=1, **options).tokens

    greedy = expected["greedy"].tolist()
    assert tokens(plain) == greedy
    assert tokens(drawing) == tokens(plain, temperature=0.7, top_k=5) != greedy
    assert tokens(drawing, top_k=60) == tokens(plain, temperature=0.7, top_k=60) != tokens(drawing)
    assert tokens(drawing, temperature=2.0) == tokens(plain, temperature=2.0, top_k=5) != tokens(drawing)
    assert tokens(drawing, temperature=0) == greedy


def test_without_a_tokenizer_prompts_are_ids(load_once):
    model = load_once(CHECKPOINTS / "llama", dtype="float32")
    assert model.tokenizer is None
    assert len(model.generate([1, 2, 3], 2).tokens) == 2
    for prompt in ("hello", HELLO):
        with pytest.raises(InputError, match="llama has no tokenizer: give prompts as lists of token ids"):
            model.generate(prompt)


# How much of a tensor each reading takes: every device reads what it holds, and what all hold is read once.
READS = {
    ("llama", "tp=4"): {
        r"(q|o|gate|up|down)_proj|embed_tokens|lm_head": 4 * [1 / 4],
        "(k|v)_proj": 4 * [1 / 2],  # two heads on four devices: each holds one
        "norm": [1],
    },
    ("llama", "tp=2"): {"_proj|embed_tokens|lm_head": 2 * [1 / 2], "norm": [1]},
    ("odd", "tp=4"): {
        "(q|o)_proj": 2 * [1 / 6] + 2 * [1 / 3],  # six heads on four devices: two places each, of which two are empty
        "(k|v)_proj": 4 * [1 / 2],
        "(gate|up|down)_proj|embed_tokens|lm_head": 4 * [1 / 4],
        "norm": [1],
    },
    ("phi3", "tp=2"): {
        "qkv_proj": 4 * [1 / 8] + 2 * [1 / 4],  # half of k, of v and of q
        "gate_up_proj": 4 * [1 / 4],
        "o_proj|down_proj|embed_tokens|lm_head": 2 * [1 / 2],
        "norm": [1],
    },
    ("mixtral", "ep=2,tp=2"): {
        "experts": 2 * [1 / 2],  # both of the devices that have this expert
        "self_attn|embed_tokens|lm_head": 4 * [1 / 2],
        "norm|gate": [1],
    },
    ("mixtral_stacked", "ep=2,tp=2"): {
        "gate_up_proj": 8 * [1 / 8],  # half of the rows of one of the halves, of two experts of four
        "experts.down_proj": 4 * [1 / 4],
        "self_attn|embed_tokens|lm_head": 4 * [1 / 2],
        "norm|gate": [1],
    },
    ("mixtral_stacked", "ep=3,tp=2"): {
        "gate_up_proj": 4 * [0] + 8 * [1 / 8],  # two experts on two of the groups; the third, of zeros, reads nothing
        "experts.down_proj": 2 * [0] + 4 * [1 / 4],
        "self_attn|embed_tokens|lm_head": 6 * [1 / 2],
        "norm|gate": [1],
    },
    ("mixtral_transposed", "ep=4"): {"gate_up_proj": 8 * [1 / 8], "experts.down_proj": 4 * [1 / 4], "": [1]},
}


@pytest.mark.parametrize(("name", "mesh"), READS)
def test_only_what_a_device_holds_is_read(monkeypatch, name, mesh):
    copies, really = defaultdict(list), FileArray.read_into

    def read_into(file, out, part=()):
        if out.flags.c_contiguous and not file.transposed:  # others are read as these
            copies[file.path, file.offset].append(out.nbytes)
        really(file, out, part)

    monkeypatch.setattr(FileArray, "read_into", read_into)
    jaxllm.load(CHECKPOINTS / name, mesh=mesh, weights="packed", progress=False)
    for tensor, weight in open_directory(CHECKPOINTS / name).tensors.items():
        array = weight.values
        expected = next(parts for pattern, parts in READS[name, mesh].items() if re.search(pattern, tensor))
        assert sorted(n / array.nbytes for n in copies[array.path, array.offset]) == expected, tensor


def big_llama(folder, hidden=2048, intermediate=5504, layers=2, vocabulary=8000, kv=512):
    """A sparse file of 0.2 GB: all zeros, but as large as any other once it is read."""
    block = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [kv, hidden],
        "self_attn.v_proj": [kv, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [intermediate, hidden],
        "mlp.up_proj": [intermediate, hidden],
        "mlp.down_proj": [hidden, intermediate],
    }
    shapes = {"model.embed_tokens": [vocabulary, hidden], "lm_head": [vocabulary, hidden], "model.norm": [hidden]}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}
    ends = list(itertools.accumulate((2 * math.prod(shape) for shape in shapes.values()), initial=0))
    entries = zip(shapes.items(), itertools.pairwise(ends), strict=True)
    head = {f"{n}.weight": {"dtype": "BF16", "shape": s, "data_offsets": place} for (n, s), place in entries}
    folder.mkdir()
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": vocabulary}
    text("config.json", json.dumps({"model_type": "llama", **sizes, **heads}))(folder)
    with (folder / SINGLE).open("wb") as file:
        data = json.dumps(head).encode()
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + ends[-1])
    return folder


def test_loading_needs_little_more_memory_than_the_model(tmp_path):
    """Peak of a process that has loaded a tiny model before: what lies on the devices, and what the readers have in
    hand."""
    code = """if True:
        import json, pathlib, re, sys, jax
        jax.config.update("jax_num_cpu_devices", 2)
        import jaxllm
        def memory(kind):
            return 1024 * int(re.search(kind + r":\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
        options = {"mesh": "tp=2", "weights": "packed", "dtype": "bfloat16", "progress": False}
        jaxllm.load(sys.argv[1], **options)
        before = memory("VmRSS")
        model = jaxllm.load(sys.argv[2], **options)
        leaves = jax.tree.leaves([p.weight for p in model.placed])
        shards = [shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards]
        print(json.dumps([memory("VmHWM") - before, sum(shards), max(shards)]))"""
    folder = big_llama(tmp_path / "big")
    done = Forked(code, CHECKPOINTS / "llama", folder).finished()
    (folder / SINGLE).unlink()
    assert done.returncode == 0, done.stderr
    more, placed, largest = json.loads(done.stdout)
    assert placed > 2.3e8
    assert more - placed < filling.READERS * largest + 50e6
