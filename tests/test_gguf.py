"""Reading GGUF files: the same as gguf-py where the file is good, one clear line where it is not."""

import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from tiny_gguf import Tiny, write

import jaxllm
from jaxllm.checkpoint.gguf import open_gguf
from jaxllm.errors import InputError


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    write(path, Tiny(layers=1), {"tokenizer.ggml.tokens": ["a", "ü", ""], "general.name": "n", "llama.x": True})
    return path


def test_metadata_and_tensors_are_what_gguf_py_reads(good):
    file, reader = open_gguf(good), gguf.GGUFReader(good)
    assert file.architecture == "llama"
    assert file.metadata == {k: f.contents() for k, f in reader.fields.items()}
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "ü", ""]
    assert list(file.tensors) == [t.name for t in reader.tensors]
    for tensor in reader.tensors:
        weight = file.tensors[tensor.name]
        assert weight.shape == tuple(tensor.shape[::-1])
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(weight.dequantize(), expected.reshape(weight.shape))


def edited(good, tmp_path, edit):
    path = tmp_path / "bad.gguf"
    path.write_bytes(edit(bytearray(good.read_bytes())))
    return path


def replaced(offset, value):
    return lambda data: data[:offset] + value + data[offset + len(value) :]


def info(name, offset, value):
    """Replace bytes of a tensor's description, `offset` bytes after its name."""
    return lambda data: replaced(data.index(name.encode()) + len(name) + offset, value)(data)


u32, u64 = struct.Struct("<I").pack, struct.Struct("<Q").pack

BAD = {
    "wrong magic": (replaced(0, b"GGML"), r"not a GGUF file \(it begins with b'GGML'"),
    "empty": (lambda data: b"", r"not a GGUF file \(it begins with b''"),
    "no header": (lambda data: data[:6], "cut short or damaged"),
    "unknown version": (replaced(4, u32(9)), "version 9"),
    "big-endian": (replaced(4, struct.pack(">I", 3)), "big-endian"),
    "absurd tensor count": (replaced(8, u64(2**60)), "cut short or damaged|Duplicate|impossible|unknown type"),
    "absurd metadata count": (replaced(16, u64(2**60)), "cut short or damaged|not a valid GGUFValueType|Duplicate"),
    "absurd key length": (replaced(24, u64(2**62)), "cut short or damaged: 4611686018427387904 bytes"),
    "absurd array": (lambda d: replaced(d.index(b"tokenizer.ggml.tokens") + 29, u64(2**40))(d), "cut short or damaged"),
    "absurd string": (
        lambda d: replaced(d.index(b"tokenizer.ggml.tokens") + 37, u64(2**63))(d),
        "cut short or damaged",
    ),
    "cut in metadata": (lambda data: data[:300], "cut short or damaged"),
    "cut in tensors": (lambda data: data[:-100], "cut short or damaged: .* bytes announced"),
    "unknown type": (info("blk.0.ffn_up.weight", 20, u32(99)), "'blk.0.ffn_up.weight' has the unknown type 99"),
    "type of another kind": (info("blk.0.ffn_up.weight", 20, u32(24)), "'blk.0.ffn_up.weight' has type I8"),
    "absurd shape": (info("blk.0.ffn_up.weight", 4, u64(2**61)), "'blk.0.ffn_up.weight' has the impossible shape"),
    "half a block": (
        info("blk.0.ffn_up.weight", 4, u64(40)),
        r"'blk.0.ffn_up.weight' has the impossible shape \[96, 40\]",
    ),
    "offset outside": (info("blk.0.ffn_up.weight", 24, u64(2**40)), "cut short or damaged"),
    "same name twice": (
        lambda d: replaced(d.index(b"blk.0.attn_k.weight"), b"blk.0.attn_q.weight")(d),
        "blk.0.attn_q.weight",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(good, tmp_path, name):
    edit, message = BAD[name]
    path = edited(good, tmp_path, edit)
    with pytest.raises(InputError, match=message) as error:
        open_gguf(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def rewritten(tmp_path, tiny=None, arch="llama", drop=(), add=(), **metadata):
    """A file with the keys and tensors of a tiny model, some of them changed; values of None are left out."""
    tiny = tiny or Tiny(layers=1)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, arch)
    for key, value in ({k.replace(".", "_"): (k, v) for k, v in tiny.metadata().items()} | metadata).values():
        if value is not None:
            add_value = {
                float: writer.add_float32,
                int: writer.add_uint32,
                list: writer.add_array,
                str: writer.add_string,
            }
            add_value[type(value)](f"{arch}.{key}", value)
    shapes = {name: shape for name, shape in tiny.shapes().items() if name not in drop} | dict(add)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


UNFIT = {
    "architecture": ({"arch": "mamba"}, "architecture 'mamba' is not supported; supported: llama"),
    "missing key": ({"block_count": ("block_count", None)}, "metadata key 'llama.block_count' is missing"),
    "experts": ({"experts": ("expert_count", 8)}, "mixtures of experts"),
    "per layer": ({"per_layer": ("feed_forward_length", [96, 64])}, "differs from layer to layer"),
    "missing tensor": ({"drop": ["blk.0.ffn_up.weight"]}, "missing tensor for layers.0.mlp.up_proj.weight"),
    "unknown tensor": ({"add": {"blk.0.surprise": (2,)}}, "unknown tensor 'blk.0.surprise'"),
    "tensor without a place": (
        {"add": {"blk.7.attn_norm.weight": (64,)}},
        "tensor 'blk.7.attn_norm.weight' has no place",
    ),
    "wrong shape": (
        {"drop": ["output_norm.weight"], "add": {"output_norm.weight": (8,)}},
        r"shape \[8\], expected \[64\]",
    ),
    "all at once": (
        {"drop": ["blk.0.ffn_up.weight"], "add": {"x": (2,), "output_norm.weight": (8,)}},
        r"unknown tensor 'x'; missing tensor for .*up_proj.weight; tensor 'output_norm.weight' has shape",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_file_that_is_no_llama_says_why(tmp_path, name):
    changes, message = UNFIT[name]
    with pytest.raises(InputError, match=message) as error:
        jaxllm.load(rewritten(tmp_path, **changes), progress=False)
    assert "model.gguf: " in str(error.value)


def test_prompts_without_a_tokenizer_are_ids(tmp_path):
    write(tmp_path / "m.gguf", Tiny(type=T.F32))
    model = jaxllm.load(tmp_path / "m.gguf", progress=False, dtype="float32")
    assert model.tokenizer is None
    assert len(model.generate([1, 2, 3], 4).tokens) == 4
    for bad, message in (
        (["hello"], "has no tokenizer"),
        ([[1, 50]], "ids must be 0 to 49"),
        ([[]], "prompt is empty"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(bad)
