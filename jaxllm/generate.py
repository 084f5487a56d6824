"""`python -m jaxllm.generate`: answer prompts on the command line.

Answers go to stdout, everything else to stderr. An error that the user can mend is one line and exit code 2.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxllm.cli import Parser, main
from jaxllm.decoding import Memory
from jaxllm.errors import InputError
from jaxllm.language_model import Completion, LanguageModel, Prompt
from jaxllm.loading import DTYPES, MATMULS, WEIGHTS, load


def parser() -> Parser:
    p = Parser("jaxllm.generate", "Answer prompts with a language model.")
    p.add_argument(
        "--model", "--ckpt-path", required=True, metavar="PATH", help="a file, directory or hub id, or 'demo'"
    )

    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--input-file", metavar="FILE", help="one prompt a line, answered in batches")
    source.add_argument("--interactive", action="store_true", help="a conversation; /clear forgets it, /exit ends it")
    p.add_argument("--raw", action="store_true", help="continue the text as it stands, without the chat template")

    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most N tokens an answer (256)")
    p.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest token (as the checkpoint says)")
    p.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    p.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that make up probability P")
    p.add_argument("--min-p", type=float, metavar="P", help="draw among tokens P times as likely as the likeliest")
    p.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 discourages tokens seen before")
    p.add_argument("--seed", type=int, default=0, help="of the draws (0)")

    p.add_argument("--tp", type=int, default=1, metavar="N", help="cut every matrix over N devices")
    p.add_argument("--ep", type=int, default=1, metavar="N", help="spread experts over N groups of devices")
    p.add_argument("--quantize", metavar="TYPE", help="encode every matrix while loading, for example q4_k")
    p.add_argument("--dtype", choices=DTYPES, help="of activations (bfloat16)")
    p.add_argument("--weights", choices=WEIGHTS, help="hold matrices packed, or as a decoded copy (CPU: a copy)")
    p.add_argument(
        "--matmul",
        choices=MATMULS,
        default="dequant",
        help="activations of FP8 or INT8 weights: as they are, or alike",
    )
    p.add_argument("--gqa", type=int, default=1, metavar="N", help="query heads to a key head, for files before GGUF")
    p.add_argument("--config", metavar="FILE", help="ModelArgs of DeepSeek's demo, for its own files")
    p.add_argument("--max-seq-len", type=int, metavar="N", help="positions of the context (the model's own)")

    p.add_argument("--json", action="store_true", help="one JSON object a prompt on stdout, and nothing else there")
    return p


def run(args: argparse.Namespace) -> None:
    if min(args.tp, args.ep) < 1:
        raise InputError("--tp and --ep must be 1 or above")
    prompts = _read_prompts(args)
    emulate_devices(args.tp * args.ep)
    model = load(
        args.model,
        mesh=f"tp={args.tp},ep={args.ep}",
        quantize=args.quantize,
        dtype=args.dtype,
        weights=args.weights,
        max_seq_len=args.max_seq_len,
        matmul=args.matmul,
        gqa=args.gqa,
        config=args.config,
    )
    raw = args.raw or model.tokenizer is None or model.tokenizer.chat_template is None
    options = {
        name: getattr(args, name)
        for name in ("max_new_tokens", "seed", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    }
    if args.interactive:
        _converse(model, raw, options, args.json)
    elif args.input_file:
        for text, completion in _answer_all(model, prompts, raw, options):
            _show(completion, text, args.json, streamed=False)
    else:
        [text] = prompts
        _stream(model, text if raw else _user(text), text, options, args.json)


def emulate_devices(count: int) -> None:
    """Let the CPU stand for `count` devices, unless XLA_FLAGS says something about that already.

    Has to come before JAX looks at its devices; on a machine with accelerators it changes nothing that matters.
    """
    if count > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)


def _read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        return [args.prompt]
    if args.interactive:
        return []
    try:
        text = Path(args.input_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{args.input_file}: {getattr(error, 'strerror', None) or error}") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"{args.input_file}: no prompts in it; one a line is expected")
    return prompts


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _answer_all(
    model: LanguageModel, texts: list[str], raw: bool, options: dict[str, object]
) -> Iterator[tuple[str, Completion]]:
    prompts = [text if raw else _user(text) for text in texts]
    yield from zip(texts, model.generate(prompts, **options), strict=True)


def _stream(
    model: LanguageModel,
    prompt: Prompt,
    text: str,
    options: dict[str, object],
    as_json: bool,
    memory: Memory | None = None,
) -> Completion:
    completion = Completion(prompt)
    for piece in model.stream(prompt, **options, memory=memory, completion=completion):
        if not as_json:
            print(piece, end="", flush=True)
    _show(completion, text, as_json, streamed=True)
    return completion


def _show(completion: Completion, text: str, as_json: bool, streamed: bool) -> None:
    """The end of a streamed answer, or a whole one."""
    if as_json:
        print(json.dumps({**dataclasses.asdict(completion), "prompt": text}, ensure_ascii=False), flush=True)
        return
    print("" if streamed else f"> {text}\n{completion.text}\n", flush=True)
    print(
        f"[prompt {completion.prompt_tokens} tokens, {completion.prefill_tok_s:.0f} tok/s; "
        f"answer {len(completion.tokens)} tokens, {completion.decode_tok_s:.1f} tok/s; {completion.finish_reason}]",
        file=sys.stderr,
    )


def _converse(model: LanguageModel, raw: bool, options: dict[str, object], as_json: bool) -> None:
    """Turns from stdin until it ends. What does not fit into the context is refused, and the conversation goes on."""
    messages: list[dict[str, str]] = []
    memory = Memory()
    if sys.stdin.isatty():
        print("/clear forgets the conversation, /exit ends it", file=sys.stderr)
    while (line := _ask()) is not None and line.strip() != "/exit":
        if line.strip() == "/clear":
            messages.clear()
        elif line.strip():
            turn = {"role": "user", "content": line}
            try:
                answer = _stream(model, line if raw else [*messages, turn], line, options, as_json, memory)
                messages += [turn, {"role": "assistant", "content": answer.text}]
            except InputError as error:
                print(f"error: {error}; /clear starts anew", file=sys.stderr)
            except KeyboardInterrupt:
                print(" [stopped]", file=sys.stderr)


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


if __name__ == "__main__":
    sys.exit(main(parser(), run))
