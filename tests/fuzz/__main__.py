"""Damages inputs by machine and looks what comes of them: an answer or an error of one line, and nothing else.

python -m fuzz --seconds 600               # with new seeds; failures are listed, the exit code is then 1
python -m fuzz --seed 7 --number 1234      # one input again; it stays in the folder .fuzz
python -m fuzz --seconds 600 --table docs/hostile_files.md
"""

import argparse
import itertools
import multiprocessing
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

import psutil

from fuzz import seeds, trial
from fuzz.trial import Outcome

STUCK = trial.SECONDS + 2  # CPU seconds after which a worker is ended
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where folders are made and removed quickly
MARK = "<!-- what follows is written by make fuzz -->\n"


class Worker:
    """A process that tries one input at a time."""

    def __init__(self, made: dict, root: Path, seed: str) -> None:
        self.start = made, root, seed
        self.begin()

    def begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=trial.work, args=(theirs, *self.start), daemon=True)
        self.process.start()
        theirs.close()
        self.number, self.doing = None, ("", "")

    def give(self, number: int) -> None:
        self.number, self.doing, self.begun = number, ("", ""), None
        self.connection.send(number)

    def seconds(self) -> float:
        """CPU time of the process and of those that it started."""
        try:
            process = psutil.Process(self.process.pid)
            times = [each.cpu_times() for each in (process, *process.children())]
        except psutil.NoSuchProcess:
            return 0.0
        return sum(each.user + each.system for each in times)

    def result(self) -> Outcome | None:
        """The outcome, if there is one: also if the process died of its input, or had to be ended."""
        try:
            while self.connection.poll():
                got = self.connection.recv()
                if isinstance(got, Outcome):
                    return got
                self.doing = got
        except (EOFError, ConnectionError):
            self.process.join()
            return self._lost(f"the process died ({self.process.exitcode})")
        if self.doing[0] and self.begun is None:
            self.begun = self.seconds()  # only now: most inputs take less time than to ask for it
        elif self.doing[0] and self.seconds() - self.begun > STUCK:
            for process in (*psutil.Process(self.process.pid).children(), self.process):
                process.kill()
            self.process.join()
            return self._lost(f"no end after {STUCK} seconds")
        return None

    def _lost(self, says: str) -> Outcome:
        if not self.doing[0]:
            sys.exit(f"input {self.number} was not made: {says}")
        lost = Outcome(self.doing[0], self.number, self.doing[1], "failed", says)
        self.begin()
        return lost


def outcomes(seed: str, seconds: float, jobs: int, root: Path) -> Iterator[Outcome]:
    """Outcomes of inputs, as long as the time allows from the first one on; each that is begun has an outcome."""
    made, numbers = seeds.make(root / "seeds"), itertools.count()
    workers = [Worker(made, root, seed) for _ in range(jobs)]
    for worker in workers:
        worker.give(next(numbers))
    end, busy = float("inf"), list(workers)
    while busy:
        wait([worker.connection for worker in busy], timeout=1)
        for worker in list(busy):
            if (found := worker.result()) is not None:
                end = min(end, time.monotonic() + seconds)
                yield found
                if time.monotonic() < end:
                    worker.give(next(numbers))
                else:
                    busy.remove(worker)
    for worker in workers:
        worker.connection.send(None)
        worker.process.join()


def table(found: list[Outcome]) -> str:
    lines = ["| kind of file | inputs | refused | answered | failed | slowest (s of CPU) | most memory (MiB) |"]
    lines.append("|---|---|---|---|---|---|---|")
    kinds = sorted({each.kind for each in found})
    for kind in [*kinds, "all"]:
        of = [each for each in found if kind in (each.kind, "all")]
        counts = [sum(each.came == came for each in of) for came in ("refused", "answered", "failed")]
        most = max(each.seconds for each in of), max(each.memory for each in of) >> 20
        lines.append(f"| {kind} | {len(of)} | {' | '.join(map(str, counts))} | {most[0]:.1f} | {most[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="when to end (default: 60)")
    parser.add_argument("--seed", default=secrets.token_hex(4), help="of the damage; by default a new one")
    parser.add_argument("--number", type=int, help="make and try only the input of this number")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--table", type=Path, help="a file whose end is replaced by the table of outcomes")
    options = parser.parse_args()
    if options.table is not None and not options.table.exists():
        parser.error(f"--table {options.table}: no such file")
    print(f"seed {options.seed}", flush=True)
    if options.number is not None:
        again(options.seed, options.number)
        return
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell that started this ignores the first
        signal.signal(number, signal.default_int_handler)
    found: list[Outcome] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as root, suppress(KeyboardInterrupt):
        for each in outcomes(options.seed, options.seconds, options.jobs, Path(root)):
            found.append(each)
            if each.came == "failed":
                print(f"FAILED {each.number} ({each.kind}) {each.what}: {each.says}", flush=True)
            if len(found) % 1000 == 0:
                print(f"{len(found)} inputs", flush=True)
    seconds = time.monotonic() - begun
    print(table(found))
    if options.table:
        kept = options.table.read_text().partition(MARK)[0]
        options.table.write_text(f"{kept}{MARK}\nSeed {options.seed}, {seconds:.0f} seconds.\n\n{table(found)}\n")
    sys.exit(any(each.came == "failed" for each in found))


def again(seed: str, number: int) -> None:
    place = Path(".fuzz").resolve()
    shutil.rmtree(place, ignore_errors=True)
    made = seeds.make(place / "seeds")
    kind, what, chosen, load = trial.put(made, place, seed, number)
    print(f"{kind}: {what}{' (loaded)' if load else ''}")
    trial.TRIALS[chosen.kind](place / "input" / chosen.name, chosen, load)


if __name__ == "__main__":
    main()
