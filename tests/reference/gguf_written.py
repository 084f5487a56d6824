"""Which files of ours other programs open, and what they make of them: tests/golden/gguf_written.json.

    python gguf_written.py write FOLDER          with this project's environment: writes what the others open
    python gguf_written.py llama.cpp FOLDER      with an environment that has llama-cpp-python
    python gguf_written.py transformers FOLDER   with an environment that has transformers

The tiny checkpoints are Hugging Face directories, with logits that transformers computed when they were made. Llama.cpp
computes logits of the GGUF files that we make of them, and transformers of the directories that we make of the GGUF
files of hf_to_gguf.py. Both also tokenize: llama.cpp with vocabularies that have been a tokenizer.json, transformers
with the demo's as a directory. Hashes say which bytes they were given.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent.parent
GOLDEN = TESTS / "golden"
OUTCOME = GOLDEN / "gguf_written.json"
# What llama.cpp computes in another way, whatever a file says.
OTHERWISE = {
    "checkpoints/qwen3_moe_b": "experts' weights always sum to one",
    "deepseek/v2": "groups are scored by their two best experts",
    "deepseek/v2_lite": "not loaded: whether queries have a low rank goes by the number of layers",
    "deepseek/v3_no_q_lora": "likewise",
    "deepseek/v3_plain_rope": "norms of latents have the model's epsilon, which is large here",
    "gpt_oss/bf16": "the ends of YaRN's ramp are rounded",
}
WINDOWS = {"checkpoints/mistral": 8}  # architecture llama has none, so only as many tokens are compared
F32 = 0  # ggml's type, for the cache
CHAT = [{"role": "user", "content": "Why is the sky blue?"}]


def write(folder: Path) -> None:
    sys.path.insert(0, str(TESTS))
    import conftest  # noqa: F401
    from hf_to_gguf import convert
    from test_gguf_writing import (
        CHECKPOINTS,
        NO_TOKENS,
        TEXT,
        demo_path,
        there_and_back,
        write_directory_of,
        write_gguf,
    )

    from jaxllm.checkpoint.gguf import open_gguf
    from jaxllm.checkpoint.gguf_writing import header

    hashes: dict[str, dict[str, str]] = {"headers": {}, "configs": {}}
    for name in CHECKPOINTS:
        stem = folder / name.replace("/", "_")
        hashes["headers"][name] = sha256(write_gguf(stem.with_suffix(".gguf"), GOLDEN / name, NO_TOKENS))
        convert(GOLDEN / name, stem.with_suffix(".theirs"))
        hashes["configs"][name] = sha256(write_directory_of(stem, stem.with_suffix(".theirs")))
    (folder / "hashes.json").write_text(json.dumps(hashes))
    demo = folder / "demo"
    demo.mkdir(exist_ok=True)
    metadata = {"demo": open_gguf(demo_path()).metadata, "text": TEXT["metadata"]}
    for name, original in metadata.items():
        files, vocabulary = there_and_back(original)
        (folder / f"{name}.gguf").write_bytes(header({"general.architecture": "llama", **vocabulary}, [])[0])
        for file, text in files.items():
            if name == "demo":
                (demo / file).write_bytes(text)


def llama_cpp(folder: Path) -> dict[str, object]:
    import llama_cpp

    outcome: dict[str, object] = {}
    for name, header in json.loads((folder / "hashes.json").read_text())["headers"].items():
        if name in OTHERWISE:
            continue
        path, golden = folder / f"{name.replace('/', '_')}.gguf", np.load(GOLDEN / name / "golden.npz")
        llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, type_k=F32, type_v=F32, verbose=False)
        errors = []
        for tokens, logits in zip(golden["tokens"], golden["logits"], strict=True):
            count = WINDOWS.get(name, len(tokens))
            llama.reset()
            llama.eval(tokens[:count].tolist())
            errors.append(np.abs(np.array(llama.scores[:count]) - logits[:count]).max())
        outcome[name] = {"header": header, "error": round(float(max(errors)), 7)}
    return {"version": llama_cpp.__version__, "files": outcome, "vocabularies": vocabularies(folder)}


def vocabularies(folder: Path) -> dict[str, dict[str, object]]:
    """On how many texts llama.cpp's ids differ from those that it gave for the original vocabulary."""
    import llama_cpp

    smollm2, text = (json.loads((GOLDEN / f"tokenizer_{name}.json").read_text()) for name in ("smollm2", "text"))
    names = smollm2["names"]["smollm"]
    wanted = {
        "demo": (smollm2["texts"], [ids[i] for ids, i in zip(smollm2["ids"], names, strict=True)]),
        "text": (text["texts"], text["cases"]["llama"]["ids"]),
    }
    outcome: dict[str, dict[str, object]] = {}
    for name, (texts, ids) in wanted.items():
        path = folder / f"{name}.gguf"
        llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        got = [llama.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
        differ = sum(a != b for a, b in zip(got, ids, strict=True))
        outcome[name] = {"header": sha256(path.read_bytes()), "texts": len(texts), "differ": differ}
    return outcome


def transformers(folder: Path) -> dict[str, object]:
    import torch
    import transformers

    models = {}
    for name, config in json.loads((folder / "hashes.json").read_text())["configs"].items():
        golden, path = np.load(GOLDEN / name / "golden.npz"), folder / name.replace("/", "_")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"], (name, info)
        with torch.no_grad():
            logits = model.eval()(torch.tensor(golden["tokens"]).long()).logits.numpy()
        models[name] = {"config": config, "error": round(float(np.abs(logits - golden["logits"]).max()), 7)}
    demo = folder / "demo"
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    texts = json.loads((GOLDEN / "tokenizer_smollm2.json").read_text())["texts"][:40]
    return {
        "version": transformers.__version__,
        "models": models,
        "files": {path.name: sha256(path.read_bytes()) for path in sorted(demo.iterdir())},
        "texts": texts,
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "chat": CHAT,
        "chat_ids": tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False),
        "eos": tokenizer.eos_token_id,
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "write":
        write(folder)
        return
    outcome = json.loads(OUTCOME.read_text()) if OUTCOME.exists() else {}
    outcome[command] = {"llama.cpp": llama_cpp, "transformers": transformers}[command](folder)
    OUTCOME.write_text(json.dumps(outcome, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
