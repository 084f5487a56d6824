"""Ends conversions, quantizations and trainings with SIGKILL at random moments, and looks what is left.

python -m fuzz.kills --moments 50 --seed 7

Moments are counted from when a command begins to write. Right after one, the target has to be absent or whole; then the
same command has to end well, with every byte as if it had never been ended, and with nothing left beside.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiny_chat
import tiny_gguf
from gguf import GGMLQuantizationType as T
from safetensors.numpy import save_file

import jaxllm.convert
import jaxllm.finetune
import jaxllm.finetuning.loop  # noqa: F401, imported before there are processes
from jaxllm import compilation_cache
from jaxllm.checkpoint import unfinished
from jaxllm.cli import main as main_of_jaxllm

FORK = multiprocessing.get_context("fork")  # whose processes need not import everything again


def run(args: tuple[str, ...], said: Path) -> None:
    """A command, in a process of its own, on a disk that takes its time."""
    unfinished.SYNC_SECONDS = 0.0  # or nothing would be noted of what takes but seconds
    fast = os.fdatasync
    os.fdatasync = lambda descriptor: (time.sleep(0.05), fast(descriptor))[1]
    compilation_cache.WORTH = 0.0  # and most of these would be spent on compiling
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    sys.exit(main_of_jaxllm(args))


@dataclass(frozen=True)
class Command:
    """A command line whose last argument is its target, by whose name the hidden folder beside it is called."""

    name: str
    args: tuple[str, ...]
    target: Path

    @property
    def hidden(self) -> Path:
        return self.target.with_name(f".{self.target.name}.partial")

    @property
    def said(self) -> Path:
        return self.target.parent.with_name(f"{self.name}.stderr")

    def begin(self) -> multiprocessing.Process:
        process = FORK.Process(target=run, args=((*self.args, str(self.target)), self.said))
        process.start()
        return process

    def wait(self, process: multiprocessing.Process) -> None:
        """Until it writes, or has ended."""
        while process.is_alive() and not (any(self.hidden.glob("content/*")) or self.target.exists()):
            time.sleep(0.001)

    def finish(self) -> float:
        """The seconds from when it began to write."""
        self.wait(process := self.begin())
        begun = time.monotonic()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{self.name}: ended with {process.exitcode}: {self.said.read_text()}")
        return time.monotonic() - begun

    def written(self) -> dict[str, str]:
        """The hash of every file of the target, and of what belongs to it."""
        found = self.target.rglob("*") if self.target.is_dir() else self.target.parent.glob(f"{self.target.name}*")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found if path.is_file()}

    def noted(self) -> bool:
        """Whether something is there that the next run need not do again."""
        journal, kept = self.hidden / "journal", list(self.hidden.glob("content/checkpoint-*"))
        return bool(kept) or (journal.exists() and journal.read_text().count("\n") > 1)

    def remove(self) -> None:
        for path in self.target.parent.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def commands(root: Path) -> list[Command]:
    rng, source = np.random.default_rng(0), root / "source"
    source.mkdir()
    tensors = {f"t{i:02}": rng.standard_normal((1 << 20), np.float32) for i in range(30)}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
    model = root / "model.gguf"
    tiny_gguf.write(model, tiny_gguf.Tiny(256, 256, 3, 4, 2, 64, vocab=300, type=T.F16))
    chat, data = tiny_chat.write_chat(root / "chat.gguf"), root / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"the {i} things"}) + "\n" for i in range(20)))
    learn = ("--steps", "10", "--save-every", "2", "--batch", "2", "--length", "32", "--rank", "4")
    listed = (
        Command("convert", ("convert", str(source), "--to", "bfloat16", "--checksums"), Path("out")),
        Command("quantize", ("convert", str(model), "--to", "q4_k", "--checksums"), Path("out.gguf")),
        Command("finetune", ("finetune", "--model", str(chat), "--data", str(data), *learn, "--out"), Path("adapter")),
    )
    made = []
    for command in listed:
        folder = root / command.name
        folder.mkdir()
        made.append(Command(command.name, command.args, folder / command.target))
    return made


def trial(command: Command, expected: dict[str, str], seconds: float, at: random.Random) -> str:
    """What was left at one moment, after which everything was well."""
    process = command.begin()
    command.wait(process)
    time.sleep(at.uniform(0, seconds))
    process.kill()
    process.join()
    if command.target.exists():
        left = "whole"
    else:
        left = "gone on with" if command.noted() else "begun anew"
        command.finish()
        assert [path for path in command.target.parent.iterdir() if path.name.startswith(".")] == [], (
            "something is left"
        )
    assert command.written() == expected, f"{command.name}: other bytes, {left}"
    command.remove()
    return left


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz.kills", description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="of each command (50)")
    parser.add_argument("--seed", default=secrets.token_hex(4), help="of the moments; by default a new one")
    parser.add_argument("--only", nargs="+", metavar="COMMAND", help="convert, quantize or finetune")
    options = parser.parse_args()
    print(f"Seed {options.seed}.\n\n| command | moments | target whole | gone on with | begun anew | other bytes |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for command in commands(Path(root)):
            if options.only and command.name not in options.only:
                continue
            at = random.Random(f"{options.seed} {command.name}")
            seconds = command.finish()
            expected = command.written()
            command.remove()
            found: Counter[str] = Counter()
            with suppress(KeyboardInterrupt):  # which shows what was tried so far
                for _ in range(options.moments):
                    found[trial(command, expected, seconds, at)] += 1
            counts = [found[left] for left in ("whole", "gone on with", "begun anew")]
            print(f"| {command.name} | {found.total()} | {' | '.join(map(str, counts))} | 0 |", flush=True)


if __name__ == "__main__":
    main()
