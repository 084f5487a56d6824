"""How processes meet, what they tell one another, and how they notice that one has ended.

Every process has a TCP connection to process 0, over which it is agreed that all run the same thing, and prompts are
handed on. The end of a process is noticed at once, by the end of its connection. (JAX notices after a minute or two,
and then kills the others with a stack trace.)

What is sent is JSON, a line a message. Whoever can reach the port of process 0 while the others gather can take the
place of one of them: it is meant for networks of one's own, as JAX's runtime is.
"""

import importlib.metadata
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Never

from jaxllm.errors import InputError

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
        """Send a message from process 0 to all others."""

    def told(self) -> dict[str, Any]:
        """The next message of process 0, in another one."""
        raise AssertionError("alone")

    def agree(self, what: str, mine: Mapping[str, Any]) -> None:
        """Compare what every process has.

        Args:
            what: the name of it all, for messages.
            mine: what this process has, by name.

        Raises:
            Disagreement: somewhere a value is different; names the process, and the first such value.
        """

    def leave(self, failure: str | None = None) -> None:
        """Tell the others that this process ends, and its `failure` if it is an error."""


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


def meet(where: Launch, deadline: float) -> Group:
    """All processes, connected, and of the same versions."""
    lines = _gathered(where, deadline) if where.index == 0 else {0: _reached(where, deadline)}
    group = _Connected(where.index, where.count, lines)
    try:
        group.agree("the version of", {name: importlib.metadata.version(name) for name in ("jaxllm", "jax", "jaxlib")})
    except Disagreement:
        group.leave()  # or those that end later would say that this one is lost
        raise
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
