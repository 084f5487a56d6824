"""`python -m jaxllm.perplexity`: how well a model predicts a text, and what quantizing costs.

Perplexity is exp of the mean negative log-likelihood of each token given those before it: lower is better, and its
growth is the usual measure of what a block type loses.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from jaxllm.cli import Parser, main
from jaxllm.errors import InputError
from jaxllm.language_model import LanguageModel
from jaxllm.loading import DTYPES, load


def perplexity(model: LanguageModel, text: str) -> float:
    """Of a text, which is read in pieces as long as the context if it is longer.

    Raises:
        InputError: the text has fewer than two tokens.
    """
    ids = model.tokenizer.encode(text)
    if len(ids) < 2:
        raise InputError("perplexity needs a text of two tokens or more")
    losses = []
    for start in range(0, len(ids) - 1, model.max_seq_len):
        piece = np.array(ids[start : start + model.max_seq_len + 1])
        logprobs = jax.nn.log_softmax(model.logits(piece[None, :-1])[0], axis=-1)
        losses.append(-jnp.take_along_axis(logprobs, piece[1:, None], axis=-1)[:, 0])
    return float(jnp.exp(jnp.mean(jnp.concatenate(losses))))


def parser() -> Parser:
    p = Parser("jaxllm.perplexity", "How well a model predicts a text, and what quantizing costs.")
    p.add_argument("--model", default="demo", metavar="PATH")
    p.add_argument("--text", required=True, metavar="FILE")
    p.add_argument("--quantize", nargs="*", default=[], metavar="TYPE", help="block types to compare with")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    return p


def run(args: argparse.Namespace) -> None:
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{args.text}: {error}") from error
    rows = []
    for type in (None, *args.quantize):
        model = load(args.model, dtype=args.dtype, quantize=type, progress=False)
        matrices = [p.encoded for p in model.placed if len(p.declaration.shape) > 1]
        bits = 8 * sum(w.nbytes for w in matrices) / sum(np.prod(w.shape) for w in matrices)
        value = perplexity(model, text)
        rows.append((type or "as in the file", bits, value, value / (rows[0][2] if rows else value)))
    print(tabulate(rows, ("matrices", "bits per weight", "perplexity", "relative"), floatfmt=("", ".2f", ".3f", ".3f")))


if __name__ == "__main__":
    sys.exit(main(parser(), run))
