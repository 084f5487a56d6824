"""Compiled programs on disk, so that a model starts quickly the second time.

The cache is JAX's own. Two of its defaults are dangerous if several processes share a folder: entries are written
without a lock, so another process may read half of one, and the folder grows forever. Limiting its size also turns on
the lock. Each jaxlib version and each kind of CPU has its own folder: XLA would refuse most foreign entries one by one,
with a warning each.
"""

import hashlib
import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import jax
import jaxlib

MOST = 4 * 2**30  # bytes of all entries; the least recently used ones make room
WORTH = 0.2  # seconds: a program that takes at least this long to compile is kept


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user has set up JAX's cache already. Where they cannot be kept, a
    warning says so; JAX would for every program."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = cache_folder("xla")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(4096))
        except OSError as error:
            warnings.warn(f"compiled programs are not kept: {folder}: {error.strerror}", stacklevel=4)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", MOST)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)


def cache_folder(kind: str) -> Path:
    """The user's folder of compiled programs of one kind, for this version of jaxlib and kind of CPU."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "jaxllm" / kind / f"jaxlib-{jaxlib.__version__}-{_cpu()}"


@cache
def _cpu() -> str:
    """A name shared by CPUs that run the same machine code."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    features = found[1] if found else platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


@contextmanager
def damaged_entries_removed() -> Iterator[None]:
    """Around compiling: entries that turn out to be damaged are removed, and said to be, once. Likewise of those that
    could not be written, as on a full disk.

    If JAX cannot read an entry, it warns and compiles again, but it never overwrites an existing entry. So the same
    would happen at every start.
    """
    begun = time.time_ns()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    removed, unwritten = set(), ""
    for warning in caught:
        found = re.match(r"Error reading persistent compilation cache entry for '([\w.<>-]+)'", str(warning.message))
        if found and _remove_read_since(begun, found[1]):
            removed.add(found[1])
        elif failed := re.match(
            r"Error writing persistent compilation cache entry for '[^']*': (.*)", str(warning.message)
        ):
            unwritten = failed[1]
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    folder = jax.config.jax_compilation_cache_dir
    if unwritten:
        warnings.warn(f"compiled programs are not kept: {folder}: {unwritten}", stacklevel=3)
    if removed:
        warnings.warn(
            f"damaged entries of the compilation cache in {folder} were removed and "
            f"compiled again: {', '.join(sorted(removed))}",
            stacklevel=3,  # of the `with` statement
        )


def _remove_read_since(begun: int, program: str) -> bool:
    """Remove entries of a program's name that were read since `begun` (ns); whether there were any.

    JAX names the program and not the entry, and every model has a program of that name. Beside each entry lies the time
    when it was last read, but only in a folder of bounded size.
    """
    read = [
        file
        for file in Path(jax.config.jax_compilation_cache_dir).glob(f"{program}-*-atime")
        if int.from_bytes(file.read_bytes(), "little") >= begun
    ]
    for file in read:
        file.with_name(file.name.removesuffix("atime") + "cache").unlink(missing_ok=True)
        file.unlink(missing_ok=True)
    return bool(read)
