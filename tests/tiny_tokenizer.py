"""A tokenizer of words for tiny models, with a chat template."""

import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from jaxllm.tokenizer import Tokenizer

TEXT = "<unk> <user> <assistant> <end> What is one two three plus ? four five six ANSWER: . sum the of"
WORDS = TEXT.split(" ")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    backend = tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    end = WORDS.index("<end>")
    return Tokenizer(backend, None, frozenset({end}), False, template, eos_id=end)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]
