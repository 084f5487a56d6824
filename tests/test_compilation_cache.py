"""The folder of compiled programs: shared by processes, and mended where an entry is damaged."""

import re
import warnings

import pytest
from forked import Forked
from tiny_gguf import Tiny, write

from jaxllm.compilation_cache import damaged_entries_removed

CODE = """
import sys
import warnings
import jaxllm
from jaxllm import compilation_cache
compilation_cache.WORTH = 0.0
model = jaxllm.load(sys.argv[1], dtype="float32", weights="float32", progress=False)
print(model.generate([1, 2, 3], 4).tokens)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that answers with a tiny model, in a cache of its own."""
    path = tmp_path / "tiny.gguf"
    write(path, Tiny(layers=1))
    return lambda: Forked(CODE, path, environment={"XDG_CACHE_HOME": str(tmp_path / "cache")})


def answered(process):
    done = process.finished()
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_processes_share_a_folder_and_damage_is_mended(start, tmp_path):
    both = [start(), start()]  # which write the same entries at the same time
    [(answer, said), (other, also_said)] = map(answered, both)
    assert (other, said, also_said) == (answer, "", "")

    [folder] = (tmp_path / "cache" / "jaxllm" / "xla").iterdir()
    # Programs so small that they are worth keeping only in this test are left alone.
    names = ("jit_advance", "jit_begin")
    entries = {entry: entry.read_bytes() for name in names for entry in folder.glob(f"{name}-*-cache")}
    assert len(entries) == 3  # of prompts, of steps, and where an answer begins
    for entry, content in entries.items():
        entry.write_bytes(content[: len(content) // 2])
    again, warned = answered(start())
    assert again == answer
    assert "damaged entries of the compilation cache" in warned
    assert "Error reading" not in warned
    assert [warned.count(name) for name in names] == [2, 1]
    assert answered(start()) == (answer, "")  # writes those that are missing
    assert all(len(entry.read_bytes()) > len(entries[entry]) // 2 for entry in entries if entry.exists())


def test_entries_of_the_same_name_stay(tmp_path):
    """Every model has a program of the name `extend`; of two, one entry is damaged."""
    code = """
import jax, jax.numpy as jnp
from jaxllm import compilation_cache
compilation_cache.WORTH = 0.0
compilation_cache.use_compilation_cache()
def extend(x):
    return x + 1
for n in 1, 2:
    with compilation_cache.damaged_entries_removed():
        jax.jit(extend).lower(jnp.ones(n)).compile()
"""

    def start():
        _, said = answered(Forked(code, environment={"XDG_CACHE_HOME": str(tmp_path)}))
        return said, {file: file.stat().st_ino for file in tmp_path.rglob("jit_extend-*-cache")}

    _, written = start()
    damaged, sound = written
    damaged.write_bytes(damaged.read_bytes()[:50])
    said, left = start()
    assert said.count("were removed and compiled again: jit_extend") == 1
    assert left == {sound: written[sound]}  # not written again either
    said, mended = start()
    assert said == "" and mended.keys() == written.keys()


def test_a_folder_that_cannot_be_written_is_one_line(start, tmp_path):
    """Here it is a file; a read-only file system and a full disk are the same to us."""
    (tmp_path / "cache" / "jaxllm").mkdir(parents=True)
    (tmp_path / "cache" / "jaxllm" / "xla").write_text("")
    _, said = answered(start())
    assert re.fullmatch(r".*: UserWarning: compiled programs are not kept: .*: (File exists|Not a directory)\n", said)


def test_entries_that_cannot_be_written_are_one_line():
    with pytest.warns(UserWarning) as caught, damaged_entries_removed():
        for name in ("jit_a", "jit_b"):
            error = "OSError: [Errno 28] No space left on device"
            warnings.warn(f"Error writing persistent compilation cache entry for '{name}': {error}", stacklevel=1)
    [warning] = caught
    assert re.fullmatch(
        r"compiled programs are not kept: .*: OSError: .* No space left on device", str(warning.message)
    )
