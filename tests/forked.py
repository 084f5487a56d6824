"""Processes that have imported jaxllm already, as each is forked from one that has: that takes Python two seconds, more
than what most tests want of a process. What belongs to a real start is tested with real ones.
"""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

from compiled import QUICK

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["jaxllm.convert", "jaxllm.generate", "jaxllm.finetune"])
cpu_seconds = 0.0  # of all so far: only of its own children the system tells a process


def _run(code, args, environment, spent, out, err):
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    import jax

    for name in QUICK:  # which JAX has read of the environment while it was imported
        if name.startswith("JAX_"):
            jax.config.update(name.lower(), bool(int(environment[name])))
    sys.argv = ["-c", *args]
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        Path(spent).write_text(str(sum(os.times()[:4])))  # with its own children's


class Forked:
    """A process of `python -c code *args` without input; it compiles quickly, unless `environment` says otherwise.

    Its stdout and stderr are files; the latter may be a terminal of the name `terminal`.
    """

    def __init__(self, code, *args, environment=None, terminal=None):
        self._folder = tempfile.TemporaryDirectory()
        self.args = [*map(str, args)]
        self._files = [Path(self._folder.name) / name for name in ("spent", "stdout", "stderr")]
        _, self.stdout, self.stderr = self._files
        self.stdout.touch(), self.stderr.touch()
        given = {**os.environ, **QUICK, **(environment or {})}
        paths = *map(str, self._files[:-1]), terminal or str(self.stderr)
        self._process = CONTEXT.Process(target=_run, args=(code, self.args, given, *paths))
        self._process.start()

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def finished(self, timeout=280):
        """Its exit code, stdout and stderr, as `subprocess.run` has them."""
        self._process.join(timeout)
        self._process.kill()  # where it hangs, it is not left behind
        self._process.join()
        spent, out, err = [file.read_text() if file.exists() else "" for file in self._files]
        self._folder.cleanup()
        global cpu_seconds
        cpu_seconds += float(spent or 0)
        return CompletedProcess(self.args, self._process.exitcode, out, err)
