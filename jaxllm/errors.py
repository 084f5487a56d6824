"""The exception for errors that a user can fix: a bad file, a bad argument, a missing package."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, and what to do.

    The command line prints it on stderr and exits with code 2; any other exception is a bug of ours.
    """


@contextmanager
def located(path: os.PathLike | str) -> Iterator[None]:
    """Adds the path to the message of an InputError raised inside, once; its class stays the same."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
