"""Converting: the values against every bfloat16 there is, and what comes of it whole, bounded, or not at all."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import safetensors
from covering import some
from forked import Forked
from safetensors.numpy import load_file, save_file

import jaxllm.convert
from jaxllm.checkpoint import dtype_convert, unfinished, writing
from jaxllm.checkpoint.safetensors import open_directory
from jaxllm.checkpoint.writing import Tensor, safetensors_file, shards, write_directory
from jaxllm.cli import execute
from jaxllm.convert import convert, parse_size
from jaxllm.errors import InputError
from jaxllm.formats.scaled import Scaled

CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
CONFIG = {"model_type": "llama", "torch_dtype": "float16"}


def source(path, tensors=None, config=CONFIG):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({"a": np.ones((2, 3), np.float32)} if tensors is None else tensors, path / "model.safetensors")
    return path


def sparse_source(path, *sizes):
    """Tensors of so many zeros as float32, in a file that takes no space."""
    source(path)
    ends = np.cumsum([0, *sizes]) * 4
    entry = {"dtype": "F32"}
    header = {f"t{i}": entry | {"shape": [n], "data_offsets": ends[i : i + 2].tolist()} for i, n in enumerate(sizes)}
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + int(ends[-1]))
    return path


def read(path):
    """Every tensor of a directory, by the library `safetensors`."""
    return {name: x for file in sorted(path.glob("*.safetensors")) for name, x in load_file(file).items()}


def raw(path):
    """Every tensor as its dtype, shape and bytes."""
    files = sorted(path.glob("*.safetensors"))
    return {n: (t["dtype"], t["shape"], t["data"]) for f in files for n, t in safetensors.deserialize(f.read_bytes())}


def nearest_bfloat16(x):
    """Bits of the nearest, ties to even, found among all of them: their midpoints are exact in float64."""
    grid = np.arange(0x7F80, dtype=np.uint16).view(BF16).astype(np.float64)
    middles = (grid + np.append(grid[1:], 2.0**128)) / 2
    size = np.abs(x.astype(np.float64))
    bits = np.searchsorted(middles, size)  # of the lower one where it is a tie
    bits += (bits % 2 == 1) & np.isin(size, middles)
    return (bits | np.signbit(x) << 15).astype(np.uint16)


def awkward(dtype):
    """Numbers of every size, subnormals, ties and what is just beside them, and infinities."""
    rng = np.random.default_rng(0)
    uint = {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
    anything = rng.integers(0, np.iinfo(uint).max, 100_000, uint, endpoint=True).view(dtype)
    with np.errstate(over="ignore"):  # of float64 most are beyond the others: so these too
        usual = (rng.standard_normal(50_000) * 10.0 ** rng.integers(-45, 39, 50_000)).astype(dtype)
        middles = np.arange(0x8000, 0x7F800000, 0x8000, np.uint32).view(F32).astype(dtype)
    beside = [np.nextafter(middles, dtype.type(to)) for to in (-np.inf, np.inf)]
    x = np.concatenate([anything, usual, middles, *beside, np.array([0, -0.0, np.inf, -np.inf], dtype)])
    return x[~np.isnan(x)]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bfloat16_is_the_nearest(tmp_path, dtype):
    x = awkward(np.dtype(dtype))
    convert(source(tmp_path / "a", {"x": x}), tmp_path / "b", to="bfloat16", progress=False)
    got = read(tmp_path / "b")["x"]
    assert got.dtype == BF16
    np.testing.assert_array_equal(got.view(np.uint16), nearest_bfloat16(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_float32_is_numpys(tmp_path, dtype):
    x = np.arange(0x7F80, dtype=np.uint16).view(BF16) if dtype == "bfloat16" else awkward(np.dtype(dtype))
    convert(source(tmp_path / "a", {"x": x}), tmp_path / "b", to="float32", progress=False)
    got = read(tmp_path / "b")["x"]
    assert got.dtype == F32
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got.view(np.uint32), x.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("to", ["bfloat16", "float32"])
def test_nan_stays_nan(tmp_path, to):
    quiet_and_signalling = {
        "bfloat16": np.array([0x7FC0, 0x7F81, 0xFF81], np.uint16).view(BF16),
        "float16": np.array([0x7E00, 0x7C01, 0xFC01], np.uint16).view(np.float16),
        "float32": np.array([0x7FC00000, 0x7F800001, 0xFF800001], np.uint32).view(np.float32),
        "float64": np.array([0x7FF8 << 48, (0x7FF0 << 48) + 1, (0xFFF0 << 48) + 1], np.uint64).view(np.float64),
    }
    convert(source(tmp_path / "a", quiet_and_signalling), tmp_path / "b", to=to, progress=False)
    got, before = read(tmp_path / "b"), read(tmp_path / "a")
    assert all(np.isnan(x).all() for x in got.values())
    assert got[to].tobytes() == before[to].tobytes()  # nothing was to be converted: every bit is kept


def test_there_and_back_is_the_same(tmp_path):
    convert(CHECKPOINTS / "odd", tmp_path / "there", to="float32", progress=False)
    convert(tmp_path / "there", tmp_path / "back", to="bfloat16", progress=False)
    before, there = raw(CHECKPOINTS / "odd"), read(tmp_path / "there")
    assert raw(tmp_path / "back") == before
    assert {x.dtype for x in there.values()} == {F32}
    assert len(before) == 21


@pytest.mark.parametrize("name", some(NAMES, ["mixtral_stacked", "odd", "phi3"]))
def test_logits_of_a_bfloat16_copy_are_near_those_of_the_original(tmp_path, name):
    convert(CHECKPOINTS / name, tmp_path / name, to="bfloat16", progress=False)
    golden = np.load(CHECKPOINTS / name / "golden.npz")
    got = jaxllm.load(tmp_path / name, dtype="float32", progress=False).logits(golden["tokens"])
    error = np.abs(np.asarray(got) - golden["logits"]).max(-1)
    assert (error > 0.25).mean() < 0.05  # a router whose two best experts are nearly level may choose the other one
    assert np.median(error) < 0.05
    assert (error.max() > 1e-3) == (name != "odd")  # which is of bfloat16 already


def test_integers_scalars_and_empty_tensors_are_kept(tmp_path):
    tensors = {
        "odd": np.ones(3, np.float16),
        "mask": np.array([True, False, True]),
        "position_ids": np.arange(2**40, 2**40 + 5),
        "bytes": np.arange(7, dtype=np.uint8),
        "table": np.arange(6, dtype=np.int32).reshape(2, 3),
        "x_scale": np.array(3.5, np.float64),
        "none": np.zeros((0, 4), np.float32),
    }
    convert(source(tmp_path / "a", tensors), tmp_path / "b", to="bfloat16", progress=False)
    got = read(tmp_path / "b")
    for name, x in tensors.items():
        assert got[name].dtype == (BF16 if x.dtype.kind == "f" else x.dtype)
        np.testing.assert_array_equal(got[name], x, strict=x.dtype.kind != "f")
    for x in open_directory(tmp_path / "b").tensors.values():
        assert x.values.offset % x.values.dtype.itemsize == 0


def test_a_correction_bias_is_never_rounded(tmp_path):
    """It only chooses experts, and a rounded one chooses others."""
    x = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)
    biases = {"a.gate.e_score_correction_bias": x[0], "e_score_correction_bias": x, "a.mlp.expert_bias": x[0]}
    others = {"a.gate.weight": x, "a.bias": x[0], "a.my_expert_bias": x[0], "a.expert_bias.weight": x}
    src = source(tmp_path / "a", biases | others)
    convert(src, tmp_path / "b", to="bfloat16", progress=False)
    before, after = raw(src), raw(tmp_path / "b")
    assert {name for name in after if after[name] == before[name]} == biases.keys()
    assert {name for name, x in after.items() if x[0] == "BF16"} == others.keys()


FP8_CONFIGS = {
    "undeclared": ({}, (128, 128)),
    "declared": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}}, (16, 32)),
}


@pytest.mark.parametrize("name", FP8_CONFIGS)
def test_only_fp8_matrices_are_converted_where_there_are_some(tmp_path, monkeypatch, name):
    """Of one matrix and of a stack of them, in bands of whole blocks that `Scaled` dequantizes."""
    said, block = FP8_CONFIGS[name]
    rng, bands = np.random.default_rng(0), []
    fp8, scales, expected = {}, {}, {}
    cases = ("a.weight", (150, 141), "_scale_inv"), ("a.experts.up_proj", (3, 150, 142), ".weight_scale_inv")
    for key, shape, suffix in cases:
        grid = (*shape[:-2], *(-(-n // size) for n, size in zip(shape[-2:], block, strict=True)))
        fp8[key] = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
        scales[key + suffix] = rng.uniform(0.5, 2, grid).astype(np.float32)
        of = scales[key + suffix].repeat(block[0], -2)[..., : shape[-2], :].repeat(block[1], -1)
        expected[key] = (fp8[key].astype(np.float32) * of[..., : shape[-1]]).astype(BF16)
    others = {"a.bias": np.ones(3, np.float32), "a.norm": np.ones(2, np.float16), "a.gate": rng.normal(size=(2, 3))}
    others |= {"ids": np.arange(3), "a.weight_k_scale": np.ones(1, np.float32)}

    def dequantize(self, dtype, usual=Scaled.dequantize):
        bands.append(self.shape)
        return usual(self, dtype)

    monkeypatch.setattr(Scaled, "dequantize", dequantize)
    monkeypatch.setattr("jaxllm.checkpoint.writing.PIECE", 5000)
    src = source(tmp_path / "a", fp8 | scales | others, CONFIG | said)
    convert(src, tmp_path / "b", to="bfloat16", progress=False)
    before, after = raw(src), raw(tmp_path / "b")
    assert after.keys() == expected.keys() | others.keys()
    assert {key: after[key] for key in others} == {key: before[key] for key in others}
    assert {key: x.tobytes() for key, x in expected.items()} == {key: after[key][2] for key in expected}
    high = 128 if name == "undeclared" else 32  # of as many whole blocks as there is room for
    assert set(bands) == {(rows, width) for rows in (high, 150 % high) for width in (141, 142)}
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == CONFIG | {"torch_dtype": "bfloat16"}


def converted_by(argv):
    return execute(jaxllm.convert.parser(), jaxllm.convert.run, [*map(str, argv)])


OWN_OPTIONS = {"both": ["--input-fp8-hf-path", "a", "--output-bf16-hf-path", "b"]}
OWN_OPTIONS |= {"the source": ["--input-fp8-hf-path", "a", "b"], "the destination": ["a", "--output-bf16-hf-path", "b"]}


@pytest.mark.parametrize("name", OWN_OPTIONS)
def test_the_options_of_the_demos_casting_imply_bfloat16(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    source(tmp_path / "a")
    assert converted_by(OWN_OPTIONS[name]) == 0
    assert {x.dtype for x in read(tmp_path / "b").values()} == {BF16}


@pytest.mark.parametrize("pair", ["--hf-ckpt-path --input-fp8-hf-path", "--save-path --output-bf16-hf-path"])
def test_two_sources_are_not_a_source_and_a_destination(tmp_path, capsys, pair):
    source(tmp_path / "a")
    one, other = pair.split()
    assert converted_by([one, tmp_path / "a", other, tmp_path / "b", "--to", "bfloat16"]) == 2
    assert capsys.readouterr().err.startswith(f"error: argument {other}: not allowed with argument {one} ")
    assert not (tmp_path / "b").exists()


EXCLUSIONS = {
    "none": ({}, {"modules_to_not_convert": ["a"]}),
    "one list": ({"modules_to_not_convert": ["x"]}, {"modules_to_not_convert": ["x", "a"]}),
    "by the other name": ({"ignored_layers": ["x"]}, {"ignored_layers": ["x", "a"]}),
}


@pytest.mark.parametrize("name", EXCLUSIONS)
def test_dequantized_matrices_join_those_that_were_left_out(tmp_path, name):
    """In the list that there is: of two lists, readers see one only."""
    before, after = EXCLUSIONS[name]
    said = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    tensors = {"a.weight": np.ones((2, 3), ml_dtypes.float8_e4m3fn), "a.weight_scale_inv": np.ones((1, 1), np.float32)}
    tensors |= {"kept.weight": tensors["a.weight"], "x.weight": np.ones((2, 3), BF16)}
    src = source(tmp_path / "a", tensors, CONFIG | {"quantization_config": said | before})
    with pytest.warns(UserWarning, match="'kept.weight' is FP8, but 'kept.weight_scale_inv' is missing"):
        convert(src, tmp_path / "b", to="bfloat16", progress=False)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"] == said | after


LIMIT = 30_000


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The checkpoint `odd` in shards, with tensors larger and smaller than one."""
    path = tmp_path_factory.mktemp("cut") / "odd"
    convert(CHECKPOINTS / "odd", path, to="float32", max_shard_size=LIMIT, progress=False)
    return path


def test_shards_are_numbered_and_within_the_limit(cut):
    files = sorted(cut.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00007.safetensors" for i in range(1, 8)]
    assert max(file.stat().st_size for file in files) <= LIMIT


def test_shards_are_full():
    """For every limit there might be. The header is taken to need at most 110 bytes a tensor."""
    tensors = [Tensor(f"{i}", F32, (i,), [np.ones(i, np.float32)]) for i in range(40)]
    for limit in range(270, 1200, 3):
        parts = shards(tensors, limit)
        assert [t.name for part in parts for t in part] == [t.name for t in tensors]
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            assert safetensors_file("file", part).nbytes <= limit
            assert following is None or sum(t.nbytes + 110 for t in (*part, following[0])) > limit


def read_header(file):
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    return header


def test_the_index_says_where_tensors_are(cut):
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    there = {name: file.name for file in cut.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == there
    assert there.keys() == read(CHECKPOINTS / "odd").keys()
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in read(cut).values())}


def test_a_larger_tensor_has_a_file_of_its_own(tmp_path):
    tensors = {name: np.ones(n, np.float32) for name, n in (("a", 10), ("b", 5000), ("c", 10), ("d", 10))}
    convert(source(tmp_path / "a", tensors), tmp_path / "b", to="float32", max_shard_size="1KB", progress=False)
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert [sorted(load_file(file)) for file in files] in ([["a"], ["b"], ["c", "d"]], [["b"], ["a", "c", "d"]])


def test_one_file_needs_no_index(tmp_path):
    convert(CHECKPOINTS / "odd", tmp_path / "b", to="float32", progress=False)
    expected = ["config.json", "config_old.json", "generation_config.json", "model.safetensors"]
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == expected
    read_header(tmp_path / "b" / "model.safetensors")


SIZES = {"5GB": 5e9, "500 MB": 5e8, "1.5gib": 1.5 * 2**30, "1KiB": 1024, "2TB": 2e12, "17": 17, "17B": 17, 18: 18}


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    assert parse_size(size) == SIZES[size]


@pytest.mark.parametrize("size", ["", "0", "5G", "GB", "-1GB", "nan", "5iB", "0.1", -5, "1" * 400])
def test_what_is_no_size(size):
    with pytest.raises(InputError, match=f"max_shard_size '{size}': give a number"):
        parse_size(size)


def test_other_files_come_along_but_neither_weights_nor_pickles(tmp_path):
    kept = ["tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "chat_template.jinja", "merges.txt", "LICENSE"]
    kept += ["generation_config.json", "modeling_x.py", "README.md"]
    left = ["pytorch_model.bin", "consolidated.00.pth", "a.pt", "x.ckpt", "t.pkl", "w.npz", "old.safetensors", "w.gguf"]
    left += ["pytorch_model.bin.index.json", "model.safetensors.index.fp16.json", "a.npy", "tf_model.h5"]
    left += [".gitattributes", "flax_model.msgpack", "model.onnx", "model.onnx_data"]
    src = source(tmp_path / "snapshots" / "a")
    for name in kept + left:
        (src / name).write_bytes(b"\x0a of " + name.encode())
    (src / "state.data").write_bytes(b"\x80\x04\x95")  # a pickle under another name, and torch's archive of some
    (src / "state.txt").write_bytes(b"PK\x03\x04")
    (src / "original").mkdir()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("linked")
    (src / "special_tokens_map.json").symlink_to("../../blobs/1")  # as in the cache of the hub
    convert(src, tmp_path / "b", to="bfloat16", progress=False)
    got = {file.name: file for file in (tmp_path / "b").iterdir()}
    assert sorted(got) == sorted([*kept, "special_tokens_map.json", "config.json", "model.safetensors"])
    assert all(got[name].read_bytes() == (src / name).read_bytes() for name in kept)
    copy = got["special_tokens_map.json"]
    assert (copy.read_text(), copy.is_symlink()) == ("linked", False)


CONFIGS = {
    "new key": ({"dtype": "float16"}, {"dtype": "bfloat16"}),
    "old key": ({"torch_dtype": "float16"}, {"torch_dtype": "bfloat16"}),
    "both": ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
    "neither": ({}, {}),
    "null": ({"dtype": None, "quantization_config": None}, {"dtype": None, "quantization_config": None}),
    "of a part": (
        {"dtype": "float32", "text_config": {"torch_dtype": "float32", "n": 1}},
        {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "n": 1}},
    ),
    "the rest stays": ({"z": [1e-05, {"dtype": "x"}], "a": "ü"}, {"z": [1e-05, {"dtype": "x"}], "a": "ü"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_says_the_new_dtype(tmp_path, name):
    before, after = CONFIGS[name]
    src = source(tmp_path / "a", config={"model_type": "x", **before})
    convert(src, tmp_path / "b", to="bfloat16", progress=False)
    got = json.loads((tmp_path / "b" / "config.json").read_text())
    assert list(got.items()) == [("model_type", "x"), *after.items()]


def cut_short(error, src, monkeypatch):
    def open_then_truncate(path):
        opened = open_directory(path)
        os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 8)
        return opened

    monkeypatch.setattr(jaxllm.convert, "open_directory", open_then_truncate)


def raising(error, src, monkeypatch):
    """Raise when the second tensor is to be read."""
    seen = []

    def pieces(name, array):
        seen.append(name)
        if len(seen) == 2:
            raise error
        yield np.zeros(array.shape, array.dtype)

    monkeypatch.setattr(dtype_convert, "_pieces", pieces)


def not_renamed(error, src, monkeypatch):
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(error))


TROUBLE = {
    "source cut short": (cut_short, None, InputError, "model.safetensors: was changed or cut .*, tensor 'a'"),
    "a bug": (raising, ZeroDivisionError(), ZeroDivisionError, None),
}
INTERRUPTED = {
    "disk full": (raising, OSError(28, "No space left on device"), InputError, "c: not written: .*No space left.*kept"),
    "Ctrl-C": (raising, KeyboardInterrupt(), KeyboardInterrupt, None),
    "taken meanwhile": (not_renamed, OSError(39, "Directory not empty"), InputError, "c: not written: .*not empty.*ke"),
}


@pytest.mark.parametrize("empty", [True, False], ids=["into an empty directory", "into a new one"])
@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_leaves_nothing_behind(tmp_path, monkeypatch, name, empty):
    patch, given, kind, message = TROUBLE[name]
    src = source(tmp_path / "a", {"a": np.ones(1000, np.float32), "b": np.ones(1000, np.float32)})
    (tmp_path / "b").mkdir()
    dst = tmp_path / "b" / "c"
    if empty:
        dst.mkdir()
    patch(given, src, monkeypatch)
    with pytest.raises(kind, match=message):
        convert(src, dst, to="bfloat16", max_shard_size=2100, progress=False)
    assert list((tmp_path / "b").rglob("*")) == ([dst] if empty else [])


@pytest.mark.parametrize("empty", [True, False], ids=["into an empty directory", "into a new one"])
@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, name, empty):
    """The second run writes only the tensor that the first one did not."""
    patch, given, kind, message = INTERRUPTED[name]
    values = {"a": np.full(1000, 2.5, np.float32), "b": np.full(1000, -3, np.float32)}
    src, dst = source(tmp_path / "a", values), tmp_path / "b" / "c"
    dst.parent.mkdir()
    if empty:
        dst.mkdir()
    with monkeypatch.context() as patched:
        patch(given, src, patched)
        patched.setattr(unfinished, "SYNC_SECONDS", 0)
        with pytest.raises(kind, match=message):
            convert(src, dst, to="bfloat16", max_shard_size=2100, progress=False)
    assert not dst.exists() or not list(dst.iterdir())
    convert(src, dst, to="bfloat16", max_shard_size=2100, progress=False)
    first = 0.0 if patch is raising else 2.5  # what the first run wrote is kept
    assert {name: float(values[0]) for name, values in read(dst).items()} == {"a": first, "b": -3.0}
    assert [path.name for path in dst.parent.iterdir()] == ["c"]


def test_the_index_is_the_last_to_be_written(tmp_path):
    """And until then there is nothing at the destination; afterwards it has the permissions of any directory."""
    seen = []

    def pieces():
        assert not (tmp_path / "b").exists()
        seen.append({file.name for file in tmp_path.rglob("content/*")})
        yield np.ones(2, np.float32)

    tensors = [Tensor(f"t{i}", F32, (2,), pieces()) for i in range(3)]
    write_directory(tmp_path / "b", tensors, {"config.json": b"{}"}, max_shard_size=1)
    assert seen[-1] == {"config.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))}
    (tmp_path / "usual").mkdir()
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b", "usual"]


def test_everything_is_on_disk_before_it_appears(tmp_path, monkeypatch):
    synced, usual = [], os.fsync

    def fsync(opened):
        synced.append((Path(f"/proc/self/fd/{opened}").readlink().name, (tmp_path / "b").exists()))
        usual(opened)

    monkeypatch.setattr(os, "fsync", fsync)
    tensors = [Tensor(f"t{i}", F32, (2,), [np.ones(2, np.float32)]) for i in range(2)]
    write_directory(tmp_path / "b", tensors, {"config.json": b"{}"}, max_shard_size=1)
    inside = [file.name for file in (tmp_path / "b").iterdir()]
    assert len(inside) == 4
    assert sorted(synced[:-1]) == sorted((name, False) for name in [*inside, "content"])
    assert synced[-1] == (tmp_path.name, True)


def test_a_link_to_an_empty_directory_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "real", target_is_directory=True)
    convert(source(tmp_path / "a"), tmp_path / "b", to="float32", progress=False)
    assert (tmp_path / "b").is_symlink()
    assert read(tmp_path / "real").keys() == {"a"}


WRONG = {
    "too few": ([np.ones(1, np.float32)], "not as many values"),
    "too many": ([np.ones(2, np.float32)] * 2, "not as many values"),
    "another dtype": ([np.ones(2, np.int32)], "int32 for float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_pieces_that_are_not_what_was_announced_are_noticed(tmp_path, name):
    pieces, message = WRONG[name]
    with pytest.raises(AssertionError, match=message):
        write_directory(tmp_path / "b", [Tensor("t", F32, (2,), pieces)], {})
    assert not list(tmp_path.iterdir())


# tests/test_faults.py kills some.
@pytest.mark.parametrize("kind", some([signal.SIGINT, signal.SIGKILL], [signal.SIGINT]))
def test_a_process_that_was_stopped_is_gone_on_with(tmp_path, monkeypatch, kind):
    src, dst = sparse_source(tmp_path / "a", *[2**20] * 40), tmp_path / "out" / "b"
    dst.parent.mkdir()
    # A job in the background ignores the signal, and so does what it starts.
    run = f"""if True:
        import runpy, signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from jaxllm.checkpoint import unfinished, writing
        unfinished.SYNC_SECONDS, usual = 0, writing._write
        writing._write = lambda part, target, advance: usual(part, target, lambda n: time.sleep(0.01))
        sys.argv = ["convert", {str(src)!r}, {str(dst)!r}, "--to", "bfloat16"]
        runpy.run_module("jaxllm.convert", run_name="__main__", alter_sys=True)"""
    journal = dst.with_name(".b.partial") / "journal"
    with subprocess.Popen([sys.executable, "-c", run], stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 2):
            time.sleep(0.01)
        with pytest.raises(InputError, match="b: another process is writing it"):
            convert(src, dst, to="bfloat16", progress=False)
        process.send_signal(kind)
        assert (process.wait(60), process.stderr.read()) == (130 if kind == signal.SIGINT else -9, "")
    assert not dst.exists()
    read_now, usual = [], writing.pieces

    def counted(name, array):
        read_now.append(name)
        yield from usual(name, array)

    monkeypatch.setattr(dtype_convert, "_pieces", counted)
    convert(src, dst, to="bfloat16", progress=False)
    assert 0 < len(read_now) < 40
    assert read(dst).keys() == {f"t{i}" for i in range(40)}
    assert [path.name for path in dst.parent.iterdir()] == ["b"]


def test_the_command_line_says_what_it_did(tmp_path):
    args = CHECKPOINTS / "odd", tmp_path / "b", "--to", "float32", "--max-shard-size", "60KB"
    command = [sys.executable, "-m", "jaxllm.convert", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith(f"{tmp_path / 'b'}: 21 tensors, 166848 bytes, ")
    assert done.stderr.endswith(" GB/s\n")
    assert done.stderr.count("\n") == 1
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 3


def quantized(tmp_path, tensors):
    source(tmp_path / "a", {"x.norm": np.ones(2, np.float32)} | tensors)


def gguf_only(tmp_path):
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "m.gguf").write_bytes(b"GGUF")


def truncated(tmp_path):
    os.truncate(tmp_path / "a" / "model.safetensors", 20)


def linked(tmp_path):
    (tmp_path / "b").symlink_to(tmp_path / "a", target_is_directory=True)


INT8 = np.ones((2, 3), np.int8)
FP8 = np.ones((2, 3), ml_dtypes.float8_e4m3fn)
SCALE = np.ones(2, np.float32)
REFUSED = {
    "no such source": (lambda p: shutil.rmtree(p / "a"), ["a", "b"], "a: no such file"),
    "a source that is a file": (None, ["a/config.json", "b"], "config.json: not a GGUF file"),
    "a GGUF file": (lambda p: (p / "m.gguf").write_bytes(b"GGUF"), ["m.gguf", "b"], "m.gguf: cut short or damaged"),
    "a directory of GGUF": (gguf_only, ["a", "b"], "a: a directory of GGUF files: name one of them, such as m.gguf"),
    "a source cut short": (truncated, ["a", "b"], "model.safetensors: cut short"),
    "FP8": (lambda p: quantized(p, {"x.weight": FP8}), ["a", "b"], r"quantized \(tensor 'x.weight' is float8_e4m3fn\)"),
    "packed integers": (
        lambda p: quantized(p, {"x.weight_packed": INT8, "x.weight_scale": SCALE}),
        ["a", "b"],
        r"quantized \(tensor 'x.weight_packed' of int8 has scales\), which only who knows the model can convert: ",
    ),
    "a config that says so": (
        lambda p: source(p / "a", config=CONFIG | {"quantization_config": {"quant_method": "gptq"}}),
        ["a", "b"],
        r"quantized \(config.json has 'quantization_config'\)",
    ),
    "onto itself": (None, ["a", "a/../a"], "/a itself or inside it"),
    "onto itself by another name": (linked, ["a", "b"], "/a itself or inside it"),
    "into itself": (None, ["a", "a/b"], "/a itself or inside it"),
    "taken": (lambda p: source(p / "b"), ["a", "b"], "b: exists already"),
    "taken by a file": (lambda p: (p / "b").touch(), ["a", "b"], "b: exists already"),
    "nowhere": (None, ["a", "b/c"], "b is not a directory; make it first"),
    "a mount": (None, ["a", "/proc"], "/proc: a file system is mounted here"),
    "no such target": (None, ["a", "b", "--to", "int9"], "cannot write 'int9'; known are .*int8"),
    "no such size": (None, ["a", "b", "--max-shard-size", "5 cows"], "max_shard_size '5 cows': give a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path, capsys, name):
    prepare, (src, dst, *options), message = REFUSED[name]
    source(tmp_path / "a")
    if prepare:
        prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    argv = [str(tmp_path / src), str(tmp_path / dst), "--to", "bfloat16", *options]
    code = execute(jaxllm.convert.parser(), jaxllm.convert.run, argv)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


PACKED = {
    "GPTQ": {"x.qweight": np.ones((2, 3), np.int32), "x.scales": SCALE},
    "MLX": {"x.weight": np.ones((2, 3), np.uint32), "x.scales": SCALE, "x.biases": SCALE},
    "MXFP4": {"x.gate_up_proj_blocks": np.ones((2, 3), np.uint8), "x.gate_up_proj_scales": np.ones(2, np.uint8)},
    "bitsandbytes NF4": {"x.weight": np.ones((6, 1), np.uint8), "x.weight.absmax": SCALE},
    "bitsandbytes INT8": {"x.weight": INT8, "x.SCB": SCALE},
    "FP8 with a scale for each row": {"x.weight": FP8, "x.weight_scale": SCALE},
    "quanto": {"x.weight._data": INT8, "x.weight._scale": SCALE},
}


@pytest.mark.parametrize("name", PACKED)
def test_values_that_need_others_are_refused_without_a_config(tmp_path, name):
    with pytest.raises(InputError, match=r"a: quantized \(tensor 'x"):
        convert(source(tmp_path / "a", PACKED[name]), tmp_path / "b", to="float32", progress=False)


@pytest.mark.parametrize("key", ["quantization_config", "quantization", "compression_config"])
@pytest.mark.parametrize("part", [False, True])
def test_a_config_of_a_quantized_model_is_refused(tmp_path, key, part):
    said = {key: {"bits": 4}}
    src = source(tmp_path / "a", config=CONFIG | ({"text_config": said} if part else said))
    with pytest.raises(InputError, match=f"has '{key}'"):
        convert(src, tmp_path / "b", to="float32", progress=False)


def test_too_little_space_is_noticed_before_writing(cut, tmp_path, monkeypatch):
    """One that is told too little here writes but 170 KB, where a real disk would be filled."""
    taken = sum(file.stat().st_size for file in cut.iterdir())

    def attempt(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        convert(CHECKPOINTS / "odd", tmp_path / "b", to="float32", max_shard_size=LIMIT, progress=False)

    with pytest.raises(InputError, match=r"b: 0\.\d+ MB are needed, but 0\.\d+ MB are free on that"):
        attempt(taken - 1)
    assert not list(tmp_path.iterdir())
    attempt(taken + 3000)


def test_a_target_that_there_is_not(tmp_path):
    with pytest.raises(InputError, match="cannot write 'float15'; known are .*float16"):
        convert(source(tmp_path / "a"), tmp_path / "b", to="float15")


def test_debug_shows_the_traceback(tmp_path):
    """As Python does of what is raised."""
    with pytest.raises(InputError):
        converted_by([tmp_path, tmp_path / "b", "--to", "float32", "--debug"])


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Peak of a process that converts 300 MB, most of it one tensor; 200 MB are Python and what it imports."""
    src = sparse_source(tmp_path / "a", 10**6, 60 * 10**6, 15 * 10**6)
    code = f"""if True:
        import pathlib, re, jaxllm.convert
        jaxllm.convert.convert({str(src)!r}, {str(tmp_path / "b")!r}, to="bfloat16", progress=False)
        print(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])"""
    peak = 1024 * int(Forked(code).finished().stdout)
    assert (tmp_path / "b" / "model.safetensors").stat().st_size > 150e6
    shutil.rmtree(tmp_path / "b")  # pytest would keep it
    assert peak < 300e6
