"""How fast `jaxllm.finetune` trains what finetune_speed.py trains with torch and peft: tokens/s and peak memory.

    python finetune_speed_ours.py --dtype float32

A step is rows x 256 tokens of text with the loss on every one of them, LoRA of rank 16 on all linear layers, AdamW. The
rate leaves out compiling, as finetune_speed.py leaves out its first step.
"""

import argparse
import resource
import time
from pathlib import Path

import jaxllm

TEXT = (Path(__file__).parent.parent / "golden" / "perplexity.txt").read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    model = jaxllm.load(args.model, dtype=args.dtype, progress=False)
    data = [{"text": TEXT[i % 1000 :] + TEXT} for i in range(args.rows * args.steps)]
    options = {"length": 256, "batch": args.rows, "steps": args.steps, "rank": 16, "alpha": 32.0, "too_long": "cut"}
    busy = time.process_time()
    done = jaxllm.finetune(model, data, progress=False, **options)
    tokens, busy = args.rows * 256 * args.steps, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{args.dtype}: {done.tokens_per_second:.0f} tokens/s, {peak:.0f} MiB", end="")
    print(f"; with compiling {tokens / busy:.0f} by CPU-second, losses {done.losses[0]:.2f} to {done.losses[-1]:.2f}")


if __name__ == "__main__":
    main()
