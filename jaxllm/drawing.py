"""From logits to the next tokens of many sequences, each drawn as its own request wants.

A token depends on its sequence alone: the random numbers for token i of an answer are made of the request's seed, the
number of its stream, and i. So neighbours, and tokens that were drafted and checked together, change nothing.
"""

import hashlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry_2x32

from jaxllm.sampling import Sampler, Seen

MOST_BIASES = 1024  # tokens whose logits a request may change
MOST_TOP = 20  # most likely tokens that a request may ask for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Asked:
    """What the requests of all sequences want; changed from outside.

    Attributes:
        sampler: a row for each sequence.
        seeds: uint32 `[sequences, 2]`, see `seed_words`.
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lines:
    """What the rows of logits are.

    Attributes:
        rows: int32 `[rows]`, the sequences that they belong to.
        drafts: int32 `[rows, most - 1]`, guesses of the next tokens, of which the first `drafted[rows]` count.
        draws: bool `[rows]`, whether a token is wanted.
    """

    rows: jax.Array
    drafts: jax.Array
    drafted: jax.Array
    draws: jax.Array


def draw(logits: jax.Array, given: Lines, asked: Asked, at: Progress) -> tuple[Progress, Drawn]:
    """Draw a token after each position, and accept guesses as long as they are what was drawn.

    Args:
        logits: float32 `[rows, most, vocab]`, after the newest token and after each guess.
        at: of all sequences; those for which nothing is wanted stay as they are.
    """
    rows, drafts = given.rows, given.drafts
    count, most, vocab = logits.shape
    line = jnp.arange(count)[:, None]
    sampler = Sampler(jnp.asarray(asked.sampler.values)[rows])
    biased, constrained, reports = asked.biased[rows], asked.constrained[rows], asked.reports[rows]

    def adjusted(x: jax.Array) -> jax.Array:
        x = x.at[line, biased].add(asked.biases[rows], mode="drop")
        tokens = jnp.arange(vocab)
        bits = (asked.allowed[rows][:, tokens // 32] >> (tokens % 32).astype(jnp.uint32)) & 1
        return jnp.where(constrained[:, None] & (bits == 0), -jnp.inf, x)

    adjusts = jnp.any(constrained) | jnp.any(biased < vocab)

    def drawn(j: jax.Array) -> jax.Array:
        def seen() -> Seen:
            before = (jnp.arange(most - 1) < j).astype(jnp.int32)
            answered = at.answered[rows].at[line, drafts].add(jnp.broadcast_to(before, drafts.shape))
            return Seen(at.prompted[rows], answered)

        x = lax.dynamic_index_in_dim(logits, j, axis=1, keepdims=False)
        x = lax.cond(adjusts, adjusted, lambda x: x, x)
        return sampler(x, seen, lambda: _gumbel(asked.seeds[rows], at.drawn[rows] + j, vocab))

    tokens = drawn(jnp.int32(0))[:, None] if most == 1 else lax.map(drawn, jnp.arange(most)).T
    right = (tokens[:, :-1] == drafts) & (jnp.arange(most - 1) < given.drafted[:, None])
    counts = 1 + jnp.sum(jnp.cumprod(right, axis=1, dtype=jnp.int32), axis=1)
    result = Drawn(tokens, counts, *_report(logits, tokens, jnp.any(reports)))
    return _advanced(at, result, rows, given.draws), result


def begin(at: Progress, row: jax.Array, drawn: jax.Array, prompted: jax.Array) -> Progress:
    """Progress where the answer of sequence `row` has `drawn` tokens, after a prompt of tokens bool `[vocab]`."""
    return Progress(
        at.newest, at.drawn.at[row].set(drawn), at.prompted.at[row].set(prompted), at.answered.at[row].set(0)
    )


def _gumbel(seeds: jax.Array, index: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise, float32 `[rows, vocab]`, for token `index[rows]` of each answer.

    The numbers are a hash of the two under the key of the answer's seed (Threefry; Salmon et al., 2011).
    """

    def row(seed: jax.Array, index: jax.Array) -> jax.Array:
        counters = jnp.concatenate([jnp.full(vocab, index, jnp.uint32), jnp.arange(vocab, dtype=jnp.uint32)])
        bits = threefry_2x32(seed, counters)[:vocab]
        uniform = lax.bitcast_convert_type(bits >> 9 | np.uint32(0x3F800000), jnp.float32) - 1
        return -jnp.log(-jnp.log(jnp.maximum(uniform, np.finfo(np.float32).tiny)))

    return jax.vmap(row)(seeds, index)


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


def _advanced(at: Progress, drawn: Drawn, rows: jax.Array, draws: jax.Array) -> Progress:
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


def seed_words(seed: int, stream: int) -> np.ndarray:
    """The row of `Asked.seeds` of a request, uint32 `[2]`: a hash, because neighbouring seeds should not be alike."""
    return np.frombuffer(hashlib.blake2b(f"{seed} {stream}".encode(), digest_size=8).digest(), np.uint32)
