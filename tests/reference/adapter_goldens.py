"""Writes tests/golden/adapters: small random adapters of PEFT for tiny checkpoints, and what peft computes with them.

Run with a Python that has torch, transformers, peft and safetensors (README.md beside the adapters names the versions).
Without arguments the directories and the README are written anew; with --check nothing is written, and every adapter is
loaded by peft again and compared with its golden.

Each directory is what `save_pretrained` writes, plus golden.npz:

    logits           float32 [2, T, V]  of the float32 base with the adapter, for the `tokens` of the base's golden.npz
    delta:<name>     float64            what `get_delta_weight` gives for that tensor, as [..., out, in], added up with
                                        the cosines of 0, 1, 2, ... as weights; for each tensor that peft adds to
    logits_sum       (second only)      of this adapter scaled by -0.5 and the adapter `patterns`

Every tensor of an adapter is random, so that its change is half as large as the matrix: peft begins with zeros.
A golden is refused if the same model in float64 gives other logits: it would be a near tie of experts.
"""

import argparse
import json
import platform
import shutil
import sys
import warnings
import zlib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_checkpoints import directory_size, forward

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ROOT = GOLDEN / "adapters"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Case:
    """An adapter for the checkpoint `base`. `config` are arguments of LoraConfig."""

    what: str
    base: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


def cases() -> dict[str, Case]:
    return {
        "patterns": Case(
            "all-linear but o_proj; rsLoRA; patterns of ranks and alphas, of which the first counts",
            "checkpoints/llama",
            {
                "target_modules": "all-linear",
                "exclude_modules": ["o_proj"],
                "r": 2,
                "lora_alpha": 3,
                "use_rslora": True,
                "rank_pattern": {r"layers\.1\..*_proj": 4, "v_proj": 1},
                "alpha_pattern": {"mlp.up_proj": 5, "k_proj|up_proj": 7},
            },
        ),
        "second": Case(
            "a regular expression as target; alpha / r; its sum with the first",
            "checkpoints/llama",
            {"target_modules": r".*\.(q|v|down)_proj", "r": 4, "lora_alpha": 6},
        ),
        "ends": Case(
            "embeddings and head",
            "checkpoints/llama",
            {"target_modules": ["embed_tokens", "lm_head", "down_proj"], "r": 3, "lora_alpha": 6},
        ),
        "biases": Case(
            "biases of the adapted layers (lora_only), bfloat16",
            "checkpoints/qwen2",
            {"target_modules": ["q_proj", "k_proj", "o_proj"], "r": 2, "lora_alpha": 4, "bias": "lora_only"},
            torch.bfloat16,
        ),
        "tied": Case(
            "the embedding table of a model whose head is the same table, which stays",
            "checkpoints/qwen2",
            {"target_modules": ["embed_tokens", "v_proj"], "r": 2, "lora_alpha": 4},
        ),
        "modules": Case(
            "modules_to_save: the head and all norms of queries; float16",
            "checkpoints/qwen3",
            {"target_modules": ATTENTION, "r": 2, "lora_alpha": 2, "modules_to_save": ["lm_head", "q_norm"]},
            torch.float16,
        ),
        "fused": Case(
            "fused qkv_proj and gate_up_proj",
            "checkpoints/phi3",
            {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "r": 3, "lora_alpha": 3},
        ),
        "experts": Case(
            "stacks of experts and the router as target_parameters, another rank for one stack",
            "checkpoints/qwen3_moe_b",
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"],
                "r": 2,
                "lora_alpha": 4,
                "rank_pattern": {r".*\.gate_up_proj": 3},
            },
        ),
        "one_stack": Case(
            "only the stacks of one name, of one layer",
            "checkpoints/qwen3_moe_b",
            {"target_modules": [], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"], "r": 2, "lora_alpha": 4},
        ),
        "each_expert": Case(
            "experts one by one, as peft saved them before transformers 5",
            "checkpoints/mixtral",
            {"target_modules": ["w1", "w2", "w3", "v_proj"], "r": 2, "lora_alpha": 4},
        ),
        "latents": Case(
            "projections of MLA, and stacks of experts",
            "deepseek/v3",
            {
                "target_modules": r".*\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                "r": 2,
                "lora_alpha": 4,
            },
        ),
        "transposed": Case(
            "stacks stored as [experts, in, out], square ones too; router and attention",
            "gpt_oss/square",
            {
                "target_modules": [*ATTENTION],
                "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"],
                "r": 2,
                "lora_alpha": 4,
            },
        ),
    }


def load_base(name: str) -> torch.nn.Module:
    """The checkpoint in float32; its logits have to be those of its golden."""
    path = GOLDEN / name
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **eager).eval()
    with np.load(path / "golden.npz") as golden:
        assert np.abs(forward(model, tokens_of(name)).numpy() - golden["logits"]).max() < 1e-4
    return model


def tokens_of(name: str) -> torch.Tensor:
    with np.load(GOLDEN / name / "golden.npz") as golden:
        return torch.tensor(golden["tokens"]).long()


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Random values for whatever was trained."""
    gen = torch.Generator().manual_seed(seed)
    ranks = {id(p): (m.r["default"], m.scaling["default"]) for m in lora_layers(model) for p in m.parameters()}
    for name, p in model.named_parameters():
        with torch.no_grad():
            if ".lora_A." in name:
                p.normal_(0.0, p.shape[1] ** -0.5, generator=gen)
            elif ".lora_embedding_A." in name:
                p.normal_(0.0, 0.3, generator=gen)
            elif ".lora_" in name:
                rank, scale = ranks[id(p)]
                p.normal_(0.0, 0.5 / (scale * rank**0.5), generator=gen)
            elif p.requires_grad and p.ndim == 1:
                p.add_(torch.empty_like(p).normal_(0.0, 0.3, generator=gen))
            elif p.requires_grad:
                p.add_(torch.empty_like(p).normal_(0.0, 0.3 * p.shape[-1] ** -0.5, generator=gen))


def lora_layers(model: torch.nn.Module) -> list[LoraLayer]:
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def save(case: Case, path: Path, seed: int) -> None:
    """Writes the adapter's directory, without a golden."""
    model = get_peft_model(load_base(case.base), LoraConfig(**case.config, task_type="CAUSAL_LM"))
    randomize(model, seed)
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path)
    (path / "README.md").unlink()
    finish(case, path)


def save_each_expert(case: Case, path: Path, seed: int) -> None:
    """What peft saved for Mixtral when each expert was a module of its own."""
    rng, config = torch.Generator().manual_seed(seed), transformers.AutoConfig.from_pretrained(GOLDEN / case.base)
    hidden, width = config.hidden_size, config.intermediate_size
    shapes = {"w1": (width, hidden), "w3": (width, hidden), "w2": (hidden, width)}
    tensors = {}
    for i in range(config.num_hidden_layers):
        layer = f"base_model.model.model.layers.{i}"
        found = {
            f"{layer}.block_sparse_moe.experts.{e}.{w}": shape
            for e in range(config.num_local_experts)
            for w, shape in shapes.items()
        } | {f"{layer}.self_attn.v_proj": (config.num_key_value_heads * hidden // config.num_attention_heads, hidden)}
        for name, (out, in_) in found.items():
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, in_, generator=rng) * in_**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=rng) * 0.2
    shutil.rmtree(path, ignore_errors=True)
    LoraConfig(**case.config, task_type="CAUSAL_LM", inference_mode=True).save_pretrained(path)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    finish(case, path)


def finish(case: Case, path: Path) -> None:
    """Lists of a configuration in order (peft keeps sets), no path of this machine, tensors in the case's dtype."""
    config = json.loads((path / "adapter_config.json").read_text()) | {"base_model_name_or_path": case.base}
    config = {key: sorted(v) if isinstance(v, list) else v for key, v in config.items()}
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: x.to(case.dtype) for name, x in load_file(path / "adapter_model.safetensors").items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def golden(name: str, case: Case) -> dict[str, np.ndarray]:
    model = PeftModel.from_pretrained(load_base(case.base), ROOT / name, autocast_adapter_dtype=True).eval()
    tokens = tokens_of(case.base)
    out = {"logits": forward(model, tokens).numpy()} | deltas(model)
    if name == "second":
        model.load_adapter(ROOT / "patterns", "patterns")
        for layer in lora_layers(model):
            layer.set_scale("default", -0.5)
        model.base_model.set_adapter(["default", "patterns"])
        out["logits_sum"] = forward(model, tokens).numpy()
    logits = out.get("logits_sum", out["logits"])
    assert np.abs(forward(model.double(), tokens).numpy() - logits).max() < 1e-4, "a near tie: choose another seed"
    return out


def deltas(model: torch.nn.Module) -> dict[str, np.ndarray]:
    found = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        parameter = getattr(layer, "parameter_name", "weight")
        name = path.removeprefix("base_model.model.").replace(".base_layer", "") + "." + parameter
        delta = layer.get_delta_weight("default").detach().double()
        if delta.ndim == 3 and not layer._did_swap_in_out_features:
            delta = delta.transpose(1, 2)
        flat = delta.reshape(-1).numpy()
        found[f"delta:{name}"] = np.asarray(flat @ np.cos(np.arange(flat.size)))
    return found


def write_readme(all_cases: dict[str, Case]) -> None:
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "peft", "safetensors", "numpy"))
    lines = [
        "# Small random adapters",
        "",
        "Written by `tests/reference/adapter_goldens.py`, which describes golden.npz.",
        f"Made with Python {platform.python_version()}, {packages}.",
        "With `--check` it compares every directory with its golden. The weights are random: nothing here comes from a",
        "published adapter. Do not edit by hand. `adapter_gguf.py` and `adapter_mlx.py` wrote what is in gguf and mlx.",
        "",
        "| directory | KB | base | what is special |",
        "|---|---|---|---|",
        *(f"| {n} | {directory_size(ROOT / n) / 1024:.0f} | {c.base} | {c.what} |" for n, c in all_cases.items()),
    ]
    (ROOT / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    failures = 0
    for name, case in cases().items():
        path = ROOT / name
        if not args.check:
            (save_each_expert if name == "each_expert" else save)(case, path, zlib.crc32(name.encode()))
            np.savez_compressed(path / "golden.npz", **golden(name, case))
        with np.load(path / "golden.npz") as z:
            expected, got = dict(z), golden(name, case)
        worst = max(np.abs(got[key] - expected[key]).max() for key in expected.keys() | got.keys())
        with np.load(GOLDEN / case.base / "golden.npz") as z:
            change = np.abs(z["logits"] - expected["logits"]).max()
        failures += not worst < 1e-4
        print(f"{name}: off by {worst:.2g}, {len(expected) - 1} deltas, largest change of a logit {change:.2f}")
    if not args.check:
        write_readme(cases())
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
