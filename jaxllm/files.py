"""Files of a checkpoint, which strangers may have made: those that are part of it, and how much of them is read."""

import os
import stat
from pathlib import Path

from jaxllm.errors import InputError

MOST_TEXT = 3 << 23  # bytes of a file that is parsed as a whole: JSON can need 40 times as many when it is read
MOST_TOKENIZER = 1 << 26  # of a tokenizer.json; Gemma's has 33 MB


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
