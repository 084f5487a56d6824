"""Writes tests/golden/finetuned: adapters of tiny checkpoints, and what torch and peft make of them in 20 steps.

Run with a Python that has torch, transformers, peft and safetensors (README.md beside the adapters of
tests/golden/adapters names the versions). With --check nothing is written, and the losses are computed again.

Each directory is the adapter that training begins with, as `save_pretrained` writes it, plus golden.npz:

    tokens  int32 [texts, T]   the texts, padded with -1
    learned bool  [texts, T]   which tokens are predicted; the others are a prompt
    losses  float32 [STEPS]    the mean cross-entropy of each step, by predicted token
    logits  float32 [2, T, V]  after the last step, for the `tokens` of the base's golden.npz

Every step is on all texts, each on its own. AdamW, its schedule and the clipping are torch's and transformers'. A
golden is refused if float64 gives other losses: then experts were nearly tied.
"""

import argparse
import shutil
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from adapter_goldens import ATTENTION, GOLDEN, Case, finish, load_base, randomize, tokens_of
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_checkpoints import forward

ROOT = GOLDEN / "finetuned"
STEPS, WARMUP, RATE, DECAY, CLIP = 20, 4, 1e-2, 0.1, 0.5
LENGTHS, PROMPTS = (20, 13, 9, 16), (5, 1, 4, 8)
MLP = ["gate_proj", "up_proj", "down_proj"]


def cases() -> dict[str, Case]:
    stacks = {"target_parameters": ["mlp.experts.down_proj"]}
    rank = {"r": 3, "lora_alpha": 6}
    latent = r".*\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    return {
        "llama": Case("", "checkpoints/llama", {"target_modules": [*ATTENTION, *MLP], **rank}),
        "qwen3_moe": Case("", "checkpoints/qwen3_moe_b", {"target_modules": ATTENTION, **stacks, **rank}),
        "deepseek": Case("", "deepseek/v3", {"target_modules": latent, **stacks, **rank}),
        "gpt_oss": Case("", "gpt_oss/square", {"target_modules": ATTENTION, **stacks, **rank}),
    }


def texts(name: str, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    tokens, learned = np.full((len(LENGTHS), max(LENGTHS)), -1, np.int32), np.zeros((len(LENGTHS), max(LENGTHS)), bool)
    for i, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        tokens[i, :length] = rng.integers(3, vocabulary, length)
        learned[i, prompt:length] = True
    return tokens, learned


def train(model: torch.nn.Module, tokens: np.ndarray, learned: np.ndarray) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for _ in range(STEPS):
        total = torch.zeros((), dtype=trained[0].dtype)
        for row, wanted in zip(tokens, learned, strict=True):
            ids = torch.tensor(row[row >= 0]).long()
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total = total + each[torch.tensor(wanted[1 : len(ids)])].sum()
        loss = total / int(learned.sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def golden(name: str, case: Case) -> dict[str, np.ndarray]:
    model = PeftModel.from_pretrained(load_base(case.base), ROOT / name, is_trainable=True)
    tokens, learned = texts(name, model.config.vocab_size)
    losses = train(model, tokens, learned)
    double = PeftModel.from_pretrained(load_base(case.base), ROOT / name, is_trainable=True).double()
    off = np.abs(np.array(train(double, tokens, learned)) - losses).max()
    assert off < 2e-4, f"{name}: off by {off}, a near tie: choose another seed"
    logits = forward(model.eval(), tokens_of(case.base)).numpy()
    return {"tokens": tokens, "learned": learned, "losses": np.array(losses, np.float32), "logits": logits}


def save(name: str, case: Case, path: Path) -> None:
    model = get_peft_model(load_base(case.base), LoraConfig(**case.config, task_type="CAUSAL_LM"))
    randomize(model, zlib.crc32(name.encode()))
    with torch.no_grad():  # a change that is small at first
        for parameter, value in model.named_parameters():
            if ".lora_B." in parameter:
                value.mul_(0.2)
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path)
    (path / "README.md").unlink()
    finish(case, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    failures = 0
    for name, case in cases().items():
        path = ROOT / name
        if not args.check:
            save(name, case, path)
            np.savez_compressed(path / "golden.npz", **golden(name, case))
        with np.load(path / "golden.npz") as z:
            expected, got = dict(z), golden(name, case)
        worst = np.abs(got["losses"] - expected["losses"]).max()
        failures += not worst < 1e-4
        print(f"{name}: losses from {expected['losses'][0]:.3f} to {expected['losses'][-1]:.3f}, off by {worst:.2g}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
