"""How fast `jaxllm.finetune` trains what finetune_speed.py trains with torch and peft: tokens/s and peak memory.

    python finetune_speed_ours.py --dtype float32

A step is rows x 256 tokens of text with the loss on every one of them, LoRA of rank 16 on all linear layers, AdamW. The
rates leave out compiling, as finetune_speed.py leaves out its first step: seconds of processors are those of `steps`
more steps than one, after programs are on disk.
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
    data = [{"text": TEXT[i % 1000 :] + TEXT} for i in range(args.rows * (args.steps + 1))]
    # Programs that know how many steps there are would be compiled again.
    options = {"schedule": "constant", "warmup": 0.0, "length": 256, "batch": args.rows, "rank": 16, "alpha": 32.0}
    busy = {}
    for steps in (1, 1, args.steps + 1):  # the first compiles
        begun = time.process_time()
        done = jaxllm.finetune(model, data, progress=False, steps=steps, too_long="cut", **options)
        busy[steps] = time.process_time() - begun
        del model.adapters[done.name]
    of_processors = args.rows * 256 * args.steps / (busy[args.steps + 1] - busy[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rates = f"{done.tokens_per_second:.0f} tokens/s, {of_processors:.0f} by CPU-second"
    print(f"{args.dtype}: {rates}, {peak:.0f} MiB; losses {done.losses[0]:.2f} to {done.losses[-1]:.2f}")


if __name__ == "__main__":
    main()
