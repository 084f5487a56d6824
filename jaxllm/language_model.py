"""`LanguageModel`: a loaded model and everything that you can do with it."""

import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxllm.adapters import Adapters
from jaxllm.checkpoint.filling import Placed, refill
from jaxllm.declaration import Declaration
from jaxllm.decoding import bucket, cache_for, hidden_states
from jaxllm.encodings import Encoding
from jaxllm.engine.answer import Completion, Prompt
from jaxllm.engine.drafting import Drafter
from jaxllm.engine.engine import Engine
from jaxllm.engine.memory import Memory
from jaxllm.errors import InputError
from jaxllm.layers.cache import KVCache
from jaxllm.layers.decoder import Decoder
from jaxllm.programs import Programs
from jaxllm.recipe import Plan, Row, is_in, recipe
from jaxllm.requantize import fitting_shards
from jaxllm.sampling import Sampling, SamplingOptions
from jaxllm.structured import Constraint
from jaxllm.summary import Summary, summarize
from jaxllm.tokenizer import Tokenizer
from jaxllm.tokenizer.chat import Messages
from jaxllm.topology import Topology
from jaxllm.tracking import Statistics

BATCH = 8  # prompts that are answered together by default


class LanguageModel:
    """A model on a mesh, with its tokenizer.

    A prompt is text, which is continued; a list of messages `{"role": ..., "content": ...}`, which the checkpoint's
    chat template renders; or a list of token ids, which is all that a checkpoint without a tokenizer takes.

    Attributes:
        config: sizes and settings of the architecture.
        tokenizer: None if the checkpoint has none.
        mesh: the devices that the weights are sharded over.
        dtype: the dtype of activations.
        max_seq_len: the most tokens that prompt and answer may have together.
        name: the name of the file or directory.
        sampling: what the checkpoint says about sampling.
        eos_ids: the tokens that end an answer.
        model: the layers; each can return its matrix, or a changed copy of itself (`jaxllm.layers`). The programs
            continue to use the loaded weights.
        placed: every parameter as it was loaded.
        programs: the compiled functions.
        adapters: what is attached to the weights, by name, see `Adapters`.
    """

    def __init__(
        self,
        model: Decoder,
        placed: Sequence[Placed],
        tokenizer: Tokenizer | None,
        mesh: Mesh,
        dtype: jax.typing.DTypeLike,
        max_seq_len: int,
        name: str,
        sampling: Sampling = Sampling(),  # noqa: B008, frozen
        eos_ids: frozenset[int] = frozenset(),
        max_batch_size: int = BATCH,
        int8_blocks: bool = False,
        cache_dtype: jax.typing.DTypeLike | None = None,
    ) -> None:
        self.config, self.tokenizer, self.mesh, self.name = model.config, tokenizer, mesh, name
        self.dtype, self.max_seq_len, self.sampling = jnp.dtype(dtype), max_seq_len, sampling
        self.eos_ids = eos_ids | (tokenizer.eos_ids if tokenizer else frozenset())
        self.placed, self.max_batch_size = list(placed), max_batch_size
        self.model, self.programs = model, Programs(model, mesh, dtype, int8_blocks, cache_dtype)
        self.adapters = Adapters(model, self.placed, mesh, lambda: self.programs.refresh())

    def logits(self, tokens: jax.typing.ArrayLike, *, last_only: bool = False) -> jax.Array:
        """Next-token logits float32 `[batch, time, vocab]` after every one of `tokens[batch, time]`.

        Args:
            last_only: only after the last of them, `[batch, vocab]`; the others are not computed.

        Raises:
            InputError: ids outside the vocabulary, or more of them than the context holds.
        """
        array = self._token_array(tokens)
        logits, _ = self._forward(array, cache_for(self.programs, *array.shape), 0, last_only)
        return logits

    def empty_cache(self, batch: int = 1, capacity: int | None = None) -> KVCache:
        """A cache for `forward` that holds no tokens yet.

        Args:
            batch: the number of sequences.
            capacity: the most tokens that each may grow to; by default `max_seq_len`. Models that scale their rotary
                frequencies for long texts do so by this length.

        Raises:
            InputError: numbers below 1, or a capacity above `max_seq_len`.
        """
        capacity = self.max_seq_len if capacity is None else capacity
        if batch < 1 or not 1 <= capacity <= self.max_seq_len:
            raise InputError(
                f"batch={batch}, capacity={capacity}: must be 1 or above, and a capacity at most {self.max_seq_len}"
            )
        limits = self.programs.replicate(np.full(batch, capacity, np.int32))
        return replace(self.programs.empty_cache(batch, capacity), limits=limits)

    def forward(
        self, tokens: jax.typing.ArrayLike, cache: KVCache, *, last_only: bool = False
    ) -> tuple[jax.Array, KVCache]:
        """Append `tokens[batch, time]` to the sequences in `cache`, as a decoding loop of your own needs it.

            cache = model.empty_cache(batch=1, capacity=64)
            logits, cache = model.forward([prompt], cache, last_only=True)
            logits, cache = model.forward(logits.argmax(-1)[:, None], cache, last_only=True)

        Args:
            cache: from `empty_cache` or the previous call. It is updated in place (donated) and cannot be used again.
            last_only: only compute logits after the last token.

        Returns:
            Logits float32 `[batch, time, vocab]`, or `[batch, vocab]` with `last_only`; and the cache with the tokens.

        Raises:
            InputError: ids outside the vocabulary, a batch that differs from the cache's, more tokens than the cache
                has room for, or a cache that was used before.
        """
        array = self._token_array(tokens)
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
            raise InputError("this cache was updated in place by an earlier call: use the one that forward returned")
        lengths = np.asarray(cache.lengths)
        if len(array) != len(lengths):
            raise InputError(f"{len(array)} rows of tokens, but the cache holds {len(lengths)} sequences")
        start = int(lengths.max())
        if start + array.shape[1] > cache.capacity:
            raise InputError(f"{start} + {array.shape[1]} tokens, but the cache holds {cache.capacity}")
        return self._forward(array, cache, start, last_only)

    def _forward(self, tokens: np.ndarray, cache: KVCache, start: int, last_only: bool) -> tuple[jax.Array, KVCache]:
        parts: list[jax.Array] = []
        for chunk in hidden_states(self.programs, tokens, cache, start):
            cache = chunk.cache
            if not last_only:
                parts.append(jax.lax.slice_in_dim(self.programs.head(chunk.hidden), 0, chunk.real, axis=1))
        if last_only:
            return self.programs.head(chunk.hidden[:, chunk.real - 1]), cache
        return jnp.concatenate(parts, axis=1), cache

    def embed(self, prompts: Sequence[Prompt], pooling: Literal["mean", "last"] = "mean") -> np.ndarray:
        """The last layer's normalised outputs for each prompt, float32 `[prompts, hidden]`.

        Args:
            pooling: their mean over all tokens, or that of the last token.

        Raises:
            InputError: another `pooling`, or a prompt that `encode` refuses.
        """
        if pooling not in ("mean", "last"):
            raise InputError(f"pooling='{pooling}': choose mean or last")
        rows = []
        for ids in [np.array(self.encode(prompt), np.int32) for prompt in prompts]:
            cache = cache_for(self.programs, 1, len(ids))
            chunks = hidden_states(self.programs, ids[None], cache, 0)
            whole = np.concatenate([np.asarray(chunk.hidden, np.float32)[0, : chunk.real] for chunk in chunks])
            rows.append(whole.mean(axis=0) if pooling == "mean" else whole[-1])
        return np.stack(rows)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 256,
        *,
        seed: int = 0,
        eos_ids: Collection[int] | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        schema: Constraint | Mapping[str, object] | None = None,
        drafter: Drafter | None = None,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion]:
        """Answer one prompt, or a list of them, several at a time (`max_batch_size`).

        Greedy answers do not depend on what else is in the list. Drawn ones depend on the position in it: prompt i
        draws from the random stream i of the seed.

        Args:
            max_new_tokens: the most tokens that an answer may have.
            seed: of the random draws. The same seed gives the same answer on the same kind of machine.
            eos_ids: tokens that end an answer, in place of the checkpoint's; `()` for none.
            stop: texts that end an answer; they are no part of it.
            logprobs: report log-probabilities of the answer's tokens, and of as many of the most likely ones (0 to 20).
            logit_bias: what is added to the logits of tokens.
            schema: a JSON schema that answers follow, or another constraint (`jaxllm.Constraint`).
            drafter: guesses tokens, see `Engine`. Answers stay the same.
            sampling: how tokens are chosen, see `Sampling`.
            **options: fields of `Sampling`, which override `sampling`. What neither sets comes from the checkpoint's
                generation_config.json, or else is off: the most likely token is taken.

        Raises:
            InputError: a prompt does not fit into the context, or a parameter is outside its range.
        """
        one = _is_one(prompts)
        listed: Any = [prompts] if one else prompts
        ids = [self.encode(prompt) for prompt in listed]
        positions = min(max(map(len, ids), default=1) + max(max_new_tokens, 1), self.max_seq_len)
        engine = Engine(self, min(bucket(len(ids), 1), self.max_batch_size), positions, drafter)
        constraint = _constraint(schema)
        answers = [
            engine.add(
                prompt,
                max_new_tokens,
                seed=seed,
                stream=i,
                eos_ids=eos_ids,
                stop=stop,
                logprobs=logprobs,
                logit_bias=logit_bias,
                constraint=constraint,
                completion=Completion(listed[i]),
                sampling=sampling,
                **options,
            )
            for i, prompt in enumerate(ids)
        ]
        while engine.busy:
            for answer in engine.step():
                if answer.error:
                    raise answer.error
        completions = [answer.completion for answer in answers]
        return completions[0] if one else completions

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        seed: int = 0,
        eos_ids: Collection[int] | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        schema: Constraint | Mapping[str, object] | None = None,
        drafter: Drafter | None = None,
        memory: Memory | None = None,
        completion: Completion | None = None,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """The answer's text in parts, as they are generated. Other arguments are those of `generate`.

        Args:
            memory: keeps the cache of a conversation between calls, so that only new turns are processed.
            completion: filled in while the answer is generated.
        """
        ids, constraint = self.encode(prompt), _constraint(schema)
        positions, memory = min(len(ids) + max(max_new_tokens, 1), self.max_seq_len), memory or Memory()
        engine = memory.engine_for(self, positions, drafter)
        answer = engine.add(
            ids,
            max_new_tokens,
            seed=seed,
            eos_ids=eos_ids,
            stop=stop,
            logprobs=logprobs,
            logit_bias=logit_bias,
            constraint=constraint,
            completion=completion or Completion(prompt),
            sampling=sampling,
            **options,
        )
        try:
            while not answer.done:
                engine.step()
                memory.reused = answer.completion.cached_tokens
                if text := answer.take().text:
                    yield text
            if answer.error:
                raise answer.error
        finally:
            engine.cancel(answer)

    def chat(self, messages: Messages, max_new_tokens: int = 256, **options: Any) -> Completion:
        """The model's answer to a conversation. Other arguments are those of `generate`."""
        answer = self.generate(messages, max_new_tokens, **options)
        assert isinstance(answer, Completion)
        return answer

    def quantize(
        self,
        type: str | int | None,
        *,
        organization: str | None = None,
        topology: str | os.PathLike | Topology | None = None,
        importance: Mapping[str, Statistics] | None = None,
        progress: bool = True,
    ) -> Plan:
        """Encode the model's matrices anew, one after the other, where they lie. Returns what was done.

        Args:
            type, organization, topology, progress: see `load`.
            importance: what `end_track_stats` returned.

        Raises:
            InputError: an argument cannot be used, or a matrix has values that are not finite.
        """
        chosen = recipe(type, organization, topology, importance)
        if chosen is None:
            raise InputError("nothing to do: give a type or a topology")
        if self.mesh.is_multi_process:
            raise InputError("no process holds a whole matrix here: quantize while loading, with load(quantize=...)")
        chosen.check(p.name for p in self.placed)
        before = {p.name: p.encoded for p in self.placed}

        def choose(name: str, declared: Declaration) -> tuple[Encoding, np.ndarray | None] | None:
            wanted = chosen.choose(name, name, declared.shape).type
            if wanted is None or is_in(before[name], wanted):
                return None
            return fitting_shards(wanted, declared, self.mesh), chosen.importance_of(name, declared.shape)

        show = progress and sys.stderr.isatty()

        def track(results: Iterable, count: int) -> Iterable:
            return tqdm(results, "quantizing", count, unit=" tensors", disable=not show, leave=False, file=sys.stderr)

        kept = self.programs.int8_blocks, self.programs.cache_dtype
        del self.programs  # holds all the old matrices
        try:
            refill(self.model, self.placed, choose, self.dtype, track)
        finally:
            self.programs = Programs(self.model, self.mesh, self.dtype, *kept)
        rows = [
            Row(p.name, before[p.name], p.encoded, chosen.choose(p.name, p.name, p.declaration.shape).why)
            for p in self.placed
            if len(p.declaration.shape) > 1 and not p.declaration.keep
        ]
        return Plan(rows)

    def begin_track_stats(self, products: bool = False) -> None:
        """From now on, collect statistics of the activations that every matrix but the head is multiplied by, while
        tokens are given to the model (those that it generates do not count).

        Args:
            products: also the sums of outer products, which GPTQ and AWQ need: for each matrix as much memory as a
                square matrix of its input's size.
        """
        self.programs.tracks, self.programs.seen = "products" if products else "squares", {}

    def end_track_stats(self) -> dict[str, Statistics]:
        """What was collected since `begin_track_stats`, by the parameters' names, in the checkpoint's order.

        Raises:
            InputError: it was not begun, or no tokens were processed since.
        """
        seen, declared = self.programs.seen, {p.name: p.declaration for p in self.placed}
        if self.programs.tracks is None or not seen:
            raise InputError("no statistics: call begin_track_stats(), then let the model process tokens")
        self.programs.tracks, self.programs.seen = None, {}
        return {name: statistics.restored(declared[name]) for name, statistics in seen.items()}

    def summary(self) -> Summary:
        """A table of every matrix: its format, how it is sharded and what one device holds."""
        cache = self.model.cache(1, self.max_seq_len, self.programs.cache_dtype, self.mesh)
        return summarize(self.placed, cache, self.mesh, self.name, self.dtype)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt.

        Raises:
            InputError: it is empty, too long, has ids outside the vocabulary, or needs a tokenizer or chat template
                that the checkpoint lacks.
        """
        if not isinstance(prompt, str) and all(isinstance(token, int | np.integer) for token in prompt):
            return self._checked([int(token) for token in cast(Sequence[int], prompt)])
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer: give prompts as lists of token ids")
        return self._checked(
            self.tokenizer.encode(prompt)
            if isinstance(prompt, str)
            else self.tokenizer.encode_chat(cast(Messages, prompt))
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

    def _token_array(self, tokens: jax.typing.ArrayLike) -> np.ndarray:
        """`tokens` as int32 `[batch, time]`, checked."""
        array = np.asarray(tokens)
        if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"tokens must be ids [batch, time], not {array.dtype} {list(array.shape)}")
        for row in array:
            self._checked(row.tolist())
        return array.astype(np.int32)


def _constraint(schema: Constraint | Mapping[str, object] | None) -> Constraint | None:
    return schema if schema is None or isinstance(schema, Constraint) else Constraint.json_schema(dict(schema))


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt (text, messages or ids) rather than a list of prompts."""
    if isinstance(prompts, str):
        return True
    first = next(iter(prompts), None)
    return isinstance(first, dict | int | np.integer)
