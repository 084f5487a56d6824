"""The files of this package, as they were when the process began: what a program that is kept on disk was made by.

Only a process that runs nothing but this package, the command line, knows that by its files. Where somebody may have
put a function of their own in place of one of ours, as in a notebook, nothing is remembered here.
"""

import importlib.util
import os
from collections.abc import Iterator

_begun: list[tuple[str, int, int, int]] | None = None


def remember() -> None:
    """Called before the modules are imported that the process runs."""
    global _begun
    _begun = _files()


def remembered() -> list[tuple[str, int, int, int]] | None:
    """Path, size and times (of the contents, and of the entry in the folder) of every file, or None."""
    return _begun


def unchanged() -> bool:
    """Whether the files are still those of the beginning. Otherwise nobody knows which of them were imported."""
    return _begun is not None and _files() == _begun


def _files() -> list[tuple[str, int, int, int]]:
    found = []
    for name in ("jaxllm", "jaxllm.kernels"):  # the second may lie elsewhere
        spec = importlib.util.find_spec(name)
        for folder in (spec and spec.submodule_search_locations) or ():
            for file in _below(folder):
                stat = file.stat()
                found.append((file.path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return sorted(found)


def _below(folder: str) -> Iterator[os.DirEntry]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry
            elif entry.name != "__pycache__" and not entry.is_symlink():
                yield from _below(entry.path)
