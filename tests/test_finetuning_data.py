"""From lines of JSON to rows: what is learned, what is refused, and how examples share rows."""

import json

import numpy as np
import pytest
from tiny_tokenizer import ids, tokenizer

from jaxllm.errors import InputError
from jaxllm.finetuning.data import Example, fitted, read_examples
from jaxllm.finetuning.packing import packed, row_length

TALK = [
    {"role": "user", "content": "What is one plus two ?"},
    {"role": "assistant", "content": "ANSWER: three"},
    {"role": "user", "content": "the sum of one ?"},
    {"role": "assistant", "content": "ANSWER: one ."},
]


def test_of_each_kind_of_line_the_answers_are_learned(tmp_path):
    lines = [
        {"messages": TALK},
        {"messages": TALK[:2], "more": 1},
        {"prompt": "What is one", "completion": " plus two"},
        {"text": "the sum of"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    talk, first, pair, text = read_examples(path, tokenizer())
    begin = "<user> What is one plus two ? <end> <assistant> ANSWER: three <end>"
    assert talk.tokens.tolist() == ids(begin + " <user> the sum of one ? <end> <assistant> ANSWER: one . <end>")
    assert talk.tokens[talk.learned].tolist() == ids("ANSWER: three <end> ANSWER: one . <end>")
    assert first.tokens.tolist() == ids(begin)
    assert np.flatnonzero(first.learned).tolist() == [9, 10, 11]
    assert pair.tokens.tolist() == ids("What is one plus two <end>")
    assert pair.tokens[pair.learned].tolist() == ids("plus two <end>")
    assert text.tokens.tolist() == ids("the sum of <end>")
    assert text.learned.tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("line", "template", "message"),
    [
        ("{", True, "not JSON: Expecting property name enclosed in double quotes"),
        ("[1]", True, "not a JSON object"),
        ('{"question": "x", "answer": "y"}', True, "it has 'question', 'answer'"),
        ('{"messages": [{"content": "x"}]}', True, 'an object with "messages" (each with a role and a content)'),
        ('{"messages": [{"role": "user", "content": "x"}]}', True, "no message is the assistant's"),
        ('{"messages": [{"role": "user", "content": "x"}]}', False, "no chat template"),
        ('{"prompt": "What is", "completion": 3}', True, "it has 'prompt', 'completion'"),
        ('{"text": ""}', True, "there is no answer to learn"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_a_reason(tmp_path, line, template, message):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "the sum"}) + "\n\n" + line + "\n")
    with pytest.raises(InputError) as error:
        read_examples(path, tokenizer() if template else tokenizer(None))
    assert str(error.value).startswith(f"{path}: line 3: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    for name, content, message in (
        ("absent", None, "No such file"),
        ("empty", b"\n", "there are no examples"),
        ("bytes", b"\xff", "not UTF-8: invalid start byte at byte 0"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_examples(tmp_path / name, tokenizer())
    with pytest.raises(InputError, match=r"^record 2: an object with"):
        read_examples([{"text": "the sum"}, {}], tokenizer())


def test_a_template_that_changes_earlier_answers_is_refused():
    hides = "{% for m in messages %}{{ m.role }} {% if loop.last %}{{ m.content }}{% endif %} {% endfor %}"
    with pytest.raises(InputError, match="the chat template writes message 2 differently"):
        read_examples([{"messages": TALK}], tokenizer(hides))


def numbered(*lengths, learned=None):
    """Examples whose tokens are 100, 101, ..., 200, 201, ...; of each, the last `learned` tokens are."""
    return [
        Example(np.arange(n, dtype=np.int32) + 100 * (i + 1), np.arange(n) >= n - (learned or n - 1))
        for i, n in enumerate(lengths)
    ]


def test_examples_longer_than_a_row_are_refused_cut_or_skipped():
    examples = numbered(3, 6, 9, learned=4)
    with pytest.raises(InputError, match="2 of 3 examples are longer than 5 tokens .the longest has 9.: allow longer"):
        fitted(examples, 5, "refuse")
    cut = fitted(examples, 5, "cut")  # the third one's answer is cut off completely
    assert [len(e) for e in cut.examples] == [3, 5]
    assert (cut.cut, cut.skipped) == (1, 1)
    skipped = fitted(examples, 5, "skip")
    assert ([len(e) for e in skipped.examples], skipped.cut, skipped.skipped) == ([3], 0, 2)
    assert fitted(examples, 9, "refuse").examples == examples
    with pytest.raises(InputError, match="no example has an answer within its first 2 tokens"):
        fitted(examples[1:], 2, "skip")


def test_short_examples_share_rows():
    rows = packed(numbered(3, 6, 4, learned=2), 8, np.array([2, 0, 1]))
    assert rows.batch.tokens.tolist() == [[300, 301, 302, 303, 100, 101, 102, 0], [*range(200, 206), 0, 0]]
    assert rows.batch.segments.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 1, 1]]
    assert rows.batch.targets.tolist() == [[-1, 302, 303, -1, 101, 102, -1, -1], [-1, -1, -1, 204, 205, -1, -1, -1]]
    assert rows.filled.tolist() == [7, 6]
    padded = rows.take(np.array([1]), 3)
    assert padded.tokens.shape == (3, 8) and padded.answers == 2


def test_the_length_of_rows():
    assert row_length(numbered(3, 65), 512) == 128
    assert row_length(numbered(3, 65), 100) == 100


@pytest.mark.parametrize("count", [5, 300])
def test_no_token_is_lost_and_none_is_doubled(count):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 30, count)
    examples = [Example(np.full(n, i, np.int32), np.arange(n) > 0) for i, n in enumerate(lengths)]
    rows = packed(examples, 30, rng.permutation(count))
    filled = np.concatenate([row[:n] for row, n in zip(rows.batch.tokens, rows.filled, strict=True)])
    assert np.bincount(filled).tolist() == lengths.tolist()
    assert rows.batch.answers == sum(lengths) - count
    assert len(rows) < count
