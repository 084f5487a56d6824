"""Writes golden/harmony_parts.json: answers of GPT-OSS, and the messages that openai-harmony finds in them.

    pip install openai-harmony==0.0.8
    TIKTOKEN_ENCODINGS_BASE=folder-with-o200k_base.tiktoken python tests/reference/harmony_parts.py

The answers are lists of texts, in which those of the form `<|name|>` are special tokens, except after a `\\0`.
"""

import json
from contextlib import suppress
from pathlib import Path

from openai_harmony import HarmonyEncodingName, HarmonyError, Role, StreamableParser, load_harmony_encoding

CHANNEL, MESSAGE, END, START = "<|channel|>", "<|message|>", "<|end|>", "<|start|>"
CALL, RETURN, CONSTRAIN = "<|call|>", "<|return|>", "<|constrain|>"
THOUGHT = [CHANNEL, "analysis", MESSAGE, "The user greets.\nSo do I – 😀.", END, START, "assistant"]
CASES = {
    "thought and answer": [*THOUGHT, CHANNEL, "final", MESSAGE, "Hello, wörld! 👩‍👧", RETURN],
    "answer alone": [CHANNEL, "final", MESSAGE, "Hello!", RETURN],
    "two thoughts": [*THOUGHT, *THOUGHT, CHANNEL, "final", MESSAGE, "Hi.", RETURN],
    "call": [CHANNEL, "commentary to=functions.get_weather ", CONSTRAIN, "json", MESSAGE, '{"city": "Paris"}', CALL],
    "call after a thought": [*THOUGHT, CHANNEL, "commentary to=functions.f ", CONSTRAIN, "json", MESSAGE, "{}", CALL],
    "call addressed before its channel": [
        " to=functions.f",
        CHANNEL,
        "commentary json",
        MESSAGE,
        '{"a": [1, 2]}',
        CALL,
    ],
    "remark and call": [
        *(CHANNEL, "commentary", MESSAGE, "I look it up.", END, START, "assistant"),
        *(CHANNEL, "commentary to=functions.f ", CONSTRAIN, "json", MESSAGE, '{"q": "x"}', CALL),
    ],
    "two calls": [
        *(CHANNEL, "commentary to=functions.f ", CONSTRAIN, "json", MESSAGE, '{"a": 1}', CALL, START, "assistant"),
        *(CHANNEL, "commentary to=functions.g ", CONSTRAIN, "json", MESSAGE, '{"b": 2}', CALL),
    ],
    "a tool of its own": [CHANNEL, "analysis to=python code", MESSAGE, "print(1 < 2)", CALL],
    "cut off in a thought": [CHANNEL, "analysis", MESSAGE, "The user"],
    "cut off in a call": [CHANNEL, "commentary to=functions.f ", CONSTRAIN, "json", MESSAGE, '{"a": '],
    "cut off between messages": [CHANNEL, "analysis", MESSAGE, "The user", END, START, "assistant"],
    "an answer about the format": [
        *(
            CHANNEL,
            "final",
            MESSAGE,
            "A message ends with ",
            "\0<|end|>",
            ", and starts with ",
            "\0<|start|>",
            ".",
            RETURN,
        )
    ],
}


def main() -> None:
    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    golden = {}
    for name, pieces in CASES.items():
        parser = StreamableParser(encoding, role=Role.ASSISTANT)
        for piece in pieces:
            plain = piece.startswith("\0") or not piece.startswith("<|")
            allowed = set() if plain else {piece}
            for token in encoding.encode(piece.removeprefix("\0"), allowed_special=allowed, disallowed_special=()):
                parser.process(token)
        with suppress(HarmonyError):  # an answer that was cut off in a header
            parser.process_eos()
        messages = [
            {"channel": m.channel, "recipient": m.recipient, "text": "".join(c.text for c in m.content)}
            for m in parser.messages
        ]
        golden[name] = {"pieces": pieces, "messages": messages}
    path = Path(__file__).parent.parent / "golden" / "harmony_parts.json"
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
