"""`LanguageModel`: a loaded model and everything that one does with it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.checkpoint.filling import Placed
from jaxllm.decoding import SMALLEST, Memory, bucket, generate_tokens, pieces
from jaxllm.errors import InputError
from jaxllm.programs import Programs
from jaxllm.sampling import Sampler
from jaxllm.summary import Summary, summarize
from jaxllm.tokenizer import Tokenizer
from jaxllm.tokenizer.chat import Messages

BATCH = 8  # prompts that are answered together

Prompt = str | Messages | Sequence[int]


@dataclass
class Completion:
    """An answer. `tokens` are all that were generated, including the one that ended it; `text` leaves that out.

    Rates are tokens per second: of the prompt until the first token came, and of the tokens after it, without the time
    that compiling took. In a batch they are this prompt's own share.
    """

    prompt: Prompt
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str = "length"
    prefill_tok_s: float = 0.0
    decode_tok_s: float = 0.0

    def __str__(self) -> str:
        return self.text


class LanguageModel:
    """A model on a mesh, with its tokenizer (None if the checkpoint has none; then prompts are lists of ids).

    A prompt is text, which is continued as it stands; a list of messages `{"role": ..., "content": ...}`, which the
    checkpoint's chat template renders; or a list of token ids.
    """

    def __init__(
        self,
        model: nnx.Module,
        placed: Sequence[Placed],
        tokenizer: Tokenizer | None,
        mesh: Mesh,
        dtype: jax.typing.DTypeLike,
        max_seq_len: int,
        name: str,
        sampling: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.config, self.tokenizer, self.mesh, self.name = model.config, tokenizer, mesh, name
        self.dtype, self.max_seq_len, self.sampling = jnp.dtype(dtype), max_seq_len, sampling
        self.placed = list(placed)
        self.programs = Programs(model, mesh, dtype)

    def logits(self, tokens: jax.typing.ArrayLike) -> jax.Array:
        """Next-token logits float32 `[batch, time, vocab]` after every one of `tokens[batch, time]`.

        Raises:
            InputError: ids outside the vocabulary, or more of them than the context holds.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not tokens.size:
            raise InputError(f"tokens must be [batch, time], not {list(tokens.shape)}")
        rows = [self._checked(row.tolist()) for row in tokens]
        cache = self.programs.empty_cache(len(rows), bucket(tokens.shape[1], SMALLEST))
        cache = replace(cache, limits=self.programs.whole(np.full(len(rows), tokens.shape[1], np.int32)))
        parts = []
        for piece, counts, start in pieces(rows, 0):
            window = min(bucket(start + piece.shape[1], SMALLEST), cache.capacity)
            hidden, cache = self.programs.extend(cache, piece, counts, window)
            parts.append(self.programs.head(hidden))
        return jnp.concatenate(parts, axis=1)[:, : tokens.shape[1]]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 256,
        *,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> Completion | list[Completion]:
        """Answer one prompt, or a list of them (in batches; each gets the tokens that it would get alone).

        Args:
            max_new_tokens: the most tokens that an answer may have.
            seed: of the random draws; the same seed gives the same text.
            temperature: 0 takes the most likely token; above, tokens are drawn.
            top_k, top_p, min_p, repetition_penalty: see `jaxllm.sampling`. What is None is as the checkpoint's
                generation_config.json says, or else not done (temperature: 0).

        Raises:
            InputError: a prompt that does not fit into the context, or a parameter outside its range.
        """
        sampler = self._sampler(temperature, top_k, top_p, min_p, repetition_penalty)
        one = _is_one(prompts)
        completions = [Completion(prompt) for prompt in ([prompts] if one else prompts)]
        ids = [self.encode(c.prompt) for c in completions]
        for first in range(0, len(ids), BATCH):
            batch = slice(first, first + BATCH)
            for _ in self._answer(completions[batch], ids[batch], max_new_tokens, sampler, seed):
                pass
        return completions[0] if one else completions

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        memory: Memory | None = None,
        completion: Completion | None = None,
    ) -> Iterator[str]:
        """Pieces of the answer's text as they come. Arguments are those of `generate`.

        Args:
            memory: keeps the cache of a conversation between calls, so that only new turns are processed.
            completion: filled in while the answer comes.
        """
        sampler = self._sampler(temperature, top_k, top_p, min_p, repetition_penalty)
        completion = completion or Completion(prompt)
        for pieces_of_step in self._answer([completion], [self.encode(prompt)], max_new_tokens, sampler, seed, memory):
            yield from filter(None, pieces_of_step)

    def chat(self, messages: Messages, max_new_tokens: int = 256, **sampling: float) -> Completion:
        """The model's answer to a conversation; keyword arguments are those of `generate`."""
        return self.generate(messages, max_new_tokens, **sampling)

    def summary(self) -> Summary:
        """A table of every matrix, its format, how it is cut and what one device holds."""
        return summarize(self.placed, self.mesh, self.name)

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt.

        Raises:
            InputError: it is empty, too long, names unknown ids, or needs a tokenizer or template that is not there.
        """
        if not isinstance(prompt, str) and all(isinstance(token, int | np.integer) for token in prompt):
            return self._checked([int(token) for token in prompt])
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer: give prompts as lists of token ids")
        return self._checked(
            self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.encode_chat(prompt)
        )

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise InputError("the prompt is empty")
        if len(ids) > self.max_seq_len:
            raise InputError(
                f"the prompt has {len(ids)} tokens, but the context holds {self.max_seq_len}; "
                f"shorten it or raise max_seq_len (--max-seq-len)"
            )
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise InputError(f"token ids must be 0 to {self.config.vocab_size - 1}, got {min(ids)} to {max(ids)}")
        return ids

    def _sampler(self, *given: float | None) -> Sampler:
        names = "temperature", "top_k", "top_p", "min_p", "repetition_penalty"
        options = {n: self.sampling.get(n) if g is None else g for n, g in zip(names, given, strict=True)}
        return Sampler.of(options.pop("temperature") or 0.0, **options)

    def _clock(self) -> float:
        """Seconds, standing still while programs are compiled."""
        return time.perf_counter() - self.programs.compile_seconds

    def _answer(
        self,
        completions: Sequence[Completion],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampler: Sampler,
        seed: int,
        memory: Memory | None = None,
    ) -> Iterator[list[str]]:
        """Fill in completions, giving out after each step the text that it added to each."""
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens}: must be 1 or above")
        limits = [min(max_new_tokens, self.max_seq_len - len(ids) + 1) for ids in prompts]
        eos = self.tokenizer.eos_ids if self.tokenizer else frozenset()
        streams = [self.tokenizer.stream() if self.tokenizer else None for _ in prompts]
        active = [True] * len(prompts)
        begun = first = self._clock()
        for step, tokens in enumerate(generate_tokens(self.programs, prompts, max(limits), sampler, seed, memory)):
            now = self._clock()
            first = now if step == 0 else first
            added = [""] * len(prompts)
            for i, (c, token) in enumerate(zip(completions, tokens.tolist(), strict=True)):
                if not active[i]:
                    continue
                c.tokens.append(token)
                if token in eos:
                    c.finish_reason = "stop"
                elif streams[i]:
                    added[i] = streams[i].push(token)
                if token in eos or len(c.tokens) == limits[i]:
                    active[i] = False
                    added[i] += streams[i].finish() if streams[i] else ""
                    c.prompt_tokens = len(prompts[i])
                    c.prefill_tok_s = len(prompts[i]) / (first - begun)
                    c.decode_tok_s = step / (now - first) if step else 0.0
                c.text += added[i]
            yield added
            if not any(active):
                return


def _is_one(prompts: object) -> bool:
    """Whether this is one prompt (text, messages or ids) rather than a list of prompts."""
    if isinstance(prompts, str):
        return True
    first = next(iter(prompts), None)
    return isinstance(first, dict | int | np.integer)
