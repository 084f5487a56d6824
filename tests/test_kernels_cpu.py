"""The native CPU kernels: every format, instruction set and number of threads; attention; what happens without them."""

import platform
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import dequantized
from covering import some
from forked import Forked
from native_cases import COLS, ROWS, WEIGHTS, affine, check, floats, ggml

import jaxllm
from jaxllm import parallel
from jaxllm.cli import main
from jaxllm.errors import InputError
from jaxllm.kernels import dense, dispatch
from jaxllm.kernels.activations import rounding
from jaxllm.kernels.attention import Cached, Scoring, apart, attend
from jaxllm.kernels.coded import Coded, stored
from jaxllm.kernels.cpu import library, native_cpu
from jaxllm.kernels.norm import rms_norm
from jaxllm.parallel import COLUMN, ROW

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


def test_every_format():
    check(*WEIGHTS)


OTHER = "dotprod" if platform.machine() in ("aarch64", "arm64") else "avx2"


@pytest.mark.parametrize(("instructions", "threads"), [("portable", "2"), (OTHER, "1")])
def test_every_instruction_set(instructions, threads):
    """The best one, with this machine's threads, is what `test_every_format` runs."""
    code = "import runpy, sys\nrunpy.run_path(sys.argv.pop(1), run_name='__main__')"
    environment = {"JAXLLM_CPU": instructions, "JAXLLM_THREADS": threads}
    done = Forked(code, Path(__file__).with_name("native_cases.py"), environment=environment).finished()
    if "this processor has no such instruction set" in done.stderr:
        pytest.skip(f"{instructions} is not here")
    assert done.stdout == f"{instructions} {threads}\n", done.stderr[-2000:]


@pytest.fixture
def looked_for_anew(monkeypatch):
    """The library is found as by a new process. (test_processes starts one with an impossible environment.)"""
    monkeypatch.setattr(library, "native", library.native.__wrapped__)


@pytest.mark.usefixtures("looked_for_anew")
def test_an_impossible_environment_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("JAXLLM_CPU", "mmx")
    assert main(["generate", "--model", "demo", "--prompt", "x"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "JAXLLM_CPU=mmx: this processor has no such instruction set" in line
    monkeypatch.setenv("JAXLLM_THREADS", "many")
    with pytest.raises(InputError, match="^JAXLLM_THREADS=many: must be 1 or above$"):
        library.threads()


@pytest.mark.usefixtures("looked_for_anew")
def test_without_them_everything_works(monkeypatch):
    monkeypatch.setenv("JAXLLM_CPU", "off")
    w, x = ggml("Q4_K"), floats(2, COLS)
    np.testing.assert_allclose(jax.jit(lambda: dispatch.matmul(x, w))(), x @ dequantized(w).T, atol=1e-3)
    said = dispatch.explain("matmul", x, w)
    assert "reference (native_cpu cannot: the native kernels are switched off (JAXLLM_CPU=off))" in said


def test_numbers_that_are_not_finite_are_passed_on():
    x = np.zeros((3, COLS), np.float32)
    x[0, 5], x[1, 40] = np.nan, np.inf
    for int8_blocks in (False, True):
        with rounding(int8_blocks):
            y = np.asarray(native_cpu.matmul(x, ggml("Q4_1")))
        assert not np.isfinite(y[:2]).any() and (y[2] == 0).all()


def test_several_matrices_in_one_call():
    weights, x = [ggml("Q4_K"), ggml("Q6_K", 5), WEIGHTS["FP8"]()], floats(3, COLS)
    together = jax.jit(dispatch.matmuls)([x] * 3, weights)
    alone = jax.jit(lambda x, weights: [dispatch.matmul(x, weight) for weight in weights])(x, weights)
    for got, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=0)
    g = [floats(3, w.shape[0], seed=i) for i, w in enumerate(weights)]

    def loss(x):
        return sum(jnp.vdot(y, each) for y, each in zip(dispatch.matmuls([x] * 3, weights), g, strict=True))

    expected = sum(each @ dequantized(w) for each, w in zip(g, weights, strict=True))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["Q4_0", "affine 4", "FP8", "MXFP4 in order"])
def test_tiles_of_experts(name):
    stack = jax.tree.map(lambda leaf: np.stack([leaf, leaf[::-1], leaf]), jax.device_get(WEIGHTS[name]()))
    x, expert = floats(12, stack.shape[-1]), np.array([2, 0, 1, -1], np.int32)
    grouped = jax.jit(native_cpu.grouped_matmul)
    got, expected = grouped(x, stack, expert), jax.jit(dense.grouped_matmul)(x, stack, expert)
    np.testing.assert_allclose(np.asarray(got)[:9], np.asarray(expected)[:9], rtol=1e-5, atol=1e-3)
    assert grouped(x, stack, np.full(4, -1, np.int32)).shape == (12, ROWS)


def test_several_stacks_in_one_call():
    pair = jax.device_get([ggml("Q4_K"), ggml("Q6_K", 5)])
    stacks = [jax.tree.map(lambda leaf: jax.device_put(np.stack([leaf, leaf[::-1]])), weight) for weight in pair]
    x, expert = floats(3, COLS), jnp.array([1, -1, 0], jnp.int32)
    together = jax.jit(dispatch.grouped_matmuls)([x] * 2, stacks, expert)
    alone = jax.jit(lambda x, stacks: [native_cpu.grouped_matmul(x, stack, expert) for stack in stacks])(x, stacks)
    for got, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got, expected)
    g = [floats(3, stack.shape[1], seed=i) for i, stack in enumerate(stacks)]

    def loss(x):
        ys = dispatch.grouped_matmuls([x] * 2, stacks, expert)
        return sum(jnp.vdot(y[::2], each[::2]) for y, each in zip(ys, g, strict=True))

    matrices = [dequantized(stack) for stack in stacks]
    expected = [sum(each[row] @ w[e] for each, w in zip(g, matrices, strict=True)) for row, e in ((0, 1), (2, 0))]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x)[::2], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("spec", [COLUMN, ROW])
def test_eight_devices_at_once(spec):
    """They share two cores and one set of helpers."""
    weight, x = ggml("Q4_0", 64), floats(2, COLS)
    with jax.set_mesh(jaxllm.make_mesh("tp=8")):
        got = jax.jit(lambda x, w: [parallel.linear(x, w, spec) for _ in range(20)])(x, weight)
    for y in got:
        np.testing.assert_allclose(y, x @ dequantized(weight).T, rtol=1e-4, atol=1e-4)


def test_threads_of_python_at_once():
    weight = ggml("Q4_K", 512)
    xs = [floats(4, COLS, seed=i) for i in range(4)]
    expected = [np.asarray(native_cpu.matmul(x, weight)) for x in xs]
    wrong = []

    def work(i):
        for _ in range(50):
            if not np.array_equal(native_cpu.matmul(xs[i], weight), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# batch, time, heads, kv_heads, dim, value_dim, length, first position, dtype, window, cap, sinks
ATTENTION = {
    "a decode step": (1, 1, 9, 3, 64, 64, 1024, 700, "float32", None, None, False),
    "a prompt": (1, 70, 9, 3, 64, 64, 512, 200, "float32", None, None, False),
    "a batch": (2, 5, 4, 2, 16, 8, 64, 30, "float32", None, None, False),
    "everything": (3, 7, 8, 2, 20, 24, 100, 50, "bfloat16", 16, 30.0, True),
    "a decode step in int8": (2, 1, 9, 3, 64, 64, 1024, 700, "int8", None, None, False),
    "a prompt in int8": (1, 70, 6, 2, 72, 24, 130, 57, "int8", 16, 30.0, True),
    "a prompt in fp8": (2, 7, 8, 2, 20, 24, 100, 50, "float8_e4m3fn", None, None, True),
    "latents": (1, 1, 128, 1, 576, 512, 300, 250, "float16", None, None, False),
    "sinks": (1, 33, 10, 1, 40, 16, 64, 20, "float32", 5, None, True),
}


held_as = jax.jit(stored, static_argnums=1)


def numbers(held):
    """Keys or values as they are without codes."""
    if not isinstance(held, Coded):
        return np.asarray(held)
    codes = np.asarray(held.codes) if held.codes.dtype == jnp.int8 else np.asarray(held.codes).view("float8_e4m3fn")
    return codes.astype(np.float32) * np.asarray(held.scales, np.float32)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, ring):
    batch, time, heads, kv_heads, dim, value_dim, length, first, dtype, window, cap, has_sinks = ATTENTION[name]
    q = floats(batch, time, heads, dim) * 3 * dim**-0.5
    keys = held_as(floats(batch + 1, kv_heads, length, dim, seed=1), dtype)
    values = held_as(floats(batch + 1, kv_heads, length, value_dim, seed=2) * 3, dtype)
    rows = np.arange(batch, 0, -1, dtype=np.int32)  # of the sequences in the cache
    positions = first + np.arange(time, dtype=np.int32) + np.arange(batch, dtype=np.int32)[:, None]
    key_positions = None
    if ring:  # in any order, some slots empty
        order = np.random.default_rng(0).permutation(length) - 10
        key_positions, window = np.maximum(order, -1).astype(np.int32)[None], window or 10_000
    sinks = floats(heads, seed=3) if has_sinks else None
    given, scoring = Cached(q, keys, values, positions, key_positions, sinks, rows), Scoring(length, window, cap)
    picked = Cached(q, *(numbers(x)[::-1][:-1] for x in (keys, values)), positions, key_positions, sinks)
    ours, definition, expected = jax.jit(
        lambda given, picked: (native_cpu.attention(given, scoring), attend(given, scoring), attend(picked, scoring))
    )(given, picked)
    for got in (ours, definition):
        np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5)


# batch, time, heads, kv_heads, dim, value_dim, dtype, window, cap, sinks
GRADIENTS = {
    "plain": (1, 130, 6, 2, 64, 64, "float32", None, None, False),
    "everything": (2, 75, 4, 2, 24, 8, "float32", 16, 5.0, True),
    "bfloat16": (2, 66, 3, 1, 40, 16, "bfloat16", None, None, True),
    "not in vectors": (1, 20, 2, 1, 20, 8, "float32", None, None, False),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_attention(name):
    """They are those of the definition in float32, for rows of one text and of two."""
    batch, time, heads, kv_heads, dim, value_dim, dtype, window, cap, has_sinks = GRADIENTS[name]
    segments = (np.arange(time) >= np.array([[time], [time // 3]])[:batch]).astype(np.int32)
    at = jax.jit(apart)(np.arange(time, dtype=np.int32)[None], segments)
    q = floats(batch, time, heads, dim) * 3 * dim**-0.5
    keys, values = floats(batch, kv_heads, time, dim, seed=1), floats(batch, kv_heads, time, value_dim, seed=2)
    q, keys, values, g = (x.astype(dtype) for x in (q, keys, values, floats(batch, time, heads, value_dim, seed=3)))
    sinks, scoring = floats(heads, seed=4) if has_sinks else None, Scoring(time, min(window or time, time), cap)

    @partial(jax.jit, static_argnums=(0, 1))
    def gradients(attention, wide):
        given = [x.astype(jnp.float32) if wide else x for x in (q, keys, values)]
        run = lambda q, k, v, s: attention(Cached(q, k, v, at, at, s), scoring)  # noqa: E731
        y, backward = jax.vjp(run, *given, sinks)
        return backward(g.astype(y.dtype))

    for got, expected in zip(
        jax.tree.leaves(gradients(dispatch.attention, False)), jax.tree.leaves(gradients(attend, True)), strict=True
    ):
        near = (4e-6 if dtype == "float32" else 1e-2) * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=0, atol=near)


# One of each class, and those that are cut within a block.
TRAINED = "Q4_0", "Q4_K", "IQ2_S", "affine 3", "affine, zeros", "affine, groups of columns", "affine, groups of rows"
TRAINED += "MXFP4 in order", "NVFP4, divided", "NF4", "FP8", "MXFP8", "INT8", "float16", "affine, short", "NF4, short"


@pytest.mark.parametrize("name", some([name for name in WEIGHTS if not name.startswith("bfloat16")], TRAINED))
def test_training_in_bfloat16(name, monkeypatch):
    """On processors that multiply bfloat16, rows of it are multiplied by matrices that are rounded to it, both ways;
    only sums are wider."""
    monkeypatch.setattr(native_cpu, "has_bfloat16", lambda: True)
    weight = WEIGHTS[name]()
    matrix = np.asarray(jax.jit(lambda w: w.dequantize().astype(jnp.bfloat16))(weight), np.float64)
    x, g = floats(native_cpu.ENOUGH, matrix.shape[1], dtype=jnp.bfloat16), floats(native_cpu.ENOUGH, len(matrix))

    @jax.jit
    def both_ways(x, g, weight):
        y, backward = jax.vjp(lambda x: dispatch.matmul(x, weight), x)
        return y, backward(g)[0]

    y, back = both_ways(x, g, weight)
    expected = np.asarray(x, np.float64) @ matrix.T
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    expected = np.asarray(g.astype(jnp.bfloat16), np.float64) @ matrix
    got = np.asarray(back, np.float64)
    np.testing.assert_allclose(got, expected, rtol=2**-8, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("exact", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(exact):
    """To the bit, so that an answer is the same alone and among others, and whether tokens are guessed or not."""
    names = "Q1_0", "Q4_0", "Q6_K", "IQ4_NL", "affine 5", "MXFP4 in order", "NF4", "FP8", "bfloat16"
    weights = [WEIGHTS[name]() for name in names]
    wide, x_wide = ggml("Q4_1", 12, 4096 + 96), floats(24, 4096 + 96, seed=7)  # more than one stretch of columns
    x, cached = floats(24, COLS), floats(24, 2, 600, 16, seed=4)
    q, positions = floats(24, 1, 4, 16, seed=5), np.arange(570, 594, dtype=np.int32)[:, None]
    scale = floats(COLS, seed=6)

    @partial(jax.jit, static_argnums=0)
    def results(rows):
        given = Cached(q[:rows], cached[:rows], cached[:rows], positions[:rows])
        with rounding(not exact):
            products = [native_cpu.matmul(x[:rows], weight) for weight in weights]
            products.append(native_cpu.matmul(x_wide[:rows], wide))
        return *products, native_cpu.rms_norm(x[:rows], scale, 1e-5), native_cpu.attention(given, Scoring(600))

    wholes = jax.device_get(results(24))
    for rows in (1, 2, 3, 5, 8, 13):
        for part, whole in zip(results(rows), wholes, strict=True):
            np.testing.assert_array_equal(part, whole[:rows])
    # The tokens of one sequence, together and one after the other.
    together = native_cpu.attention(
        Cached(q[:8].reshape(1, 8, 4, 16), cached[:1], cached[:1], positions[:8].reshape(1, 8)), Scoring(600)
    )
    alone = jax.jit(lambda q, at: native_cpu.attention(Cached(q, cached[:1], cached[:1], at), Scoring(600)))
    for i in range(8):
        one = alone(q[i : i + 1], positions[i : i + 1])
        np.testing.assert_array_equal(np.asarray(one)[0, 0], np.asarray(together)[0, i])


@pytest.mark.parametrize(("rows", "size"), [(1, 7), (3, 64), (200, 576)])
def test_norms(rows, size):
    x, weight = floats(rows, size), floats(size, seed=1)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(native_cpu.rms_norm(x, None, 1e-5), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(native_cpu.rms_norm(x, weight, 1e-5), expected * weight, rtol=2e-6, atol=1e-6)
    loss = lambda f: jax.jit(jax.grad(lambda x, w: jnp.sum(f(x, w, 1e-5) ** 3), (0, 1)))(x, weight)  # noqa: E731
    for got, want in zip(loss(dispatch.rms_norm), loss(rms_norm), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_of_attention_are_those_of_the_definition():
    q, keys, values = floats(1, 3, 4, 16), floats(1, 2, 8, 16, seed=1), floats(1, 2, 8, 16, seed=2)
    positions = np.array([[4, 5, 6]], np.int32)

    @partial(jax.jit, static_argnums=0)
    def gradients(f):
        loss = lambda q, keys, values: jnp.sum(f(Cached(q, keys, values, positions), Scoring(8)) ** 2)  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(q, keys, values)

    for got, expected in zip(gradients(dispatch.attention), gradients(attend), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_rounding_is_asked_for_only_where_it_can_be(monkeypatch):
    monkeypatch.setattr(library, "missing", lambda: "there is no compiler")
    with pytest.raises(InputError, match="'int8_blocks' is of the native CPU kernels: there is no compiler"):
        jaxllm.load("demo", matmul="int8_blocks", progress=False)


def test_what_it_leaves_to_others():
    said = dispatch.explain("matmul", floats(1, COLS), WEIGHTS["bfloat16"]())
    assert "native_cpu (made for cpu)" in said
    with dispatch.using("native_cpu"), pytest.raises(InputError, match="XLA multiplies"):
        dispatch.matmul(floats(1, COLS, dtype=jnp.bfloat16), WEIGHTS["bfloat16"]())


# What no buffer has: an error, not what lies beside it in memory.


def refused(call):
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="jaxllm's kernels refuse"):
        jax.block_until_ready(call())


@pytest.mark.parametrize("expert", [4, 2**31 - 1])
def test_an_expert_that_is_not_there(expert):
    stack = jax.tree.map(lambda leaf: np.stack([leaf] * 4), ggml("Q4_0"))
    experts = np.array([0, expert, -1], np.int32)
    refused(lambda: native_cpu.grouped_matmul(floats(6, COLS), stack, experts))


def test_tiles_without_an_expert_are_zero():
    stack = jax.tree.map(lambda leaf: np.stack([leaf] * 4), ggml("Q4_0"))
    y = np.asarray(native_cpu.grouped_matmul(floats(6, COLS), stack, np.array([3, -1, -(2**31)], np.int32)))
    assert (y[:2] != 0).any(1).all() and (y[2:] == 0).all()


@pytest.mark.parametrize("index", [-1, COLS // 32, -(2**31), 2**31 - 1])
def test_a_group_that_is_not_there(index):
    groups = np.arange(COLS, dtype=np.int32) // 32
    groups[7] = index
    weight = affine(4, in_groups=lambda rng: groups)
    refused(lambda: native_cpu.matmul(floats(2, COLS), weight))


@pytest.mark.parametrize("row", [-1, 2, 2**31 - 1])
def test_a_sequence_that_is_not_there(row):
    cache = floats(2, 1, 8, 16)
    positions, rows = np.zeros((1, 1), np.int32), np.array([row], np.int32)
    given = Cached(floats(1, 1, 2, 16), cache, cache, positions, None, None, rows)
    refused(lambda: native_cpu.attention(given, Scoring(8)))
