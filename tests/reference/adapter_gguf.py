"""Writes tests/golden/adapters/gguf: adapters of PEFT as llama.cpp's converter writes them, and llama.cpp's logits.

Run with a Python that has torch, transformers and gguf; given the sources of llama.cpp (those in the source package of
llama-cpp-python 0.3.36 were used) and the Python of an environment that has llama-cpp-python:

    python tests/reference/adapter_gguf.py LLAMA_CPP PEER_PYTHON

Of each adapter there are `NAME.gguf` and `NAME.npy`: float32 [2, T, V], logits for the `tokens` of its base's
golden.npz, where the base is what tests/hf_to_gguf.py writes, in float32.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from hf_to_gguf import convert  # noqa: E402

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ROOT = GOLDEN / "adapters" / "gguf"
NAMES = ("second", "ends")

PEER = """
import sys
import numpy as np
from llama_cpp import Llama
base, adapter, tokens, out = sys.argv[1:]
model = Llama(base, lora_path=adapter, n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False)
logits = []
for row in np.load(tokens)["tokens"]:
    model.reset()
    model.eval(row.tolist())
    logits.append(np.array(model.scores[: len(row)], np.float32))
np.save(out, np.stack(logits))
"""


def main(sources: str, peer: str) -> None:
    ROOT.mkdir(exist_ok=True)
    for name in NAMES:
        adapter = GOLDEN / "adapters" / name
        base = GOLDEN / json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        made, logits = ROOT / f"{name}.gguf", ROOT / f"{name}.npy"
        command = [sys.executable, f"{sources}/convert_lora_to_gguf.py", "--base", base, "--outtype", "f32"]
        subprocess.run([*command, "--outfile", made, adapter], check=True, env={"PYTHONPATH": f"{sources}/gguf-py"})
        vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
        with tempfile.TemporaryDirectory() as folder:
            more = {"tokenizer.ggml.model": "none", "vocab_size": vocabulary}
            convert(base, Path(folder, "base.gguf"), more_metadata=more)
            subprocess.run([peer, "-c", PEER, f"{folder}/base.gguf", made, base / "golden.npz", logits], check=True)
        apart = np.abs(np.load(logits) - np.load(adapter / "golden.npz")["logits"]).max()
        print(f"{name}: at most {apart:.2g} from peft's logits")  # 9.3e-06 and 5.5e-06


if __name__ == "__main__":
    main(*sys.argv[1:])
