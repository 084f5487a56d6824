"""Programs that are found on disk without being traced: the same answers, never those of other sources or models."""

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from covering import some
from jax._src.compilation_cache import reset_cache
from tiny_gguf import Tiny, write

import jaxllm
from jaxllm import executables, sources
from jaxllm.checkpoint import filling
from jaxllm.executables import Executables
from jaxllm.parallel import make_mesh

ROOT = Path(__file__).parent.parent
TINY = Tiny(layers=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write(path, TINY)
    return path


@pytest.fixture(scope="module", autouse=True)
def caches():
    """On, as in a command line; other tests have them off."""
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()  # JAX asks only once whether it is to be used
    yield
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()


def keep_in(folder, monkeypatch):
    """Let this process keep programs, as a command line does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(sources, "_begun", None)  # which it is again afterwards
    sources.remember()


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Programs are kept in an empty folder; returns the entries."""
    keep_in(tmp_path, monkeypatch)
    return lambda: sorted((tmp_path / "jaxllm" / "executables").glob("*/*"))


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """A first answer, and the folder with what was kept of it."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        keep_in(folder, patch)
        return answer(model), folder


@pytest.fixture
def first(kept, made, tmp_path):
    """The first answer, whose programs have been kept."""
    shutil.copytree(made[1], tmp_path, dirs_exist_ok=True)
    return made[0]


@pytest.fixture(scope="module")
def listening():
    """The names of functions that are traced, as a list that grows. A listener cannot be removed again."""
    names: list[str] = []

    def hear(event: str, seconds: float, **more: str) -> None:
        if event.endswith("jaxpr_trace_duration"):
            names.append(more["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(hear)
    return names


@pytest.fixture
def traced(listening):
    """Of the last answer: which of the model's programs were traced."""

    def names():
        found = {"extend", "advance", "draw", "begin", "zeros"}.intersection(listening)
        listening.clear()
        return found

    return names


def answer(path, **options):
    """Of a new process, as far as JAX can tell."""
    jax.clear_caches()
    model = jaxllm.load(path, progress=False, **options)
    return model.generate([[1, 2, 3], [4, 5]], 4, logprobs=1)


def added(*made_of, size=3):
    """What a small program gives, which is kept or found."""
    x = jnp.ones(size)

    def compile():
        return jax.jit(lambda x: x + 1).lower(x).compile()

    return Executables(make_mesh("tp=1"), made_of, ()).get("add", (x,), compile)(x).tolist()


@pytest.mark.parametrize("options", [{"mesh": "tp=2,dp=2", "dtype": "float32"}, *some([{}], [])])
def test_nothing_is_traced_the_second_time(model, kept, traced, options):
    first = answer(model, **options)
    assert traced() == {"advance", "draw", "begin", "zeros"}
    entries = {file: file.stat().st_ino for file in kept()}
    assert len(entries) >= 5  # prompts and steps are two programs
    again = answer(model, **options)
    assert traced() == set()
    assert [a.tokens for a in again] == [a.tokens for a in first]
    assert [a.logprobs for a in again] == [a.logprobs for a in first]  # the very same code ran
    assert {file: file.stat().st_ino for file in kept()} == entries


def test_what_was_used_last_is_read_while_weights_are(model, kept, first, monkeypatch):
    begun, fill = [], filling.fill

    def fill_and_look(*args):
        begun.append(set(executables._ahead))
        return fill(*args)

    monkeypatch.setattr(filling, "fill", fill_and_look)
    again, other = (jaxllm.load(model, progress=False, **options) for options in ({}, {"dtype": "float32"}))
    assert len(begun[0]) == executables.AHEAD and begun[0] <= set(kept())
    assert set(again.programs._executables._ahead) == begun[0] == begun[1]
    assert other.programs._executables._ahead == executables._ahead == {}


def test_processes_that_run_more_than_this_package_keep_nothing(kept, monkeypatch):
    monkeypatch.setattr(sources, "_begun", None)
    assert added(1) == [2, 2, 2]
    assert kept() == []


def test_programs_of_jax_s_cache_are_compiled_again(model, kept, monkeypatch):
    """What XLA writes of a program that was read lacks some of its functions."""
    worth = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sources, "_begun", None)
            answer(model)
        first, again = answer(model), answer(model)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", worth)
    assert [a.tokens for a in again] == [a.tokens for a in first]


def test_damaged_entries_are_mended(model, kept, first, traced):
    traced()
    entries = {file: file.read_bytes() for file in kept()}
    cut, scribbled, other, *_ = entries
    cut.write_bytes(entries[cut][:100])
    scribbled.write_bytes(b"no program")
    other.write_bytes(zlib.compress(b"no program either"))
    with pytest.warns(UserWarning, match="a damaged program was removed and compiled again") as warned:
        assert [a.tokens for a in answer(model)] == [a.tokens for a in first]
    assert {file for file in entries for w in warned if str(file) in str(w.message)} == {cut, scribbled, other}
    assert all("\n" not in str(w.message) for w in warned)
    assert len(traced()) >= 1
    answer(model)
    assert traced() == set()


def test_another_constant_is_another_program(model, kept, first, traced, tmp_path):
    """Shapes are the same; what differs is a number in the programs."""
    key, content = b"attention.layer_norm_rms_epsilon", model.read_bytes()
    where = content.index(key) + len(key) + 4
    other = tmp_path / "other.gguf"
    other.write_bytes(content[:where] + jnp.float32(0.5).tobytes() + content[where + 4 :])
    entries = kept()
    traced()
    assert [a.logprobs for a in answer(other)] != [a.logprobs for a in first]
    assert traced() >= {"advance"}
    assert len(kept()) >= len(entries) + 2


def test_other_settings_are_other_programs(model, kept, monkeypatch):
    def name(**options):
        return jaxllm.load(model, progress=False, **options).programs._executables._common

    usual = name()
    assert name() == usual is not None
    others = [name(matmul="dequant"), name(dtype="bfloat16"), name(cache_dtype="int8"), name(mesh="tp=2")]
    others += [name(quantize="q4_k"), name(weights="float32")]
    with jax.default_matmul_precision("highest"):
        others.append(name())
    with monkeypatch.context() as patch:
        patch.setenv("JAXLLM_THREADS", "1")
        others.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(executables, "VERSIONS", (*executables.VERSIONS[:-1], "another numpy"))
        others.append(name())
    files = sources.remembered()
    for changed in ((*files[0][:3], files[0][3] + 1), (files[0][0], files[0][1] + 1, *files[0][2:])):
        monkeypatch.setattr(sources, "_begun", [changed, *files[1:]])
        others.append(name())
    assert len({usual, *others}) == 1 + len(others)


def test_nothing_is_written_once_a_source_has_changed(kept, monkeypatch):
    files = sources.remembered()
    monkeypatch.setattr(sources, "_files", lambda: [*files[:-1], (*files[-1][:3], files[-1][3] + 1)])
    assert added(1) == [2, 2, 2]
    assert kept() == []


def test_what_has_no_name_is_not_kept(kept):
    assert added(lambda: 1) == [2, 2, 2]
    assert kept() == []
    assert added(1) == added(1) == [2, 2, 2]
    assert len(kept()) == 1
    assert added(1, size=2) == [2, 2]  # arguments of other shapes
    assert len(kept()) == 2


def test_equal_things_have_one_name_whether_they_are_one_object_or_two(kept):
    one, other = (str(b"a mesh", "ascii") for _ in range(2))
    assert one is not other
    assert added(one, one) == added(one, other) == [2, 2, 2]
    assert len(kept()) == 1


def test_the_least_recently_used_make_room(kept, monkeypatch):
    monkeypatch.setattr(executables, "MOST", 2)
    keeper = Executables(make_mesh("tp=1"), (), ())

    def use(n):
        keeper.get(n, (), lambda: jax.jit(lambda: jnp.int32(n)).lower().compile())
        return {file.name for file in kept()}

    [first] = use(1)
    [second] = use(2) - {first}
    for file in kept():  # used at the same time, as far as a coarse clock can tell
        os.utime(file, (1, 1))
    use(1)
    assert first in use(3)
    assert second not in use(3)


def test_the_command_line_runs_its_sources_as_they_are(model, tmp_path):
    """The package is copied, run twice, and changed: now every token is to be 7."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "jaxllm", copy / "jaxllm", ignore=shutil.ignore_patterns("kernels"))
    shutil.copytree(ROOT / "kernels", copy / "jaxllm" / "kernels")
    quick = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env = os.environ | quick | {"PYTHONPATH": str(copy), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = ["-m", "jaxllm", "generate", "--prompt-ids", "1,2,3", "--max-new-tokens", "4", "--model"]

    def start():
        done = subprocess.run([sys.executable, *command, model], env=env, capture_output=True, text=True, cwd=copy)
        assert done.returncode == 0, done.stderr
        entries = {file: file.stat().st_ino for file in (tmp_path / "cache" / "jaxllm" / "executables").glob("*/*")}
        return done.stdout, entries

    answered, entries = start()
    assert answered != "7,7,7,7\n" and len(entries) >= 5
    assert start() == (answered, entries)
    with (copy / "jaxllm" / "sampling.py").open("a") as file:
        file.write("\nSampler.__call__ = lambda self, logits, *_: jnp.full(len(logits), 7, jnp.int32)\n")
    changed, more = start()
    assert changed == "7,7,7,7\n"
    assert len(more) == 2 * len(entries)


@pytest.mark.parametrize(
    "started, argv, alone",
    [
        (["python", "-m", "jaxllm.generate", "--model", "demo"], ["-m", "--model", "demo"], True),
        (["python", "-X", "utf8", "-m", "jaxllm"], ["-m"], True),
        (["python", "-m", "jaxllm.generate"], ["/somewhere/jaxllm/generate.py"], False),  # imported later, by whomever
        (["python", "-m", "pytest"], ["-m"], False),
        (["python", "-m", "jaxllm_tools"], ["-m"], False),
        (["python", "script.py", "-m"], ["script.py", "-m"], False),
        (["jaxllm", "generate"], ["jaxllm", "generate"], False),  # the command says it itself
    ],
)
def test_whether_a_process_runs_nothing_else(monkeypatch, started, argv, alone):
    monkeypatch.setattr(sys, "orig_argv", started)
    monkeypatch.setattr(sys, "argv", argv)
    assert sources.run_alone() == alone
