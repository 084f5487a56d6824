"""A cache in 8 bits: codes and scales as numpy has them, and models that answer as if its numbers were so rounded."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from covering import some

import jaxllm
from jaxllm.kernels.coded import Coded, read, stored
from jaxllm.layers.cache import write, write_ring

GOLDEN = Path(__file__).parent / "golden"
E4M3 = ml_dtypes.float8_e4m3fn
TYPES = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}


def rounded(x, name):
    """`x[..., dim]` float32 after it was cached, in numpy: codes of its own, and the nearest bfloat16 as the scale."""
    scale = (
        (np.abs(x).max(-1, keepdims=True) / np.float32(TYPES[name][1])).astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    codes = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
    return (np.rint(codes) if name == "int8" else codes.astype(E4M3).astype(np.float32)) * scale


@pytest.mark.parametrize("name", TYPES)
def test_numbers_of_every_size(name):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(9, 200, 24)) * 10.0 ** rng.integers(-30, 30, (9, 200, 1))).astype(np.float32)
    x[0, 0], x[0, 1], x[0, 2, 3] = 0, 2e-38, 1e30
    got = np.asarray(read(Coded.of(jnp.asarray(x), TYPES[name][0]), jnp.float32))
    np.testing.assert_array_equal(got[1:], rounded(x[1:], name))
    # Half a step, which is 1 / 127 of the largest, or an eighth of the number itself; and the rounding of the scale.
    peak = np.abs(x).max(-1, keepdims=True)
    most = peak / 127 / 2 if name == "int8" else np.maximum(np.abs(x) / 16, peak / 448 / 2**10)
    assert (np.abs(got - x) <= 1.01 * most)[1:].all()
    assert (got[0, :2] == 0).all() and got[0, 2, 3] == pytest.approx(1e30, rel=0.01)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(name, wrong):
    x = np.ones((2, 8), np.float32)
    x[0, 3] = wrong
    got = np.asarray(read(Coded.of(jnp.asarray(x), TYPES[name][0]), jnp.float32))
    assert not np.isfinite(got[0]).any() and np.isfinite(got[1]).all()


@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_written_where_numbers_would_be(rows):
    """Codes and scales go to the same places: buffers and rings hold what those of numbers hold, rounded."""
    rng, rows = np.random.default_rng(1), rows if rows is None else jnp.array(rows, jnp.int32)
    old = jnp.asarray(rng.normal(size=(2 if rows is None else 3, 2, 12, 8)), jnp.float32)
    new = jnp.asarray(rng.normal(size=(2, 5, 2, 8)), jnp.float32)
    start, counts = jnp.array([3, 10], jnp.int32), jnp.array([5, 4], jnp.int32)

    @jax.jit
    def updated(buffer):
        return write(buffer, new, jnp.minimum(start, 7), rows), write_ring(buffer, new, start, counts, rows)

    for name, (dtype, _) in TYPES.items():
        coded = updated(jax.jit(Coded.of, static_argnums=1)(old, dtype))
        for got, numbers in zip(coded, updated(old), strict=True):
            np.testing.assert_array_equal(read(got, jnp.float32), rounded(np.asarray(numbers), name))


CASES = [
    ("checkpoints/mistral", {}, "dp=2,tp=2", "fp8"),
    ("gpt_oss/bf16", {}, "tp=8", "int8"),
    ("deepseek/v3", {}, "tp=2", "fp8"),
]
STEPPING = some([case[0] for case in CASES], ["checkpoints/mistral"])  # the others add two tokens, by the same program
CASES += some(
    [("checkpoints/gemma3_text", {}, "tp=2", "int8"), ("deepseek/v3", {"attention": "naive"}, "tp=8", "int8")], []
)


@pytest.fixture(scope="module")
def name(request):
    """A type. While a test has it, numbers of float32 are cached as if they were so rounded."""
    dtype, limit = TYPES[request.param]

    def rounding(x, held):
        if held != jnp.float32:
            return stored(x, held)
        scale = (jnp.max(jnp.abs(x), axis=-1, keepdims=True) / limit).astype(jnp.bfloat16).astype(jnp.float32)
        codes = x / jnp.where(scale == 0, 1.0, scale)
        return (jnp.round(codes) if request.param == "int8" else codes.astype(dtype).astype(jnp.float32)) * scale

    jax.clear_caches()  # of what was traced with the function that is replaced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxllm.layers.cache.stored", rounding)
        yield request.param
    jax.clear_caches()


@pytest.mark.parametrize(("path", "options", "mesh", "name"), CASES, indirect=["name"])
def test_models_answer_as_if_numbers_were_rounded(monkeypatch, path, options, mesh, name):
    """On a mesh, chunk by chunk and then in steps, with rings that have come around; as one device answers all in
    chunks."""
    monkeypatch.setattr("jaxllm.layers.cache.REWIND", 2)
    monkeypatch.setattr("jaxllm.decoding.CHUNK", 8)
    golden = np.load(GOLDEN / path / "golden.npz")
    tokens, options = golden["tokens"][:, :24], options | {"dtype": "float32", "progress": False}
    model = jaxllm.load(GOLDEN / path, **options)
    expected, _ = model.forward(tokens, model.empty_cache(len(tokens), 32))
    assert np.abs(expected - golden["logits"][:, :24]).max() > 0.01  # else nothing was rounded
    model = jaxllm.load(GOLDEN / path, mesh=mesh, cache_dtype=name, **options)
    found, cache = model.forward(tokens[:, :16], model.empty_cache(len(tokens), 32))
    parts, step = [found], 1 if path in STEPPING else 2
    for i in range(16, 20, step):
        found, cache = model.forward(tokens[:, i : i + step], cache)
        parts.append(found)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected[:, :20], atol=2e-3)


def test_half_the_memory():
    path = GOLDEN / "checkpoints/llama"
    model = jaxllm.load(path, cache_dtype="int8", progress=False)
    for _ in range(2):
        cache = model.empty_cache(2, 64)
        for buffer, shape in zip(cache.keys, cache.shapes, strict=True):
            assert sum(leaf.nbytes for leaf in jax.tree.leaves(buffer)) == 2 * 64 * shape.heads * (shape.key_dim + 2)
        model.quantize("q8_0", progress=False)  # which leaves the cache as it is
    with pytest.raises(jaxllm.InputError, match="cache_dtype 'int4': choose one of int8, fp8"):
        jaxllm.load(path, cache_dtype="int4")
