"""Clients that mean harm, all at the same time, and one that does not: it has to be answered, and nothing may be left.

    jaxllm serve --model demo --port 8000 &
    python tests/reference/serving_attacks.py --port 8000 --pid $! --seconds 120

Prints how often each attack was tried and what came of it, how long the good client waited, and the server's memory,
files and answers before and after. Exit code 1: the good client was not answered, or something was left.
"""

import argparse
import asyncio
import collections
import json
import random
import resource
import socket
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

import psutil
from serving_client import read

CHAT = "/v1/chat/completions"
PATIENT = 45  # seconds: longer than the server's own deadlines, after which all that was attempted has to be gone
GROWN = 200 << 20  # bytes that a server may keep: caches of programs and of the allocator


def head(path: str, *headers: str, method: str = "POST") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", "")).encode()


def post(body: object, path: str = CHAT) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(path, f"Content-Length: {len(data)}") + data


class Attacks:
    """Each coroutine is one attacker's turn; it returns a word for what came of it.

    Args:
        model: what clients call it.
        size: how many attackers of a kind, of those that only wait.
        longest: seconds for which those stay who never read.
    """

    def __init__(self, port: int, model: str, size: int, longest: float) -> None:
        self.port, self.model, self.size, self.longest = port, model, size, longest
        self.rng = random.Random(0)

    def body(self, **fields: object) -> dict[str, object]:
        messages = [{"role": "user", "content": "Say something."}]
        return {"model": self.model, "messages": messages, "max_tokens": 8} | fields

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        raw = socket.socket()
        raw.setblocking(False)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that who does not read holds much back
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", self.port))
        return await asyncio.open_connection(sock=raw, limit=4096)

    async def send(self, data: bytes, then: Callable[..., Awaitable[str]]) -> str:
        """What comes of `data`; the connection is closed afterwards."""
        try:
            reader, writer = await self.connect()
        except OSError:
            return "not connected"
        try:
            writer.write(data)
            return await asyncio.wait_for(then(reader, writer), PATIENT)
        except OSError:
            return "closed"
        except TimeoutError:
            return "LEFT ALONE"
        finally:
            writer.transport.abort()

    async def status(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        try:
            await writer.drain()
            line = await reader.readline()
        except ValueError:
            return "much"
        return line.split(b" ")[1].decode() if line.startswith(b"HTTP/1.1 ") else "closed"

    async def slowly(self, data: bytes) -> str:
        """A byte a second, until the server has enough of it."""

        async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
            answer = asyncio.ensure_future(self.status(reader, writer))
            while not answer.done():
                writer.write(b"x")
                await asyncio.wait((answer,), timeout=1)
            return answer.result()

        return await self.send(data, drip)

    async def slow_headers(self) -> str:
        return await self.slowly(head(CHAT)[:-2] + b"X-Much: ")

    async def slow_body(self) -> str:
        return await self.slowly(head(CHAT, "Content-Length: 50000"))

    async def slow_after_an_answer(self) -> str:
        return await self.slowly(head("/nothing", "Content-Length: 50000"))

    async def silent(self) -> str:
        return await self.send(b"", self.status)

    async def flood(self) -> str:
        """Very many at once."""
        requests = [self.send(post(self.body(max_tokens=50)), self.status) for _ in range(self.size * 5)]
        counts = collections.Counter(await asyncio.gather(*requests))
        await asyncio.sleep(self.longest / 5)
        return " ".join(sorted(counts))

    async def half_closed(self) -> str:
        async def then(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
            writer.write_eof()
            return await self.status(reader, writer)

        return await self.send(post(self.body(max_tokens=100, stream=True)), then)

    async def gone(self) -> str:
        async def then(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
            await asyncio.sleep(self.rng.random())
            return "left"

        data = post(self.body(max_tokens=100, stream=True))
        return await self.send(data[: self.rng.randrange(len(data))] if self.rng.random() < 0.5 else data, then)

    async def never_reading(self) -> str:
        async def then(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
            writer.transport.pause_reading()
            await asyncio.sleep(self.longest * self.rng.random())
            return "left"

        fields = self.body(max_tokens=400, logprobs=True, top_logprobs=20, stream=self.rng.random() < 0.8)
        return await self.send(post(fields), then)

    async def oversized(self) -> str:
        messages = [{"role": "user", "content": "a"}]
        schema = {"type": "object", "properties": {str(i): {"type": "string"} for i in range(2000)}}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        data = self.rng.choice(
            (
                head(CHAT, "X-Much: " + "x" * 2_000_000),
                head(CHAT, *(f"X-{i}: x" for i in range(50_000))),
                head("/" + "x" * 1_000_000, method="GET"),
                head(CHAT, "Content-Length: 99999999999999") + b"x" * 100_000,
                head(CHAT, "Content-Length: 99999999999999999999999999999999999999"),
                head(CHAT, "Transfer-Encoding: chunked") + b"ffffffffffffffffff\r\n" + b"x" * 100_000,
                head(CHAT, "Transfer-Encoding: chunked") + b"1\r\nx\r\n" * 100_000,
                post(b"[" * 80_000),
                post(b'{"model":' * 9_000),
                post(self.body(messages=messages * 100_000)),
                post(self.body(messages=messages * 2_000)),
                post(self.body(stop=["x" * 10] * 5_000)),
                post(self.body(logit_bias={str(i): 1 for i in range(250)})),
                post(self.body(logit_bias={str(10**40): 1})),
                post(self.body(tools=[tool])),
                post(self.body(response_format=form)),
                post(self.body(n=10**5)),
                post(self.body(max_tokens=10**30)),
                post({"model": self.model, "prompt": ["x"] * 10_000, "max_tokens": 10}, "/v1/completions"),
                post({"model": self.model, "input": "x" * 80_000}, "/v1/responses"),
            )
        )
        return await self.send(data, self.status)

    async def garbage(self) -> str:
        good = post(self.body(max_tokens=1))
        data = self.rng.choice(
            (
                self.rng.randbytes(5000),
                good + self.rng.randbytes(5000),
                good + good[:-1],
                head("/health", method="GET") * 1000,
                b"\r\n" * 50_000,
                b"GET / HTTP/9.9\r\n\r\n",
                head(CHAT, "Upgrade: websocket", "Connection: Upgrade"),
                head(CHAT, "Expect: 100-continue", "Content-Length: 10"),
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + self.rng.randbytes(500),
            )
        )
        return await self.send(data, self.status)

    def crowds(self) -> dict[str, tuple[Callable[[], Awaitable[str]], int]]:
        """The attacks, and how many at a time."""
        many, few = self.size, 4
        each = {f.__name__: (f, many) for f in (self.slow_headers, self.slow_body, self.slow_after_an_answer)}
        each |= {f.__name__: (f, few) for f in (self.half_closed, self.gone, self.never_reading, self.oversized)}
        return each | {"silent": (self.silent, many), "flood": (self.flood, 1), "garbage": (self.garbage, few)}


async def good(attacks: Attacks, end: float, waited: list[float], refused: collections.Counter[str]) -> None:
    """Asks again and again, and comes back a second later where there is no room, as OpenAI's clients do."""
    data = post(attacks.body(max_tokens=4))
    while time.monotonic() < end:
        begun = time.monotonic()
        while (got := await attacks.send(data, attacks.status)) != "200":
            if got == "404":
                sys.exit(f"the server has no model {attacks.model!r}: --model says its name")
            refused[got] += 1
            await asyncio.sleep(0.5)
        waited.append(time.monotonic() - begun)
        await asyncio.sleep(0.1)


async def live(port: int) -> float:
    lines = (await read(port, "/metrics")).splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("jaxllm_live "))


async def run(args: argparse.Namespace) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    attacks = Attacks(args.port, args.model, args.size, min(20, 4 * args.seconds))
    process = psutil.Process(args.pid)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    waited: list[float] = []
    refused: collections.Counter[str] = collections.Counter()
    await asyncio.gather(*(attacks.flood() for _ in range(2)))  # compiles what it needs
    await good(attacks, time.monotonic() + 2, alone := [], refused)
    refused.clear()
    before, files = process.memory_info().rss, process.num_fds()
    end = time.monotonic() + args.seconds

    async def crowd(name: str, attack: Callable[[], Awaitable[str]]) -> None:
        while time.monotonic() < end:
            counts[name][await attack()] += 1

    tasks = [crowd(name, attack) for name, (attack, many) in attacks.crowds().items() for _ in range(many)]
    peak = 0

    async def watch() -> None:
        nonlocal peak
        while time.monotonic() < end:
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0.5)

    attacking = asyncio.gather(watch(), *tasks)
    await good(attacks, end, waited, refused)
    await attacking
    for _ in range(PATIENT * 10):
        if process.num_fds() <= files and await live(args.port) == 0:
            break
        await asyncio.sleep(0.1)
    after, files_after, still = process.memory_info().rss, process.num_fds(), await live(args.port)
    for name, counted in sorted(counts.items()):
        print(f"{name}: {counted.total()} times, {', '.join(f'{what} {n}' for what, n in counted.most_common())}")
    cuts = statistics.quantiles(waited, n=20) if len(waited) > 1 else [float("inf")] * 19
    print(f"good client: {len(waited)} answers, p50 {cuts[9]:.2f} s, p95 {cuts[18]:.2f} s, longest {max(waited):.2f} s")
    print(f"  (alone: p50 {statistics.median(alone):.2f} s); not at once: {dict(refused)}")
    print(f"memory {before >> 20} MiB before, {peak >> 20} at most, {after >> 20} after; {still:.0f} answers left")
    print(f"open files {files} before, {files_after} after")
    lost = sum(counted["LEFT ALONE"] for counted in counts.values())
    return int(not waited or lost > 0 or files_after > files or still > 0 or after - before > GROWN)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--pid", type=int, required=True, help="of the server, whose memory and files are counted")
    p.add_argument("--model", default="demo")
    p.add_argument("--size", type=int, default=100, help="attackers of each kind of those that only wait (100)")
    p.add_argument("--seconds", type=float, default=120)
    sys.exit(asyncio.run(run(p.parse_args())))
