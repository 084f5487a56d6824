"""Very many conversations of any length and settings in one process: memory, mappings and files stay as they are.

    python tests/reference/soak.py                                   # 2,000 with a tiny model of random weights
    python tests/reference/soak.py --model demo --conversations 100

Prints twenty times what the process has. Exit code 1: after the first hundred (of few, the first quarter) memory or
mappings grew by more than 5 %, or a file was left open. Prompts of every size come first, so that what grows later is
not their programs.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

import jaxllm
from jaxllm.engine.memory import Memory
from jaxllm.errors import InputError
from jaxllm.language_model import LanguageModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_chat import write_chat

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
WORDS = ["the", "sea", "bread", "lighthouse", "brothers", "moon", "clock", "rain", "market", "chess", "fox", "snow"]


def settings(rng: random.Random, seed: int) -> dict:
    """What one answer is asked for with."""
    options: dict = {"seed": seed, "temperature": rng.choice([0, 0.7, 1.3])}
    more: list[tuple[str, Callable[[], object]]] = [
        ("top_k", lambda: rng.randint(1, 50)),
        ("top_p", lambda: rng.uniform(0.1, 1)),
        ("repetition_penalty", lambda: rng.uniform(1, 1.3)),
        ("frequency_penalty", lambda: rng.uniform(-1, 1)),
        ("logprobs", lambda: rng.randint(0, 5)),
        ("logit_bias", lambda: {rng.randrange(200): rng.uniform(-5, 5) for _ in range(rng.randint(1, 20))}),
        ("stop", lambda: rng.choices(WORDS, k=rng.randint(1, 4))),
        ("schema", lambda: SCHEMA),
    ]
    return options | {name: value() for name, value in more if rng.random() < 0.15}


def converse(model: LanguageModel, rng: random.Random, number: int) -> int:
    """A conversation of some turns; how many tokens were answered. One in ten is left in the middle of an answer."""
    memory, messages, tokens = Memory(), [], 0
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": " ".join(rng.choices(WORDS, k=1 + int(rng.expovariate(0.1))))})
        leaves, pieces = rng.random() < 0.1, []
        try:
            for piece in model.stream(messages, rng.randint(1, 32), memory=memory, **settings(rng, number)):
                pieces.append(piece)
                if leaves:
                    break
        except InputError:  # longer than the context
            break
        tokens += len(pieces)
        messages.append({"role": "assistant", "content": "".join(pieces)})
    return tokens


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", help="by default a tiny one")
    p.add_argument("--conversations", type=int, default=2000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or write_chat(Path(folder) / "tiny.gguf", 512)
        model = jaxllm.load(path, progress=False, dtype="float32", max_seq_len=512)
    for length in (10, 20, 40, 80, 160, 320):
        model.generate([1] * length, 2, eos_ids=())
    rng, process, seen, tokens = random.Random(args.seed), psutil.Process(), {}, 0
    every = max(1, args.conversations // 20)
    for number in range(1, args.conversations + 1):
        tokens += converse(model, rng, number)
        if number % every == 0:
            memory, maps = process.memory_info().rss, len(Path("/proc/self/maps").read_text().splitlines())
            seen[number] = memory, maps, (files := process.num_fds())
            compiled = f"{len(model.programs.compiled)} programs, {model.programs.compile_seconds:.0f} s of compiling"
            print(f"{number}: {memory / 2**20:.1f} MiB, {maps} maps, {files} files; {tokens} tokens, {compiled}")
            sys.stdout.flush()
    early = next(had for number, had in seen.items() if number >= min(100, args.conversations // 4))
    last = seen[args.conversations // every * every]
    return int(last[0] > early[0] * 1.05 or last[1] > early[1] * 1.05 or last[2] > early[2])


if __name__ == "__main__":
    sys.exit(main())
