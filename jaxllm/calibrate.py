"""`python -m jaxllm.calibrate`: what the matrices of a model are multiplied by, on a text, as an importance matrix.

Low-bit types become better if their encoders know which columns matter. `load(imatrix=)`, `convert --imatrix` and
llama.cpp's tools read the result. The text should resemble what the model will be used for; some 100,000 tokens are
usual.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.cli import Parser, execute
from jaxllm.decoding import cache_for, hidden_states
from jaxllm.errors import InputError
from jaxllm.generate import emulate_devices
from jaxllm.imatrix import named
from jaxllm.importance import write_cimatrix, write_gguf
from jaxllm.language_model import LanguageModel
from jaxllm.loading import find_checkpoint, load
from jaxllm.models.family import GGUF, HUGGING_FACE
from jaxllm.tracking import Statistics

CHUNK = 512  # tokens that are processed with one another, as in llama.cpp


def calibrate(
    model: LanguageModel, text: str, *, chunk: int = CHUNK, chunks: int | None = None, progress: bool = True
) -> dict[str, Statistics]:
    """Statistics of the activations that each matrix of a model is multiplied by on a text, by the parameters' names.

    Args:
        chunk: the text is cut into pieces of this many tokens, which do not see each other. A shorter rest is left out.
        chunks: the most pieces; None: all of the text.
        progress: whether to show progress on stderr, if that is a terminal.

    Raises:
        InputError: the model has no tokenizer, or the text is shorter than one piece.
    """
    pieces = text_chunks(model, text, chunk, chunks)
    model.begin_track_stats()
    for tokens in with_progress(pieces, progress):
        for _ in hidden_states(model.programs, tokens[None], cache_for(model.programs, 1, len(tokens)), 0):
            pass
    return model.end_track_stats()


def text_chunks(model: LanguageModel, text: str, chunk: int = CHUNK, chunks: int | None = None) -> np.ndarray:
    """A text as pieces of tokens, int32 `[chunks, chunk]`. Raises InputError as `calibrate` does."""
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer, which calibrating on a text needs")
    if not 1 <= chunk <= model.max_seq_len or (chunks is not None and chunks < 1):
        raise InputError(f"chunk {chunk}, chunks {chunks}: must be 1 or above, and a chunk at most {model.max_seq_len}")
    ids = model.tokenizer.encode(text)
    count = len(ids) // chunk
    if count == 0:
        raise InputError(
            f"a text of {len(ids)} tokens is shorter than a chunk of {chunk}: give more, or smaller chunks"
        )
    return np.array(ids[: count * chunk], np.int32).reshape(count, chunk)[:chunks]


def with_progress[T](items: Iterable[T], progress: bool) -> Iterable[T]:
    """The items, with progress on stderr."""
    return tqdm(items, "calibrating", disable=not (progress and sys.stderr.isatty()), leave=False, file=sys.stderr)


def read_text(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error


def parser() -> Parser:
    p = Parser("jaxllm.calibrate", "Find out which inputs of a model's matrices matter, for better low-bit types.")
    p.add_argument("--model", required=True, metavar="PATH", help="a file, directory or hub id, or 'demo'")
    p.add_argument("--text", required=True, metavar="FILE", help="a text in UTF-8")
    p.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="the importance matrix: .gguf (llama.cpp's) or .cimatrix (mistral.rs's)",
    )
    p.add_argument("--chunk", type=int, default=CHUNK, metavar="N", help=f"tokens of a piece of the text ({CHUNK})")
    p.add_argument("--chunks", type=int, metavar="N", help="at most N pieces (all)")
    p.add_argument("--tp", type=int, default=1, metavar="N", help="shard every matrix over N devices")
    p.add_argument("--ep", type=int, default=1, metavar="N", help="distribute experts over N groups of devices")
    return p


def run(args: argparse.Namespace) -> None:
    out, text = Path(args.out), read_text(args.text)
    if out.suffix not in (".gguf", ".cimatrix"):
        raise InputError(f"{out}: name it .gguf (llama.cpp's form) or .cimatrix (mistral.rs's)")
    if not out.resolve().parent.is_dir():
        raise InputError(f"{out}: {out.resolve().parent} is not a directory; make it first")
    emulate_devices(args.tp * args.ep)
    checkpoint = open_checkpoint(find_checkpoint(args.model))
    model = load(args.model, mesh=f"tp={args.tp},ep={args.ep}", dtype="float32")
    statistics = calibrate(model, text, chunk=args.chunk, chunks=args.chunks)
    tokens = max(int(np.max(s.counts)) for s in statistics.values())
    if out.suffix == ".gguf":
        entries = named(statistics, checkpoint, GGUF)
        write_gguf(out, entries, [Path(args.text).name], tokens // args.chunk, args.chunk)
    else:
        entries = {name.removesuffix(".weight"): s for name, s in named(statistics, checkpoint, HUGGING_FACE).items()}
        write_cimatrix(out, entries)
    print(f"{out}: {len(entries)} matrices, {tokens} tokens", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(execute(parser(), run))
