"""The files of this package, as they were when the process began: what a program that is kept on disk was made by.

Only a process that runs nothing but this package, a command line, knows that by its files. Where somebody may have
put a function of their own in place of one of ours, as in a notebook, nothing is remembered here.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.machinery import all_suffixes

IMPORTED = tuple(all_suffixes())  # what the names of such files end with

Files = list[tuple[str, int, int, int]]  # path, size, and the times of the contents and of the entry in the folder
_begun: Files | None = None


def run_alone() -> bool:
    """Whether Python was started as `python -m jaxllm...` and is about to run that."""
    started = sys.orig_argv
    module = started[started.index("-m") + 1] if "-m" in started[:-1] else ""
    return sys.argv[:1] == ["-m"] and module.partition(".")[0] == "jaxllm"  # Python puts the module's path there later


def remember() -> None:
    """Called before the modules are imported that the process runs."""
    global _begun
    _begun = _files()


def remembered() -> Files | None:
    """The files at the beginning; None where they are not known."""
    return _begun


def unchanged() -> bool:
    """Whether the files are still those of the beginning. Otherwise nobody knows which of them were imported."""
    return _begun is not None and _files() == _begun


def _files() -> Files | None:
    found = []
    try:
        for name in ("jaxllm", "jaxllm.kernels"):  # the second may lie elsewhere
            spec = importlib.util.find_spec(name)
            for folder in (spec and spec.submodule_search_locations) or ():
                for file in _below(folder):
                    stat = file.stat()
                    found.append((file.path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    except OSError:  # one was removed just now, or they are in an archive
        return None
    return sorted(found)


def _below(folder: str) -> Iterator[os.DirEntry]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if entry.name != "__pycache__" and not entry.is_symlink():
                    yield from _below(entry.path)
            elif entry.name.endswith(IMPORTED):
                yield entry
