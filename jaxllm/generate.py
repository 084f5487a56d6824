"""`jaxllm generate`: answer prompts on the command line.

Answers go to stdout, everything else to stderr. Prompts and answers are text, or token ids where a checkpoint has no
tokenizer. An error that the user can fix is one line and exit code 2.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxllm.cli import Parser, adapters, add_adapters, add_matformer, add_quantizing, execute, quantizing
from jaxllm.engine.answer import Completion, Prompt
from jaxllm.engine.drafting import Drafter, DraftModel, PromptLookup
from jaxllm.engine.memory import Memory
from jaxllm.errors import InputError
from jaxllm.language_model import LanguageModel
from jaxllm.leading import Leader, follow
from jaxllm.loading import CACHE_DTYPES, DTYPES, MATMULS, WEIGHTS, find_checkpoint, load
from jaxllm.meeting import Group
from jaxllm.processes import add_processes, fingerprint, joined
from jaxllm.sampling import Sampling

# Options of `load` with the same names here.
LOADING = (
    "merge_adapters",
    "dtype",
    "cache_dtype",
    "weights",
    "max_seq_len",
    "matmul",
    "attention",
    "gqa",
    "config",
    "matformer",
    "verify",
)
TYPES = {"top_k": int}  # of sampling options; the others are float


def parser() -> Parser:
    p = Parser("jaxllm.generate", "Answer prompts with a language model.")
    p.add_argument(
        "--model", "--ckpt-path", required=True, metavar="PATH", help="a file, directory or hub id, or 'demo'"
    )

    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="answer this text")
    source.add_argument("--prompt-ids", metavar="IDS", help="answer these token ids, such as 1,2,3")
    source.add_argument(
        "--input-file", metavar="FILE", help="answer each line, in batches (token ids if there is no tokenizer)"
    )
    source.add_argument("--interactive", action="store_true", help="a conversation; /clear forgets it, /exit ends it")
    p.add_argument("--raw", action="store_true", help="continue the text, without the chat template")

    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most N tokens an answer (256)")
    for option in dataclasses.fields(Sampling):
        name, metavar, help = option.name.replace("_", "-"), option.metadata["metavar"], option.metadata["help"]
        p.add_argument(f"--{name}", type=TYPES.get(option.name, float), metavar=metavar, help=help)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end answers before TEXT; repeatable")
    p.add_argument("--schema", metavar="FILE", help="answer in JSON that follows the JSON schema in FILE")
    p.add_argument(
        "--draft",
        metavar="MODEL",
        help="guess tokens with a smaller model of the same vocabulary, or with 'lookup' in the text so far; answers "
        "stay the same",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the random draws (0)")

    add_loading(p)
    add_processes(p)
    p.add_argument("--json", action="store_true", help="print one JSON object per prompt on stdout, and nothing else")
    return p


def add_loading(p: argparse.ArgumentParser) -> None:
    """The options that say how the model is loaded; `loading` reads them."""
    p.add_argument("--tp", type=int, default=1, metavar="N", help="shard every matrix over N devices")
    p.add_argument("--ep", type=int, default=1, metavar="N", help="distribute experts over N groups of devices")
    p.add_argument("--dp", type=int, default=1, metavar="N", help="distribute the prompts of a batch over N copies")
    add_quantizing(p)
    add_matformer(p)
    add_adapters(p)
    p.add_argument("--merge-adapters", action="store_true", help="add adapters to the matrices themselves")
    p.add_argument("--dtype", choices=DTYPES, help="of activations")
    p.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        help="cache keys and values in 8 bits, with a scale for each head and position",
    )
    p.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="keep matrices quantized (packed, the default if there are kernels for it), or dequantize them once",
    )
    p.add_argument(
        "--matmul",
        choices=MATMULS,
        help="activations in --dtype (dequant); rounded to FP8 or INT8 as the checkpoint says (fp8, int8); or, on a "
        "CPU, to int8 by 32 (int8_blocks, there the default unless --dtype is given)",
    )
    p.add_argument(
        "--attention",
        metavar="FORM",
        help="what DeepSeek's models cache of a token: one latent vector (absorbed, the default), or every head's keys "
        "and values (naive)",
    )
    p.add_argument(
        "--gqa",
        type=int,
        default=1,
        metavar="N",
        help="query heads per key/value head, for GGML files from before GGUF",
    )
    p.add_argument("--config", metavar="FILE", help="ModelArgs of DeepSeek's demo, for its own files")
    p.add_argument("--max-seq-len", type=int, metavar="N", help="length of the context (the model's own)")
    p.add_argument("--verify", action="store_true", help="first compare the files with their checksums (SHA256SUMS)")


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `load`."""
    return {
        "mesh": f"tp={args.tp},ep={args.ep},dp={args.dp}",
        **quantizing(args),
        "adapters": adapters(args),
        **{name: getattr(args, name) for name in LOADING},
    }


def run(args: argparse.Namespace) -> None:
    if min(args.tp, args.ep, args.dp) < 1:
        raise InputError("--tp, --ep and --dp must be 1 or above")
    with joined(args) as group:
        answer(args, group)


def answer(args: argparse.Namespace, group: Group) -> None:
    """Load the model, and answer what the options ask for, together with the other processes."""
    sampling = Sampling(**{option.name: getattr(args, option.name) for option in dataclasses.fields(Sampling)})
    lines = _read_lines(args.input_file) if args.input_file else []
    schema = _read_schema(args.schema) if args.schema else None
    ids = None if args.prompt_ids is None else _parse_ids(args.prompt_ids, "--prompt-ids")
    devices = args.tp * args.ep * args.dp
    if devices % group.count:
        raise InputError(f"{devices} devices (--tp, --ep, --dp) cannot be shared out among {group.count} processes")
    emulate_devices(devices // group.count)
    options = loading(args)
    if group.count > 1:
        group.agree("the option", {name: str(value) for name, value in options.items()})
        group.agree("the file", fingerprint(find_checkpoint(args.model)))
    model = load(args.model, **options, progress=group.leads)
    drafter = None if args.draft is None else _drafter(args.draft, options["mesh"], group)
    if not group.leads:
        follow(model, group, drafter)
        return
    answering = {"max_new_tokens": args.max_new_tokens, "seed": args.seed, "stop": args.stop, "schema": schema}
    leader = Leader(model, group, sampling, answering, drafter)
    session = Session(leader, args.raw, args.json)
    if args.interactive:
        session.converse()
    elif args.input_file:
        session.answer_lines(lines, args.input_file)
    elif ids is not None:
        session.answer(ids)
    elif model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: give --prompt-ids, or lines of token ids in --input-file")
    else:
        session.answer(session.prompt(args.prompt), args.prompt)
    leader.end()


def emulate_devices(count: int) -> None:
    """Let the CPU emulate `count` devices, unless XLA_FLAGS sets a number already.

    Must run before JAX looks at its devices. On a machine with accelerators it has no relevant effect.
    """
    if count > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)


def _drafter(name: str, mesh: str, group: Group) -> Drafter:
    if name == "lookup":
        return PromptLookup()
    if group.count > 1:
        group.agree("the file", fingerprint(find_checkpoint(name)))
    return DraftModel(load(name, mesh=mesh, progress=group.leads))


def _read_schema(file: str) -> dict[str, Any]:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: {getattr(error, 'strerror', None) or error}") from error


def _read_lines(file: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{file}: no prompts in it; one per line is expected")
    return lines


def _parse_ids(text: str, where: str) -> list[int]:
    """Token ids from text such as "1,2,3" or "1 2 3"."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise InputError(f"{where}: {text.strip()[:40]!r} is not a list of token ids such as 1,2,3") from error


@dataclasses.dataclass
class Session:
    """A model, with what the command line needs to prompt it and print its answers."""

    leader: Leader
    raw: bool
    json: bool

    @property
    def model(self) -> LanguageModel:
        return self.leader.model

    def prompt(self, line: str, where: str = "stdin", before: list[dict[str, str]] | None = None) -> Prompt:
        """The prompt that a line of input stands for, after the turns `before` if there is a chat template."""
        if self.model.tokenizer is None:
            return _parse_ids(line, where)
        if self.raw or self.model.tokenizer.chat_template is None:
            return line
        return [*(before or []), _turn("user", line)]

    def answer(self, prompt: Prompt, line: str | None = None, memory: Memory | None = None) -> Completion:
        """Answer one prompt, printing the text as it comes. `line` is the prompt as it was typed, None for ids."""
        completion = Completion(prompt)
        try:
            for text in self.leader.stream(prompt, memory, completion):
                if not self.json:
                    print(text, end="", flush=True)
        except KeyboardInterrupt:
            if not self.json:
                print(flush=True)  # what a terminal shows next begins a line
            raise
        if not self.json:
            print(self._ids(completion), flush=True)
        self._report(completion, line)
        return completion

    def answer_lines(self, lines: list[str], where: str) -> None:
        """Answer many prompts in batches, then print them."""
        prompts = [self.prompt(line, where) for line in lines]
        completions = self.leader.generate(prompts)
        for line, completion in zip(lines, completions, strict=True):
            if not self.json:
                print(f"> {line}\n{completion.text}{self._ids(completion)}\n", flush=True)
            self._report(completion, None if self.model.tokenizer is None else line)

    def converse(self) -> None:
        """Answer turns from stdin until it ends. A turn that does not fit the context is refused, and it goes on."""
        turns: list[dict[str, str]] = []
        memory = Memory()
        if sys.stdin.isatty():
            print("/clear forgets the conversation, /exit ends it", file=sys.stderr)
        for line in _typed():
            if line.strip() == "/clear":
                turns.clear()
            elif line.strip():
                try:
                    answer = self.answer(self.prompt(line, before=turns), line, memory)
                    turns += [_turn("user", line), _turn("assistant", answer.text)]
                except InputError as error:
                    print(f"error: {error}; /clear starts a new conversation", file=sys.stderr)
                except KeyboardInterrupt:
                    print("[stopped]", file=sys.stderr)

    def _ids(self, completion: Completion) -> str:
        """What is printed in place of text where there is no tokenizer."""
        return "" if self.model.tokenizer else ",".join(map(str, completion.tokens))

    def _report(self, completion: Completion, line: str | None) -> None:
        """After an answer: all of it as JSON on stdout, or its speed on stderr."""
        if self.json:
            values = {name: value for name, value in dataclasses.asdict(completion).items() if value is not None}
            print(json.dumps(values if line is None else values | {"prompt": line}, ensure_ascii=False), flush=True)
            return
        cached = f" ({completion.cached_tokens} of them cached)" if completion.cached_tokens else ""
        print(
            f"[prompt {completion.prompt_tokens} tokens{cached}, {completion.prefill_tok_s:.0f} tok/s; "
            f"answer {len(completion.tokens)} tokens, {completion.decode_tok_s:.1f} tok/s; {completion.finish_reason}]",
            file=sys.stderr,
        )


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _typed() -> Iterator[str]:
    """Lines from stdin, until it ends or one is /exit."""
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        while (line := input(prompt)).strip() != "/exit":
            yield line
    except EOFError:
        return


if __name__ == "__main__":
    sys.exit(execute(parser(), run))
