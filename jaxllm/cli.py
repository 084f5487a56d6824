"""What the command lines have in common: an error that the user can mend is one line on stderr and exit code 2."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from jaxllm.errors import InputError


class Parser(argparse.ArgumentParser):
    """A parser with `--debug`, whose complaints are `InputError`s."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(prog=f"python -m {module}", description=description)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> None:
        raise InputError(f"{message} (--help lists the options)")


def main(parser: Parser, run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn what goes wrong into an exit code."""
    argv = sys.argv[1:] if argv is None else argv
    warnings.showwarning = lambda message, *_: print("warning:", message, file=sys.stderr)
    try:
        run(parser.parse_args(argv))
    except InputError as error:
        if "--debug" in argv:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
