"""Writes tests/golden/exported_gguf.json: what llama.cpp makes of the demo model in the GGUF files that we write.

For each type, the log-probabilities of the next token after a fixed text: the most likely ones, by llama.cpp. Run it
where jaxllm is installed, with the Python of an environment that has llama-cpp-python 0.3.36:

    python tests/reference/exported_gguf.py PEER_PYTHON
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "exported_gguf.json"
TYPES = ("q4_k", "q6_k", "iq4_xs", "mxfp4", "q8_0", "q3_k")
IDS = [504, 5372, 314, 4618, 284, 260, 6888, 314, 1165, 30, 4886, 3412, 260, 2446, 284]

PEER = """
import json, sys
import numpy as np
from llama_cpp import Llama, llama_supports_gpu_offload
ids = json.loads(sys.argv[2])
model = Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False)
model.eval(ids)
logits = np.array(model.scores[len(ids) - 1], np.float64)
logits -= logits.max() + np.log(np.exp(logits - logits.max()).sum())
best = np.argsort(-logits)[:20]
print(json.dumps({int(i): round(float(logits[i]), 4) for i in best}))
"""


def main(python: str) -> None:
    from jaxllm.convert import convert

    golden = {}
    with tempfile.TemporaryDirectory() as folder:
        for type in TYPES:
            path = Path(folder, f"{type}.gguf")
            convert("demo", path, to=type, container="gguf", progress=False)
            run = [python, "-c", PEER, str(path), json.dumps(IDS)]
            golden[type] = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
            print(type, list(golden[type].items())[:3], flush=True)
    GOLDEN.write_text(json.dumps({"ids": IDS, "types": golden}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
