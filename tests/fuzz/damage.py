"""Damage: what a bad disk, a careless tool or a stranger with a plan makes of a sound input."""

import json
import os
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from fuzz import containers

SECRET = "outside"  # a folder beside the input's, which nothing may read; it has the input's own files
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 10**30)
NESTED, LONG = "@nested@", "@long@"  # put into JSON as text, as `json` cannot write the one and need not the other
VALUES = (
    *(None, True, False, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), *NUMBERS),
    *(
        "",
        "x\ny",
        "\x1b[2J",
        "\ud800",
        "\u2028",
        "a" * 5000,
        "(a|a)*b",
        "(.|.)*x",
        "(((",
        "re:(.|.)*x",
        "{0.__class__}",
    ),
    *("../outside/model.safetensors", "/etc/passwd", ".", "model.safetensors/..", "nul\0l"),
    *([], {}, [[]], [0] * 3000, [None], {"": {}}, {"a": {"a": {"a": []}}}, NESTED, LONG),
)
# Lists of lists of lists, very many if written out.
_LAUGHS = "0: {isq: &a [x,x,x,x,x,x,x,x]}\n" + "".join(
    f"{i}: {{isq: &{new} [{', '.join([f'*{old}'] * 8)}]}}\n" for i, (old, new) in enumerate(pairwise("abcdefghi"), 1)
)
# What does much with few words, or asks for what is not its business; by the ending of the file's name.
SNIPPETS = {
    ".jinja": (
        "{{ 'x' * 10**10 }}",
        "{{ [0] * 10**10 }}",
        "{{ 10 ** 10 ** 9 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ 'x' | center(10**10) }}",
        "{{ messages | tojson(indent=10**10) }}",
        "{% set ns = namespace(x='x' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.getcwd() }}",
        "{{ raise_exception('a\n\x1b[2Jb') }}",
        "{{ strftime_now('%' * 10**6) }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{" * 3000,
        "{{ " + "(" * 3000 + ")" * 3000 + " }}",
        "{{ " + "-" * 3000 + "1 }}",
    ),
    ".yaml": (
        _LAUGHS,
        _LAUGHS.replace("isq: ", ""),
        "&a 0: *a\n",
        "0: &a {isq: *a}\n",
        "'/" + "(" * 300 + ")" * 300 + "/': {isq: q8_0}\n",
        "'/a{99999999999}/': {isq: q8_0}\n",
        "!!python/object/apply:os.system ['touch pwned']\n",
        "2001-99-99: {isq: q8_0}\n",
        "9" * 5000 + ": {isq: q8_0}\n",
        "0: {isq: " + "9" * 5000 + "}\n",
        "? [1, 2]\n: {isq: q8_0}\n",
        "0: {isq: 0x" + "f" * 9999 + "}\n",
        "0-99999: {isq: q8_0}\n",
        "0: {isq: !!binary x}\n",
        "0: !!timestamp x\n",
        "0: !!int x\n",
        "0: !!float .\n",
        "0: {isq: 1:99:1e9}\n",
    ),
    ".csv": (
        '"' * 999,
        ',"[9 * 9 * 9]",',
        "[9" + "9" * 5000 + "]",
        "_" * 99,
        "9" + " * 99999" * 999,
        "\0",
        "\r\n\r",
        ",,,,,,,,,",
    ),
}
# Of these each takes seconds, which all end in the same way, so they are tried less often.
SLOW = {
    ".jinja": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ lipsum(n=10**7) }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    ),
    ".yaml": ("'/(.|.)*x/': {isq: q8_0}\n", "0: " + "[" * 5000 + "\n"),
}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 2000}
TOKENIZING: tuple[Any, ...] = (  # parts of a tokenizer.json
    *(REPLACE, {"type": "Sequence", "normalizers": [REPLACE] * 3}, {"type": "Sequence", "decoders": [REPLACE] * 3}),
    {"type": "Split", "pattern": {"Regex": "(a+)+c"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
    {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5},
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    [
        {"id": 2**32 - 1, "content": "Hello", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ],
    {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]], "byte_fallback": True},
    {
        "type": "WordPiece",
        "unk_token": "?",
        "continuing_subword_prefix": "",
        "max_input_chars_per_word": 0,
        "vocab": {},
    },
    {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": [["a", "b"]]},
    {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "?"},
)
SCHEMAS: tuple[Any, ...] = (  # of answers, and of the arguments of tools
    {"$ref": "#"},
    {"anyOf": [{"$ref": "#"}] * 1000},
    {"type": "object", "properties": {str(i): {"type": "string"} for i in range(20_000)}},
    {"enum": [str(i) for i in range(100_000)]},
    {"type": "string", "pattern": "((a|b)*c){1000}d{1000}"},
    {"type": "string", "pattern": "(?=x)y"},
    {"type": "string", "minLength": 10**9},
    {"type": "array", "minItems": 10**6, "items": {"$ref": "#"}},
    {"type": "integer", "multipleOf": 1_000_003, "minimum": -(10**300)},
    {"allOf": [{"type": "string"}, {"type": "null"}]},
    {"x-guidance": {"whitespace_pattern": ".*"}, "type": "object"},
    NESTED,
)
REQUESTS: dict[str, tuple[Any, ...]] = {  # fields of the server's bodies that ask for much
    "stop": (["a"] * 100_000, "b" * 1_000_000, [""], ["x\0"], ["\ud83d"]),
    "logit_bias": ({str(i): 1 for i in range(50_000)}, {"-1": 1}, {"9" * 30: 1}, {"1e3": 1}, {" 1": 1}),
    "n": (8, 2**31, 10**30),
    "max_tokens": (2**63, 10**30, 1),
    "messages": (
        [{"role": "user", "content": "a"}] * 100_000,
        [{"role": "user", "content": "x " * 1_000_000}],
        [{"role": "user", "content": [{"type": "text", "text": ""}] * 50_000}],
        [{"role": "assistant", "tool_calls": [{"id": "", "function": {"name": "", "arguments": "{}"}}] * 20_000}],
    ),
    "prompt": ("x " * 1_000_000, [1] * 1_000_000, [[1]] * 100_000, [""] * 100_000, [[]], [2**62], [-1]),
    "input": (
        [{"role": "user", "content": "a"}] * 100_000,
        [{"type": "function_call", "call_id": "", "name": "", "arguments": "{}"}] * 50_000,
        [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": ""}] * 50_000}],
    ),
    "tools": ([{"type": "function", "function": {"name": "a"}}] * 50_000, [{"type": "function", "name": "a"}] * 50_000),
    "chat_template_kwargs": ({"messages": []}, {"add_generation_prompt": 1}, {str(i): 0 for i in range(100_000)}),
    "metadata": ({str(i): "x" for i in range(100_000)}, NESTED),
}
JSON_BOMBS: tuple[Callable[[], bytes], ...] = (
    lambda: b'{"a":' * 200_000,
    lambda: b"[" * 1_000_000,
    lambda: b'{"a": [' + b"[]," * 6_000_000 + b"[]]}",
    lambda: b'{"a": [' + b"{}," * 6_000_000 + b"{}]}",
    lambda: b"{" + b",".join(b'"%d":{}' % i for i in range(600_000)) + b"}",
    lambda: b'{"a": ' + b"9" * 5_000_000 + b"}",
    lambda: b'{"a": "' + b"x" * 50_000_000 + b'"}',
    lambda: b"\xef\xbb\xbf{}",
    lambda: b"\xff\xfe{\0}\0",
    lambda: b"null",
)


def damage(rng: random.Random, folder: Path, named: str) -> str:
    """Damage one of the files in a folder; returns what was done. The file that the user `named` stays a file."""
    files = sorted(folder.iterdir())
    file = rng.choices(files, [5 if "index" in file.name else 1 for file in files])[0]
    if rng.random() < 0.1 and file.name != named:
        return f"{file.name}: {_as_a_file(rng, file)}"
    data = file.read_bytes()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data, what = _content(rng, file.suffix, data)
    file.unlink()
    file.write_bytes(data)
    return f"{file.name}: {what}"


def _as_a_file(rng: random.Random, file: Path) -> str:
    what = rng.choice(
        ("missing", "empty", "a folder", "a pipe", "a link to itself", "a link outside", "a link outside")
    )
    outside = file.parent.parent / SECRET / file.name
    file.unlink()
    if what == "empty":
        file.touch()
    elif what == "a folder":
        file.mkdir()
    elif what == "a pipe":
        os.mkfifo(file)
    elif what == "a link to itself":
        file.symlink_to(file.name)
    elif what == "a link outside":
        file.symlink_to(rng.choice((Path("..", SECRET, file.name), outside, Path("/dev/zero"))))
    return what


def _content(rng: random.Random, suffix: str, data: bytes) -> tuple[bytes, str]:
    if suffix == ".json" and rng.random() < 0.01:
        return rng.choice(JSON_BOMBS)(), "a bomb"
    if suffix == ".json" and rng.random() < 0.85:
        return _json(rng, data), "other JSON"
    if suffix == ".jsonl" and rng.random() < 0.85:
        lines = data.split(b"\n")
        i = rng.randrange(len(lines))
        return b"\n".join([*lines[:i], _json(rng, lines[i]), *lines[i + 1 :]]), "other JSON in a line"
    if suffix in SNIPPETS and rng.random() < 0.9:
        return _text(rng, data.decode(errors="replace"), suffix).encode(errors="replace"), "other text"
    way = rng.random()
    try:
        if suffix in (".safetensors", ".uqff") and way < 0.3:
            end = 8 + int.from_bytes(data[:8], "little")
            header = _json(rng, data[8:end])
            return len(header).to_bytes(8, "little") + header + data[end:], "another header"
        if suffix in (".safetensors", ".uqff") and way < 0.8:
            return containers.safetensors(rng, data), "other tensors"
        if data[:4] == b"GGUF" and way < 0.6:
            return containers.gguf(rng, data), "other entries"
    except Exception:
        pass  # damaged before, so that there is nothing to understand
    return _bytes(rng, data), "other bytes"


def _bytes(rng: random.Random, data: bytes) -> bytes:
    """Cut, lengthened, or with other bytes, mostly in its first part and where numbers follow names."""
    out = bytearray(data or b"\0")
    way = rng.random()
    if way < 0.15:
        del out[rng.randrange(len(out)) :]
    elif way < 0.2:
        out += rng.randbytes(rng.choice((1, 8, 1000)))
    elif way < 0.25:
        begin = rng.randrange(len(out))
        del out[begin : begin + rng.choice((1, 4, 8, 100))]
    else:
        head = out[: min(len(out), 1 << 15)]
        names = [m.span() for m in re.finditer(rb"[\w.]{4,}", head)]
        place = rng.randrange(len(head))
        if names and rng.random() < 0.7:
            begin, end = rng.choice(names)
            place = max(0, rng.choice((begin - 8, begin - 4, end, end, end + 4, end + 8, end + 12)))
        number = rng.choice(NUMBERS) if rng.random() < 0.6 else rng.randrange(16)
        size = rng.choice((1, 4, 4, 8, 8))
        new = (number % 256**size).to_bytes(size, "little") if rng.random() < 0.8 else rng.randbytes(size)
        out[place : place + size] = new
    return bytes(out)


def _text(rng: random.Random, text: str, suffix: str) -> str:
    """A snippet put in or instead, a piece left out, doubled, or moved."""
    snippet = rng.choice(SLOW[suffix] if suffix in SLOW and rng.random() < 0.05 else SNIPPETS[suffix])
    if rng.random() < 0.4:
        return snippet
    begin, end = sorted(rng.choices(range(len(text) + 1), k=2))
    end = min(end, begin + rng.choice((1, 5, 50)))
    piece = rng.choice((snippet, "", text[begin:end] * 2, str(rng.choice(NUMBERS)), str(rng.choice(VALUES))))
    return text[:begin] + piece + text[end:]


def _json(rng: random.Random, data: bytes) -> bytes:
    """JSON with one of its values replaced, left out, moved or put under another key."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(rng, data)
    holders = [holder for holder in _holders(document) if holder]
    if not holders:
        return json.dumps(rng.choice(VALUES)).encode()
    if "added_tokens" in document and rng.random() < 0.3:
        document[rng.choice(list(document))] = rng.choice(TOKENIZING)
        return json.dumps(document).encode()
    names = document.get("weight_map") if isinstance(document, dict) else None
    if isinstance(names, dict) and names and rng.random() < 0.3:
        name = rng.choice(list(names))
        names[name] = f"../{SECRET}/{names[name]}"
        return _written(document)
    if "top_p" in document and rng.random() < 0.05:
        return _written(_asking_for_much(rng, document, holders))
    holder = rng.choice(holders)
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    old, way = holder[key], rng.random()
    if way < 0.45:
        holder[key] = _other(rng, old)
    elif way < 0.55:
        del holder[key]
    elif way < 0.7:
        other = rng.choice(holders)
        place = rng.choice(list(other) if isinstance(other, dict) else range(len(other)))
        try:
            holder[key] = json.loads(json.dumps(other[place]))
        except RecursionError:
            holder[key] = 0
    elif way < 0.8 and isinstance(holder, dict):
        holder[rng.choice((*(v for v in VALUES if isinstance(v, str)), key.upper()))] = holder.pop(key)
    elif isinstance(holder, dict):
        holder[key + rng.choice(("", "2", ".weight"))] = rng.choice(VALUES)
    else:
        holder.insert(key, old)
    return _written(document)


def _asking_for_much(rng: random.Random, document: dict, holders: list[Any]) -> dict:
    """A request with one field, or one schema, that asks for very much."""
    schemas = [(holder, key) for holder in holders for key in ("schema", "parameters") if key in holder]
    if schemas and rng.random() < 0.3:
        holder, key = rng.choice(schemas)
        holder[key] = rng.choice(SCHEMAS)
    else:
        name = rng.choice([name for name in REQUESTS if name in document] or ["n"])
        document[name] = rng.choice(REQUESTS[name])
    return document


def _written(document: Any) -> bytes:
    text = json.dumps(document)
    text = text.replace(f'"{NESTED}"', "[" * 100_000 + "]" * 100_000)
    return text.replace(f'"{LONG}"', "9" * 5000).encode()


def _other(rng: random.Random, old: Any) -> Any:
    """A value instead of `old`: often one like it."""
    if isinstance(old, int | float) and not isinstance(old, bool) and rng.random() < 0.5:
        return rng.choice((old + 1, old - 1, old * 2, -old, old // 2, float(old), str(old), [old], old * 1000))
    if isinstance(old, str) and old.endswith(".safetensors") and rng.random() < 0.6:
        return f"../{SECRET}/{old}"
    if isinstance(old, str) and rng.random() < 0.3:
        return rng.choice((old.upper(), old + "x", old[:-1], old * 2, [old], f"/{old}"))
    if isinstance(old, list) and rng.random() < 0.5:
        return rng.choice((old[:-1], old + old, old[::-1], [old], {str(i): v for i, v in enumerate(old)}))
    return rng.choice(VALUES)


def _holders(value: Any) -> list[Any]:
    """All objects and lists in a document."""
    if not isinstance(value, dict | list):
        return []
    inner = value.values() if isinstance(value, dict) else value[:200]
    return [value, *(found for each in inner for found in _holders(each))]
