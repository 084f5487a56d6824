r"""How byte-level BPE splits text into pieces before merging, by the name in `tokenizer.ggml.pre`.

The names and their grouping are llama.cpp's (src/llama-vocab.cpp). The patterns are the ones the models were trained
with. Where llama.cpp had to rewrite a pattern for std::regex, which knows no `(?i:)`, no `\p{Lu}` and no `\p{Han}`, we
keep the original: tokenizers' Oniguruma runs it unchanged, and the ids that matter are those of the training. The
alternative, llama.cpp's own rewriting, does not cut "ПриветМир" for gpt-4o, and cuts Hindi words at every vowel sign.
"""

import warnings
from typing import NamedTuple

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{PUNCTUATION}|{SPACE}"
QWEN2 = rf"{CONTRACTION}|{WORD}|\p{{N}}|{PUNCTUATION}|{SPACE}"
LINES = r"[^\n]+|[\n]+"

# DeepSeek-LLM lists cased letters one by one, and not all of them: Georgian, for one, is missing.
CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"  # deepseek-llm and -coder: Han, kana, Hangul and all between
HAN_KANA = "\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff"


def _mixed_case(tail: str, marks: str = r"\p{M}") -> str:
    """Words that end where lower case is followed by upper case, as in `o200k_base`, each with an optional `tail`."""
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}{marks}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}{marks}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{upper}*{lower}+{tail}|{start}{upper}+{lower}*{tail}"


def _deepseek_v3(punctuation: str, space: str = SPACE) -> str:
    """Letters with their marks, apart from punctuation and symbols; an ASCII sign stays with the word after it."""
    signs = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    return rf"{signs}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+|{punctuation}|{space}"


GPT4O = rf"{_mixed_case(CONTRACTION + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACE}"
TEKKEN = rf"{_mixed_case('')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACE}"
KIMI_WORD = _mixed_case(CONTRACTION + "?", marks=r"\p{M}&&[^\p{Han}]")
KIMI = rf"\p{{Han}}+|{KIMI_WORD}|\p{{N}}{{1,3}}|{PUNCTUATION}|{SPACE}"


class PreTokenizer(NamedTuple):
    """What a name in `tokenizer.ggml.pre` stands for."""

    patterns: tuple[str, ...]  # applied in sequence, each to the pieces of the one before; matches and gaps both stay
    ignore_merges: bool = False  # a piece that is a token is used as one, even if no merges lead to it
    add_bos: bool = False  # whether a text starts with BOS when `tokenizer.ggml.add_bos_token` does not say
    byte_level: bool = True  # False: tokens are plain text with U+2581 for spaces, bytes are <0xNN>


DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))

_TABLE = {
    "default": DEFAULT,
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": PreTokenizer(
        (LLAMA3,), ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": PreTokenizer((LLAMA3,)),
    "glm4": PreTokenizer((LLAMA3,), ignore_merges=True),
    "minicpm5": PreTokenizer(
        (r"\p{N}{1,3}", rf"{CONTRACTION}|{WORD}|\p{{N}}+|{PUNCTUATION}|{SPACE}"), ignore_merges=True
    ),
    "jais-2": PreTokenizer(
        (
            rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{PUNCTUATION}|\s*[\r\n]+"
            + "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
            + r"|\s",
        )
    ),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan megrez grok-2 solar-open "
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer((QWEN2,)),
    "qwen35": PreTokenizer(
        (
            rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACE}",
        )
    ),
    "ufakzeka": PreTokenizer((rf"{WORD}|\p{{N}}|{PUNCTUATION}|{SPACE}",)),
    "seed-coder": PreTokenizer((rf"{CONTRACTION}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACE}",)),
    "exaone-moe": PreTokenizer(
        (
            rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "laguna": PreTokenizer((LINES, QWEN2)),
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert roberta-bpe "
    "jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code": PreTokenizer((GPT2,)),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}", GPT2)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            "([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            GPT2,
        ),
        add_bos=True,
    ),
    "bloom poro-chat gpt3-finnish": PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    "viking": PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            ASIAN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", ASIAN, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": PreTokenizer(
        (r"\p{N}{1,3}", f"[{HAN_KANA}]+", _deepseek_v3(r" ?[\p{P}\p{S}]+[\r\n]*"))
    ),
    "spark2_5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            f"[{HAN_KANA}]+",
            _deepseek_v3(r" ?[\p{P}\p{S}]+", r"[\r\n]|\s+(?!\S)|\s+"),
            r"\p{N}",
        )
    ),
    "afmoe": PreTokenizer(
        (
            r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
            # U+F900 is where the compatibility ideographs start; llama.cpp has U+8C48, which NFC makes of it.
            "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
            "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
            _deepseek_v3(r" ?[\p{P}\p{S}]+[\r\n]*"),
        )
    ),
    "gpt-4o llama4 kanana2 talkie minimax-m2": PreTokenizer((GPT4O,)),
    "granite-embed-multi-97m": PreTokenizer((GPT4O,), ignore_merges=True),
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True),
    "tiny_aya cohere2moe": PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O)),
    "youtu": PreTokenizer(
        (
            "[\uac00-\ud7a3\u3131-\u318e]+"
            "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
            f"|[\u3105-\u312f]+|[{HAN_KANA}]+",
            rf"{_mixed_case(CONTRACTION + '?')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACE}",
        ),
        ignore_merges=True,
    ),
    "kimi-k2": PreTokenizer((KIMI,)),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    # llama.cpp keeps only runs of newlines together. Other lines that are tokens have merges that lead to them.
    "gemma4 granite-embed-multi-311m": PreTokenizer((LINES,), ignore_merges=True, add_bos=True, byte_level=False),
    "sarvam-moe": PreTokenizer((LINES,), byte_level=False),
}
BY_NAME = {name: pre_tokenizer for names, pre_tokenizer in _TABLE.items() for name in names.split()}


def lookup(name: str | None) -> PreTokenizer:
    """The pre-tokenizer called `name`. A missing or unknown name warns, and gets the default as in llama.cpp."""
    if name not in BY_NAME:
        what = "names no pre-tokenizer" if name is None else f"names the unknown pre-tokenizer {name!r}"
        warnings.warn(f"tokenizer.ggml.pre {what}; using 'default', which may degrade answers", stacklevel=2)
    return BY_NAME.get(name or "", DEFAULT)
