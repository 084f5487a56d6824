"""Tokens per second, and time to the first token, of servers with many requests at a time: one line of JSON.

    python serving_speed.py http --port 8000 --model demo --requests 32     # a server that runs
    python serving_speed.py mistral.rs --model FILE.gguf --requests 32      # in this process: PyPI has no server of it

All requests come at once and are greedy chats; each engine gets the same texts. A first round warms up.
llama.cpp's server is
`python -m llama_cpp.server --model FILE.gguf --n_ctx 2048 --interrupt_requests False --port 8001`.
"""

import argparse
import asyncio
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

from serving_client import stream

TOPICS = "the sea, bread, a lighthouse, two brothers, the moon, a clock, rain, a market, chess, a fox, snow, trains"
Timing = tuple[float, int]  # seconds until the first token, and how many tokens came


def prompt(i: int) -> str:
    topics = TOPICS.split(", ")
    chosen = ", ".join(topics[(i * 5 + j * 7 + i // 12) % 12] for j in range(3 + i % 5))
    return f"Story number {i}. Write a very long story about these things, with many details: {chosen}."


async def over_http(port: int, model: str, i: int, tokens: int) -> Timing:
    begun, first, count, usage = time.perf_counter(), 0.0, 0, None
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt(i)}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    async for event in stream(port, body | {"stream_options": {"include_usage": True}}):
        usage = event.get("usage") or usage
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            first = first or time.perf_counter() - begun
            count += 1
    return first, usage["completion_tokens"] if usage else count


def http(args: argparse.Namespace) -> Callable[[int], list[Timing]]:
    async def together(start: int) -> list[Timing]:
        numbers = range(start, start + args.requests)
        return await asyncio.gather(*(over_http(args.port, args.model, i, args.tokens) for i in numbers))

    return lambda start: asyncio.run(together(start))


def mistral_rs(args: argparse.Namespace) -> Callable[[int], list[Timing]]:
    os.environ["RAYON_NUM_THREADS"] = os.environ["CANDLE_NUM_THREADS"] = str(os.cpu_count())
    os.environ.setdefault("RUST_LOG", "warn")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import mistralrs

    file = Path(args.model).absolute()
    which = mistralrs.Which.GGUF(quantized_model_id=str(file.parent), quantized_filename=file.name, tok_model_id=None)
    runner = mistralrs.Runner(
        which=which, in_situ_quant=args.isq, max_seqs=args.requests, prefix_cache_n=0, token_source="none"
    )

    submitting = threading.Lock()  # one thread at a time may call the runner; what it gives can be read by all

    def one(i: int, into: list[Timing]) -> None:
        begun, first, count = time.perf_counter(), 0.0, 0
        messages = [{"role": "user", "content": prompt(i)}]
        request = mistralrs.ChatCompletionRequest(
            model="default", messages=messages, max_tokens=args.tokens, temperature=0.0, stream=True
        )
        with submitting:
            chunks = runner.send_chat_completion_request(request)
        for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - begun
                count += 1
        into.append((first, count))

    def together(start: int) -> list[Timing]:
        timings: list[Timing] = []
        threads = [threading.Thread(target=one, args=(i, timings)) for i in range(start, start + args.requests)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return timings

    return together


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("engine", choices=("http", "mistral.rs"))
    p.add_argument("--model", default="demo")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--requests", type=int, default=8)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--isq", metavar="TYPE", help="what mistral.rs quantizes weights to")
    args = p.parse_args()
    together = (http if args.engine == "http" else mistral_rs)(args)
    rates, firsts = [], []
    for round in range(args.rounds + 1):
        begun = time.perf_counter()
        timings = together(round * args.requests)
        seconds = time.perf_counter() - begun
        if round:
            rates.append(sum(count for _, count in timings) / seconds)
            firsts += [first for first, _ in timings]
    firsts.sort()
    result = {
        "requests": args.requests,
        "tok_s": round_to(statistics.median(rates)),
        "first_p50_s": round_to(statistics.median(firsts)),
        "first_p95_s": round_to(firsts[int(0.95 * (len(firsts) - 1))]),
        "rates": [round_to(rate) for rate in rates],
    }
    print(json.dumps(result))


def round_to(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
