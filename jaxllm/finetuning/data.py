"""Training data: lines of JSON as tokens, of which some are answers to be learned.

A line is one of three:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}

Of a conversation the assistant's turns are learned, of the second kind the completion, of a text every token.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxllm.errors import InputError
from jaxllm.tokenizer import Tokenizer

TooLong = Literal["refuse", "cut", "skip"]
Data = str | os.PathLike | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """One text.

    tokens: int32 `[length]`.
    learned: bool `[length]`, which tokens are to be predicted from those before them. Never the first.
    """

    tokens: np.ndarray
    learned: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> "Example":
        return Example(self.tokens[:length], self.learned[:length])


def read_examples(data: Data, tokenizer: Tokenizer) -> list[Example]:
    """The examples of a JSONL file, or of records like its lines.

    Raises:
        InputError: a line is not one of the three kinds, or has nothing to learn; says which line, and why.
    """
    path = Path(data) if isinstance(data, str | os.PathLike) else None
    where = "record" if path is None else f"{path}: line"
    examples = []
    lines: Iterable[Any] = data if path is None else _lines(path)  # type: ignore[assignment]
    for number, line in enumerate(lines, 1):
        if isinstance(line, str) and not line.strip():
            continue
        try:
            examples.append(example_of(_record(line), tokenizer))
        except InputError as error:
            raise InputError(f"{where} {number}: {error}") from error
    if not examples:
        raise InputError(f"{path or 'data'}: there are no examples")
    return examples


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error


def _record(line: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(line, str):
        try:
            line = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(line, Mapping):
        raise InputError("not a JSON object")
    return line


def example_of(record: Mapping[str, Any], tokenizer: Tokenizer) -> Example:
    """One record as tokens. Raises InputError if it is of no known kind, or has nothing to learn."""
    match record:
        case {"messages": [*messages]} if all(_is_message(m) for m in messages):
            text, spans, end = *_answers(messages, tokenizer), False
        case {"prompt": str(prompt), "completion": str(completion)}:
            text, spans, end = prompt + completion, [(len(prompt), len(prompt + completion))], True
        case {"text": str(text)}:
            spans, end = [(0, len(text))], True
        case _:
            kinds = '"messages" (each with a role and a content), "prompt" and "completion", or "text"'
            raise InputError(f"an object with {kinds} is expected; it has {', '.join(map(repr, record)) or 'nothing'}")
    tokens, offsets = tokenizer.encode_with_offsets(text, written_by_template=not end)
    learned = np.zeros(len(tokens), bool)
    for begin, stop in spans:
        learned |= (offsets[:, 0] >= begin) & (offsets[:, 0] < stop) & (offsets[:, 1] > offsets[:, 0])
    if end and tokenizer.eos_id is not None:
        tokens, learned = [*tokens, tokenizer.eos_id], np.append(learned, True)
    learned[:1] = False
    if not learned.any():
        raise InputError("there is no answer to learn")
    return Example(np.array(tokens, np.int32), learned)


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)


def _answers(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as its chat template writes it, and where the assistant's turns are: from where the template would
    let the model begin to the end of the turn."""
    if tokenizer.chat_template is None:
        raise InputError('this checkpoint has no chat template for "messages"; give "prompt" and "completion"')
    render = tokenizer.chat_template.render
    text = render(messages, add_generation_prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, whole = render(messages[:i]), render(messages[: i + 1], add_generation_prompt=False)
        if not (text.startswith(whole) and whole.startswith(before)):
            raise InputError(
                f"the chat template writes message {i + 1} differently when others follow it, or when it is an "
                "answer: give a line for each answer, or prompt and completion"
            )
        spans.append((len(before), len(whole)))
    if not spans:
        raise InputError("no message is the assistant's, so there is no answer to learn")
    return text, spans


@dataclass(frozen=True)
class Fitted:
    """Examples no longer than the context, and how many were longer."""

    examples: list[Example]
    cut: int = 0
    skipped: int = 0


def fitted(examples: Sequence[Example], length: int, too_long: TooLong) -> Fitted:
    """What `too_long` says of examples with more than `length` tokens.

    Raises:
        InputError: there are such, and they are refused; or nothing is left.
    """
    longer = sum(len(example) > length for example in examples)
    if longer and too_long == "refuse":
        raise InputError(
            f"{longer} of {len(examples)} examples are longer than {length} tokens (the longest has "
            f"{max(map(len, examples))}): allow longer ones (length), or say 'cut' or 'skip'"
        )
    kept = [example if len(example) <= length else example.cut(length) for example in examples]
    if too_long == "skip":
        kept = [example for example in examples if len(example) <= length]
    kept = [example for example in kept if example.learned.any()]
    if not kept:
        raise InputError(f"no example has an answer within its first {length} tokens")
    lost = len(examples) - len(kept)
    return Fitted(kept, longer - lost if too_long == "cut" else 0, lost)
