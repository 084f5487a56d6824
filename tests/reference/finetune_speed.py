"""How fast torch and peft train what `jaxllm.finetune` trains: tokens/s and peak memory, to compare with.

    python finetune_speed.py --gguf FILE --dtype bfloat16

The base is the same file, dequantized by transformers. A step is rows x 256 random tokens with the loss on every one of
them, LoRA of rank 16 on all linear layers, AdamW; printed is the median over a few steps, after one that warms up.
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
    seconds = []
    for _ in range(args.steps + 1):
        tokens = torch.randint(0, 49000, (args.rows, args.length), generator=gen)
        begun = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"torch {torch.__version__}, {args.dtype}: {args.rows * args.length / median:.0f} tokens/s, {peak:.0f} MiB")


if __name__ == "__main__":
    main()
