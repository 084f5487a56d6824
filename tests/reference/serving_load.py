"""Many streams at a time for minutes, some of which are left: no slot may be lost, and answers have to be as alone.

    jaxllm serve --model demo --dtype float32 --port 8000 --queue 64 &
    python tests/reference/serving_load.py --port 8000 --pid $! --streams 64 --seconds 120

Prints what was done, and the memory of the process every ten seconds. Exit code 1: a slot was lost, or answers differ.
"""

import argparse
import asyncio
import collections
import random
import sys
import time

import psutil
from serving_client import read, stream

TOPICS = "the sea, bread, a lighthouse, two brothers, the moon, a clock, rain, a market, chess, a fox, snow, trains"
REQUESTS = 24  # different ones; each is first answered alone


def request(model: str, i: int) -> dict:
    """Request i: prompts and answers of many lengths, half of them drawn."""
    rng = random.Random(i)
    topics = rng.choices(TOPICS.split(", "), k=rng.choice([1, 2, 8, 20]))
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": i} if i % 2 else {"temperature": 0}
    messages = [{"role": "user", "content": f"Tell me a story about {', '.join(topics)}."}]
    return {"model": model, "messages": messages, "max_tokens": rng.randint(1, 64), **sampling}


async def answer(port: int, body: dict, leave_after: int | None = None) -> str | None:
    """The text; None if we left before its end."""
    text, pieces = "", 0
    async for event in stream(port, body):
        choice = event["choices"][0]
        text += choice["delta"].get("content") or ""
        pieces += 1
        if choice["finish_reason"]:
            return text
        if pieces == leave_after:
            return None
    raise RuntimeError("a stream that has no end")


async def gauges(port: int) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in (await read(port, "/metrics")).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def run(args: argparse.Namespace) -> int:
    bodies = [request(args.model, i) for i in range(REQUESTS)]
    alone = [await answer(args.port, body) for body in bodies]
    print(f"{REQUESTS} requests alone, {sum(map(len, alone))} characters")
    counts: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + args.seconds
    process = psutil.Process(args.pid)

    async def client(number: int) -> None:
        rng = random.Random(1000 + number)
        while time.monotonic() < end:
            i = rng.randrange(REQUESTS)
            leave_after = rng.randint(1, 20) if rng.random() < 0.3 else None
            got = await answer(args.port, bodies[i], leave_after)
            counts["left" if got is None else "equal" if got == alone[i] else "different"] += 1
            if got is not None and got != alone[i]:
                print(f"request {i} differs:\n  {alone[i]!r}\n  {got!r}", file=sys.stderr)

    async def state() -> str:
        now = await gauges(args.port)
        return f"{now['jaxllm_live']:.0f} live, {now['jaxllm_running']:.0f} running, {dict(counts)}"

    async def watch() -> None:
        while time.monotonic() < end:
            memory, files = process.memory_info().rss / 2**20, process.num_fds()
            print(f"{end - time.monotonic():5.0f} s to go, {memory:7.1f} MiB, {files} files", flush=True, end=", ")
            print(await state(), flush=True)
            await asyncio.sleep(10)

    await asyncio.gather(watch(), *(client(number) for number in range(args.streams)))
    for _ in range(100):  # those who were left are noticed at once, but not within no time
        now = await gauges(args.port)
        if now["jaxllm_live"] == now["jaxllm_running"] == 0:
            break
        await asyncio.sleep(0.1)
    print("at the end", await state())
    return int(bool(counts["different"] or now["jaxllm_live"] or now["jaxllm_running"]))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--pid", type=int, required=True, help="of the server, whose memory is read")
    p.add_argument("--model", default="demo")
    p.add_argument("--streams", type=int, default=64)
    p.add_argument("--seconds", type=float, default=120)
    sys.exit(asyncio.run(run(p.parse_args())))
