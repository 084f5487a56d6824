"""llama.cpp's perplexity of a text, for tests/golden/perplexity.json.

    python perplexity_llama_cpp.py MODEL.gguf TEXT

Run with the interpreter of an environment that has llama-cpp-python; prints one JSON object.
"""

import json
import math
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    model_path, text_path = sys.argv[1:]
    llama = llama_cpp.Llama(model_path, n_ctx=1024, logits_all=True, verbose=False)
    tokens = llama.tokenize(Path(text_path).read_bytes(), add_bos=False, special=True)
    llama.eval(tokens)
    logits = np.array(llama.scores[: len(tokens) - 1], np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(axis=-1)) + peak[:, 0]
    losses = total - logits[np.arange(len(tokens) - 1), tokens[1:]]
    result = {"tokens": len(tokens), "perplexity": math.exp(losses.mean()), "llama-cpp-python": llama_cpp.__version__}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
