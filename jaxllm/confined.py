"""Work that a stranger's text asks for, done in another process, with limits to its time and memory.

Chat templates and regular expressions of a checkpoint can take for ever or fill memory, in one step that no check in
this process would interrupt: `10 ** 10 ** 9`, `'x' * 10 ** 10`, `(a|a)*b`. Alternatives were to look at every operation
of a template (there are filters, methods and operators without end), to trace its lines (which does not end a step),
and signals (which only the main thread gets). The process is started once, in a tenth of a second, and serves all. Who
will ask can `prepare` it, and does something else meanwhile.
"""

import atexit
import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Lock
from typing import Any

from jaxllm.confined_process import MEMORY, SECONDS
from jaxllm.errors import InputError

_PROGRAM = Path(__file__).with_name("confined_process.py")
_lock = Lock()
_running: dict[int, subprocess.Popen] = {}  # by the process that started it: a fork must not share it


def prepare() -> None:
    """Start the process, without waiting for it."""
    with _lock:
        _process()


def ask(work: str, **arguments: object) -> Any:
    """The result of one of `confined_process.WORK`.

    Args:
        arguments: what JSON can say.

    Raises:
        InputError: it failed, or needed too much; says why.
    """
    try:
        request = json.dumps({"work": work, **arguments}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"only what JSON can say can be given: {error}") from error
    with _lock:
        process = _process()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(request + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        except BaseException:  # such as KeyboardInterrupt: an answer that comes later would be taken for the next one
            _end()
            raise
        if not answer.endswith(b"\n"):
            _end()
            raise InputError(
                f"takes more than {SECONDS} seconds of computing, or more than {MEMORY >> 20} MiB of memory"
            )
    result, refusal = json.loads(answer)
    if refusal is not None:
        raise InputError(refusal)
    return result


def _process() -> subprocess.Popen:
    if (running := _running.get(os.getpid())) is not None:
        return running
    command, pipe = [sys.executable, "-P", str(_PROGRAM)], subprocess.PIPE
    process = _running[os.getpid()] = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
    return process


@atexit.register
def _end() -> None:
    if process := _running.pop(os.getpid(), None):
        process.kill()
        process.communicate()
