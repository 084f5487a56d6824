"""Whether mistral.rs reads the UQFF that we write, and answers the same: tests/golden/uqff/check.json.

    python uqff_check.py FOLDER     with jaxllm: writes tiny models of several families and types there, and our answers
    python uqff_check.py FOLDER     with mistralrs 0.9.5, then 0.6.0: loads those of version 1.2, or of 0.2

The outcome of a file is the largest difference of a log-probability (of a logit, for 0.6.0), over the most likely
tokens of three steps, or why mistral.rs does not run it. It rounds activations for GGML's types (differences up to
0.15), and more coarsely for F8Q8 (0.3), and computes in float16 where AFQ's scales are.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from uqff_goldens import PROMPT, ROOT, STEPS, VERSIONS, answer, sources

TYPES = {
    "llama": ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "hqq4", "hqq8", "fp8", "afq2", "afq3", "afq4", "afq6", "afq8"),
    "qwen3": ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    "qwen3_moe": ("q4_0", "afq4"),
    "qwen2": ("q4_0", "hqq8"),
    "mixtral": ("q8_0",),
    "phi3": ("hqq4", "fp8"),
    "gpt_oss": ("q4_0", "mxfp4"),
    "deepseek": ("q4_0",),
}
TYPES["llama"] += ("f8q8", "mxfp4")


def write(folder: Path) -> None:
    """Models as UQFF, with our logits after PROMPT and after the tokens that we then choose."""
    import numpy as np

    import jaxllm
    from jaxllm.convert import convert

    for name, types in TYPES.items():
        source = sources(folder / "sources", name)
        for type in types:
            for version in ("1.2", "0.2"):
                if version == "0.2" and (name == "gpt_oss" or type in ("f8q8", "mxfp4")):
                    continue
                path = folder / f"{version} {name} {type}"
                convert(source, path, to=type, container="uqff", uqff_version=version, progress=False)
                model, tokens, rows = jaxllm.load(path, dtype="float32", progress=False), list(PROMPT), []
                for _ in range(STEPS):
                    rows.append(np.asarray(model.logits([tokens])[0, -1]).tolist())
                    tokens.append(int(np.argmax(rows[-1])))
                (path / "ours.json").write_text(json.dumps(rows))


def compare(path: Path, version: str) -> Any:
    """The largest difference, or why there is none."""
    import mistralrs
    import numpy as np

    old = version == "0.1"
    [file] = path.glob("*.uqff")
    try:
        which = mistralrs.Which.Plain(
            model_id=str(path), dtype=mistralrs.ModelDType.F32, from_uqff=file.name if old else str(file)
        )
        steps = answer(old, which)
    except BaseException as error:  # panics too
        return str(error).split("\n")[0][:160]
    off = 0.0
    # It stops at an end of text.
    for step, row in zip(steps, json.loads((path / "ours.json").read_text()), strict=False):
        ours = np.array(row) if old else np.array(row) - np.log(np.exp(row).sum())
        theirs = np.array(step["logits" if old else "logprobs"])
        off = max(off, float(np.abs(ours[step["tokens"]] - theirs).max()))
        if step["tokens"][0] != int(np.argmax(ours)):
            break  # a near tie, after which the tokens differ
    return round(off, 5)


def main() -> None:
    folder = Path(sys.argv[1])
    if importlib.util.find_spec("mistralrs") is None:
        write(folder)
        return
    version = VERSIONS[importlib.metadata.version("mistralrs")]
    if len(sys.argv) > 2:
        print("\n" + json.dumps(compare(Path(sys.argv[2]), version)))
        return
    outcome, file = {}, ROOT / "check.json"
    for path in sorted(folder.glob("0.2 *" if version == "0.1" else "1.2 *")):
        done = subprocess.run([sys.executable, __file__, str(folder), str(path)], capture_output=True, text=True)
        said = [line for line in done.stdout.splitlines() if line.startswith(('"', "0", "1", "2"))]
        outcome[path.name] = json.loads(said[-1]) if said else f"dies with {done.returncode}"
        print(path.name, outcome[path.name])
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(dict(sorted({**known, **outcome}.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
