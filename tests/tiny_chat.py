"""A tiny model that can be talked to: random weights, a token for each byte, and a chat template with tools."""

from tiny_gguf import Tiny, write
from tokenizers.pre_tokenizers import ByteLevel

TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}
Call one with <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

ALPHABET = sorted(ByteLevel.alphabet())
TOKENS = [*ALPHABET, "th", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def write_chat(path, context=1024):
    """Write the model as a GGUF file."""
    types = [NORMAL] * 257 + [CONTROL] * 2 + [USER_DEFINED] * 2
    tokenizer = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.eos_token_id": TOKENS.index("<|im_end|>"),
        "tokenizer.chat_template": TEMPLATE,
    }
    write(path, Tiny(vocab=len(TOKENS), context=context), tokenizer)
    return path
