"""A tokenizer with what generation needs: special ids, the chat template, and decoding token by token."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from tokenizers.decoders import DecodeStream

from jaxllm import confined
from jaxllm.errors import InputError
from jaxllm.files import MOST_TOKENIZER, read_small
from jaxllm.tokenizer import gguf, pretokenizers
from jaxllm.tokenizer.chat import ChatTemplate, Messages

MOST_GROWTH = 1000  # how many times as long normalizers and decoders may make a text; U+2581 for a space is 3 times
# What ends an answer that calls a tool, in GPT-OSS and Llama 3. Converters to GGUF leave it to readers to know them.
_CALL_ENDS = ("<|call|>", "<|eom_id|>")


class Tokenizer:
    """Text to ids and back.

    Attributes:
        bos_id: the token that begins a text, or None.
        eos_ids: tokens that end an answer.
        eos_id: the one that ends a text, or None.
        chat_template: None where the checkpoint has none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int | None,
        eos_ids: frozenset[int],
        add_bos: bool,
        chat_template: str | None,
        eos_id: int | None = None,
    ) -> None:
        self.backend = backend
        self.bos_id, self._add_bos = bos_id, add_bos and bos_id is not None
        self.eos_id = min(eos_ids, default=None) if eos_id is None else eos_id  # which of them templates mean
        special = {"bos_token": self._text(bos_id), "eos_token": self._text(self.eos_id)}
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, special)
        self.eos_ids = eos_ids | self._end_of_turn()

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """The tokenizer in the metadata of a GGUF file.

        Raises:
            InputError: it is of an unknown kind, or inconsistent.
        """

        def get(key: str) -> Any:
            return metadata.get(f"tokenizer.ggml.{key}")

        template = metadata.get("tokenizer.chat_template")
        if template is not None:
            confined.prepare()
        backend, add_bos = gguf.build(metadata), get("add_bos_token")
        if add_bos is None:  # then it goes by the kind
            known = pretokenizers.BY_NAME.get(str(get("pre")))
            add_bos = get("model") == "llama" or (known is not None and known.add_bos)
        ends = [get(f"{key}_token_id") for key in ("eos", "eot", "eom")]
        ends += [backend.token_to_id(token) for token in _CALL_ENDS]
        return cls(
            backend,
            bos_id=get("bos_token_id"),
            eos_ids=frozenset(i for i in ends if i is not None),
            add_bos=bool(add_bos),
            chat_template=template,
            eos_id=get("eos_token_id"),
        )

    @classmethod
    def from_directory(cls, folder: Path, config: Mapping[str, object], eos: int | list[int] | None) -> Self:
        """The tokenizer of a Hugging Face directory: tokenizer.json, and what tokenizer_config.json says of it.

        Args:
            folder: the directory.
            config: its config.json.
            eos: `eos_token_id` of generation_config.json or config.json.

        Raises:
            InputError: tokenizer.json or the chat template cannot be read.
        """
        text, template = read_small(folder / "tokenizer.json", MOST_TOKENIZER), _template(folder, config)
        if template is not None:
            confined.prepare()
        with _refused():
            backend = tokenizers.Tokenizer.from_buffer(text)
            growth = _growth(backend.normalizer) * _growth(backend.decoder)
        if growth > MOST_GROWTH:
            raise InputError(f"tokenizer.json: replacements that can make a text {growth} times as long")
        backend.no_padding()  # settings of training
        backend.no_truncation()

        def token(name: str) -> int | None:
            text = config.get(name)
            text = text.get("content") if isinstance(text, Mapping) else text
            if text is not None and not isinstance(text, str):
                raise InputError(f"tokenizer_config.json: '{name}' is not text")
            return None if text is None else backend.token_to_id(text)

        ids = {token("eos_token"), *(eos if isinstance(eos, list) else [eos])} - {None}
        # What comes before a text is the business of tokenizer.json's own post-processor.
        bos_id, eos_id = token("bos_token"), token("eos_token")
        return cls(backend, bos_id, frozenset(ids), add_bos=False, chat_template=template, eos_id=eos_id)

    @property
    def vocab_size(self) -> int:
        """How many ids there are, those of special tokens included."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; the names of special tokens in it become those tokens. BOS is put first if the model wants it.

        A chat template may have written BOS already; it is not put twice.
        """
        return self._with_bos(self._ids(text, add_special_tokens=True))

    def encode_chat(self, messages: Messages, **variables: Any) -> list[int]:
        """Ids of a conversation, up to where the model has to answer; `variables` go to the chat template.

        Raises:
            InputError: the checkpoint has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise InputError("this checkpoint has no chat template; give plain text (on the command line: --raw)")
        text = self.chat_template.render(messages, **variables)  # it writes what has to come first, as far as it knows
        return self._with_bos(self._ids(text, add_special_tokens=False))

    def encode_with_offsets(self, text: str, written_by_template: bool) -> tuple[list[int], np.ndarray]:
        """Ids of a text as `encode` or `encode_chat` give them, and where in the text each of them begins and ends: int
        `[ids, 2]`, in characters; both are the same for a token that does not come from the text."""
        encoded = self._encoded(text, add_special_tokens=not written_by_template)
        ids, offsets = self._with_bos(encoded.ids), encoded.offsets
        return ids, np.array([(0, 0)] * (len(ids) - len(offsets)) + offsets).reshape(-1, 2)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> "TextStream":
        """What turns ids into text one after the other."""
        return TextStream(self)

    def _encoded(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text has half a character, {text[error.start]!a}: it is not Unicode") from error
        with _refused():
            return self.backend.encode(text, add_special_tokens=add_special_tokens)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._encoded(text, add_special_tokens).ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos_id is None or not self._add_bos or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.backend.id_to_token(token) or ""

    def _end_of_turn(self) -> frozenset[int]:
        """The special token that the chat template writes after an answer, if any."""
        answer = "An answer."
        try:
            turn = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
            text = self.chat_template.render(turn, add_generation_prompt=False) if self.chat_template else ""
        except InputError:  # some templates want a system message or tools; their eos_token_id has to do
            return frozenset()
        _, found, after = text.rpartition(answer)
        ids = self._ids(after.strip(), add_special_tokens=False) if found else []
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        return frozenset(ids[:1]) & special


@contextmanager
def _refused() -> Iterator[None]:
    """What `tokenizers` raises about a tokenizer.json, while it is read or used, as InputError."""
    try:
        yield
    except BaseException as error:  # it raises plain Exceptions and, where Rust panics, what is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"tokenizer.json: {str(error).partition('\n')[0]}") from error


def _growth(step: Any) -> int:
    """How many times as long a normalizer or a decoder can make a text: `tokenizers` would fill memory, and abort."""
    growth, found = 1, [] if step is None else [json.loads(step.__getstate__())]
    for part in found:
        if isinstance(part, dict):
            new = part.get("content", "") if part.get("type") == "Replace" else part.get("prepend", "")
            growth *= max(len(new.encode()), 1)
        found += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return growth


def _template(folder: Path, config: Mapping[str, object]) -> str | None:
    """The chat template: a separate file, or an entry of tokenizer_config.json, perhaps a list of named templates."""
    for name in ("chat_template.jinja", "chat_template.jinja2"):
        if (folder / name).is_file():
            try:
                return read_small(folder / name).decode()
            except UnicodeDecodeError as error:
                raise InputError(f"{name}: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, Mapping) for entry in template):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise InputError("tokenizer_config.json: 'chat_template' is neither text nor a list of named texts")
    return template


class TextStream:
    """Decodes tokens one by one: a character is returned once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._given = ""

    def push(self, token: int) -> str:
        """The text that `token` completes, which may be empty."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer.backend, token) or ""
        self._given += piece
        return piece

    def finish(self) -> str:
        """The remaining text after the last token: bytes that do not make a character become U+FFFD."""
        whole = self._tokenizer.decode(self._ids)
        return whole[len(self._given) :] if whole.startswith(self._given) else ""
