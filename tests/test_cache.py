"""Layers with sliding windows keep rings: the same answers as transformers, whatever a ring has forgotten by then."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from compiled import step_by_step
from covering import FULL, in_turn, some

import jaxllm
from jaxllm.layers.cache import CacheShape, ring_positions, write_ring

GOLDEN = Path(__file__).parent / "golden"
WINDOWED = {"mistral": "checkpoints/mistral", "gpt_oss": "gpt_oss/bf16"}


@pytest.fixture
def small_rings(monkeypatch):
    """Rings of two positions more than the window, and prompts in chunks that are shorter than a ring."""
    monkeypatch.setattr("jaxllm.layers.cache.REWIND", 2)
    monkeypatch.setattr("jaxllm.decoding.CHUNK", 8)
    monkeypatch.setattr("jaxllm.decoding.SMALLEST", 4)


@pytest.mark.parametrize(("name", "mesh"), in_turn(WINDOWED, "tp=1", "tp=4"))
def test_rings_give_what_transformers_gives(small_rings, name, mesh):
    expected = np.load(GOLDEN / WINDOWED[name] / "golden.npz")
    model = jaxllm.load(GOLDEN / WINDOWED[name], mesh=mesh, dtype="float32", progress=False)
    lengths = {keys.shape[2] for keys in model.programs.empty_cache(1, 256).keys}
    assert min(lengths) < expected["tokens"].shape[1] // 2  # else nothing would be forgotten
    np.testing.assert_allclose(model.logits(expected["tokens"]), expected["logits"], atol=1e-3)
    if name != "mistral":
        np.testing.assert_allclose(step_by_step(model, expected["tokens"]), expected["logits"], atol=1e-3)
    if name == "mistral" or FULL:  # beside a shorter prompt, of which the same chunks are mostly padding
        tokens = expected["tokens"][0].tolist()
        for prompts in some([[tokens], [tokens, tokens[:5]]], [[tokens, tokens[:5]]]):
            assert model.generate(prompts, 12)[0].tokens == expected["greedy"].tolist()


def test_a_conversation_goes_back_as_far_as_its_rings_allow(small_rings):
    path = GOLDEN / WINDOWED["mistral"]
    model = jaxllm.load(path, dtype="float32", progress=False)
    prompt = np.load(path / "golden.npz")["tokens"][0].tolist()
    for kept, reused in ((22, 22), (10, 0)):  # of 23 tokens held; the ring keeps 2 more than the window
        memory = jaxllm.Memory()
        list(model.stream(prompt, 1, memory=memory))
        turn = [*prompt[:kept], 5, 6, 7]
        got = jaxllm.Completion(turn)
        list(model.stream(turn, 8, memory=memory, completion=got))
        assert memory.reused == reused
        assert got.tokens == model.generate(turn, 8).tokens


def test_a_ring_holds_the_newest_positions():
    """Against a list that is written to one position after another."""
    rng = np.random.default_rng(0)
    length, heads, dim = 5, 2, 3
    slots = np.full((2, length), -1)
    ring = np.zeros((2, heads, length, dim), np.float32)
    expected, start = ring.copy(), np.zeros(2, np.int32)
    for time, counts in ((3, [3, 1]), (4, [4, 0]), (16, [9, 16])):
        new = rng.normal(size=(2, time, heads, dim)).astype(np.float32)
        ring = write_ring(jnp.asarray(ring), jnp.asarray(new), jnp.asarray(start), jnp.asarray(counts, jnp.int32))
        for row, count in enumerate(counts):
            for t in range(count):
                slots[row, (start[row] + t) % length] = start[row] + t
                expected[row, :, (start[row] + t) % length] = new[row, t]
        start = start + np.asarray(counts, np.int32)
        np.testing.assert_array_equal(ring, expected)
        at = np.asarray(ring_positions(length, jnp.asarray(start) - 1))
        np.testing.assert_array_equal(np.where(at < 0, -1, at), slots)


def test_a_window_needs_no_more_than_its_ring():
    assert CacheShape(8, 64, 64, 128).length(131072) < 256
    assert CacheShape(8, 64, 64, 128).length(100) == 100
    assert CacheShape(8, 64, 64).length(131072) == 131072
