"""From logits to the next tokens of many sequences, each drawn as its own request wants.

A token depends on its sequence alone: the random key of token i of an answer is made of the request's seed, the number
of its stream, and i. So neighbours, and tokens that were drafted and checked together, change nothing.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.sampling import Sampler, Seen

MOST_BIASES = 1024  # tokens whose logits a request may change
MOST_TOP = 20  # most likely tokens that a request may ask for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Asked:
    """What the requests of all sequences want; changed from outside.

    Attributes:
        sampler: a row for each sequence.
        seeds: uint32 `[sequences, 3]`, the seed's high and low word, and the number of the random stream.
        allowed: uint32 `[sequences, words]`, a bit for each token; counts where `constrained`, bool `[sequences]`.
        biased: int32 `[sequences, MOST_BIASES]`, tokens, from vocab on for none; and what is added to their logits.
        reports: bool `[sequences]`, whether log-probabilities are wanted.
    """

    sampler: Sampler
    seeds: jax.Array
    allowed: jax.Array
    constrained: jax.Array
    biased: jax.Array
    biases: jax.Array
    reports: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """Where the answers of all sequences stand.

    Attributes:
        newest: int32 `[sequences]`, the newest token, not yet in the cache.
        drawn: int32 `[sequences]`, how many tokens the answer has.
        prompted: bool `[sequences, vocab]`, tokens of the prompt, where penalties want to know it.
        answered: int32 `[sequences, vocab]`, how often each token occurred in the answer.
    """

    newest: jax.Array
    drawn: jax.Array
    prompted: jax.Array
    answered: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """The result of a call, for each of its rows.

    Attributes:
        tokens: int32 `[rows, most]`; the first `counts[rows]` of them continue the answer.
        logprobs: float32 `[rows, most]`, of these tokens; before penalties and temperature. Zeros if no row reports.
        top, top_logprobs: `[rows, most, MOST_TOP]`, the most likely tokens.
    """

    tokens: jax.Array
    counts: jax.Array
    logprobs: jax.Array
    top: jax.Array
    top_logprobs: jax.Array


def draw(
    logits: jax.Array, drafts: jax.Array, drafted: jax.Array, rows: jax.Array, asked: Asked, at: Progress
) -> Drawn:
    """Draw a token after each position, and accept drafted tokens as long as they are what was drawn.

    Args:
        logits: float32 `[rows, most, vocab]`, after the newest token and after each draft.
        drafts: int32 `[rows, most - 1]`, of which the first `drafted[rows]` count.
        rows: int32 `[rows]`, the sequences that they belong to.
    """
    count, most, vocab = logits.shape
    lines = jnp.arange(count)[:, None]
    sampler = Sampler(jnp.asarray(asked.sampler.values)[rows])
    biased, constrained, reports = asked.biased[rows], asked.constrained[rows], asked.reports[rows]

    def adjusted(x: jax.Array) -> jax.Array:
        x = x.at[lines, biased].add(asked.biases[rows], mode="drop")
        tokens = jnp.arange(vocab)
        bits = (asked.allowed[rows][:, tokens // 32] >> (tokens % 32).astype(jnp.uint32)) & 1
        return jnp.where(constrained[:, None] & (bits == 0), -jnp.inf, x)

    adjusts = jnp.any(constrained) | jnp.any(biased < vocab)

    def drawn(j: jax.Array) -> jax.Array:
        def seen() -> Seen:
            before = (jnp.arange(most - 1) < j).astype(jnp.int32)
            answered = at.answered[rows].at[lines, drafts].add(jnp.broadcast_to(before, drafts.shape))
            return Seen(at.prompted[rows], answered)

        x = lax.dynamic_index_in_dim(logits, j, axis=1, keepdims=False)
        x = lax.cond(adjusts, adjusted, lambda x: x, x)
        return sampler(x, seen, _keys(asked.seeds[rows], at.drawn[rows] + j))

    tokens = drawn(jnp.int32(0))[:, None] if most == 1 else lax.map(drawn, jnp.arange(most)).T
    right = (tokens[:, :-1] == drafts) & (jnp.arange(most - 1) < drafted[:, None])
    counts = 1 + jnp.sum(jnp.cumprod(right, axis=1, dtype=jnp.int32), axis=1)
    return Drawn(tokens, counts, *_report(logits, tokens, jnp.any(reports)))


def _keys(seeds: jax.Array, index: jax.Array) -> jax.Array:
    """A random key for token `index[rows]` of each answer."""

    def key(seed: jax.Array, index: jax.Array) -> jax.Array:
        stream = jax.random.fold_in(jax.random.wrap_key_data(seed[:2], impl="threefry2x32"), seed[2])
        return jax.random.fold_in(stream, index)

    return jax.vmap(key)(seeds, index)


def _report(logits: jax.Array, tokens: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    top = min(MOST_TOP, logits.shape[-1])
    shape = (*tokens.shape, top)

    def report() -> tuple[jax.Array, jax.Array, jax.Array]:
        logprobs = jax.nn.log_softmax(logits)
        values, ids = lax.top_k(logprobs, top)
        return jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0], ids.astype(jnp.int32), values

    def nothing() -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.zeros(tokens.shape), jnp.zeros(shape, jnp.int32), jnp.zeros(shape)

    return lax.cond(wanted, report, nothing)


def advanced(at: Progress, drawn: Drawn, rows: jax.Array, draws: jax.Array) -> Progress:
    """Where the answers stand after a call. Rows for which not `draws[rows]` stay as they are."""
    sequences, vocab = at.answered.shape
    target = jnp.where(draws, rows, sequences)  # what lies outside is dropped
    taken = jnp.arange(drawn.tokens.shape[1]) < drawn.counts[:, None]
    newest = jnp.take_along_axis(drawn.tokens, drawn.counts[:, None] - 1, axis=1)[:, 0]
    return Progress(
        at.newest.at[target].set(newest, mode="drop"),
        at.drawn.at[target].add(drawn.counts, mode="drop"),
        at.prompted,
        at.answered.at[target[:, None], jnp.where(taken, drawn.tokens, vocab)].add(1, mode="drop"),
    )


def seed_words(seed: int, stream: int) -> tuple[int, int, int]:
    """The row of `Asked.seeds` of a request."""
    return seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF, stream & 0xFFFFFFFF
