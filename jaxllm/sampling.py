"""Choosing the next token: `Sampling` is what a user asks for, `Sampler` is what a compiled step does.

A `Sampler` is a tuple of pure functions over logits, applied in order before a token is drawn. The usual order, that of
mistral.rs, is repetition penalty, temperature, top-k, top-p, min-p. Their parameters are arrays, so changing one does
not compile the decode step again.

Top-k and top-p do not sort the vocabulary, which would dominate a step on a CPU. The smallest probability to keep is
found by bisection over float32 bit patterns, which order non-negative floats. Tokens exactly as likely as the last one
kept are kept too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypedDict, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import InputError


class Step(Protocol):
    """One transformation of the logits."""

    def __call__(self, logits: jax.Array, occurred: jax.Array) -> jax.Array:
        """New logits float32 `[batch, vocab]`; `occurred` bool `[batch, vocab]` marks tokens of prompt and answer."""


@dataclass_transform(frozen_default=True)
def _step[T](cls: type[T]) -> type[T]:
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


@_step
class RepetitionPenalty:
    """For tokens that occurred, positive logits are divided by `penalty`, negative ones multiplied (Keskar 2019)."""

    penalty: jax.typing.ArrayLike

    def __call__(self, logits: jax.Array, occurred: jax.Array) -> jax.Array:
        return jnp.where(occurred, jnp.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)


@_step
class Temperature:
    """Logits divided by `temperature`, which is above 0. (A sampler without this step is greedy.)"""

    temperature: jax.typing.ArrayLike

    def __call__(self, logits: jax.Array, occurred: jax.Array) -> jax.Array:
        return logits / self.temperature


@_step
class TopK:
    """Only the `k` most likely tokens."""

    k: jax.typing.ArrayLike

    def __call__(self, logits: jax.Array, occurred: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(logits)
        enough = _least(probs, lambda kept: jnp.sum(kept, axis=-1) >= self.k)
        return jnp.where(probs >= enough, logits, -jnp.inf)


@_step
class TopP:
    """The most likely tokens that together reach probability `p` (nucleus sampling, Holtzman et al., 2020)."""

    p: jax.typing.ArrayLike

    def __call__(self, logits: jax.Array, occurred: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(logits)
        enough = _least(probs, lambda kept: jnp.sum(jnp.where(kept, probs, 0.0), axis=-1) >= self.p)
        return jnp.where(probs >= enough, logits, -jnp.inf)


@_step
class MinP:
    """Tokens at least `p` times as likely as the most likely one."""

    p: jax.typing.ArrayLike

    def __call__(self, logits: jax.Array, occurred: jax.Array) -> jax.Array:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.p)
        return jnp.where(logits >= floor, logits, -jnp.inf)


def _least(probs: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest threshold `[batch, 1]` such that the tokens at least that likely satisfy `enough`."""

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
    """Applies `steps` to the logits, then draws; without a `Temperature` step it takes the most likely token."""

    steps: tuple[Step, ...] = ()

    @property
    def kind(self) -> tuple[type, ...]:
        """What a compiled program depends on: the types of the steps, not their parameters."""
        return tuple(type(step) for step in self.steps)

    def __call__(self, logits: jax.Array, occurred: jax.Array, keys: jax.Array) -> jax.Array:
        """Token ids int32 `[batch]` from logits `[batch, vocab]`, with one random key per row."""
        for step in self.steps:
            logits = step(logits, occurred)
        if Temperature in self.kind:
            return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _option(metavar: str, help: str, valid: Callable[[Any], bool], range: str) -> Any:
    return field(default=None, metadata={"metavar": metavar, "help": help, "valid": valid, "range": range})


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Where a field is None, the checkpoint decides, or else the step is skipped.

    The help of the command line is made from this table.

    Attributes:
        temperature: 0 takes the most likely token; above 0 tokens are drawn.
        top_k: draw from this many most likely tokens.
        top_p: draw from the most likely tokens that together reach this probability.
        min_p: draw from the tokens at least this times as likely as the most likely one.
        repetition_penalty: above 1, tokens that occurred before become less likely.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float | None = _option(
        "T", "0 takes the most likely token, above 0 tokens are drawn", lambda t: 0 <= t < math.inf, "0 or above"
    )
    top_k: int | None = _option(
        "K", "draw from the K most likely tokens", lambda k: 1 <= k < 2**31 and k % 1 == 0, "an integer, 1 or above"
    )
    top_p: float | None = _option(
        "P",
        "draw from the most likely tokens that together reach probability P",
        lambda p: 0 < p <= 1,
        "above 0 and at most 1",
    )
    min_p: float | None = _option(
        "P",
        "draw from the tokens at least P times as likely as the most likely one",
        lambda p: 0 < p <= 1,
        "above 0 and at most 1",
    )
    repetition_penalty: float | None = _option(
        "R",
        "above 1, tokens that occurred before become less likely",
        lambda r: 0 < r < math.inf,
        "above 0",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if value is not None and not (is_number and option.metadata["valid"](value)):
                raise InputError(f"{option.name}={value}: must be {option.metadata['range']}")

    def with_defaults(self, defaults: "Sampling") -> "Sampling":
        """The same, with `defaults` for fields that are None."""
        both = ((f.name, getattr(self, f.name), getattr(defaults, f.name)) for f in fields(self))
        return Sampling(**{name: default if value is None else value for name, value, default in both})

    def sampler(self) -> Sampler:
        """The requested steps. Greedy sampling (temperature 0 or None) needs only the repetition penalty."""
        steps: list[Step] = []
        if self.repetition_penalty is not None:
            steps.append(RepetitionPenalty(np.float32(self.repetition_penalty)))
        if self.temperature:
            steps.append(Temperature(np.float32(self.temperature)))
            if self.top_k is not None:
                steps.append(TopK(np.int32(self.top_k)))
            if self.top_p is not None:
                steps.append(TopP(np.float32(self.top_p)))
            if self.min_p is not None:
                steps.append(MinP(np.float32(self.min_p)))
        return Sampler(tuple(steps))


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments, for type checkers."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
