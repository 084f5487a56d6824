"""Choosing the next token: `Sampling` is what a user asks for, `Sampler` is what a compiled step does.

A step transforms the logits of many sequences at once, each with a value of its own. The usual order, that of
mistral.rs, is penalties, temperature, top-k, top-p, min-p. Values are arrays, and a step that no row asks for is
skipped while the program runs, so that one program serves every choice.

Top-k and top-p do not sort the vocabulary, which would dominate a step on a CPU. The smallest probability to keep is
found by bisection over float32 bit patterns, which order non-negative floats. Tokens exactly as likely as the last one
kept are kept too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.errors import InputError


class Seen(NamedTuple):
    """Which tokens occurred in the prompt, bool `[rows, vocab]`; and how often in the answer, int32 `[rows, vocab]`."""

    prompted: jax.Array
    answered: jax.Array


def repeated(logits: jax.Array, penalty: jax.Array, seen: Seen) -> jax.Array:
    """For tokens that occurred, positive logits are divided by `penalty`, negative ones multiplied (Keskar 2019)."""
    occurred = seen.prompted | (seen.answered > 0)
    return jnp.where(occurred, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def frequent(logits: jax.Array, penalty: jax.Array, seen: Seen) -> jax.Array:
    """`penalty` is subtracted for each time that a token occurred in the answer (OpenAI)."""
    return logits - penalty * seen.answered.astype(logits.dtype)


def present(logits: jax.Array, penalty: jax.Array, seen: Seen) -> jax.Array:
    """`penalty` is subtracted from tokens that occurred in the answer (OpenAI)."""
    return jnp.where(seen.answered > 0, logits - penalty, logits)


def top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Only the `k` most likely tokens."""
    probs = jax.nn.softmax(logits)
    enough = _least(probs, lambda kept: jnp.sum(kept, axis=-1, keepdims=True, dtype=k.dtype) >= k)
    return jnp.where(probs >= enough, logits, -jnp.inf)


def top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """The most likely tokens that together reach probability `p` (nucleus sampling, Holtzman et al., 2020)."""
    probs = jax.nn.softmax(logits)
    enough = _least(probs, lambda kept: jnp.sum(jnp.where(kept, probs, 0.0), axis=-1, keepdims=True) >= p)
    return jnp.where(probs >= enough, logits, -jnp.inf)


def min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Tokens at least `p` times as likely as the most likely one."""
    return jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p), logits, -jnp.inf)


def _least(probs: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest threshold `[rows, 1]` such that the tokens at least that likely satisfy `enough`."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # enough at low; not known to be enough at high
        middle = low + (high - low + 1) // 2
        good = enough(probs >= lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    zero = jnp.zeros((probs.shape[0], 1), jnp.int32)
    one = jnp.full_like(zero, np.float32(1).view(np.int32).item())
    low, _ = lax.fori_loop(0, 31, halve, (zero, one))
    return lax.bitcast_convert_type(low, jnp.float32)


# The options of `Sampling` in the order in which they apply, and the value that turns each of them off.
OFF = {
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "temperature": 0.0,
    "top_k": 0.0,
    "top_p": 1.0,
    "min_p": 0.0,
}
PENALTIES = {"repetition_penalty": repeated, "frequency_penalty": frequent, "presence_penalty": present}
CUTS = {"top_k": top_k, "top_p": top_p, "min_p": min_p}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampler:
    """How the next token of each row is drawn. `values`, float32 `[rows, options]`, has the columns of OFF."""

    values: jax.typing.ArrayLike

    @classmethod
    def of(cls, samplings: Sequence["Sampling"]) -> "Sampler":
        """A row for each of `samplings`."""
        return cls(np.array([sampling.values() for sampling in samplings], np.float32))

    def __call__(self, logits: jax.Array, seen: Callable[[], Seen], noise: Callable[[], jax.Array]) -> jax.Array:
        """Token ids int32 `[rows]` from logits `[rows, vocab]`.

        Args:
            seen: what the penalties need; only computed if there are any.
            noise: independent draws of the Gumbel distribution, float32 `[rows, vocab]`. The largest sum of a logit and
                its noise is a draw of the softmax of the logits (Gumbel, 1954).
        """
        values = dict(zip(OFF, jnp.split(jnp.asarray(self.values), len(OFF), axis=-1), strict=True))

        def step(name: str, logits: jax.Array, change: Callable[..., jax.Array], *more: Callable) -> jax.Array:
            asked = values[name] != OFF[name]

            def changed() -> jax.Array:
                return jnp.where(asked, change(logits, values[name], *(f() for f in more)), logits)

            return lax.cond(jnp.any(asked), changed, lambda: logits)

        for name, penalty in PENALTIES.items():
            logits = step(name, logits, penalty, seen)
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        draws = values["temperature"] > 0

        def draw() -> jax.Array:
            scaled = logits / jnp.where(draws, values["temperature"], 1.0)
            for name, cut in CUTS.items():
                scaled = step(name, scaled, cut)
            return jnp.where(draws[:, 0], jnp.argmax(scaled + noise(), axis=-1).astype(jnp.int32), likeliest)

        return lax.cond(jnp.any(draws), draw, lambda: likeliest)


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
        frequency_penalty: is subtracted from a token's logit for each time that it occurred in the answer.
        presence_penalty: is subtracted from the logits of tokens that occurred in the answer.

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
    frequency_penalty: float | None = _option(
        "F",
        "lower the logits of tokens by F for each time that they occurred in the answer",
        math.isfinite,
        "a finite number",
    )
    presence_penalty: float | None = _option(
        "F", "lower the logits of tokens that occurred in the answer by F", math.isfinite, "a finite number"
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

    def values(self) -> list[float]:
        """A row of `Sampler`. Greedy sampling (temperature 0 or None) needs only the penalties."""
        greedy = not self.temperature
        chosen = ((name, None if greedy and name in CUTS else getattr(self, name)) for name in OFF)
        return [OFF[name] if value is None else float(value) for name, value in chosen]


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments, for type checkers."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
