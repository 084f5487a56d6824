"""Reading GGUF files: the same as gguf-py where the file is good, one clear line where it is not."""

import struct

import gguf
import jax
import jax.numpy as jnp
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
    metadata = {"tokenizer.ggml.tokens": ["a", "ü", ""], "tokenizer.ggml.scores": [0.5, -1.0], "llama.x": True}
    write(path, Tiny(layers=1), metadata | {"general.alignmenu": 33, "general.alignmens": "n"})
    return path


def read(weight):
    return jax.tree.map(np.asarray, weight)


def check_equal(file, reader):
    assert file.architecture == "llama"
    assert file.metadata == {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "ü", ""]
    assert list(file.tensors) == [t.name for t in reader.tensors]
    for tensor in reader.tensors:
        weight = file.tensors[tensor.name]
        assert weight.shape == tuple(tensor.shape[::-1])
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(read(weight).dequantize(), expected.reshape(weight.shape))


def test_metadata_and_tensors_are_what_gguf_py_reads(good):
    check_equal(open_gguf(good), gguf.GGUFReader(good))


def as_version_1(data, reader):
    """The file with counts, lengths and dimensions in 32 bits; of gguf-py's parts, only these (and offsets) have 64."""

    def narrow(parts):
        return b"".join(p.astype(np.uint32).tobytes() if p.dtype == np.uint64 else p.tobytes() for p in parts)

    fields = [field for key, field in reader.fields.items() if not key.startswith("GGUF.")]
    head = b"GGUF" + struct.pack("<3I", 1, len(reader.tensors), len(fields))
    head += b"".join(narrow(field.parts) for field in fields)
    head += b"".join(narrow(t.field.parts[:-1]) + t.field.parts[-1].tobytes() for t in reader.tensors)
    return head + bytes(-len(head) % 32) + data[reader.data_offset :]


OLDER = {1: as_version_1, 2: lambda data, reader: replaced(4, u32(2))(data)}


@pytest.mark.parametrize("version", OLDER)
def test_older_versions_hold_the_same(good, tmp_path, version):
    reader, path = gguf.GGUFReader(good), tmp_path / "old.gguf"
    path.write_bytes(OLDER[version](good.read_bytes(), reader))
    check_equal(open_gguf(path), reader)


@pytest.mark.parametrize("cut", [8, 12, 30, 200, 900])
def test_a_version_1_file_cut_short_is_one_line(good, tmp_path, cut):
    path = tmp_path / "old.gguf"
    path.write_bytes(as_version_1(good.read_bytes(), gguf.GGUFReader(good))[:cut])
    with pytest.raises(InputError, match="cut short or damaged"):
        open_gguf(path)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int8", "int16", "int32", "int64"])
def test_plain_numbers_are_kept_as_they_are(tmp_path, dtype):
    writer, path = gguf.GGUFWriter(tmp_path / "m.gguf", "llama"), tmp_path / "m.gguf"
    values = np.array([[-1, 2, 3], [4, 5, 60]], jnp.dtype(dtype))
    for name, data in (("matrix", values), ("vector", values[1])):
        if dtype == "bfloat16":
            writer.add_tensor(name, data.view(np.uint8), raw_dtype=T.BF16)
        else:
            writer.add_tensor(name, data)
    save(writer)
    tensors = open_gguf(path).tensors
    assert {name: w.format for name, w in tensors.items()} == {"matrix": dtype, "vector": dtype}
    np.testing.assert_array_equal(tensors["matrix"].values, values)
    np.testing.assert_array_equal(tensors["vector"].values, values[1])


def test_blocks_of_q8_1_have_the_36_bytes_of_today(tmp_path):
    path = tmp_path / "m.gguf"
    blocks = np.random.default_rng(0).integers(0, 100, (2, 2, 36), np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x.weight", blocks.reshape(2, -1).view(np.float32))
    save(writer)
    path.write_bytes(info("x.weight", 4, u64(64) + u64(2) + u32(T.Q8_1))(path.read_bytes()))
    weight = open_gguf(path).tensors["x.weight"]
    assert (weight.format, weight.shape) == ("Q8_1", (2, 64))
    np.testing.assert_array_equal(weight.blocks, blocks)


def edited(good, tmp_path, edit):
    path = tmp_path / "bad.gguf"
    path.write_bytes(edit(bytearray(good.read_bytes())))
    return path


def replaced(offset, value):
    return lambda data: data[:offset] + value + data[offset + len(value) :]


def info(name, offset, value):
    """Replace bytes of a tensor's description, `offset` bytes after its name."""
    return lambda data: replaced(data.index(name.encode()) + len(name) + offset, value)(data)


def after(name, value):
    return lambda data: replaced(data.index(name.encode()) + len(name), value)(data)


def renamed(name, other):
    return lambda data: replaced(data.index(name.encode()), other.encode())(data)


def offset_of(data, name):
    return struct.unpack_from("<Q", data, data.index(name.encode()) + len(name) + 24)[0]


u32, u64 = struct.Struct("<I").pack, struct.Struct("<Q").pack

BAD = {
    "wrong magic": (replaced(0, b"GGML"), r"not a GGUF file \(it begins with b'GGML'"),
    "empty": (lambda data: b"", r"not a GGUF file \(it begins with b''"),
    "no header": (lambda data: data[:6], "cut short or damaged"),
    "unknown version": (replaced(4, u32(9)), "version 9"),
    "big-endian": (replaced(4, struct.pack(">I", 3)), "big-endian"),
    "absurd tensor count": (replaced(8, u64(2**60)), "cut short or damaged: 1152921504606846976 announced"),
    "a tensor too many": (replaced(8, u64(13)), "damaged: a tensor of .* dimensions"),
    "absurd metadata count": (replaced(16, u64(2**60)), "cut short or damaged: 1152921504606846976 announced"),
    "absurd key length": (replaced(24, u64(2**62)), "cut short or damaged: 4611686018427387904 announced"),
    "unknown value": (after("llama.x", u32(99)), "metadata: 'llama.x' has the type 99"),
    "array of arrays": (
        after("tokenizer.ggml.scores", u32(9) + u32(9)),
        "an item of 'tokenizer.ggml.scores' has the type 9",
    ),
    "key given twice": (
        renamed("llama.rope.freq_base", "llama.context_length"),
        "'llama.context_length' is given twice",
    ),
    "odd alignment": (
        renamed("general.alignmenu", "general.alignment"),
        "'general.alignment' is 33, not a power of two",
    ),
    "alignment in words": (
        renamed("general.alignmens", "general.alignment"),
        "'general.alignment' is not a whole number",
    ),
    "absurd array": (lambda d: replaced(d.index(b"tokenizer.ggml.tokens") + 29, u64(2**40))(d), "cut short or damaged"),
    "absurd string": (
        lambda d: replaced(d.index(b"tokenizer.ggml.tokens") + 37, u64(2**63))(d),
        "cut short or damaged",
    ),
    "cut in metadata": (lambda data: data[:300], "cut short or damaged"),
    "cut in tensors": (
        lambda data: data[:-100],
        "cut short or damaged: tensor 'blk.0.ffn_down.weight' .* ends outside",
    ),
    "unknown type": (info("blk.0.ffn_up.weight", 20, u32(99)), "'blk.0.ffn_up.weight' has the unknown type 99"),
    "no dimensions": (info("blk.0.ffn_up.weight", 0, u32(0)), "damaged: a tensor of 0 dimensions"),
    "five dimensions": (info("blk.0.ffn_up.weight", 0, u32(5)), "damaged: a tensor of 5 dimensions"),
    "absurd shape": (
        info("blk.0.ffn_up.weight", 4, u64(2**61)),
        "'blk.0.ffn_up.weight' of shape .* ends outside the file",
    ),
    "nothing in it": (
        info("blk.0.ffn_up.weight", 12, u64(0)),
        r"'blk.0.ffn_up.weight' has the impossible shape \[0, 64\]",
    ),
    "vector of blocks": (info("output_norm.weight", 12, u32(T.Q8_0)), "'output_norm.weight' has the impossible shape"),
    "half a block": (
        info("blk.0.ffn_up.weight", 4, u64(40)),
        r"'blk.0.ffn_up.weight' has the impossible shape \[96, 40\]",
    ),
    "offset outside": (info("blk.0.ffn_up.weight", 24, u64(2**40)), "cut short or damaged"),
    "misaligned": (
        lambda d: info("blk.0.ffn_up.weight", 24, u64(offset_of(d, "blk.0.ffn_up.weight") + 8))(d),
        r"'blk.0.ffn_up.weight' begins at offset \d+, which is not a multiple of 32",
    ),
    "on top of another": (
        lambda d: info("blk.0.ffn_up.weight", 24, u64(offset_of(d, "blk.0.ffn_gate.weight")))(d),
        "tensors 'blk.0.ffn_gate.weight' and 'blk.0.ffn_up.weight' overlap",
    ),
    "larger than its place": (
        info("blk.0.ffn_up.weight", 12, u64(97)),
        "tensors 'blk.0.ffn_up.weight' and 'blk.0.ffn_down.weight' overlap",
    ),
    "same name twice": (renamed("blk.0.attn_k.weight", "blk.0.attn_q.weight"), "'blk.0.attn_q.weight' is given twice"),
    "name of two lines": (renamed("blk.0.attn_k.weight", "blk\n0.attn_k.weight"), r"a tensor with the name 'blk\\n0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(good, tmp_path, name):
    edit, message = BAD[name]
    path = edited(good, tmp_path, edit)
    with pytest.raises(InputError, match=message) as error:
        open_gguf(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def save(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    save(writer)
    return path


def test_a_damaged_length_does_not_fill_memory_even_where_the_file_is_large(good, tmp_path):
    count = good.read_bytes().index(b"tokenizer.ggml.scores") + len("tokenizer.ggml.scores") + 8
    path = edited(good, tmp_path, replaced(count, u64(2**24 + 1)))
    with path.open("r+b") as file:
        file.truncate(2**27)  # sparse
    with pytest.raises(InputError, match="cut short or damaged: 16777217 announced"):
        open_gguf(path)


@pytest.fixture
def parts(good, tmp_path):
    """The good file in three parts, by gguf-py."""
    reader = gguf.GGUFReader(good)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=5)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    save(writer)
    return [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_stands_for_the_whole(good, parts, given):
    whole, file = open_gguf(good), open_gguf(parts[given])
    assert file.path == parts[0]
    split = {"split.count": 3, "split.no": 0, "split.tensors.count": 12}
    assert file.metadata == {**whole.metadata, **split}
    assert list(file.tensors) == list(whole.tensors)
    for name, weight in whole.tensors.items():
        np.testing.assert_array_equal(read(file.tensors[name]).dequantize(), read(weight).dequantize())


def edit_part(number, edit):
    return lambda parts: parts[number].write_bytes(edit(parts[number].read_bytes()))


BAD_PARTS = {
    "missing first": (2, lambda p: p[0].unlink(), r"m-00003\S+: part 1 of 3 is missing: \S*/m-00001-of-00003.gguf"),
    "missing last": (0, lambda p: p[2].unlink(), r"m-00001\S+: part 3 of 3 is missing: \S*/m-00003-of-00003.gguf"),
    "missing one's own name": (
        1,
        lambda p: p[1].write_bytes(p[0].read_bytes()),
        "m-00002.* part 1 of 3, but its name does not end in '-00001-of-00003.gguf'",
    ),
    "one part twice": (
        0,
        lambda p: p[1].write_bytes(p[2].read_bytes()),
        r"m-00002\S+: split.no and split.count are 2 and 3, not 1 and 3",
    ),
    "a part that is whole": (
        0,
        edit_part(1, renamed("split.count", "split.kount")),
        r"m-00002\S+: split.no and split.count are 1 and None, not 1 and 3",
    ),
    "cut part": (0, edit_part(2, lambda data: data[:-2000]), r"m-00003\S+: cut short or damaged: tensor"),
    "tensor in two parts": (
        2,
        edit_part(1, renamed("blk.0.attn_v.weight", "blk.0.attn_q.weight")),
        r"m-00002\S+: tensor 'blk.0.attn_q.weight' is in an earlier part already",
    ),
    "tensors missing": (
        1,
        edit_part(0, after("split.tensors.count", u32(5) + u32(13))),
        r"m-00001\S+: split.tensors.count is 13, but the parts have 12 tensors",
    ),
    "no count": (
        1,
        edit_part(0, renamed("split.tensors.count", "split.tensors.kount")),
        r"m-00001\S+: split.tensors.count is None, but",
    ),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_bad_parts_are_one_line(parts, name):
    given, edit, message = BAD_PARTS[name]
    edit(parts)
    with pytest.raises(InputError, match=message) as error:
        open_gguf(parts[given])
    assert "\n" not in str(error.value)


UNFIT = {
    "architecture": ({"arch": "mamba"}, "models of type 'mamba' are not supported; supported in GGUF files: llama"),
    "missing key": ({"block_count": ("block_count", None)}, r"metadata llama\.\*: 'block_count' is missing"),
    "experts": ({"experts": ("expert_count", 8)}, r"metadata llama\.\*: 'expert_used_count' is missing"),
    "per layer": ({"per_layer": ("feed_forward_length", [96, 64])}, "'feed_forward_length' has 2 values for 1 layers"),
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
