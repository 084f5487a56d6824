"""Sound inputs of every kind that comes from strangers, made once in a temporary folder. Damage is done to copies."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import hf_to_gguf
import numpy as np
import test_demo_layout
import test_importance
import tiny_ggml
import tiny_gguf
import tiny_hf
from gguf import GGMLQuantizationType as T
from quantized_writers import CONFIGS, quantized_checkpoint, read_safetensors, write_safetensors
from test_tokenizer_gguf import BYTES, TEXT
from tiny_gguf import Tiny

GOLDEN = Path(__file__).parent.parent / "golden"
TEMPLATE = """{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}
{%- if tools is defined and loop.first %}{{ tools | tojson(indent=2) }}{% endif %}{{ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TRAINING = (
    {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello, world!"}]},
    {"prompt": "1 + 1 =", "completion": " 2"},
    {"text": "Once upon a time \u00e9\u4e2d."},
)
# A body of each endpoint of the server, with most of the fields that there are.
COMMON = {"model": "tiny", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "stream": False}
COMMON |= {"frequency_penalty": 0.1, "presence_penalty": 0.1, "repetition_penalty": 1.1, "metadata": {"a": "b"}}
SAMPLED = COMMON | {"n": 2, "stop": ["x", "yy"], "logit_bias": {"3": -1, "5": 2.5}, "max_tokens": 3}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}
FUNCTION = {"name": "look", "description": "Looks.", "parameters": SCHEMA, "strict": True}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
TALK: list[dict] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Look."}], "name": "ann"},
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "1"},
]
ITEMS: list[dict] = [
    {"role": "user", "content": [{"type": "input_text", "text": "Look."}]},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {"type": "function_call", "call_id": "1", "name": "look", "arguments": '{"a": 1}'},
    {"type": "function_call_output", "call_id": "1", "output": "2"},
]
TOOLS = [{"type": "function", "function": FUNCTION}]
FORM = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
BODIES: dict[str, list[dict]] = {
    "chat": [
        SAMPLED | {"messages": TALK[:1], "response_format": FORM},
        SAMPLED | {"messages": TALK, "tools": TOOLS, "tool_choice": "auto", "logprobs": True, "top_logprobs": 2},
        SAMPLED
        | {"messages": TALK[:2], "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}},
        COMMON | {"messages": TALK[:2], "max_completion_tokens": 2, "chat_template_kwargs": {"x": [1]}, "stream": True},
    ],
    "completions": [
        SAMPLED | {"prompt": ["Hello", "world"], "echo": True},
        SAMPLED | {"prompt": [1, 2, 3], "logprobs": 2, "stream": True, "stream_options": {"include_usage": True}},
    ],
    "responses": [
        COMMON | {"input": ITEMS, "tools": [{"type": "function", **FUNCTION}], "max_output_tokens": 2},
        COMMON
        | {"input": "Hello", "instructions": "Be kind.", "reasoning": {"effort": "low"}, "truncation": "disabled"},
        COMMON | {"input": "Hello", "text": {"format": {"type": "json_schema", **FORM["json_schema"]}}, "stream": True},
    ],
}
TOPOLOGY = "0-8: {isq: q3_k}\n8:\n  isq: q8_0\n'/attn\\.q_proj/': {isq: q6_k, device: 'cuda[0]'}\n9-12:\n"


MEANS = {"blk.0.attn_q.weight": np.ones(32, np.float32), "blk.1.ffn_down.weight": np.ones(48, np.float32)}
LEGACY = b"".join(
    struct.pack("<i", len(name)) + name.encode() + struct.pack(f"<ii{x.size}f", 7, x.size, *x)
    for name, x in MEANS.items()
)
KEYED = b"".join(
    struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<Q{x.size}f", x.size, *x) for name, x in MEANS.items()
)
BY_POSITION = struct.pack("<QQBQ32f", 2, 0, 1, 32, *[1.0] * 32) + struct.pack("<QB", 1, 0)
SUMS = {
    f"{name}.{end}": x[None] if end == "in_sum2" else x[None, :1]
    for name, x in MEANS.items()
    for end in ("in_sum2", "counts")
}
IMPORTANCE: dict[str, Callable[[Path], object]] = {
    "legacy": lambda path: path.write_bytes(struct.pack("<i", 2) + LEGACY + struct.pack("<ii", 7, 4) + b"wiki"),
    "keyed": lambda path: path.write_bytes(struct.pack("<Q", 2) + KEYED),
    "by position": lambda path: path.write_bytes(BY_POSITION),
    "gguf": lambda path: test_importance.gguf_file(path, SUMS),
}


@dataclass(frozen=True)
class Seed:
    """A sound input.

    folder: its files.
    name: which of them is opened; "" for the folder.
    kind: how it is tried, see `trial.TRIALS`.
    base: for an adapter and what else belongs to a model, the model's golden; for a request, the endpoint.
    """

    folder: Path
    name: str = ""
    kind: str = "checkpoint"
    base: str = "checkpoints/llama"


def make(root: Path) -> dict[str, list[Seed]]:
    """All of them, below `root`, by the kinds that the table of outcomes shows."""
    made: dict[str, list[Seed]] = {}

    def add(kind: str, name: str, file: str = "", trial: str = "checkpoint", base: str = "checkpoints/llama") -> Path:
        folder = root / kind.replace(" ", "_") / name
        folder.mkdir(parents=True)
        made.setdefault(kind, []).append(Seed(folder, file, trial, base))
        return folder

    for golden in folders(GOLDEN / "checkpoints", GOLDEN / "deepseek", GOLDEN / "gpt_oss"):
        copied(golden, add("Hugging Face directories", golden.name))
    for golden in folders(GOLDEN / "checkpoints")[::4]:
        sharded(copied(golden, add("indexes of files", golden.name)))
    plain = {name: tiny_hf.write(root / "plain" / name, name) for name in ("llama", "qwen3_moe", "deepseek")}
    for name in CONFIGS:
        model = "qwen3_moe" if name.startswith(("mlx", "mxfp4")) else "llama"
        written, _ = quantized_checkpoint(plain[model], root / "quantized" / name, name, np.random.default_rng(0))
        copied(written, add("quantized directories", name))
    for name in ("harmony", "bpe"):
        tokenizer(name, copied(plain["llama"], add("tokenizer.json", name)))
    for name in folders(GOLDEN / "checkpoints"):
        kind = json.loads((name / "config.json").read_text())["model_type"]
        if kind in hf_to_gguf.ARCHITECTURES and name.name not in ("mixtral_stacked", "mixtral_transposed", "qwen3_moe"):
            hf_to_gguf.convert(name, add("GGUF", name.name, "model.gguf") / "model.gguf")
    for type in (T.Q2_K, T.Q4_K, T.Q8_0):
        tiny = Tiny(layers=1, hidden=256, intermediate=256, head_dim=64, type=type)
        tiny_gguf.write(add("GGUF", type.name, "model.gguf") / "model.gguf", tiny)
    for name in ("llama", "gpt2", "gemma4"):
        file = add("GGUF vocabularies", name, "model.gguf") / "model.gguf"
        tiny_gguf.write(file, Tiny(layers=1, vocab=len(vocabulary(name)["tokenizer.ggml.tokens"])), vocabulary(name))
    split(add("GGUF, split", "parts", "m-00001-of-00003.gguf"))
    for kind in tiny_ggml.BEGINNINGS:
        type = T.F16 if kind != "ggjt 3" else T.Q8_0
        tiny = Tiny(layers=1, kv_heads=4, vocab=len(tiny_ggml.VOCABULARY), type=type)
        tiny_ggml.write(add("GGML", kind, "model.bin") / "model.bin", kind, tiny)
    for name in ("v2", "v3"):
        copied(test_demo_layout.made(root / "made", name), add("DeepSeek's demo", name))
    for generation in ("0.1", "1.0", "1.2"):
        for golden in folders(GOLDEN / "uqff" / generation):
            file = sorted(golden.glob("*.uqff"))[0]
            copied(
                golden, add(f"UQFF {'1.x' if generation > '1' else '0.x'}", f"{generation} {golden.name}", file.name)
            )
    for golden in folders(GOLDEN / "adapters", GOLDEN / "adapters" / "mlx"):
        config = json.loads((golden / "adapter_config.json").read_text())
        base = config.get("base_model_name_or_path") or config["model"]
        copied(golden, add("adapters", f"{golden.parent.name} {golden.name}", trial="adapter", base=base))
    for name, base in {"ends": "llama", "second": "llama", "experts": "qwen2_moe"}.items():
        folder = add("adapters", f"gguf {name}", f"{name}.gguf", "adapter", f"checkpoints/{base}")
        shutil.copy(GOLDEN / "adapters" / "gguf" / f"{name}.gguf", folder)
    for name, write in IMPORTANCE.items():
        write(add("importance matrices", name, "i.imatrix", "importance") / "i.imatrix")
    (add("topologies", "usual", "topology.yaml", "topology") / "topology.yaml").write_text(TOPOLOGY)
    shutil.copy(
        GOLDEN / "checkpoints" / "gemma3n" / "matformer.csv", add("MatFormer", "usual", "matformer.csv", "matformer")
    )
    (add("chat templates", "usual", "chat.jinja", "template") / "chat.jinja").write_text(TEMPLATE)
    shutil.copy(
        GOLDEN / "gpt_oss" / "harmony" / "chat_template.jinja",
        add("chat templates", "harmony", "chat_template.jinja", "template"),
    )
    for number, record in enumerate(TRAINING):
        lines = [json.dumps(each) for each in (record, *TRAINING)]
        (add("training data", str(number), "data.jsonl", "training") / "data.jsonl").write_text("\n".join(lines))
    for endpoint, several in BODIES.items():
        for number, body in enumerate(several):
            folder = add(f"requests, {endpoint}", str(number), "body.json", "request", base=endpoint)
            (folder / "body.json").write_text(json.dumps(body))
    return made


def folders(*parents: Path) -> list[Path]:
    """The folders of checkpoints or adapters in these."""
    found = [folder for parent in parents for folder in sorted(parent.iterdir())]
    return [
        folder for folder in found if {"config.json", "adapter_config.json"} & {file.name for file in folder.glob("*")}
    ]


def copied(source: Path, target: Path) -> Path:
    """The files of `source` that are part of what it is, in `target`."""
    for file in source.iterdir():
        if file.is_file() and file.suffix not in (".npz", ".npy") and file.name not in ("config_old.json",):
            shutil.copy(file, target)
    return target


def sharded(folder: Path) -> None:
    """A directory's tensors in two files and an index."""
    if not (folder / "model.safetensors").exists():
        return
    tensors = read_safetensors(folder / "model.safetensors")[0]
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-{i + 1}.safetensors": names[i::2] for i in range(2)}
    for file, listed in files.items():
        write_safetensors(folder / file, {name: tensors[name] for name in listed})
    index = {"weight_map": {name: file for file, listed in files.items() for name in listed}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizer(name: str, folder: Path) -> None:
    harmony = GOLDEN / "gpt_oss" / "harmony"
    shutil.copy(harmony / "generation_config.json", folder)
    config = json.loads((harmony / "tokenizer_config.json").read_text())
    if name == "harmony":
        shutil.copy(harmony / "chat_template.jinja", folder)
        shutil.copy(harmony / "tokenizer.json", folder)
    else:
        from jaxllm.tokenizer.gguf import build

        build(vocabulary("llama")).save(str(folder / "tokenizer.json"))
        config |= {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def vocabulary(model: str) -> dict[str, object]:
    """GGUF metadata of a vocabulary of this kind."""
    more = {"tokenizer.chat_template": TEMPLATE}
    if model == "gpt2":
        return {**BYTES["metadata"], "tokenizer.ggml.pre": "llama-bpe", **more}
    metadata = {**TEXT["metadata"], "tokenizer.ggml.model": model}
    return {**metadata, **({} if model == "llama" else {"tokenizer.ggml.merges": TEXT["merges"]}), **more}


def split(folder: Path) -> None:
    """A GGUF file in three parts, by gguf-py."""
    tiny_gguf.write(folder / "whole", Tiny(layers=1))
    reader = gguf.GGUFReader(folder / "whole")
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=5)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    (folder / "whole").unlink()
