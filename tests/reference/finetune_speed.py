"""How fast torch and peft train what `jaxllm.finetune` trains: tokens/s and peak memory, to compare with.

    python finetune_speed.py --gguf FILE --dtype bfloat16

The base is the same file, dequantized by transformers. A step is rows x 256 random tokens with the loss on every one of
them, LoRA of rank 16 on all linear layers, AdamW. Printed is the median over a few steps, after one that warms up; beside it
the same by seconds of processors, which other work on the machine changes less.
"""

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name, dtype=dtype)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    gen = torch.Generator().manual_seed(0)
    seconds, busy = [], []
    for _ in range(args.steps + 1):
        tokens = torch.randint(0, 49000, (args.rows, args.length), generator=gen)
        begun, begun_busy = time.perf_counter(), time.process_time()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
        busy.append(time.process_time() - begun_busy)
    rate, of_processors = (args.rows * args.length / statistics.median(each[1:]) for each in (seconds, busy))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"torch {torch.__version__}, {args.dtype}: {rate:.0f} tokens/s, {of_processors:.0f} by CPU-second, {peak:.0f} MiB"
    )


if __name__ == "__main__":
    main()
