"""Several processes that run one model: how they meet, what they tell one another, and how they notice a loss.

JAX's own runtime connects the devices. Beside it, every process keeps a TCP connection to process 0, over which it is
agreed that all run the same thing, prompts are handed on, and the end of a process is noticed at once, by the end of
its connection (JAX notices after a minute or two, and then kills the others with a stack trace).

What is sent is JSON, a line a message. Whoever can reach the port of process 0 while the others gather can take the
place of one of them: it is meant for networks of one's own, as JAX's runtime is.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.errors import InputError

AUTO = "auto"
GRACE = 10.0  # seconds in which the end of a process is noticed after computations with it have failed
LONGEST = 2**26  # bytes of a message


def wait_seconds() -> float:
    """How long processes wait for one another at the start: JAXLLM_WAIT, or a minute."""
    return float(os.environ.get("JAXLLM_WAIT", "60"))


@dataclass(frozen=True)
class Launch:
    """Where processes meet (host and port), how many there are, and which this one is."""

    host: str
    port: int
    count: int
    index: int


def add_processes(p: argparse.ArgumentParser) -> None:
    """The options of commands that several processes run together; `joined` reads them."""
    p.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="run with other processes, which meet here; 'auto' asks Slurm, MPI, Kubernetes or a TPU pod (torchrun's "
        "variables are read without this)",
    )
    p.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    p.add_argument("--process-id", type=int, metavar="I", help="which of them this is; 0 reads prompts and prints")


def launch(coordinator: str | None, count: int | None, index: int | None, env: Mapping[str, str]) -> Launch | None:
    """How this process was started, from the options or from torchrun's variables; None: alone.

    Raises:
        InputError: something is missing or impossible.
    """
    if coordinator is None and count is None and index is None and env.get("WORLD_SIZE", "1") != "1":
        names = "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"
        if lacking := [name for name in names if name not in env]:
            raise InputError(f"WORLD_SIZE is set, but not {', '.join(lacking)}: start with torchrun, or --coordinator")
        # Under torchrun itself, its own store has that port.
        port = _integer(env["MASTER_PORT"], "MASTER_PORT") + (env.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
        count, index = (_integer(env[name], name) for name in names[2:])
        coordinator = f"{env['MASTER_ADDR']}:{port}"
    if coordinator is None and count is None and index is None:
        return None
    if coordinator is None or count is None or index is None:
        raise InputError("--coordinator HOST:PORT, --num-processes and --process-id belong together")
    host, _, port_text = coordinator.rpartition(":")
    port = _integer(port_text, "the port of --coordinator")
    if not host or not 0 < port < 65535:
        raise InputError(f"--coordinator {coordinator}: expected HOST:PORT, such as 10.0.0.1:8476")
    if not 0 <= index < count:
        raise InputError(f"process {index} of {count}: they are numbered from 0")
    return None if count == 1 else Launch(host, port, count, index)


def _integer(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{what} is {text!r}, not a number") from error


class Disagreement(InputError):
    """Processes were started differently, and every one of them knows it."""


class Group:
    """The processes that run a model together; by default this process alone.

    Attributes:
        index: which of them this is.
        count: how many there are.
    """

    index, count = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that reads prompts and prints."""
        return self.index == 0

    def tell(self, message: Mapping[str, Any]) -> None:
        """From process 0 to all others."""

    def told(self) -> dict[str, Any]:
        """The next message of process 0, in another one."""
        raise AssertionError("alone")

    def agree(self, what: str, mine: Mapping[str, Any]) -> None:
        """Compare what every process has.

        Raises:
            Disagreement: somewhere a value is different; names the process, and the first such value.
        """

    def leave(self, failure: str | None = None) -> None:
        """Tell the others that this process ends, and why if it is an error."""


class _Line:
    """A connection over which messages go both ways."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lines, self._sending = connection, connection.makefile("rb"), threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Does nothing if the connection has ended, which who receives notices."""
        with suppress(OSError), self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None if the connection has ended.

        Raises:
            OSError: nothing came in time.
            ValueError: what came is not a message.
        """
        line = self._lines.readline(LONGEST)
        message = json.loads(line) if line else None
        if not isinstance(message, dict | None):
            raise ValueError("not a message")
        return message

    def settle(self) -> None:
        """From now on wait without a limit; but let the connection end half a minute after the other machine has."""
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):  # not everywhere
                self._connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Connected(Group):
    """Several processes: 0 has a line to each of the others, and these have one to 0."""

    def __init__(self, index: int, count: int, lines: Mapping[int, _Line]) -> None:
        self.index, self.count, self._lines = index, count, lines
        self._ending, self._leaves = threading.Lock(), False
        self._inboxes: dict[int, queue.Queue[dict[str, Any]]] = {i: queue.Queue() for i in lines}
        for i, line in lines.items():
            line.settle()
            threading.Thread(target=self._listen, args=(i, line), daemon=True).start()

    def _listen(self, index: int, line: _Line) -> None:
        """Take what another process sends. If it just ends, so does this one: computations would wait for ever."""
        while True:
            try:
                message = line.receive()
            except (OSError, ValueError):
                message = None
            if self._leaves:
                return
            if message is None:
                self._end(index, "ended without a word; what it printed last may say why")
            elif "lost" in message:
                self._end(message["lost"], message["why"])
            elif "leaves" in message:
                if message["leaves"] is not None:
                    self._end(index, message["leaves"])
                return
            else:
                self._inboxes[index].put(message)

    def _end(self, index: int, why: str) -> Never:
        with self._ending:
            if self.leads:
                self.tell({"lost": index, "why": why})
            sys.stdout.flush()
            print(f"error: process {index}: {' '.join(why.split())}", file=sys.stderr, flush=True)
            os._exit(2)

    def tell(self, message: Mapping[str, Any]) -> None:
        for line in self._lines.values():
            line.send(message)

    def told(self) -> dict[str, Any]:
        return self._inboxes[0].get()

    def agree(self, what: str, mine: Mapping[str, Any]) -> None:
        if not self.leads:
            self.tell({"mine": dict(mine)})
            complaint = self.told()["complaint"]
        else:
            ours, complaints = json.loads(json.dumps(mine)), []
            for index, inbox in self._inboxes.items():
                theirs = inbox.get()["mine"]
                for key in {**ours, **theirs}:
                    if theirs.get(key) != ours.get(key):
                        complaints.append(
                            f"process {index} has {what} {key} {theirs.get(key)}, process 0 has {ours.get(key)}"
                        )
            complaint = complaints[0] if complaints else None
            self.tell({"complaint": complaint})
        if complaint is not None:
            raise Disagreement(complaint)

    def leave(self, failure: str | None = None) -> None:
        self._leaves = True
        self.tell({"leaves": failure})


def join(where: Launch, computes: bool = True) -> Group:
    """Meet the other processes and connect JAX's runtimes. Must run before JAX looks for devices.

    Args:
        computes: whether they compute together; if not, JAX knows nothing of the others.

    Raises:
        InputError: the others did not come, or were started differently.
    """
    group = _meet(where, time.monotonic() + wait_seconds())
    if not computes:
        return group
    if group.leads:
        with socket.create_server((where.host, 0)) as free:
            address = f"{where.host}:{free.getsockname()[1]}"
        group.tell({"jax": address})
    else:
        address = group.told()["jax"]
    local = os.environ.get("LOCAL_RANK")  # torchrun's: one accelerator for each process
    jax.distributed.initialize(
        address,
        where.count,
        where.index,
        local_device_ids=None if local is None else [int(local)],
        initialization_timeout=int(wait_seconds()),
    )
    return group


def join_cluster() -> Group:
    """Like `join`, where JAX finds the other processes by itself: under Slurm, MPI or Kubernetes, on TPU pods.

    Raises:
        InputError: JAX finds none.
    """
    try:
        jax.distributed.initialize(initialization_timeout=int(wait_seconds()))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--coordinator auto: JAX found no cluster: {error}") from error
    if jax.process_count() == 1:
        return Group()
    address = np.zeros(256, np.uint8)
    with socket.create_server(("", 0)) as free:
        written = f"{_own_address()}:{free.getsockname()[1]}".encode()
    address[: len(written)] = np.frombuffer(written, np.uint8)
    host, _, port = bytes(multihost_utils.broadcast_one_to_all(address)).rstrip(b"\0").decode().rpartition(":")
    where = Launch(host, int(port), jax.process_count(), jax.process_index())
    return _meet(where, time.monotonic() + wait_seconds())


def _own_address() -> str:
    """This machine's address as other machines see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: only the route is looked up
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _meet(where: Launch, deadline: float) -> Group:
    """All processes, connected, and of the same versions."""
    lines = _gathered(where, deadline) if where.index == 0 else {0: _reached(where, deadline)}
    group = _Connected(where.index, where.count, lines)
    group.agree("the version of", {name: importlib.metadata.version(name) for name in ("jaxllm", "jax", "jaxlib")})
    return group


def _gathered(where: Launch, deadline: float) -> dict[int, _Line]:
    """Process 0: a line to each of the others."""
    found: dict[int, _Line] = {}
    at = f"{where.host}:{where.port}"
    try:
        server = socket.create_server((where.host, where.port))
    except OSError as error:
        raise InputError(f"{at}: process 0 cannot listen there: {error.strerror or error}") from error
    problem = None
    with server:
        while problem is None and len(found) < where.count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, where.count) if i not in found)
                problem = f"in {wait_seconds():.0f} s no process {missing} of {where.count} came to {at}"
                break
            connection.settimeout(5.0)
            line = _Line(connection)
            try:
                hello = line.receive() or {}
                index, count = int(hello["index"]), int(hello["count"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not one of ours
            if count != where.count:
                problem = f"process {index} was told of {count} processes, process 0 of {where.count}"
            elif index in found or not 0 < index < where.count:
                problem = f"two processes say that they are number {index}"
            found[index if problem is None else -1] = line
    for line in found.values():
        line.send({"problem": problem})
    if problem is not None:
        raise InputError(problem)
    return found


def _reached(where: Launch, deadline: float) -> _Line:
    """Another process: the line to process 0, which may not listen yet."""
    at = f"{where.host}:{where.port}"
    while True:
        left = deadline - time.monotonic()
        try:
            connection = socket.create_connection((where.host, where.port), timeout=max(left, 0.001))
            if connection.getsockname() == connection.getpeername():  # a port that nobody listens on can meet itself
                connection.close()
                raise ConnectionRefusedError("connection refused")
            break
        except OSError as error:
            if left < 0.2:
                reason = f"{at}: in {wait_seconds():.0f} s process 0 was not to be reached: {error.strerror or error}"
                raise InputError(reason) from error
            time.sleep(0.2)
    line = _Line(connection)
    line.send({"index": where.index, "count": where.count})
    connection.settimeout(wait_seconds() + 5)  # process 0 says why it gives up
    try:
        answer = line.receive() or {"problem": "process 0 ended while the others came"}
    except (OSError, ValueError) as error:
        raise InputError(f"{at}: what listens there is not process 0") from error
    if answer.get("problem") is not None:
        raise InputError(str(answer["problem"]))
    return line


@contextmanager
def joined(args: argparse.Namespace, computes: bool = True) -> Iterator[Group]:
    """The group of the processes that run this command, from its options; see `join`.

    If one of them fails, all end: the others with one line that says which one and why.
    """
    found = args.coordinator == AUTO
    where = None if found else launch(args.coordinator, args.num_processes, args.process_id, os.environ)
    if found or where is not None:
        _only_python_prints()
    group = join_cluster() if found else Group() if where is None else join(where, computes)
    try:
        yield group
    except BaseException as error:
        if group.count == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(GRACE)  # computations fail when another process ends; then the line to it has ended too
        group.leave(None if isinstance(error, Disagreement) else f"{error}" or type(error).__name__)
        _end_at_once(error)
    group.leave()
    if group.count > 1 and (found or computes):
        jax.distributed.shutdown()  # waits for all


def _end_at_once(error: BaseException) -> Never:
    """End this process as the command line would; but JAX would wait for the others while Python exits."""
    if isinstance(error, InputError):
        print("error:", " ".join(str(error).split()), file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, InputError) else 130 if isinstance(error, KeyboardInterrupt) else 1)


def _only_python_prints() -> None:
    """Keep what libraries in C++ print (gloo does, on CPUs) out of stdout, where answers go."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 1)


def fingerprint(path: Path) -> dict[str, str]:
    """The files of a checkpoint by name: their sizes, and a hash of how they begin, where headers are."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    found = {}
    for file in files:
        with file.open("rb") as opened:
            found[file.name] = f"{file.stat().st_size} bytes ({hashlib.sha256(opened.read(2**16)).hexdigest()[:12]})"
    return found
