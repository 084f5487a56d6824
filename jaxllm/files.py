"""Files of a checkpoint, which strangers may have made: those that are part of it, how much of them is read, and how.

Weights are read, not mapped: who touches a mapped page of a file that was cut meanwhile dies of SIGBUS.
"""

import os
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from jaxllm.errors import InputError

MOST_TEXT = 3 << 23  # bytes of a file that is parsed as a whole: JSON can need 40 times as many when it is read
MOST_TOKENIZER = 1 << 26  # of a tokenizer.json; Gemma's has 33 MB
PIECE = 1 << 22  # bytes that are read at once: a slow disk may take a second for them
_thread = threading.local()


def part_of(file: Path) -> Path:
    """The same path, if it may be opened as a part of the checkpoint in its folder.

    A link has to stay in the folder, or lead to the `blobs` of the hub's cache, from whose `snapshots` it is. Elsewhere
    are files that a checkpoint has no business with, and that would get into what is written of it.

    Raises:
        InputError: a link leads elsewhere, or this is no file but a device, or a pipe that would be waited for.
    """
    folder, real = Path(os.path.realpath(file.parent)), Path(os.path.realpath(file))
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not (real.is_relative_to(folder) or real.is_relative_to(blobs)):
        raise InputError(f"{file}: a link to {real}, outside of the checkpoint: put the file itself there")
    if file.exists() and not stat.S_ISREG(mode := file.stat().st_mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{file}: a pipe or a device, not a file")
    return file


def read_small(file: Path, most: int = MOST_TEXT) -> bytes:
    """The content of a file that is part of a checkpoint and is parsed as a whole.

    Raises:
        InputError: it cannot be read, is larger than `most`, or is no part, see `part_of`.
    """
    try:
        with part_of(file).open("rb") as opened:
            content = opened.read(most + 1)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    if len(content) > most:
        raise InputError(f"{file}: larger than {most >> 20} MiB, which no such file is")
    return content


class Stamp(NamedTuple):
    """The size of a file and when it was written (ns), by which a later read sees that it is still the same."""

    size: int
    written: int

    @classmethod
    def of(cls, opened: BinaryIO) -> "Stamp":
        found = os.fstat(opened.fileno())
        return cls(found.st_size, found.st_mtime_ns)


def read_runs(file: Path, runs: Iterable[tuple[int, memoryview]], stamp: Stamp | None = None) -> None:
    """Fill each buffer with the bytes of a file from an offset on.

    Raises:
        InputError: the file is gone, cut, or not what it was at `stamp`; or `give_up_reading` said so.
    """
    try:
        with file.open("rb", buffering=0) as opened:
            _check(file, opened, stamp)
            for offset, buffer in runs:
                opened.seek(offset)
                while buffer:
                    if (given_up := getattr(_thread, "given_up", None)) is not None and given_up.is_set():
                        raise InputError(f"{file}: reading was given up")
                    if not (count := opened.readinto(buffer[:PIECE])):
                        raise InputError(f"{file}: was cut short while it was read")
                    buffer = buffer[count:]
            _check(file, opened, stamp)
    except OSError as error:
        raise InputError(f"{file}: not read: {error.strerror}") from error


def _check(file: Path, opened: BinaryIO, stamp: Stamp | None) -> None:
    if stamp is not None and Stamp.of(opened) != stamp:
        raise InputError(f"{file}: was changed or cut short while it was read")


def give_up_reading(when: threading.Event) -> None:
    """From now on, what this thread reads ends with an error as soon as the event is set."""
    _thread.given_up = when
