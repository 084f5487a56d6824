"""Importance matrices: files as llama.cpp and mistral.rs write them, written once more with `struct`, and damaged."""

import re
import struct

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from jaxllm.errors import InputError
from jaxllm.importance import Statistics, read_importance, write_cimatrix, write_gguf

RNG = np.random.default_rng(0)
MEANS = {  # by tensor, few bits each, so that sums are exact; the last is of a stack of three experts
    "blk.0.attn_q.weight": RNG.integers(1, 64, 8).astype(np.float32) / 16,
    "blk.0.ffn_down_exps.weight": RNG.integers(1, 64, (3, 6)).astype(np.float32) / 16,
}
COUNTS = {"blk.0.attn_q.weight": np.array(48), "blk.0.ffn_down_exps.weight": np.array([5, 0, 91])}
MEANS["blk.0.ffn_down_exps.weight"][1] = 0  # an expert that saw nothing
STATS = {name: Statistics(m * COUNTS[name][..., None].astype(np.float32), COUNTS[name]) for name, m in MEANS.items()}


def text(value: str, length: str) -> bytes:
    return struct.pack(length, len(value.encode())) + value.encode()


def legacy(chunks: int = 7, trailer: bytes = struct.pack("<i", 7) + text("wiki.txt", "<i")) -> bytes:
    """llama.cpp's `save_imatrix_legacy`."""
    entries = [
        text(name, "<i") + struct.pack(f"<ii{m.size}f", chunks, m.size, *(m * max(chunks, 1)).ravel())
        for name, m in MEANS.items()
    ]
    return struct.pack("<i", len(entries)) + b"".join(entries) + trailer


def keyed() -> bytes:
    """mistral.rs's `CollectedImatrixData::save_imatrix` after release 0.8."""
    entries = [text(name, "<Q") + struct.pack(f"<Q{m.size}f", m.size, *m.ravel()) for name, m in MEANS.items()]
    return struct.pack("<Q", len(entries)) + b"".join(entries)


def by_position(first: int = 2) -> bytes:
    """The same in release 0.8: a map, so in any order; the layer 1 has no data."""
    dense, experts = MEANS.values()
    entries = [
        struct.pack(f"<QBQ{experts.size}f", first, 1, experts.size, *experts.ravel()),
        struct.pack("<QB", 1, 0),
        struct.pack(f"<QBQ{dense.size}f", 0, 1, dense.size, *dense),
    ]
    return struct.pack("<Q", len(entries)) + b"".join(entries)


def gguf_file(path, tensors: dict[str, np.ndarray], type: str = "imatrix"):
    """gguf-py's writer, with the keys and tensors of llama.cpp's `save_imatrix`."""
    writer = GGUFWriter(path, "llama")
    writer.add_type(type)
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors() -> dict[str, np.ndarray]:
    tensors = {}
    for name, entry in STATS.items():
        counts = np.float32(entry.counts).reshape(-1, 1)
        tensors[f"{name}.in_sum2"] = entry.squares.reshape(len(counts), -1)
        tensors[f"{name}.counts"] = counts
        tensors[f"{name}.in_sum"] = -entry.squares.reshape(len(counts), -1)
    return tensors


def check(found, names=tuple(MEANS), flat: bool = True) -> None:
    assert list(found) == list(names)
    for entry, means in zip(found.values(), MEANS.values(), strict=True):
        assert entry.importance.dtype == np.float32
        np.testing.assert_array_equal(entry.importance, means.ravel() if flat else means)


@pytest.mark.parametrize(
    "data",
    [legacy(), legacy(chunks=0), legacy(trailer=b""), legacy(trailer=struct.pack("<i", 7)), keyed()],
    ids=["legacy", "legacy without counts", "legacy without a trailer", "legacy with half of it", "keyed"],
)
def test_files_of_means_are_read(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    check(read_importance(path))


def test_files_by_position_are_read(tmp_path):
    path = tmp_path / "x.cimatrix"
    path.write_bytes(by_position())
    found = read_importance(path)
    assert list(found) == ["2", "0"]
    check({name: found[name] for name in ("0", "2")}, ("0", "2"))


def test_gguf_files_are_read(tmp_path):
    found = read_importance(gguf_file(tmp_path / "x.gguf", gguf_tensors()))
    check(found, flat=False)
    for name, entry in found.items():
        np.testing.assert_array_equal(entry.squares, STATS[name].squares)
        np.testing.assert_array_equal(entry.counts, STATS[name].counts)


def test_gguf_files_are_written_as_llama_cpp_writes_them(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_text("an older file")
    write_gguf(path, STATS, ["a.txt", "b.txt"], 7, 512)
    reader = GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.type"] == "imatrix"
    assert values["imatrix.datasets"] == ["a.txt", "b.txt"]
    assert (values["imatrix.chunk_count"], values["imatrix.chunk_size"]) == (7, 512)
    assert {field.types[0].name for key, field in reader.fields.items() if "chunk" in key} == {"UINT32"}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    want = {name: array for name, array in gguf_tensors().items() if not name.endswith("in_sum")}
    assert tensors.keys() == want.keys()
    for name, array in want.items():
        assert tensors[name].data.dtype == np.float32
        np.testing.assert_array_equal(tensors[name].data, array)
    assert path.stat().st_size % 32 == 0
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]
    check(read_importance(path), flat=False)


def test_cimatrix_files_are_written_as_mistral_rs_writes_them(tmp_path):
    path = tmp_path / "x.cimatrix"
    write_cimatrix(path, STATS | {"unseen": Statistics(np.zeros(4, np.float32), np.array(0))})
    assert path.read_bytes() == keyed()
    check(read_importance(path))


def refused(path) -> str:
    with pytest.raises(InputError) as info:
        read_importance(path)
    message = str(info.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message


@pytest.mark.parametrize("data", [legacy(trailer=b""), keyed(), by_position()], ids=["legacy", "keyed", "by position"])
def test_a_file_that_is_cut_short_or_goes_on_is_refused(tmp_path, data):
    path = tmp_path / "file"
    for end in range(len(data)):
        path.write_bytes(data[:end])
        refused(path)
    path.write_bytes(data + b"\1\0\0\0\x10\0\0\0")
    refused(path)


def test_every_byte_of_a_file_may_be_damaged(tmp_path):
    """Read or refused in one line, and never with values that an encoder cannot use."""
    path = tmp_path / "file"
    for data in (legacy(), keyed(), by_position()):
        for place in range(len(data)):
            path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
            try:
                found = read_importance(path)
            except InputError as error:
                assert str(error).isprintable()
            else:
                assert all(np.isfinite(e.importance).all() and (e.importance >= 0).all() for e in found.values())


DAMAGES = {
    "missing counts": ({"a.in_sum2": np.ones((1, 4), np.float32)}, "tensor 'a.counts' is missing"),
    "counts do not divide": (
        {"a.in_sum2": np.ones((1, 4), np.float32), "a.counts": np.ones((3, 1), np.float32)},
        r"'a' has 4 sums for these counts of tokens: \[1.0, 1.0, 1.0\]",
    ),
    "negative counts": (
        {"a.in_sum2": np.ones((1, 4), np.float32), "a.counts": -np.ones((1, 1), np.float32)},
        "'a' has 4 sums for these counts",
    ),
    "half precision": (
        {"a.in_sum2": np.ones((1, 4), np.float16), "a.counts": np.ones((1, 1), np.float32)},
        "tensor 'a.in_sum2' is float16, not float32",
    ),
    "not finite": (
        {"a.in_sum2": np.full((1, 4), np.nan, np.float32), "a.counts": np.ones((1, 1), np.float32)},
        "'a' has no values, or values that are negative or not finite",
    ),
    "a model": ({"a.weight": np.ones((1, 4), np.float32)}, "a GGUF file, but no importance matrix"),
}


@pytest.mark.parametrize(("tensors", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_gguf_files_are_refused(tmp_path, tensors, message):
    assert re.search(message, refused(gguf_file(tmp_path / "x.gguf", tensors)))


def test_other_files_are_refused(tmp_path):
    assert "No such file" in refused(tmp_path / "nowhere")
    assert "Is a directory" in refused(tmp_path)
    path = tmp_path / "file"
    for content, message in {
        b"": "a file of 0 bytes",
        b"# Importance\n\nNot this one.\n": "not an importance matrix of llama.cpp or mistral.rs, or damaged",
        struct.pack("<QQB", 1, 0, 0): "it has no data",
        struct.pack("<i", 2) + 2 * (text("a", "<i") + struct.pack("<iif", 1, 1, 1.0)): "'a' is given twice",
        struct.pack("<i", 1) + text("a\nb", "<i") + struct.pack("<iif", 1, 1, 1.0): r"an entry with the name 'a\nb'",
        by_position(first=3): "entry 3 of 3",
    }.items():
        path.write_bytes(content)
        assert message in refused(path)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="not written"):
        write_gguf(tmp_path / "nowhere" / "x.gguf", STATS, ["a.txt"], 7, 512)
    with pytest.raises(InputError, match="not written"):
        write_cimatrix(tmp_path, STATS)
    assert list(tmp_path.iterdir()) == []
