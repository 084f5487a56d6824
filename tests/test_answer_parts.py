"""Answers taken apart: thoughts, content and calls, however the text comes in pieces."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from jaxllm.errors import InputError
from jaxllm.serving.constraints import after_reasoning, required
from jaxllm.serving.parts import Content, Reasoning, ToolCall, joined
from jaxllm.serving.splitter import splitter_for
from jaxllm.structured import Constraint, Guide
from jaxllm.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
HARMONY = json.loads((GOLDEN / "harmony_parts.json").read_text())  # by reference/harmony_parts.py


def byte_tokenizer(template, special=(), added=()):
    """One token a byte, besides the end, `special` tokens and `added` ones that are text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(["</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("</s>", *special)])
    backend.add_tokens([AddedToken(t, normalized=False) for t in added])
    return Tokenizer(backend, bos_id=None, eos_ids=frozenset([0]), add_bos=False, chat_template=template)


@pytest.fixture(scope="module")
def harmony():
    folder = GOLDEN / "gpt_oss" / "harmony"
    config, generation = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("tokenizer_config", "generation_config")
    )
    return Tokenizer.from_directory(folder, config, generation["eos_token_id"])


def split(tokenizer, ids, prompt=(), tools=(), seed=0, most=1):
    """What a splitter gives, with up to `most` tokens at once, and the text up to that many characters behind."""
    rng, splitter, stream = random.Random(seed), splitter_for(tokenizer, prompt, tools), tokenizer.stream()
    parts, behind, rest = [], "", list(ids)
    while rest:
        count = rng.randint(1, most)
        now, rest = rest[:count], rest[count:]
        text = behind + "".join(map(stream.push, now))
        cut = len(text) - rng.randint(0, min(len(text), most - 1))
        parts += splitter.push(now, text[:cut])
        behind = text[cut:]
    parts += splitter.push([], behind + stream.finish())
    return joined([*parts, *splitter.finish()])


PIECES = [(0, 1), (1, 3), (2, 20), (3, 1000)]


@pytest.mark.parametrize(("seed", "most"), PIECES)
@pytest.mark.parametrize("case", HARMONY)
def test_harmony_is_read_as_by_its_own_parser(harmony, case, seed, most):
    ids = [i for piece in HARMONY[case]["pieces"] for i in encoded(harmony, piece)]
    wanted = []
    for message in HARMONY[case]["messages"]:
        if message["recipient"]:
            wanted.append(ToolCall(message["recipient"].removeprefix("functions."), message["text"]))
            continue
        kind = Reasoning if message["channel"] == "analysis" else Content
        if any(isinstance(part, kind) for part in wanted):
            wanted.append(kind("\n\n"))
        wanted.append(kind(message["text"]))
    assert split(harmony, ids, seed=seed, most=most) == joined(wanted)


def encoded(tokenizer, piece):
    """Ids; after a NUL, the name of a special token is ordinary text."""
    parts = [piece[1:3], piece[3:]] if piece.startswith("\0") else [piece]
    return [i for part in parts for i in tokenizer.backend.encode(part, add_special_tokens=False).ids]


def test_text_without_channels_is_content(harmony):
    assert split(harmony, encoded(harmony, "Hello!")) == [Content("Hello!")]


def test_a_stop_string_cuts_what_is_behind_it(harmony):
    ids = [i for piece in HARMONY["thought and answer"]["pieces"] for i in encoded(harmony, piece)]
    splitter = splitter_for(harmony, [])
    parts = splitter.push(ids, "analysisThe user gre") + splitter.finish()  # cut at "ets", say
    assert joined(parts) == [Reasoning("The user gre")]


THINKS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
THOUGHTS = {
    "<think>\nHm.\n</think>\n\nHello, <b>you</b>!\n": [Reasoning("Hm."), Content("Hello, <b>you</b>!\n")],
    "\n<think>a <thi </thin\n\nb</think>": [Reasoning("a <thi </thin\n\nb")],
    "<think></think> Yes": [Content("Yes")],
    "<think>cut off </thi": [Reasoning("cut off </thi")],
    "<thi": [Content("<thi")],
    " Tags are <think> and </think>.": [Content(" Tags are <think> and </think>.")],
    "<think>a</think>b<think>c</think>": [Reasoning("a"), Content("b<think>c</think>")],
    "": [],
}


@pytest.mark.parametrize("special", [False, True], ids=["text", "special tokens"])
@pytest.mark.parametrize(("seed", "most"), PIECES)
@pytest.mark.parametrize("answer", THOUGHTS)
def test_thoughts_at_the_beginning(answer, seed, most, special):
    tokenizer = byte_tokenizer(THINKS, special=["<think>", "</think>"] if special else [])
    assert split(tokenizer, tokenizer.encode(answer), seed=seed, most=most) == THOUGHTS[answer]


def test_a_prompt_may_open_the_thoughts_or_close_them():
    tokenizer = byte_tokenizer(THINKS)
    ids = tokenizer.encode("Hm.</think>Yes")
    assert split(tokenizer, ids, tokenizer.encode("Well?<think>\n"), most=4) == [Reasoning("Hm."), Content("Yes")]
    closed = tokenizer.encode("Well?<think>\n\n</think>\n\n")
    assert split(tokenizer, ids, closed, most=4) == [Content("Hm.</think>Yes")]


def test_models_that_know_no_thoughts_have_their_text_unchanged():
    tokenizer = byte_tokenizer("{{ messages }}")
    text = " <think>a</think> <tool_call>{}</tool_call>\n"
    assert split(tokenizer, tokenizer.encode(text), tools=TOOLS, most=5) == [Content(text)]
    assert split(byte_tokenizer(None), tokenizer.encode(text), most=5) == [Content(text)]


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 0}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Looks outside.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
PARIS, NOW = ToolCall("weather", '{"city": "Paris", "days": 2}'), ToolCall("now", "{}")
TAG = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
SEP, BEGIN, END = "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
ALL_BEGIN, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"

# Signs of the templates, tokens, and answers as the model cards and templates show them.
FORMS = {
    "tagged": ("<tool_call></tool_call>", ["<tool_call>", "</tool_call>"]),
    "mistral": ("[AVAILABLE_TOOLS] [TOOL_CALLS]", ["[TOOL_CALLS]"]),
    "mistral 11": ("[TOOL_CALLS] [ARGS]", ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]),
    "granite": ("<|tool_call|>", ["<|tool_call|>"]),
    "glm": ("<tool_call> <arg_key>", ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"]),
    "deepseek 3": (f"{ALL_BEGIN} ```json", [ALL_BEGIN, ALL_END, BEGIN, END, SEP]),
    "deepseek": (ALL_BEGIN, [ALL_BEGIN, ALL_END, BEGIN, END, SEP]),
    "llama": ("<|python_tag|> ipython", ["<|python_tag|>"]),
}
ANSWERS = [
    ("tagged", "No call.\n<tool", [Content("No call.\n<tool")]),
    ("tagged", TAG, [PARIS]),
    ("tagged", f"I look.\n\n{TAG}\n{TAG}\n", [Content("I look."), PARIS, PARIS]),
    ("tagged", f'{TAG}<tool_call>{{"name": "now", "arguments": "{{}}"}}</tool_call>', [PARIS, NOW]),
    ("tagged", "a <tool_call>{oh</tool_call> b", [Content("a <tool_call>{oh</tool_call> b")]),
    ("tagged", f"{TAG[:40]}", [Content(TAG[:40])]),
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris", "days": 2}}]', [PARIS]),
    (
        "mistral",
        'Well.[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]',
        [Content("Well."), NOW, NOW],
    ),
    ("mistral 11", '[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]now[ARGS]{}', [PARIS, NOW]),
    ("mistral 11", "[TOOL_CALLS]now[CALL_ID]a1b2[ARGS]{}", [NOW]),
    ("granite", '<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris", "days": 2}}]', [PARIS]),
    (
        "glm",
        "I see.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call><tool_call>now\n</tool_call>",
        [Content("I see."), PARIS, NOW],
    ),
    (
        "glm",  # a city called 7
        "<tool_call>weather<arg_key>city</arg_key><arg_value>7</arg_value></tool_call>",
        [ToolCall("weather", '{"city": "7"}')],
    ),
    (
        "deepseek 3",
        f'{ALL_BEGIN}{BEGIN}function{SEP}weather\n```json\n{{"city": "Paris", "days": 2}}\n```{END}\n'
        f"{BEGIN}function{SEP}now\n```json\n{{}}\n```{END}{ALL_END}",
        [PARIS, NOW],
    ),
    (
        "deepseek",
        f'Yes.{ALL_BEGIN}{BEGIN}weather{SEP}{{"city": "Paris", "days": 2}}{END}{BEGIN}now{SEP}{{}}{END}{ALL_END}',
        [Content("Yes."), PARIS, NOW],
    ),
    ("llama", '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}', [PARIS]),
    (
        "llama",
        '<|python_tag|>{"name": "now", "parameters": {}}; {"type": "function", "name": "now", "parameters": {}}',
        [NOW, NOW],
    ),
    ("llama", '{"name": "Ada", "parameters": {}}', [Content('{"name": "Ada", "parameters": {}}')]),
    ("llama", '{"answer": 1}', [Content('{"answer": 1}')]),
    ("llama", '{"na', [Content('{"na')]),
    ("llama", "Hello {", [Content("Hello {")]),
]


def answering(form, special):
    signs, tokens = FORMS[form]
    return byte_tokenizer(f"{{% if false %}}{signs}{{% endif %}}", *([tokens, []] if special else [[], tokens]))


@pytest.mark.parametrize("special", [False, True], ids=["text", "special tokens"])
@pytest.mark.parametrize(("form", "answer", "wanted"), ANSWERS)
def test_calls_in_the_forms_of_models(form, answer, wanted, special):
    tokenizer = answering(form, special)
    for seed, most in PIECES:
        assert split(tokenizer, tokenizer.encode(answer), tools=TOOLS, seed=seed, most=most) == wanted


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "now", "arguments": {"x": 1e999}}',  # infinity is not JSON
        '{"name": 3, "arguments": {}}',
        '{"name": "now", "arguments": [1]}',
        '"now"',
        "[]",
        "[" * 100_000,
    ],
)
def test_what_is_no_call_is_content(call):
    tokenizer = answering("tagged", False)
    text = f"<tool_call>{call}</tool_call>"
    splitter = splitter_for(tokenizer, [], TOOLS)
    assert joined(splitter.push([], text) + splitter.finish()) == [Content(text)]


def test_without_tools_no_calls_are_looked_for():
    tokenizer = answering("tagged", False)
    assert split(tokenizer, tokenizer.encode(TAG)) == [Content(TAG)]


def test_thoughts_and_then_a_call():
    tokenizer = byte_tokenizer("{% if false %}<think><tool_call>{% endif %}")
    answer = f"<think>Is <tool_call> right?</think>\nYes. {TAG}"
    wanted = [Reasoning("Is <tool_call> right?"), Content("Yes."), PARIS]
    assert split(tokenizer, tokenizer.encode(answer), tools=TOOLS, most=6) == wanted


SCRAPS = [" ", "\n", "a", "é", "{", "}", "[", "]", '"name"', "now", ";", "<", "</", '{"name": "now", "arguments": {}}']


@pytest.mark.parametrize("form", [*FORMS, "harmony"])
def test_parts_do_not_depend_on_how_the_text_comes(harmony, form):
    rng = random.Random(0)
    tags = (
        ["<think>", "</think>", *FORMS[form][1]]
        if form != "harmony"
        else [p for case in HARMONY.values() for p in case["pieces"]]
    )
    tokenizer = byte_tokenizer(f"{{% if false %}}{' '.join(tags)}{{% endif %}}", rng.sample(tags, len(tags) // 2), tags)
    tokenizer = harmony if form == "harmony" else tokenizer
    for seed in range(40):
        ids = tokenizer.encode("".join(rng.choice(rng.choice([tags, SCRAPS])) for _ in range(rng.randint(0, 14))))
        at_once = split(tokenizer, ids, tools=TOOLS, most=1000)
        assert split(tokenizer, ids, tools=TOOLS) == split(tokenizer, ids, tools=TOOLS, seed=seed, most=7) == at_once


def generate(tokenizer, constraint, seed, text="", most=4000):
    """Ids of an answer from random logits, as from a temperature above all others."""
    guide, rng = Guide(constraint, tokenizer), np.random.default_rng(seed)
    ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    for i in ids:
        guide.accept(i)
    words = np.zeros((tokenizer.vocab_size + 31) // 32, np.uint32)
    while len(ids) < most:
        guide.mask(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        ends = [i for i in tokenizer.eos_ids if i in allowed]
        ids.append(int(ends[0] if ends else rng.choice(allowed)))
        guide.accept(ids[-1])
        if ids[-1] in tokenizer.eos_ids:
            return ids
    raise AssertionError(f"no end after {tokenizer.decode(ids)!r}")


def called(parts):
    assert parts and all(isinstance(part, ToolCall) for part in parts)
    for part in parts:
        arguments = json.loads(part.arguments)
        assert set(arguments) <= {"city", "days"} if part.name == "weather" else not arguments
        assert len(arguments.get("city", "")) <= 12 and arguments.get("days", 0) >= 0
    return {part.name for part in parts}


@pytest.mark.parametrize("special", [False, True], ids=["text", "special tokens"])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "glm"])
def test_a_required_call_is_one_in_the_form_of_the_model(form, special):
    tokenizer = answering(form, special)
    anything, named = required(tokenizer, [], TOOLS), required(tokenizer, [], TOOLS, "weather")
    names = [called(split(tokenizer, generate(tokenizer, anything, seed), tools=TOOLS)) for seed in range(8)]
    assert set.union(*names) == {"weather", "now"}
    assert {1} == {len(split(tokenizer, generate(tokenizer, named, seed), tools=TOOLS)) for seed in range(3)}
    assert called(split(tokenizer, generate(tokenizer, named, 0), tools=TOOLS)) == {"weather"}


NOW_CALLED = {
    "tagged": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "now", "arguments": {}}]',
    "mistral 11": "[TOOL_CALLS]now[ARGS]{}",
    "granite": '<|tool_call|>[{"name": "now", "arguments": {}}]',
    "deepseek 3": f"{ALL_BEGIN}{BEGIN}function{SEP}now\n```json\n{{}}\n```{END}{ALL_END}",
    "deepseek": f"{ALL_BEGIN}{BEGIN}now{SEP}{{}}{END}{ALL_END}",
    "llama": '{"name": "now", "parameters": {}}',
}


@pytest.mark.parametrize("form", NOW_CALLED)
def test_a_required_call_is_written_as_the_template_does(form):
    tokenizer = answering(form, False)
    text = tokenizer.decode(generate(tokenizer, required(tokenizer, [], TOOLS, "now"), 0))
    assert re.sub(r"{\s*}", "{}", text) == NOW_CALLED[form]


def test_a_required_call_in_harmony_after_thoughts(harmony):
    begun = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to"
    for seed in range(4):
        thought, *calls = split(harmony, generate(harmony, required(harmony, [], TOOLS), seed, begun))
        assert thought == Reasoning("Hm.") and called(calls)


def test_a_required_call_after_thoughts():
    tokenizer = byte_tokenizer("{% if false %}<think><tool_call>{% endif %}")
    prompt = tokenizer.encode("<think>")
    ids = generate(tokenizer, required(tokenizer, prompt, TOOLS), 0, "Hm. </think>")
    thought, *calls = split(tokenizer, ids, prompt, TOOLS)
    assert thought == Reasoning("Hm.") and called(calls)


@pytest.mark.parametrize("special", [False, True], ids=["text", "special tokens"])
def test_thoughts_are_free_and_content_is_bound(harmony, special):
    tokenizer = byte_tokenizer(THINKS, *([["<think>", "</think>"]] if special else []))
    number = Constraint.regex("[0-9]{4}")
    for prompt, text in (("", "<think>a {</think>"), ("<think>", "a {</think>"), ("", "")):
        prompt = tokenizer.encode(prompt)
        ids = generate(tokenizer, after_reasoning(tokenizer, prompt, number), 0, text)
        *thought, content = split(tokenizer, ids, prompt)
        assert thought == ([Reasoning("a {")] if text else [])
        assert content.text.isdecimal() and len(content.text) == 4
    begun = "<|channel|>analysis<|message|>a {<|end|><|start|>assistant<|channel|>final"
    thought, content = split(harmony, generate(harmony, after_reasoning(harmony, [], number), 0, begun))
    assert thought == Reasoning("a {") and len(content.text) == 4
    assert after_reasoning(byte_tokenizer(None), [], number) is number
    assert after_reasoning(tokenizer, tokenizer.encode("<think></think>"), number) is number


def tool(**function):
    return {"type": "function", "function": function}


@pytest.mark.parametrize(
    ("form", "tools", "name", "message"),
    [
        ("tagged", [], None, "there are none"),
        ("tagged", TOOLS, "rain", "none is called 'rain'"),
        ("tagged", [{"type": "function"}], None, r"tools\[0\]: a function with a 'name'"),
        ("tagged", [tool(name="two words")], None, "with a 'name'"),
        (
            "tagged",
            [tool(name="f", parameters={"type": "strung"})],
            None,
            "tools: the parameters of f: JSON schema: Invalid type",
        ),
        ("tagged", [tool(name="f", parameters=[1])], None, "JSON schema: it has to be an object"),
        ("glm", TOOLS, None, "no form of calls that can be forced"),
    ],
)
def test_calls_that_cannot_be_required(form, tools, name, message):
    with pytest.raises(InputError, match=message) as error:
        required(answering(form, False), [], tools, name)
    assert "\n" not in str(error.value)
