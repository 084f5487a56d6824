"""What GPTQ costs the demo model, by gptqmodel and by us: writes tests/golden/gptq_perplexity.json.

Both quantize the same bfloat16 directory, 4 bits in symmetric groups of 64, calibrated on the same pieces of text; one
reader (ours) then measures the perplexity of another text. In an environment of Python 3.11 with torch, transformers,
optimum and gptqmodel 7.7.0:

    python gptq_perplexity.py quantize DIRECTORY TEXT OUT     (gptqmodel's part)

and where jaxllm is installed:

    python tests/reference/gptq_perplexity.py PYTHON_OF_THAT_ENVIRONMENT
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "golden" / "gptq_perplexity.json"
CHUNK, CHUNKS = 512, 24


def calibration_text() -> str:
    """Prose that every Python has."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:50_000]


def quantize(directory: str, text: str, out: str) -> None:
    os.cpu_count = lambda: 4  # of two cores it leaves itself one thread, and then asks for two
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(Path(text).read_text(), add_special_tokens=False)["input_ids"]
    pieces = [ids[i * CHUNK : (i + 1) * CHUNK] for i in range(min(CHUNKS, len(ids) // CHUNK))]
    model = GPTQModel.load(directory, QuantizeConfig(bits=4, group_size=64, sym=True, desc_act=False), device="cpu")
    model.quantize([{"input_ids": p, "attention_mask": [1] * len(p)} for p in pieces], batch_size=1)
    model.save(out)


def main(python: str) -> None:
    import jaxllm
    from jaxllm.convert import convert
    from jaxllm.perplexity import perplexity

    held_out = (TESTS / "golden" / "perplexity.txt").read_text(encoding="utf-8")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").write_text(calibration_text())
        convert("demo", folder / "bf16", to="bfloat16", progress=False)
        convert(folder / "bf16", folder / "ours", to="gptq4", text=folder / "text", progress=False)
        run = [python, __file__, "quantize", folder / "bf16", folder / "text", folder / "theirs"]
        subprocess.run(list(map(str, run)), check=True)
        for each in ("bf16", "ours", "theirs"):
            model = jaxllm.load(folder / each, dtype="float32", progress=False)
            found[each] = round(perplexity(model, held_out), 3)
            print(each, found[each], flush=True)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    quantize(*sys.argv[2:]) if sys.argv[1] == "quantize" else main(sys.argv[1])
