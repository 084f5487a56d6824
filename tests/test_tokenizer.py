"""Chat templates in their sandbox, end-of-answer tokens, and text that comes out token by token."""

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from jaxllm.errors import InputError
from jaxllm.tokenizer import ChatTemplate, Tokenizer

HELLO = [{"role": "user", "content": "Hello <there> & ü"}]


def render(source, messages=HELLO, **variables):
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>", **variables}).render(messages)


def test_templates_have_what_hugging_face_gives_them():
    assert render("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}") == (
        "<s>Hello <there> & ü</s>"
    )
    assert render("{{ messages[0] | tojson }}") == '{"role": "user", "content": "Hello <there> & ü"}'
    assert render("{{ strftime_now('%Y') | length }}") == "4"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% if true %}\n  x\n{% endif %}\n") == "  x\n"
    assert render("{{ add_generation_prompt }}{{ tools is defined }}") == "TrueFalse"


HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ messages.append.__globals__ }}",
    "functions": "{{ raise_exception.__globals__['json'] }}",
    "format strings": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "changing the caller's lists": "{{ messages.append(1) }}",
    "files": "{% include '/etc/passwd' %}",
    "endless ranges": "{{ range(10**9) | list }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_cannot_reach_outside(name):
    with pytest.raises(InputError, match="chat template: ") as error:
        render(HOSTILE[name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_says_why(source, message):
    with pytest.raises(InputError, match=f"chat template: .*{message}"):
        render(source)


def test_a_template_that_is_none():
    with pytest.raises(InputError, match="chat template: "):
        ChatTemplate("{% if %}", {})


def byte_tokenizer(chat_template=None, add_bos=True, eos=(1,)):
    """One token a byte, after <s>, </s> and <|end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|end|>"]
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(special + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    return Tokenizer(backend, bos_id=0, eos_ids=frozenset(eos), add_bos=add_bos, chat_template=chat_template)


def test_bos_is_put_first_but_never_twice():
    assert byte_tokenizer().encode("hi")[0] == 0
    assert byte_tokenizer().encode("<s>hi") == byte_tokenizer().encode("hi")
    assert byte_tokenizer(add_bos=False).encode("hi") == byte_tokenizer().encode("hi")[1:]


def test_the_token_after_an_answer_ends_answers_too():
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
    assert byte_tokenizer(turns).eos_ids == {1, 2}
    assert byte_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}").eos_ids == {1}
    assert byte_tokenizer("{{ raise_exception('no') }}").eos_ids == {1}
    assert byte_tokenizer().eos_ids == {1}


def test_a_conversation_needs_a_template():
    with pytest.raises(InputError, match="no chat template"):
        byte_tokenizer().encode_chat(HELLO)


def test_a_stream_gives_out_whole_characters():
    tokenizer = byte_tokenizer(add_bos=False)
    text = "aü€👩‍👩‍👧 b\n"
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert pieces[:3] == ["a", "", "ü"]
    assert stream.finish() == ""


def test_a_stream_that_ends_inside_a_character_shows_so():
    tokenizer = byte_tokenizer(add_bos=False)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode("x€")[:-1]]
    assert "".join(pieces) == "x"
    assert stream.finish() == "\ufffd"


def test_special_tokens_are_not_text():
    tokenizer = byte_tokenizer(add_bos=False)
    ids = tokenizer.encode("a<|end|>b")
    assert ids[1] == 2
    assert tokenizer.decode(ids) == "ab"
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == "ab"
