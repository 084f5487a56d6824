"""llama.cpp's perplexity of a text and of its first two paragraphs, for tests/golden/perplexity.json.

    python perplexity_llama_cpp.py MODEL.gguf TEXT

Run with the interpreter of an environment that has llama-cpp-python; prints one JSON object.
"""

import json
import math
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def perplexity(llama: llama_cpp.Llama, text: str) -> dict[str, float]:
    tokens = llama.tokenize(text.encode(), add_bos=False, special=True)
    llama.reset()
    llama.eval(tokens)
    logits = np.array(llama.scores[: len(tokens) - 1], np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(axis=-1)) + peak[:, 0]
    losses = total - logits[np.arange(len(tokens) - 1), tokens[1:]]
    return {"tokens": len(tokens), "perplexity": math.exp(losses.mean())}


def main() -> None:
    model_path, text_path = sys.argv[1:]
    llama, text = llama_cpp.Llama(model_path, n_ctx=1024, logits_all=True, verbose=False), Path(text_path).read_text()
    texts = {"whole": text, "beginning": "\n\n".join(text.split("\n\n")[:2])}
    result = {name: perplexity(llama, part) for name, part in texts.items()}
    print(json.dumps(result | {"llama-cpp-python": llama_cpp.__version__}))


if __name__ == "__main__":
    main()
