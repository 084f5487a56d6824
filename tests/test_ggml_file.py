"""Reading files from before GGUF: the model of a GGUF file where they can be read, one clear line where not."""

import struct
from dataclasses import replace

import jax
import numpy as np
import pytest
from compiled import dequantized
from covering import some
from gguf import GGMLQuantizationType as T
from tiny_ggml import BEGINNINGS, VOCABULARY, write
from tiny_gguf import Tiny, reference_logits

import jaxllm
from jaxllm.checkpoint.ggml import HParams, is_ggml, open_ggml
from jaxllm.errors import InputError
from jaxllm.placing import FileArray
from jaxllm.tokenizer import Tokenizer

TINY = Tiny(layers=1, type=T.F32)  # two query heads for each key head: gqa=2
FLOATS = [(kind, type) for kind in BEGINNINGS for type in (T.F32, T.F16)]
BLOCKS = [("ggjt 3", T.Q4_0), ("ggjt 3", T.Q5_1), ("ggjt 3", T.Q8_0)]
KINDS = pytest.mark.parametrize(("kind", "type"), FLOATS + BLOCKS, ids=lambda x: getattr(x, "name", x))


@KINDS
def test_header_vocabulary_and_tensors_are_what_was_written(tmp_path, kind, type):
    path = tmp_path / "model.bin"
    tensors = write(path, kind, replace(TINY, type=type))
    file = open_ggml(path, gqa=2)
    assert is_ggml(path)
    assert file.kind == {"ggml": "ggml (unversioned)"}.get(kind, kind.replace(" ", " version "))
    assert file.hparams == HParams(n_vocab=50, n_embd=64, n_mult=256, n_head=4, n_layer=1, n_rot=16, ftype=0)
    assert [token for token, _ in file.vocabulary] == [token for token, _ in VOCABULARY[:50]]
    assert list(file.tensors) == list(tensors)
    for name, want in tensors.items():
        np.testing.assert_array_equal(dequantized(jax.tree.map(np.asarray, file.tensors[name])), want)
        assert isinstance(jax.tree.leaves(file.tensors[name])[0], FileArray)


# How the tensors of each kind are read, the test above says; what is made of them does not depend on the kind.
@pytest.mark.parametrize(
    ("kind", "type"),
    some(FLOATS + BLOCKS, [("ggml", T.F16), ("ggjt 3", T.F32), ("ggjt 3", T.Q5_1)]),
    ids=lambda x: getattr(x, "name", x),
)
def test_logits_equal_numpys(tmp_path, kind, type):
    path = tmp_path / "model.bin"
    tiny = replace(TINY, type=type)
    tensors = write(path, kind, tiny)
    model = jaxllm.load(path, mesh="tp=2", dtype="float32", weights="float32", gqa=2, progress=False)
    # The reference has a rotary base of 500, and these files one of 10000.
    tensors["rope_freqs.weight"] = 500.0 ** -(np.arange(8) / 8) / 10000.0 ** -(np.arange(8) / 8)
    want = reference_logits(replace(tiny, rope_freqs=True), tensors, [3, 14, 15, 9, 2, 6])
    got = model.logits([[3, 14, 15, 9, 2, 6]])[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_constants_that_the_file_does_not_have_are_those_of_llama_2(tmp_path):
    write(tmp_path / "model.bin", "ggjt 3", replace(TINY, kv_heads=4))
    metadata = open_ggml(tmp_path / "model.bin").metadata
    want = {"attention.head_count": 4, "attention.head_count_kv": 4, "attention.layer_norm_rms_epsilon": 1e-5}
    want |= {"rope.freq_base": 10000.0, "context_length": 4096, "feed_forward_length": 96, "block_count": 1}
    assert {key: metadata[f"llama.{key}"] for key in want} == want
    assert open_ggml(tmp_path / "model.bin", gqa=4, context=2048).metadata["llama.context_length"] == 2048


def test_the_vocabulary_is_what_llama_cpps_converter_makes_of_it(tmp_path):
    write(tmp_path / "model.bin", "ggjt 3", replace(TINY, vocab=len(VOCABULARY)))
    metadata = open_ggml(tmp_path / "model.bin").metadata
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
    assert (get("model"), get("unknown_token_id"), get("bos_token_id"), get("eos_token_id")) == ("llama", 0, 1, 2)
    assert get("tokens")[:5] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    assert get("tokens")[257:] == ["<0xFE>", "<0xFF>", *["▁a", "bc", "▁abc", "é", "▁", "a", "b", "c", "ab"], ""]
    assert get("token_type") == [2, 3, 3, *[6] * 256, *[1] * 9, 3]
    assert get("scores") == [score for _, score in VOCABULARY]


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_text_becomes_the_same_ids_with_and_without_scores(tmp_path, kind):
    write(tmp_path / "model.bin", kind, replace(TINY, vocab=len(VOCABULARY)))
    tokenizer = Tokenizer.from_gguf(open_ggml(tmp_path / "model.bin").metadata)
    ids = [1, 263, 265, 264, 260, 261, 262, 3 + ord("\n")]  # "bc" is joined before "ab"
    assert tokenizer.encode("babc abcé\n") == ids
    assert tokenizer.decode(ids) == "babc abcé\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("ggml") / "good.bin"
    write(path, "ggjt 3", replace(TINY, type=T.Q8_0, kv_heads=4))
    return path


def u32(*values):
    return struct.pack(f"<{len(values)}I", *values)


def at(offset, *values):
    return lambda data: data[:offset] + u32(*values) + data[offset + 4 * len(values) :]


def before(name, offset, *values):
    """Replace words `offset` bytes before a tensor's name."""
    return lambda data: at(data.index(name) - offset, *values)(data)


def renamed(old, new):
    return lambda data: data.replace(old, new, 1)


W1 = b"layers.0.feed_forward.w1.weight"  # of which are written: rank, length of the name, type, two dimensions, name

BAD = {
    "empty": (lambda d: b"", r"not a GGML file \(it begins with b''\)"),
    "wrong magic": (lambda d: b"GGUF" + d[4:], r"not a GGML file \(it begins with b'GGUF'\)"),
    "adapter": (lambda d: b"algg" + d[4:], r"a LoRA adapter \(ggla\), not a model"),
    "state": (lambda d: b"nsgg" + d[4:], r"a saved state of llama.cpp \(ggsn\), not a model"),
    "ggjt of tomorrow": (at(4, 4), "ggjt version 4 is not supported; known: 1, 2, 3"),
    "ggmf of tomorrow": (lambda d: b"fmgg" + u32(2) + d[8:], "ggmf version 2 is not supported; known: 1"),
    "only a magic": (lambda d: d[:4], "cut short or damaged: 4 bytes announced at offset 4, 0 left"),
    "cut in the header": (lambda d: d[:20], "cut short or damaged: 28 bytes announced at offset 8, 12 left"),
    "cut in the vocabulary": (lambda d: d[:70], "cut short or damaged"),
    "cut in a tensor's header": (lambda d: d[: d.index(W1) - 6], "cut short or damaged"),
    "cut in a name": (lambda d: d[: d.index(W1) + 6], "cut short or damaged"),
    "cut in the alignment": (lambda d: d[: d.index(W1) + len(W1)], "cut short or damaged"),
    "cut in a tensor": (lambda d: d[: d.index(W1) + 700], r"'blk.0.ffn_gate.weight' of shape \[96, 64\] .* outside"),
    "cut between tensors": (lambda d: d[: d.index(W1) - 20], "tensor 'blk.0.ffn_gate.weight' is missing"),
    "a byte too many": (lambda d: d + b"\0", "cut short or damaged: 4 bytes announced"),
    "absurd vocabulary": (at(8, 2**32 - 1), "cut short or damaged: 4294967295 announced"),
    "absurd token": (at(36, 2**31), "cut short or damaged: 2147483648 announced"),
    "absurd name": (before(W1, 16, 2**31), "cut short or damaged: 2147483648 announced"),
    "absurd rank": (before(W1, 20, 2**31), "damaged: a tensor of 2147483648 dimensions"),
    "no dimensions": (before(W1, 20, 0), "damaged: a tensor of 0 dimensions"),
    "absurd shape": (before(W1, 8, 2**31, 2**31), "'blk.0.ffn_gate.weight' of shape .* ends outside the file"),
    "empty shape": (before(W1, 8, 64, 0), r"'blk.0.ffn_gate.weight' has the impossible shape \[0, 64\]"),
    "half a block": (before(W1, 8, 40, 96), r"'blk.0.ffn_gate.weight' has the impossible shape \[96, 40\] for Q8_0"),
    "unknown type": (before(W1, 12, 99), f"tensor '{W1.decode()}' has type 99, which such files do not have"),
    "type of today": (before(W1, 12, T.IQ4_NL), "has type IQ4_NL, which such files do not have"),
    "name of two lines": (renamed(W1, W1.replace(b".", b"\n", 1)), r"damaged: a tensor with the name 'layers\\n0"),
    "same name twice": (renamed(b"attention.wk", b"attention.wq"), "tensor 'blk.0.attn_q.weight' is given twice"),
    "other width": (at(12, 128), r"'token_embd.weight' has shape \[50, 64\], but the header says \[50, 128\]"),
    "no embedding": (renamed(b"tok_e", b"tic_e"), "tensor 'token_embd.weight' is missing"),
    "absurd layers": (at(24, 2**32 - 1), "cut short or damaged: 4294967295 layers announced, 12 tensors found"),
    "no heads": (at(20, 0), "damaged: 0 heads for a width of 64"),
    "odd heads": (at(20, 64), "damaged: 64 heads for a width of 64"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(good, tmp_path, name):
    edit, message = BAD[name]
    path = tmp_path / "bad.bin"
    path.write_bytes(edit(good.read_bytes()))
    with pytest.raises(InputError, match=message) as error:
        open_ggml(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["ggml", "ggmf 1", "ggjt 1", "ggjt 2"])
@pytest.mark.parametrize("type", [T.Q4_0, T.Q8_0], ids=lambda type: type.name)
def test_blocks_of_old_layouts_are_refused_by_name(tmp_path, kind, type):
    write(tmp_path / "old.bin", kind, replace(TINY, type=type))
    message = rf"has type {type.name}, and {kind[:4]} \(?(version|unversioned).* llama.cpp of its time, or use a GGUF"
    with pytest.raises(InputError, match=message):
        open_ggml(tmp_path / "old.bin")


@pytest.mark.parametrize("gqa", [0, 3, 8])
def test_key_heads_must_divide(good, gqa):
    with pytest.raises(InputError, match=f"gqa {gqa} does not divide the model's 4 heads"):
        open_ggml(good, gqa=gqa)


def test_a_vocabulary_has_at_least_the_special_tokens(tmp_path):
    write(tmp_path / "model.bin", "ggjt 3", replace(TINY, vocab=2))
    with pytest.raises(InputError, match="a vocabulary of 2 tokens"):
        open_ggml(tmp_path / "model.bin")


def test_models_cut_over_several_files_are_refused(tmp_path):
    write(tmp_path / "model.bin", "ggmf 1", TINY)
    (tmp_path / "model.bin.1").touch()
    with pytest.raises(InputError, match=r"a model split over several files \(there is model.bin.1\)"):
        open_ggml(tmp_path / "model.bin")


def test_a_gguf_file_is_of_another_family(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert not is_ggml(tmp_path / "m.gguf")
