"""A checkpoint that is being written: it grows in a hidden directory and appears when it is complete.

If the process is killed, the disk is full, the user interrupts or an error says so (`Kept`), what was written stays,
with a journal of the tensors that are complete; the next run with the same inputs goes on from there. Any other error
removes it.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from jaxllm.checkpoint.checksums import write_sums
from jaxllm.errors import InputError

GB = 10**9
CONTENT, JOURNAL, LOCK = "content", "journal", "lock"
SYNC_SECONDS = 2.0  # how much work may be lost; waiting for the disk after every tensor would cost more than that


@dataclass
class Unfinished:
    """A directory that is being filled.

    Attributes:
        folder: where to write.
        done: the tensors that an earlier run has written already, as they were noted.
    """

    folder: Path
    done: frozenset[str]
    _journal: Path
    _waiting: list[str] = field(default_factory=list)
    _synced: float = field(default_factory=time.monotonic)

    def note(self, tensor: str, descriptor: int) -> None:
        """Note that a tensor is complete in the open file. It counts as done when the disk has it."""
        self._waiting.append(tensor)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync(descriptor)

    def sync(self, descriptor: int) -> None:
        """Wait until the disk has the file, and put its tensors into the journal."""
        os.fdatasync(descriptor)
        with self._journal.open("a") as journal:
            journal.writelines(f"{name}\n" for name in self._waiting)
        self._waiting, self._synced = [], time.monotonic()


@contextmanager
def unfinished(
    path: Path, nbytes: int, fingerprint: str, file: str | None = None, checksums: bool = False
) -> Iterator[Unfinished]:
    """A hidden directory beside `path` to fill with `nbytes`. At the end it, or one `file` in it, becomes `path`.

    Args:
        fingerprint: what is written, and from what; only a run with the same goes on where another stopped.
        checksums: whether they are written too, see `checksums`.

    Raises:
        InputError: `path` is taken or cannot be made, there is too little space, another process writes it, or the
            operating system refused.
    """
    go_on = ""
    try:
        final = path.resolve()
        check_target(path, file is not None)
        hidden = final.with_name(f".{final.name}.partial")
        hidden.mkdir(exist_ok=True)
        try:
            with FileLock(hidden / LOCK, blocking=False):
                begun = _begun(hidden, fingerprint)
                there = sum(each.stat().st_blocks * 512 for each in begun.folder.iterdir())
                if (free := shutil.disk_usage(final.parent).free + there) < nbytes:
                    needed = f"{_shown(nbytes)} are needed, but {_shown(free)} are free on that disk"
                    if not begun.done:
                        shutil.rmtree(hidden)
                    raise NoSpace(f"{path}: {needed}")
                yield begun
                sums = write_sums(begun.folder, file) if checksums else None
                made = [*begun.folder.rglob("*"), begun.folder] if file is None else [begun.folder / file]
                for each in made:
                    sync_path(each)
                if sums is not None and file is not None:
                    sync_path(sums)
                    sums.replace(final.with_name(sums.name))
                made[-1].rename(final)
                sync_path(final.parent)
                shutil.rmtree(hidden)
        except Timeout as error:
            raise InputError(f"{path}: another process is writing it") from error
        except Kept:
            raise
        except (OSError, KeyboardInterrupt):
            go_on = "; what was written is kept, and the same command goes on from there"
            raise
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(f"{path}: not written: {error}{go_on}") from error


class Kept(InputError):
    """An error after which what was written stays."""


class NoSpace(Kept):
    """The disk is too small for the rest."""


def _shown(nbytes: int) -> str:
    return f"{nbytes / GB:.2f} GB" if nbytes > GB // 10 else f"{nbytes * 1000 / GB:.2f} MB"


def check_target(path: Path, is_file: bool) -> None:
    """Raise InputError if nothing can be written under this name."""
    final = path.resolve()
    if final.is_mount():
        raise InputError(f"{path}: a file system is mounted here; name a directory inside it")
    if is_file and final.exists():
        raise InputError(f"{path}: exists already; name a file that does not exist")
    if final.exists() and not (final.is_dir() and next(final.iterdir(), None) is None):
        raise InputError(f"{path}: exists already; name a directory that does not exist, or an empty one")
    if not final.parent.is_dir():
        raise InputError(f"{path}: {final.parent} is not a directory; make it first")


def _begun(hidden: Path, fingerprint: str) -> Unfinished:
    """What an earlier run left, if it wrote the same; else a fresh start."""
    folder, journal = hidden / CONTENT, hidden / JOURNAL
    lines: Sequence[str] = journal.read_text().split("\n") if journal.exists() else ()
    if not lines or lines[0] != fingerprint or not folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        journal.write_text(f"{fingerprint}\n")
        lines = ()
    return Unfinished(folder, frozenset(lines[1:-1]), journal)  # what follows the last line break is cut short


def sync_path(path: Path) -> None:
    """Wait until the disk has a file, or the names in a directory."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
