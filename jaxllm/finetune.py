"""`jaxllm finetune`: train a low-rank adapter (LoRA) for a model in any format.

The module is also the function: `jaxllm.finetune(model, "answers.jsonl", "adapter")`, see `jaxllm.finetuning.loop`.
"""

import argparse
import sys
from dataclasses import fields
from types import ModuleType
from typing import Any

from jaxllm.cli import Parser, Terminated, execute
from jaxllm.finetuning.settings import SCHEDULES, TOO_LONG, Settings
from jaxllm.generate import emulate_devices
from jaxllm.loading import DTYPES, load
from jaxllm.parallel import parse_mesh


class _Callable(ModuleType):
    """Importing the module puts it where `jaxllm.finetune` was the function, so it can be called likewise."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from jaxllm.finetuning.loop import finetune

        return finetune(*args, **options)


sys.modules[__name__].__class__ = _Callable

# Of each number among the settings: its type, and what it says.
NUMBERS = {
    "rank": (int, "of the changes"),
    "alpha": (float, "changes are multiplied by alpha / rank (twice the rank)"),
    "epochs": (int, "how often the examples are seen"),
    "steps": (int, "steps of the optimizer, in place of epochs"),
    "batch": (int, "rows that are processed together"),
    "accumulate": (int, "batches that make up a step"),
    "length": (int, "tokens of a row (those of the longest example)"),
    "learning_rate": (float, "the highest"),
    "warmup": (float, "the part of all steps in which the learning rate rises"),
    "weight_decay": (float, "of AdamW"),
    "clip": (float, "the largest norm of a gradient, 0 for any"),
    "held_out": (int, "examples that are not trained on but evaluated"),
    "evaluate_every": (int, "steps between evaluations (an epoch)"),
    "save_every": (int, "steps between checkpoints"),
    "seed": (int, "of all that is drawn"),
}


def parser() -> Parser:
    p = Parser("jaxllm.finetune", "Train a low-rank adapter (LoRA) for a model, whose weights stay as they are.")
    p.add_argument("--model", required=True, metavar="PATH", help="a file, directory or hub id, or 'demo'")
    p.add_argument("--data", required=True, metavar="FILE", help="JSONL: messages, or prompt and completion, or text")
    p.add_argument("--out", required=True, metavar="DIR", help="where the adapter goes, as PEFT writes it")
    p.add_argument("--evaluation", metavar="FILE", help="more data, which is only evaluated")
    p.add_argument("--start", metavar="DIR", help="an adapter to go on from")
    p.add_argument("--targets", nargs="+", metavar="NAME", help="matrices to change, such as q_proj (all projections)")
    p.add_argument("--too-long", choices=TOO_LONG, default=TOO_LONG[0], help="what happens to longer examples (refuse)")
    p.add_argument("--schedule", choices=SCHEDULES, default=SCHEDULES[0], help="how the learning rate falls (cosine)")
    p.add_argument("--remat", action="store_true", help="compute layers twice, for less memory")
    for name, (kind, text) in NUMBERS.items():
        default = getattr(Settings, name)
        shown = text if default is None else f"{text} ({default:g})"
        p.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=shown)
    p.add_argument("--mesh", default="", metavar="AXES", help="devices, such as tp=4,ep=2 or dp=2 (one)")
    p.add_argument("--dtype", choices=DTYPES, help="of activations")
    p.add_argument("--max-seq-len", type=int, metavar="N", help="positions of the context (the model's)")
    return p


def run(args: argparse.Namespace) -> None:
    from jaxllm.finetuning.loop import finetune  # needs optax, of which it says so

    Terminated.by_signal()
    sizes = parse_mesh(args.mesh)
    emulate_devices(sizes["dp"] * sizes["ep"] * sizes["tp"])
    model = load(args.model, mesh=args.mesh, dtype=args.dtype, max_seq_len=args.max_seq_len)
    settings: Any = {field.name: getattr(args, field.name) for field in fields(Settings)}
    done = finetune(model, args.data, args.out, evaluation=args.evaluation, start=args.start, **settings)
    lost = f"; {done.cut} examples were cut, {done.skipped} left out" if done.cut or done.skipped else ""
    held = "".join(f", {loss:.4f} on what was held out after {step} steps" for step, loss in done.evaluations[-1:])
    print(f"{args.out}: loss {done.losses[-1]:.4f}{held}; {done.tokens_per_second:.0f} tokens/s{lost}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(execute(parser(), run))
