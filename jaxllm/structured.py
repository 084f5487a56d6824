"""Answers that follow a JSON schema, a regular expression or a grammar.

llguidance keeps a parser over the bytes of an answer and says before each token which ones may follow. That is exact
for every tokenizer, as a token is only its bytes here. The alternative, an automaton over tokens that is built ahead
(Willard and Louf, 2023), takes seconds for a schema and has no recursion.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from jaxllm.errors import InputError
from jaxllm.tokenizer import Tokenizer

# Between the tokens of JSON. Without a bound, a model that likes to indent may never come to an end.
_WHITE_SPACE = r"[ \n\r\t]{1,40}"
_SECONDS, _PATIENCE = 1, 30  # of CPU time that a grammar may take; of waiting for that on a busy machine
_TRYING = Path(__file__).with_name("structured_trial.py")

TEXT = "TEXT: /(.|\\n)*/"  # any text, as a rule of a Lark grammar
_SYMBOLS = 30_000  # of a grammar; schemas that people write have hundreds
_LIMITS = LLParserLimits(max_grammar_size=_SYMBOLS, verbose_errors=False)
_COERCE = "Enable 'coerce_one_of' option to approximate oneOf with anyOf"


@dataclass(frozen=True)
class Constraint:
    """What an answer has to be. It names no tokenizer: a `Guide` is what applies it to one answer.

    Attributes:
        grammar: in llguidance's format, JSON text.
    """

    grammar: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, object]) -> Self:
        """JSON text that is valid under `schema`, its properties in the order of the schema.

        llguidance has most of draft 2020-12. What it does not have is refused, not ignored.

        Raises:
            InputError: the schema is malformed, uses an unsupported keyword, is satisfied by nothing, or explodes.
        """
        options = {"x-guidance": {"whitespace_pattern": _WHITE_SPACE}}  # in place of any that the schema has
        if not isinstance(schema, Mapping):
            raise InputError(f"JSON schema: it has to be an object, and is of type {type(schema).__name__}")
        return cls._tried("JSON schema", {"json_schema": {**schema, **options}})

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Text that matches `pattern` from its first to its last character. Look-around is not supported.

        Raises:
            InputError: the pattern is malformed, matches nothing, or explodes.
        """
        try:
            grammar = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]
        except UnicodeEncodeError as error:
            raise InputError(f"regular expression: {error}") from error
        return cls._tried("regular expression", grammar)

    @classmethod
    def lark(cls, grammar: str) -> Self:
        """Text of a context-free grammar in llguidance's dialect of Lark, without special tokens.

        Raises:
            InputError: the grammar is malformed, produces nothing, or explodes.
        """
        return cls._tried("grammar", {"lark_grammar": grammar})

    @classmethod
    def compose(cls, lark: str, parts: Mapping[str, Self]) -> Self:
        """A Lark grammar, trusted, that calls the constraints `parts` as `@name`. It may use special tokens.

        Names must be unique among all parts of parts.
        """
        grammars = [{"lark_grammar": lark}]
        for name, part in parts.items():
            first, *others = json.loads(part.grammar)["grammars"]
            grammars += [{**first, "name": name}, *others]
        return cls(json.dumps({"grammars": grammars}))

    @classmethod
    def _tried(cls, kind: str, grammar: Mapping[str, object]) -> Self:
        try:
            text = json.dumps({"grammars": [grammar]})
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{kind}: it is not JSON ({error})") from error
        if problem := _try(text):
            raise InputError(f"{kind}: {problem}")
        return cls(text)


class Guide:
    """A constraint while an answer is written: which tokens may come next.

    Args:
        tokenizer: the model's. What llguidance has to know of it is made once.

    Raises:
        InputError: the constraint cannot be applied with this tokenizer.
    """

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer) -> None:
        self._matcher = _matcher(_tokenizer(tokenizer), constraint.grammar).deep_copy()
        self._check()

    def mask(self, out: np.ndarray) -> None:
        """Sets the bits of the tokens that may come next, the lowest bit of a word first, and clears all others.

        End-of-answer tokens are among them exactly where the answer may end. Ids that only the model has, as its
        vocabulary is padded, are never.

        Args:
            out: uint32 `[ceil(vocab / 32)]`.

        Raises:
            InputError: the grammar became too ambiguous for the parser.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(out)]
        self._check()
        out[: len(words)] = words
        out[len(words) :] = 0

    def accept(self, token: int) -> None:
        """Continues after `token`, which the mask has to allow.

        Raises:
            InputError: the grammar became too ambiguous for the parser, or does not allow the token.
        """
        self._matcher.consume_token(token)
        self._check()

    @property
    def ended(self) -> bool:
        """Whether it is known that nothing but the end can follow."""
        return self._matcher.is_stopped()

    def forced(self) -> list[int]:
        """The tokens that have to come next, as far as there is only one way to go on. This does not accept them."""
        return self._matcher.compute_ff_tokens()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"structured output: {_one_line(self._matcher.get_error())}")


def spelled(tokenizer: Tokenizer, text: str) -> str:
    """`text` for a Lark grammar: the token of this name, if it is one that stands for no text, or the characters."""
    token = tokenizer.backend.token_to_id(text)
    is_special = token is not None and _tokenizer(tokenizer).is_special_token(token)
    return f"<[{token}]>" if is_special else json.dumps(text)


_TOKENIZERS: WeakKeyDictionary[Tokenizer, LLTokenizer] = WeakKeyDictionary()


def _tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    made = _TOKENIZERS.get(tokenizer)
    if made is None:
        if not tokenizer.eos_ids:
            raise InputError("structured output needs a token that ends answers, and this checkpoint names none")
        try:
            made = LLTokenizer(tokenizer.backend.to_str(), eos_token=sorted(tokenizer.eos_ids))
        except Exception as error:  # llguidance raises what its tokenizer library does
            raise InputError(f"structured output with this tokenizer: {_one_line(str(error))}") from error
        _TOKENIZERS[tokenizer] = made
    return made


@lru_cache(maxsize=32)
def _matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A parser at the start of an answer. Copies are made in microseconds and share what the lexer has worked out."""
    return LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)


@lru_cache(maxsize=256)
def _try(grammar: str) -> str:
    """What is wrong with a grammar, or nothing.

    There are short schemas that llguidance, for all its limits, has not compiled after three minutes (`allOf` of fifty
    patterns). Only a process can be stopped, so a grammar is compiled in one before it may come near a server.
    """
    command = [sys.executable, "-P", str(_TRYING), str(_SECONDS), str(_SYMBOLS)]
    try:
        done = subprocess.run(command, input=grammar, capture_output=True, encoding="utf-8", timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return "it takes too long to compile; make it simpler"
    if done.returncode < 0:
        return "it takes too long to compile, or too much memory; make it simpler"
    if done.returncode:
        raise RuntimeError(done.stderr)
    return _one_line(done.stdout).replace(_COERCE, "Where its branches exclude each other, use anyOf")


def _one_line(message: str) -> str:
    """llguidance's message without the parser's state and without the lines that point at a character."""
    lines = [line.strip() for line in message.split("\n<")[0].splitlines()]
    return " ".join(line for line in lines if line.strip("^"))[:200]
