"""The command line: `jaxllm COMMAND ...`, also `python -m jaxllm` and `python -m jaxllm.COMMAND`.

An error that the user can fix is one line on stderr and exit code 2. Modules are imported when their command runs, so
that `jaxllm --help` need not wait for JAX.
"""

import argparse
import errno
import gc
import importlib
import importlib.metadata
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Never, TextIO

from jaxllm import sources
from jaxllm.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk is called

# Every command: the module with its `parser` and `run`, and what it does.
COMMANDS = {
    "generate": ("jaxllm.generate", "answer prompts, or talk with a model"),
    "serve": ("jaxllm.serve", "answer requests over HTTP, as OpenAI's API has them"),
    "convert": ("jaxllm.convert", "write a checkpoint in another type or another kind of file"),
    "calibrate": ("jaxllm.calibrate", "find out which inputs matter, for better low-bit types"),
    "finetune": ("jaxllm.finetune", "train a low-rank adapter on examples"),
    "perplexity": ("jaxllm.perplexity", "measure how well a model predicts a text"),
    "plan": ("jaxllm.plan", "say whether a model fits on other devices, and what bounds its speed there"),
    "bench": ("jaxllm.bench", "measure tokens per second"),
    "bench-kernels": ("jaxllm.kernels.bench", "measure the kernels, or ask the compilers about them"),
}


class Parser(argparse.ArgumentParser):
    """A parser with `--debug` that raises `InputError` for bad arguments."""

    def __init__(self, module: str, description: str) -> None:
        command = next((f"jaxllm {name}" for name, (m, _) in COMMANDS.items() if m == module), f"python -m {module}")
        super().__init__(prog=command, description=description)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> Never:
        raise InputError(f"{message} (--help lists the options)")


def add_quantizing(p: argparse.ArgumentParser) -> None:
    """The options of commands that quantize a model while they load it; `quantizing` reads them."""
    p.add_argument(
        "--quantize", metavar="TYPE", help="quantize matrices while loading, for example to q4_k, hqq4 or fp8, or to 4"
    )
    p.add_argument("--organization", metavar="NAME", help="which of them: default, or moqe (routed experts only)")
    p.add_argument("--topology", metavar="FILE", help="YAML with other types for some layers or matrices")
    p.add_argument("--imatrix", metavar="FILE", help="an importance matrix, see jaxllm calibrate")


def quantizing(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `load`."""
    return {name: getattr(args, name) for name in ("quantize", "organization", "topology", "imatrix")}


def add_matformer(p: argparse.ArgumentParser) -> None:
    """The option `--matformer`, a pair for `load`."""

    def pair(text: str) -> tuple[str, str]:
        file, _, name = text.rpartition(":")
        if not file or not name:
            raise argparse.ArgumentTypeError(f"'{text}' is not CSV:SLICE, a file and the name of a slice in it")
        return file, name

    p.add_argument(
        "--matformer", type=pair, metavar="CSV:SLICE", help="a smaller model inside a Gemma 3n, as a line of CSV has it"
    )


def add_adapters(p: argparse.ArgumentParser) -> None:
    """The option for adapters; `adapters` reads it."""
    p.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[=SCALE]",
        help="a low-rank adapter (LoRA): a directory of PEFT's or mlx-lm's, or a GGUF file; several are summed",
    )


def adapters(args: argparse.Namespace) -> tuple[str | tuple[str, float], ...]:
    """The argument for `load`. Raises InputError if a scale is not a number."""
    return tuple(map(_adapter, args.adapter))


def _adapter(text: str) -> str | tuple[str, float]:
    path, _, scale = text.rpartition("=")
    if not path or Path(text).exists():
        return text
    try:
        return path, float(scale)
    except ValueError as error:
        raise InputError(f"--adapter {text}: '{scale}' is not a number; write PATH=SCALE, such as tuned=0.5") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jaxllm COMMAND ...` and return the exit code."""
    ours = argv is None  # the process, which runs nothing else
    argv = sys.argv[1:] if argv is None else argv
    name, *rest = argv or ["--help"]

    def run() -> None:
        if name in ("-h", "--help"):
            print(_usage())
        elif name == "--version":
            print("jaxllm", importlib.metadata.version("jaxllm"))
        elif name in COMMANDS:
            if ours and sources.remembered() is None:
                sources.remember()
            gc.disable()  # nothing of what is imported is garbage, and looking for it takes a tenth of a second
            module = importlib.import_module(COMMANDS[name][0])
            _collect_again()
            module.run(module.parser().parse_args(rest))
        else:
            raise InputError(f"there is no command '{name}'; commands are {', '.join(COMMANDS)}")

    return _exit_code(run, "--debug" in rest)


def _usage() -> str:
    lines = [f"  {name:15}{help}" for name, (_, help) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jaxllm COMMAND [options]",
            "",
            "Real, quantized large language models in JAX, on any mesh of devices.",
            "",
            "commands:",
            *lines,
            "",
            "`jaxllm COMMAND --help` lists the options of a command; `jaxllm --version` prints the version.",
        ]
    )


def execute(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None
) -> int:
    """Parse the options of one command, run it, and turn errors into an exit code."""
    argv = sys.argv[1:] if argv is None else argv
    _collect_again()
    return _exit_code(lambda: run(parser.parse_args(argv)), "--debug" in argv)


def _collect_again() -> None:
    """From now on garbage is looked for, but not among what has been imported."""
    gc.freeze()
    gc.enable()


class Terminated(KeyboardInterrupt):
    """SIGTERM, in commands that end as they do at Ctrl-C."""

    @classmethod
    def by_signal(cls) -> None:
        """From now on SIGTERM raises this."""

        def end(number: int, frame: FrameType | None) -> Never:
            raise cls

        signal.signal(signal.SIGTERM, end)


def _exit_code(run: Callable[[], None], debug: bool) -> int:
    warnings.showwarning = lambda message, *_: print("warning:", message, file=sys.stderr)
    try:
        run()
        sys.stdout.flush()
    except InputError as error:
        if debug:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has closed it
        _forget(sys.stdout)
    except OSError as error:
        if error.errno not in FULL or debug:
            raise
        try:
            print("error: not written:", error, file=sys.stderr)
        except OSError:  # that is where errors go too
            _forget(sys.stderr)
        _forget(sys.stdout)
        return 2
    return 0


def _forget(file: TextIO) -> None:
    """What could not be written is not tried once more when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
