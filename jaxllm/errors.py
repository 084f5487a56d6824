"""The exception for errors that a user can fix: a bad file, a bad argument, a missing package."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 1500  # characters of a message


class InputError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, and what to do.

    The command line prints it on stderr and exits with code 2; any other exception is a bug of ours. It may quote what
    a stranger wrote: what is not printed as it is, such as codes that steer a terminal, is escaped; long texts are cut.
    """

    def __init__(self, message: object) -> None:
        text = str(message)
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


@contextmanager
def located(path: os.PathLike | str) -> Iterator[None]:
    """Adds the path to the message of an InputError raised inside, once; its class stays the same."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
