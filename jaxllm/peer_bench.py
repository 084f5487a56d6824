"""The speed of another inference engine on a GGUF file: one JSON object on stdout, and nothing else.

    python peer_bench.py {llama.cpp|mistral.rs} MODEL.gguf --prefill 512 --decode 64 --threads 2 --repeats 3

``--isq q8_0`` makes mistral.rs quantize the file's weights once more while it loads them, which it is faster with.

Run it with the interpreter of an environment that has the peer (``llama-cpp-python`` or ``mistralrs``);
it needs nothing else, not even jaxllm. Each run processes a prompt it has not seen before, then
generates greedily at batch 1, after the whole prompt and past any end-of-text token; the first run is a
warm-up, and the medians over the others are reported. Both peers get the same prompts.

Prefill ends when the peer holds the prompt's last logits. Decode is the ``--decode`` steps after it, each
of which takes in one token and picks the next, so the token that the prefill itself yields is not counted.
Exit code 2: the peer is not installed, or there is no such file (or the arguments are wrong).
"""

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

# Common enough that nearly every vocabulary holds each, with the space before it, as one token.
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were all her she there would their we him been has when who will no more if out so said what "
    "up its about into than them can only other time new some could these two may then do first any my now such "
    "like our over man me even most made after also did many before must through years where much your way well"
)


class Timing(NamedTuple):
    """What one run processed, and the seconds it took."""

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float


class Peer(NamedTuple):
    """A loaded model: how many tokens a text makes, and a run on that text as the prompt."""

    count: Callable[[str], int]
    measure: Callable[[str], Timing]


def fail(message: str) -> NoReturn:
    print(f"peer_bench: {message}", file=sys.stderr)
    raise SystemExit(2)


def load_llama_cpp(model: Path, prefill: int, decode: int, threads: int, isq: str | None) -> Peer:
    import llama_cpp

    llama = llama_cpp.Llama(
        str(model), n_ctx=prefill + decode + 8, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def tokenize(text: str) -> list[int]:
        return llama.tokenize(text.encode())

    def measure(text: str) -> Timing:
        tokens = tokenize(text)
        llama.reset()  # `eval` reuses nothing: it drops the cache past the position that this sets to zero
        start = time.perf_counter()
        llama.eval(tokens)
        llama_cpp.llama_synchronize(llama.ctx)
        middle = time.perf_counter()
        for _ in range(decode):
            llama.eval([llama.sample(temp=0)])
        llama_cpp.llama_synchronize(llama.ctx)
        return Timing(len(tokens), middle - start, decode, time.perf_counter() - middle)

    return Peer(lambda text: len(tokenize(text)), measure)


def load_mistral_rs(model: Path, prefill: int, decode: int, threads: int, isq: str | None) -> Peer:
    # Read once, by the native library: its two thread pools, its log, its model hub.
    os.environ["RAYON_NUM_THREADS"] = os.environ["CANDLE_NUM_THREADS"] = str(threads)
    os.environ.setdefault("RUST_LOG", "warn")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import mistralrs

    runner = mistralrs.Runner(
        which=mistralrs.Which.GGUF(
            quantized_model_id=str(model.parent), quantized_filename=model.name, tok_model_id=None
        ),
        in_situ_quant=isq,
        max_seqs=1,
        prefix_cache_n=0,
        token_source="none",
    )

    def measure(text: str) -> Timing:
        request = mistralrs.CompletionRequest(
            prompt=text, model="default", max_tokens=decode + 1, temperature=0.0, ignore_eos=True
        )
        start = time.perf_counter()
        usage = runner.send_completion_request(request).usage
        total = time.perf_counter() - start
        # The prompt is one timed step, but the reported completion time is a sum of steps each cut down to
        # whole milliseconds (and its rate counts the prefill's token): the clock gives the steps' real time.
        seconds = usage.total_prompt_time_sec
        if usage.prompt_tokens_details or usage.completion_tokens != decode + 1 or not 0 < seconds < total:
            raise RuntimeError(f"a run of {total:.3f} s that cannot be split into prefill and decode: {usage!r}")
        return Timing(usage.prompt_tokens, seconds, decode, total - seconds)

    return Peer(lambda text: len(runner.tokenize_text(text, True, None)), measure)


PEERS = {"llama.cpp": (load_llama_cpp, "llama-cpp-python"), "mistral.rs": (load_mistral_rs, "mistralrs")}


def make_prompt(length: int, rng: random.Random, count: Callable[[str], int]) -> str:
    """Random words that make `length` tokens, or the next lower number that whole words make."""
    vocabulary = WORDS.split()
    words = rng.choices(vocabulary, k=length)
    while (missing := length - count(" ".join(words))) > 0:
        words += rng.choices(vocabulary, k=missing)
    while len(words) > 1 and count(" ".join(words)) > length:
        words.pop()
    return " ".join(words)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure another inference engine on a GGUF file.")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--prefill", type=positive, default=512, help="tokens of the prompt")
    parser.add_argument("--decode", type=positive, default=64, help="tokens to generate after it")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--isq", metavar="TYPE", help="what mistral.rs quantizes weights to")
    parser.add_argument("--repeats", type=positive, default=3, help="measured runs, after one warm-up")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not arguments.model.is_file():
        fail(f"no such file: {arguments.model}")
    load, distribution = PEERS[arguments.peer]

    # Native code prints too: from here on, whatever goes to stdout ends up on stderr, but for the result.
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        version = importlib.metadata.version(distribution)
        peer = load(arguments.model.absolute(), arguments.prefill, arguments.decode, arguments.threads, arguments.isq)
    except ImportError as error:  # a distribution that importlib.metadata does not find is one, too
        fail(f"{arguments.peer} is not installed: {error}")

    rng = random.Random(0)
    runs = [peer.measure(make_prompt(arguments.prefill, rng, peer.count)) for _ in range(arguments.repeats + 1)][1:]
    report = {
        "peer": arguments.peer,
        "version": version,
        "prefill_tok_s": round(statistics.median(run.prefill_tokens / run.prefill_seconds for run in runs), 2),
        "decode_tok_s": round(statistics.median(run.decode_tokens / run.decode_seconds for run in runs), 2),
        "prefill_tokens": statistics.median_low(run.prefill_tokens for run in runs),
        "decode_tokens": statistics.median_low(run.decode_tokens for run in runs),
        "repeats": arguments.repeats,
    }
    with result:
        print(json.dumps(report), file=result)


if __name__ == "__main__":
    main()
