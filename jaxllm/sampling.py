"""Choosing the next token: small steps that compose, as pure functions over logits.

A `Sampler` is a tuple of steps, applied in order, before a draw; the usual order, that of mistral.rs, is repetition
penalty, temperature, top-k, top-p, min-p. Their numbers are arrays, so changing one does not retrace the decode step.

Top-k and top-p need no sorted vocabulary (the slowest thing that a CPU could do in a step): the smallest kept
probability is found by bisection over float32 bit patterns, which order non-negative floats. Tokens as likely as the
last one kept are kept too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError


class Step(Protocol):
    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        """New logits float32 `[batch, vocab]`; `seen` bool `[batch, vocab]` marks tokens of the prompt and answer."""


def _step[T](cls: type[T]) -> type[T]:
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


@_step
class RepetitionPenalty:
    """Positive logits of seen tokens are divided by `penalty`, negative ones multiplied (Keskar et al., 2019)."""

    penalty: jax.Array

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        return jnp.where(seen, jnp.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)


@_step
class Temperature:
    """Logits divided by `temperature`, which is above 0 (0 means greedy: no sampler at all)."""

    temperature: jax.Array

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        return logits / self.temperature


@_step
class TopK:
    """Only the `k` most likely tokens."""

    k: jax.Array

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(logits)
        enough = _least(probs, lambda kept: jnp.sum(kept, axis=-1) >= self.k)
        return jnp.where(probs >= enough, logits, -jnp.inf)


@_step
class TopP:
    """The most likely tokens that together reach probability `p` (nucleus sampling, Holtzman et al., 2020)."""

    p: jax.Array

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(logits)
        enough = _least(probs, lambda kept: jnp.sum(jnp.where(kept, probs, 0.0), axis=-1) >= self.p)
        return jnp.where(probs >= enough, logits, -jnp.inf)


@_step
class MinP:
    """Tokens at least `p` times as likely as the most likely one."""

    p: jax.Array

    def __call__(self, logits: jax.Array, seen: jax.Array) -> jax.Array:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.p)
        return jnp.where(logits >= floor, logits, -jnp.inf)


def _least(probs: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest threshold `[batch, 1]` for which the tokens with at least that probability are `enough`."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # enough at low; not known to be enough at high
        middle = low + (high - low + 1) // 2
        good = enough(probs >= jax.lax.bitcast_convert_type(middle, jnp.float32))[:, None]
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    zero = jnp.zeros((probs.shape[0], 1), jnp.int32)
    one = jnp.full_like(zero, np.float32(1).view(np.int32).item())
    low, _ = jax.lax.fori_loop(0, 31, halve, (zero, one))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """`steps`, then a draw; with no `Temperature` among the steps the draw is the most likely token."""

    steps: tuple[Step, ...] = ()

    @classmethod
    def of(
        cls,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> Self:
        """The usual chain, of those steps that are asked for. At temperature 0 the most likely token is taken.

        Raises:
            InputError: a number outside its range.
        """
        chain: list[Step] = []
        if repetition_penalty is not None:
            _check("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0")
            chain.append(RepetitionPenalty(np.float32(repetition_penalty)))
        _check("temperature", temperature, 0 <= temperature < float("inf"), "0 or above")
        if temperature > 0:
            chain.append(Temperature(np.float32(temperature)))
            if top_k is not None:
                _check("top_k", top_k, top_k >= 1, "1 or above")
                chain.append(TopK(np.int32(top_k)))
            if top_p is not None:
                _check("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")
                chain.append(TopP(np.float32(top_p)))
            if min_p is not None:
                _check("min_p", min_p, 0 < min_p <= 1, "above 0 and at most 1")
                chain.append(MinP(np.float32(min_p)))
        return cls(tuple(chain))

    @property
    def kind(self) -> tuple[type, ...]:
        """What a program that draws with this sampler depends on: the steps, not their numbers."""
        return tuple(type(step) for step in self.steps)

    def __call__(self, logits: jax.Array, seen: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids int32 `[batch]` from logits `[batch, vocab]`, with one random key per row."""
        for step in self.steps:
            logits = step(logits, seen)
        if Temperature in self.kind:
            return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _check(name: str, value: float, good: bool, want: str) -> None:
    if not good:
        raise InputError(f"{name}={value}: must be {want}")
