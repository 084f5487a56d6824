"""Writes tests/golden/uqff: tiny models as UQFF files that mistral.rs wrote, and what it computes with them.

Run with Pythons that have mistralrs, numpy and ml_dtypes, one for each version of the format:

    mistralrs 0.9.5 -> golden/uqff/1.2      mistralrs 0.8.4 -> golden/uqff/1.0      mistralrs 0.6.0 -> golden/uqff/0.1

A folder there is a model, with a file for each type. Beside them, golden.json has for each type what mistral.rs answers
to PROMPT: for each step the most likely tokens, and their log-probabilities; or their logits, because what versions
before 0.8.5 call a log-probability is the decimal logarithm of a logit. `loads` says whether these come from the file,
or, as `error` says that it cannot be read back, from the model that the file was written from. Without `steps` that one
cannot be run either.

Sources are `sources`, which tests make anew; some are of tests/golden.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

import tiny_hf  # noqa: E402

ROOT = TESTS / "golden" / "uqff"
VERSIONS = {"0.9.5": "1.2", "0.8.4": "1.0", "0.6.0": "0.1"}
PROMPT, STEPS, TOP = [3, 17, 5, 40, 22, 9], 3, 20
RUNNERS: list[Any] = []  # 0.6.0 panics where one is dropped
LEGACY = ("q4_0", "hqq4", "fp8", "afq4")
AFQ = tuple(f"afq{bits}" for bits in (2, 3, 4, 6, 8))
TYPES: dict[str, dict[str, tuple[str, ...]]] = {
    "1.2": {
        "llama": ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1", "hqq4", "hqq8", "fp8", *AFQ, "f8q8", "mxfp4"),
        "qwen3": ("q2k", "q3k", "q4k", "q5k", "q6k", "q8k"),
        "qwen3_moe": ("q4_0", "afq4"),
        "qwen2": ("q4_0", "fp8", "afq4"),
        "mixtral": ("q8_0",),
        "phi3": ("hqq4",),
        "gpt_oss": ("q4_0", "mxfp4"),
        "deepseek": ("q4_0",),
    },
    "1.0": {"llama": ("q4_0", "afq4")},
    "0.1": {
        "llama": LEGACY,
        "qwen3_moe": ("q4_0", "afq4"),
        "qwen2": ("hqq4",),
        "mixtral": ("hqq4",),
        "phi3": ("fp8",),
        "deepseek": ("q4_0",),
    },
}

USUAL = {
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "eos_token_id": 2,
    "bos_token_id": 1,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "tie_word_embeddings": False,
}
QWEN = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 1}
SPARSE = QWEN | {"decoder_sparse_step": 1, "mlp_only_layers": []}
DEEPSEEK = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "num_key_value_heads": 4,
    "ep_size": 1,
    "rope_scaling": None,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
}


def sources(folder: Path, name: str) -> Path:
    """A Hugging Face directory of one of these models, as mistral.rs wants it."""
    path = folder / name
    if name == "llama":
        tiny_hf.write(path, "llama", intermediate_size=64, vocab_size=64)
    elif name == "qwen3":  # rows of 256; those of o_proj and down_proj are too short for K-quants
        sizes = {"hidden_size": 256, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64}
        tiny_hf.write(path, "llama", model_type="qwen3", **sizes)
    elif name in ("qwen3_moe", "deepseek"):
        tiny_hf.write(path, name)
    else:
        golden = TESTS / "golden" / ("gpt_oss/mxfp4" if name == "gpt_oss" else f"checkpoints/{name}")
        shutil.copytree(golden, path)
    config = json.loads((path / "config.json").read_text())
    rope = dict(config.get("rope_parameters") or {})
    more = {"qwen3": QWEN, "qwen2": QWEN, "qwen3_moe": SPARSE, "deepseek": DEEPSEEK}.get(name, {})
    kind = {"gpt_oss": "GptOss", "qwen3_moe": "Qwen3Moe", "deepseek": "DeepseekV3"}.get(name, name.capitalize())
    config = USUAL | config | more | {"architectures": [f"{kind}ForCausalLM"]}
    config |= {"rope_theta": rope.pop("rope_theta")} if rope else {}
    config |= {"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {}
    (path / "config.json").write_text(json.dumps(config, indent=1))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer(config["vocab_size"])))
    template = {"chat_template": "{{ messages[0]['content'] }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(template))
    return path


def tokenizer(size: int) -> dict[str, Any]:
    """Token i is the word ti."""
    vocabulary = {"<unk>": 0, **{f"t{i}": i for i in range(1, size)}}
    unused = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    pieces = {"pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": decoder, "model": model}
    return {"version": "1.0", "added_tokens": [], **unused, **pieces}


def answer(old: bool, which: Any, isq: str | None = None) -> list[dict[str, list]]:
    """The most likely tokens of each step."""
    os.environ |= {"MISTRALRS_CPU_KV_F32": "1", "HF_HUB_OFFLINE": "1", "RUST_LOG": "error"}
    import mistralrs

    runner = mistralrs.Runner(which=which, in_situ_quant=isq, max_seqs=1, prefix_cache_n=0, token_source="none")
    RUNNERS.append(runner)
    text = " ".join(f"t{i}" for i in PROMPT)
    request = mistralrs.ChatCompletionRequest(
        messages=text, model="default", max_tokens=STEPS, temperature=0.0, logprobs=True, top_logprobs=TOP
    )
    steps = []
    for step in runner.send_chat_completion_request(request).choices[0].logprobs.content[:STEPS]:
        top = [(t.token, 10**t.logprob if old else t.logprob) for t in step.top_logprobs]
        steps.append({"tokens": [t for t, _ in top], "logits" if old else "logprobs": [round(v, 5) for _, v in top]})
    return steps


def one(version: str, source: Path, out: Path, type: str) -> dict[str, Any]:
    """Write a file of this type into `out`, and ask it."""
    import mistralrs

    plain, old, name = mistralrs.Which.Plain, version != "1.2", f"{type}-0.uqff"
    f32, said = mistralrs.ModelDType.F32, dict[str, Any]()
    try:
        said["steps"] = answer(old, plain(model_id=str(source), dtype=f32, write_uqff=str(out / f"{type}.uqff")), type)
    except BaseException as error:  # panics too
        said["error"] = str(error).split("\n")[0][:160]
    try:
        file = name if version == "0.1" else str(out / name)
        said = {"loads": True, "steps": answer(old, plain(model_id=str(out), dtype=f32, from_uqff=file))}
    except BaseException as error:
        said = {"loads": False, "error": str(error).split("\n")[0][:160]} | said
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # a type in a process of its own: some panic
    given = parser.parse_args().one
    if given:
        version, source, out, type = given
        result = one(version, Path(source), Path(out), type)
        print("\n" + json.dumps(result))
        return
    version = VERSIONS[importlib.metadata.version("mistralrs")]
    shutil.rmtree(ROOT / version, ignore_errors=True)
    for name, types in TYPES[version].items():
        with tempfile.TemporaryDirectory() as temporary:
            source, out, said = sources(Path(temporary), name), ROOT / version / name, {}
            out.mkdir(parents=True)
            for type in types:
                command = [sys.executable, __file__, "--one", version, str(source), str(out), type]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                said[type] = json.loads(done.stdout.splitlines()[-1])
                print(version, name, type, "loads" if said[type]["loads"] else said[type]["error"])
        lines = ",\n".join(f" {json.dumps(type)}: {json.dumps(entry)}" for type, entry in said.items())
        (out / "golden.json").write_text(f"{{\n{lines}\n}}\n")
        for file in out.iterdir():
            file.chmod(0o644)


if __name__ == "__main__":
    main()
