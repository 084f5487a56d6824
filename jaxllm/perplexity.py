"""`jaxllm perplexity`: how well a model predicts a text, and what quantizing costs.

Perplexity is exp of the mean negative log-likelihood of each token given those before it. Lower is better; how much it
grows is the usual measure of what a quantization type loses.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate

from jaxllm.cli import Parser, adapters, add_adapters, execute
from jaxllm.decoding import cache_for, hidden_states
from jaxllm.errors import InputError
from jaxllm.language_model import LanguageModel
from jaxllm.loading import CACHE_DTYPES, DTYPES, load


def perplexity(model: LanguageModel, text: str) -> float:
    """The model's perplexity on a text. A text longer than the context is split into parts of that length.

    Raises:
        InputError: the model has no tokenizer, or the text has fewer than two tokens.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer, which perplexity of a text needs")
    ids = np.array(model.tokenizer.encode(text), np.int32)
    if len(ids) < 2:
        raise InputError("perplexity needs a text of two tokens or more")
    losses = []
    for start in range(0, len(ids) - 1, model.max_seq_len):
        tokens, targets = ids[start:-1][: model.max_seq_len], ids[start + 1 :][: model.max_seq_len]
        cache, done = cache_for(model.programs, 1, len(tokens)), 0
        for chunk in hidden_states(model.programs, tokens[None], cache, 0):  # never all logits at once
            logprobs = jax.nn.log_softmax(model.programs.head(chunk.hidden)[0, : chunk.real])
            losses.append(-jnp.take_along_axis(logprobs, targets[done : done + chunk.real, None], axis=-1)[:, 0])
            done += chunk.real
    return float(jnp.exp(jnp.mean(jnp.concatenate(losses))))


def parser() -> Parser:
    p = Parser("jaxllm.perplexity", "How well a model predicts a text, and what quantizing costs.")
    p.add_argument("--model", default="demo", metavar="PATH", help="a file, directory or hub id (demo)")
    p.add_argument("--text", required=True, metavar="FILE", help="the text, in UTF-8")
    p.add_argument("--quantize", nargs="*", default=[], metavar="TYPE", help="quantization types to compare with")
    p.add_argument("--imatrix", metavar="FILE", help="also compare with this importance matrix, see jaxllm calibrate")
    add_adapters(p)
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of activations (float32)")
    p.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        help="cache keys and values in 8 bits, with a scale for each head and position",
    )
    return p


def run(args: argparse.Namespace) -> None:
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{args.text}: {error}") from error
    rows, attached = list[tuple](), adapters(args)
    wanted = [(type, imatrix) for type in args.quantize for imatrix in dict.fromkeys((None, args.imatrix))]
    for type, imatrix in ((None, None), *wanted):
        options = {"dtype": args.dtype, "cache_dtype": args.cache_dtype, "adapters": attached}
        model = load(args.model, quantize=type, imatrix=imatrix, **options, progress=False)
        matrices = [p.encoded for p in model.placed if len(p.declaration.shape) > 1]
        bits = 8 * sum(w.nbytes for w in matrices) / sum(np.prod(w.shape) for w in matrices)
        value = perplexity(model, text)
        name = f"{type or 'as in the file'}{' with imatrix' if imatrix else ''}"
        rows.append((name, bits, value, value / (rows[0][2] if rows else value)))
    print(tabulate(rows, ("matrices", "bits per weight", "perplexity", "relative"), floatfmt=("", ".2f", ".3f", ".3f")))


if __name__ == "__main__":
    sys.exit(execute(parser(), run))
