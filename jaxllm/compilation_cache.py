"""Compiled programs on disk, so that a model starts quickly the second time.

The cache is JAX's own. Two of its defaults are dangerous where several processes share a folder: entries are written
without a lock, so that another process may read half of one, and the folder grows for ever. A bound on its size turns
the lock on as well. Entries of another jaxlib or another CPU lie in folders of their own: XLA would refuse most of them
one by one, with a warning each.
"""

import hashlib
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jaxlib

MOST = 4 * 2**30  # bytes of all entries; the least recently used ones make room
WORTH = 0.2  # seconds of compiling from which on a program is kept


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user has set up JAX's cache already."""
    if jax.config.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "jaxllm" / "xla" / f"jaxlib-{jaxlib.__version__}-{_cpu()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", MOST)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)


def _cpu() -> str:
    """A name for CPUs that run the same machine code."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    features = found[1] if found else platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


@contextmanager
def damaged_entries_removed() -> Iterator[None]:
    """Around compiling: entries that turn out to be damaged are removed, and said to be, once.

    JAX compiles again what it cannot read, and warns, but it never writes over an entry that is there; so it would do
    that at every start.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    damaged = set()
    for warning in caught:
        text = str(warning.message)
        if found := re.match(r"Error reading persistent compilation cache entry for '([\w.<>-]+)'", text):
            damaged.add(found[1])
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    folder = jax.config.jax_compilation_cache_dir
    for name in damaged if folder else ():
        for entry in Path(folder).glob(f"{name}-*"):
            entry.unlink(missing_ok=True)
    if damaged:
        warnings.warn(
            f"damaged entries of the compilation cache in {folder} were removed and compiled again: "
            f"{', '.join(sorted(damaged))}",
            stacklevel=2,
        )
