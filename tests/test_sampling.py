"""Sampling steps against sorted, straightforward numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.drawing import _gumbel, seed_words
from jaxllm.errors import InputError
from jaxllm.sampling import Sampler, Sampling, Seen, frequent, min_p, present, repeated, top_k, top_p

VOCAB = 257
LOGITS = np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32) * 3
PROMPTED = np.random.default_rng(1).random((3, VOCAB)) < 0.1


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept(cut, value, logits=LOGITS):
    return np.isfinite(np.asarray(jax.jit(cut)(jnp.asarray(logits), jnp.full((len(logits), 1), value, jnp.float32))))


@pytest.mark.parametrize("k", [1, 2, 40, VOCAB, VOCAB + 5])
def test_top_k_keeps_the_k_likeliest(k):
    order = np.argsort(-LOGITS, axis=-1)[:, :k]
    expected = np.zeros_like(PROMPTED)
    np.put_along_axis(expected, order, True, axis=-1)
    np.testing.assert_array_equal(kept(top_k, k), expected)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_p(p):
    probs = softmax(LOGITS)
    order = np.argsort(-probs, axis=-1)
    mass_before = np.cumsum(np.take_along_axis(probs, order, -1), -1) - np.take_along_axis(probs, order, -1)
    expected = np.zeros_like(PROMPTED)
    np.put_along_axis(expected, order, mass_before < p, axis=-1)
    np.testing.assert_array_equal(kept(top_p, p), expected)


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p_keeps_what_is_near_the_likeliest(p):
    probs = softmax(LOGITS)
    np.testing.assert_array_equal(kept(min_p, p), probs >= p * probs.max(-1, keepdims=True) * (1 - 1e-6))


def test_ties_at_the_border_are_all_kept():
    logits = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]], np.float32)
    assert kept(top_k, 2, logits).tolist() == [[True, True, True, True, False]]


SEEN = Seen(PROMPTED, np.random.default_rng(2).integers(0, 3, (3, VOCAB)) * (PROMPTED == 0))


def test_penalties_move_seen_tokens_only():
    x, occurred = jnp.asarray(LOGITS), PROMPTED | (SEEN.answered > 0)
    factor = np.where(LOGITS > 0, 1 / 1.5, 1.5)
    np.testing.assert_allclose(repeated(x, 1.5, SEEN), np.where(occurred, LOGITS * factor, LOGITS), rtol=1e-6)
    np.testing.assert_allclose(frequent(x, 0.5, SEEN), LOGITS - 0.5 * SEEN.answered, rtol=1e-6)
    np.testing.assert_allclose(present(x, 0.5, SEEN), LOGITS - 0.5 * (SEEN.answered > 0), rtol=1e-6)


def draws(samplings, count=4000):
    noise = jax.random.gumbel(jax.random.key(0), (count, 3, VOCAB))
    sampler = Sampler.of(samplings if isinstance(samplings, list) else [samplings] * 3)
    return np.asarray(jax.lax.map(lambda noise: sampler(jnp.asarray(LOGITS), lambda: SEEN, lambda: noise), noise))


def test_temperature_zero_takes_the_likeliest():
    np.testing.assert_array_equal(draws(Sampling(), 2), [LOGITS.argmax(-1)] * 2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    probs = softmax(LOGITS / temperature)
    drawn = draws(Sampling(temperature))
    for row in range(3):
        top = np.argsort(-probs[row])[:5]
        share = np.array([(drawn[:, row] == t).mean() for t in top])
        assert np.abs(share - probs[row][top]).max() < 5 * np.sqrt(0.25 / len(drawn))


def test_a_chain_draws_only_what_all_its_steps_keep():
    chain = Sampling(1.5, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.2)
    occurred = PROMPTED | (SEEN.answered > 0)
    logits = np.where(occurred, np.where(LOGITS > 0, LOGITS / 1.2, LOGITS * 1.2), LOGITS) / 1.5
    allowed = kept(top_k, 20, logits)
    drawn = draws(chain, 300)
    assert all(allowed[row, token] for step in drawn for row, token in enumerate(step))
    assert len(np.unique(drawn[:, 0])) > 2


def test_each_row_is_drawn_as_it_asks():
    """What a row's neighbours ask for changes nothing, to the bit."""
    samplings = [Sampling(), Sampling(1.2, top_k=5, presence_penalty=0.5), Sampling(0.7, top_p=0.5, min_p=0.1)]
    together = draws(samplings, 50)
    for row, sampling in enumerate(samplings):
        np.testing.assert_array_equal(together[:, row], draws(sampling, 50)[:, row])


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1},
        {"temperature": 1.0, "min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"frequency_penalty": float("inf")},
    ],
)
def test_numbers_out_of_range(bad):
    with pytest.raises(InputError, match=f"{list(bad)[-1]}=.*: must be "):
        Sampling(**bad)


def test_the_noise_is_gumbels():
    """Its mean is Euler's constant and its variance pi^2 / 6; no two rows, tokens or seeds have the same."""
    seeds = np.stack([seed_words(seed, stream) for seed in (1, 2) for stream in (0, 1)])
    noise = np.asarray(_gumbel(jnp.asarray(np.repeat(seeds, 2, axis=0)), jnp.arange(8) % 2, 4001))
    assert noise.mean() == pytest.approx(0.5772, abs=0.03)
    assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.03)
    assert np.abs(np.corrcoef(noise) - np.eye(8)).max() < 0.08
    again = np.asarray(_gumbel(jnp.asarray(seeds[:1]), jnp.array([1]), 4001))
    np.testing.assert_array_equal(again[0], noise[1])
