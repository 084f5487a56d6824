"""Writes tests/golden/gemma_270m.json: what llama.cpp computes with the Gemma 3 270M that `make bench-gemma` fetches.

Run it with the Python of an environment that has llama-cpp-python 0.3.36:

    python tests/reference/gemma_270m.py .gemma/gemma-3-270m-q4_k_m.gguf

Llama.cpp rounds what quantized matrices are multiplied by. So it first writes the file's weights as float32, by
itself, and runs those. For each text: its ids, the most likely next tokens, and what greedy decoding appends.
"""

import ctypes
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden" / "gemma_270m.json"
F32, NEW, BEST = 0, 16, 8  # ggml's type, for the cache and for the file
TEXTS = (
    "The capital of France is",
    "  def f(x):\n\treturn  x**2   # \u00e9 \u6f22\u5b57 \U0001f98a\n\n\n",
    "<start_of_turn>user\nHow are you?<end_of_turn>\n<start_of_turn>model\n",
    " ".join(f"Sheep number {i} jumps over the fence." for i in range(80)),  # longer than the window of 512
)


def main(path: str) -> None:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder, "f32.gguf")
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = F32, True
        if llama_cpp.llama_model_quantize(path.encode(), str(wide).encode(), ctypes.byref(options)):
            raise SystemExit(f"{path}: llama.cpp cannot write it as float32")
        model = llama_cpp.Llama(str(wide), n_ctx=1024, logits_all=True, verbose=False, type_k=F32, type_v=F32)
        for text in TEXTS:
            ids = model.tokenize(text.encode(), add_bos=True, special=True)
            model.reset()
            model.eval(ids)
            logits = np.array(model.scores[len(ids) - 1], np.float64)
            logits -= logits.max() + np.log(np.exp(logits - logits.max()).sum())
            best = np.argsort(-logits)[:BEST]
            greedy = []
            for _ in range(NEW):
                greedy.append(int(np.argmax(model.scores[model.n_tokens - 1])))
                model.eval(greedy[-1:])
            top = {int(i): round(float(logits[i]), 4) for i in best}
            found.append({"text": text, "ids": ids, "top": top, "greedy": greedy})
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    golden = {"version": llama_cpp.__version__, "sha256": digest, "texts": found}
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
