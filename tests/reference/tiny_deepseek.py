"""Writes tests/golden/deepseek: tiny random DeepSeek-V2 and V3 checkpoints, and what transformers computes with them.

Run with a Python that has torch, transformers and safetensors (README.md beside the checkpoints names the versions).
Without arguments the directories and the README are written anew; with --check nothing is written, and every
directory is loaded again and compared with its golden.npz.

Each directory holds

    model.safetensors  the names of the published checkpoints, bfloat16, e_score_correction_bias in float32
    config.json        as transformers 5 spells it
    config_old.json    the same config as DeepSeek published theirs: rope_scaling, scoring_func, no head_dim
    golden.npz         tokens int32 [2, T], logits float32 [2, T, V] of the float32 model,
                       greedy int32 [12], what `generate` appends to the first prompt

FP8 directories follow DeepSeek-V3: `P.weight` is E4M3 and `P.weight_scale_inv` float32 [ceil(out/b0), ceil(in/b1)] for
every projection of attention, MLP and experts; embeddings, head, norms and router stay bfloat16. Their golden is of
the float32 model with the weights w * scale, activations not quantized. transformers does not dequantize them here:
it takes the block size to be shape / grid, which is another one where the last block is smaller.

Weights are drawn as in tiny_checkpoints.py. A seed is refused if rounding could change a token, a group or an expert;
if groups or the bias of the router never change a choice; and if it matters whether the experts of a refused group
score -inf (transformers) or 0 (DeepSeek's own code).
"""

import argparse
import json
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tiny_checkpoints as base
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import EOS, LENGTH, NEW, SMALL, directory_size, forward, generate, rope

ROOT = Path(__file__).resolve().parents[1] / "golden" / "deepseek"
E4M3_MAX = 448.0
COMMON = {
    **SMALL,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
# What DeepSeek's config.json has and transformers 5 does not write.
DEEPSEEK_KEYS = {
    "deepseek_v2": {"scoring_func": "softmax", "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1},
}


@dataclass(frozen=True)
class Case:
    """One checkpoint. `block` quantizes to FP8 in blocks of that size; `mtp` adds a layer that loaders must skip."""

    what: str
    config: transformers.PreTrainedConfig
    seed: int
    block: tuple[int, int] | None = None
    mtp: bool = False


def yarn(mscale: float, mscale_all_dim: float, beta_fast: int = 32, beta_slow: int = 1) -> dict[str, Any]:
    """YaRN from 64 to 256 tokens; the usual betas keep one of 4 frequencies, blend two and divide one."""
    betas = {"beta_fast": beta_fast, "beta_slow": beta_slow}
    scales = {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    return rope(100.0, "yarn", factor=4.0, original_max_position_embeddings=64, **betas, **scales)


def v2(**more: Any) -> transformers.PreTrainedConfig:
    return transformers.DeepseekV2Config(**{**COMMON, "n_shared_experts": 2, "norm_topk_prob": False, **more})


def v3(**more: Any) -> transformers.PreTrainedConfig:
    groups = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    return transformers.DeepseekV3Config(
        **{**COMMON, "n_shared_experts": 1, "num_nextn_predict_layers": 0, **groups, **more}
    )


def cases() -> dict[str, Case]:
    plain = {**rope(100.0), "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    return {
        "v2_lite": Case(
            "V2 without q_lora: softmax, the greedy top 3 of 8 experts, 2 shared; 4 of 12 dimensions rotated, no YaRN",
            v2(
                **rope(100.0),
                q_lora_rank=None,
                qk_rope_head_dim=4,
                topk_method="greedy",
                n_group=1,
                topk_group=1,
                routed_scaling_factor=1.0,
            ),
            1,
        ),
        "v2": Case(
            "V2: q_lora, softmax, 2 of 4 groups by their best expert, weights times 4; YaRN, both mscales 0.707",
            v2(
                **yarn(0.707, 0.707),
                hidden_size=48,
                topk_method="group_limited_greedy",
                n_group=4,
                topk_group=2,
                routed_scaling_factor=4.0,
            ),
            2,
        ),
        "v3": Case(
            "V3: sigmoid, e_score_correction_bias, 2 of 4 groups by the sum of two, weights normalised and times 2.5; "
            "YaRN, both mscales 1",
            v3(**yarn(1.0, 1.0)),
            1,
        ),
        "v3_no_q_lora": Case(
            "V3 without q_lora and without groups (n_group 1), as Moonlight is; YaRN",
            v3(**yarn(1.0, 1.0), hidden_size=40, q_lora_rank=None, n_group=1, topk_group=1),
            3,
        ),
        "v3_plain_rope": Case(
            "V3 without YaRN, rope_interleave true; 1 of 2 groups of 4; v_head_dim != qk_nope_head_dim; rms_norm_eps "
            "0.01, though the norms of the latents keep 1e-6",
            v3(**plain, v_head_dim=12, rms_norm_eps=1e-2),
            1,
        ),
        "v3_half_rope": Case(
            "V3 without YaRN, rope_interleave false: dimension i turns with i + half",
            v3(**plain, rope_interleave=False),
            1,
        ),
        "v3_unlike_demo": Case(
            "what DeepSeek's demo cannot express: mscale 1 and mscale_all_dim 0.5, norm_topk_prob false; other betas",
            v3(**yarn(1.0, 0.5, 3, 2), norm_topk_prob=False),
            2,
        ),
        "v3_fp8": Case(
            "v3 in FP8, blocks of 128 x 128, of which the dense MLP, kv_b_proj and o_proj have two, the second smaller",
            v3(**yarn(1.0, 1.0), hidden_size=48, intermediate_size=160, v_head_dim=40),
            1,
            block=(128, 128),
        ),
        "v3_fp8_small_blocks": Case(
            "v3 in FP8, blocks of 16 x 8, the last ones smaller; layer 3 is for multi-token prediction, to be skipped",
            v3(
                **yarn(1.0, 1.0),
                hidden_size=44,
                intermediate_size=56,
                moe_intermediate_size=20,
                num_nextn_predict_layers=1,
            ),
            1,
            block=(16, 8),
            mtp=True,
        ),
    }


def randomize(model: torch.nn.Module, seed: int) -> None:
    """tiny_checkpoints' weights, a router and queries that decide, and a bias of the router of both signs."""
    base.randomize(model, seed)
    gen = torch.Generator().manual_seed(2000 + seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if re.search(r"q_b_proj|kv_a_proj_with_mqa|mlp\.gate\.weight", name):
                p.mul_(1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2, generator=gen)


def blocks(scale: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """A value for each block, as one for each weight: [ceil(out/b0), ceil(in/b1)] -> [out, in]."""
    return scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def quantize(w: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 [out, in] and the multiplier of each block; a block of zeros has 1."""
    padded = torch.nn.functional.pad(w, (0, -w.shape[1] % block[1], 0, -w.shape[0] % block[0]))
    tiles = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))  # [rows, b0, columns, b1]
    largest = tiles.abs().amax((1, 3))
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    q = (w / blocks(scale, block, w.shape)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return q, scale


def dequantize(tensors: dict[str, torch.Tensor], block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """float32 weights in place of E4M3 and scales."""
    out = {}
    for name, x in tensors.items():
        if x.dtype == torch.float8_e4m3fn:
            out[name] = x.float() * blocks(tensors[f"{name}_scale_inv"], block, x.shape)
        elif not name.endswith("_scale_inv"):
            out[name] = x
    return out


def stored(tensors: dict[str, torch.Tensor], case: Case) -> dict[str, torch.Tensor]:
    """The tensors of the file from float32 ones."""
    gen = torch.Generator().manual_seed(3000 + case.seed)
    out = {}
    for name, x in sorted(tensors.items()):
        if case.block and re.search(r"(?<!\.eh)_proj(_with_mqa)?\.weight$", name):
            grid = [-(-size // b) for size, b in zip(x.shape, case.block, strict=True)]
            gain = 2 ** torch.empty(grid).uniform_(-1, 1, generator=gen)  # so that every scale is another
            out[name], out[f"{name}_scale_inv"] = quantize(x * blocks(gain, case.block, x.shape), case.block)
        else:
            out[name] = x if name.endswith("e_score_correction_bias") else x.bfloat16()
    return out


def mtp_layer(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """A layer of multi-token prediction: the names that DeepSeek-V3 has in layer 61, the values noise."""
    hidden = tensors["model.norm.weight"].shape[0]
    to = f"model.layers.{layers}."
    shapes = {name.replace(f"model.layers.{layers - 1}.", to): x.shape for name, x in tensors.items()}
    shapes = {name: shape for name, shape in shapes.items() if name.startswith(to)}
    shapes |= {f"{to}{part}.weight": (hidden,) for part in ("enorm", "hnorm", "shared_head.norm")}
    shapes |= {f"{to}{part}.weight": tensors["lm_head.weight"].shape for part in ("embed_tokens", "shared_head.head")}
    shapes[f"{to}eh_proj.weight"] = (hidden, 2 * hidden)
    gen = torch.Generator().manual_seed(layers)
    return {name: torch.randn(tuple(shape), generator=gen) for name, shape in shapes.items()}


def load(path: Path, config_file: str, **more: Any) -> torch.nn.Module:
    """The model in float32, every tensor of the file used and none missing.

    FP8 weights are dequantized here, into another directory, without the layer of multi-token prediction.
    """
    config = transformers.AutoConfig.from_pretrained(path / config_file)
    with tempfile.TemporaryDirectory() as temporary:
        if quantized := getattr(config, "quantization_config", None):
            del config.quantization_config
            tensors = dequantize(load_file(path / "model.safetensors"), tuple(quantized["weight_block_size"]))
            extra = f"model.layers.{config.num_hidden_layers}."
            tensors = {name: x for name, x in tensors.items() if not name.startswith(extra)}
            path = Path(temporary)
            config.save_pretrained(path)
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, output_loading_info=True, **more
        )
    if bad := {k: v for k, v in info.items() if v}:
        raise ValueError(f"{path.name}: {bad}")
    return model.eval()


@dataclass(frozen=True)
class Routing:
    """What the router of one layer saw: scores [N, E] by which experts are chosen, of them the part of the bias."""

    scores: torch.Tensor
    bias: torch.Tensor | None
    groups: int
    kept: int
    k: int

    def group_scores(self) -> torch.Tensor:
        grouped = self.scores.unflatten(1, (self.groups, -1))
        return grouped.amax(-1) if self.bias is None else grouped.topk(2, -1).values.sum(-1)

    def masked(self, fill: float) -> torch.Tensor:
        """Scores, `fill` for those of refused groups."""
        kept = torch.zeros(len(self.scores), self.groups).scatter(1, self.group_scores().topk(self.kept).indices, 1.0)
        return self.scores.masked_fill(kept.repeat_interleave(self.scores.shape[1] // self.groups, 1) == 0, fill)

    def chosen(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.topk(self.k).indices.sort().values

    def margin(self) -> float:
        """Least difference between the last chosen and the first refused group or expert."""
        out = []
        for scores, k in ((self.group_scores(), self.kept), (self.masked(-torch.inf), self.k)):
            best = scores.sort(descending=True).values
            if k < best.shape[1]:
                out.append((best[:, k - 1] - best[:, k]).min().item())
        return min(out)


def routings(model: torch.nn.Module, tokens: torch.Tensor) -> Iterator[Routing]:
    """One for each layer with experts."""
    config = model.config
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False, output_router_logits=True).router_logits
    gates = [layer.mlp.gate for layer in model.model.layers[config.first_k_dense_replace :]]
    for gate, x in zip(gates, logits, strict=True):
        bias = getattr(gate, "e_score_correction_bias", None)
        scores = x.softmax(-1) if bias is None else x.sigmoid() + bias
        limited = bias is not None or config.topk_method == "group_limited_greedy"
        groups, kept = (config.n_group, config.topk_group) if limited else (1, 1)
        yield Routing(scores, bias, groups, kept, config.num_experts_per_tok)


def check_routing(seen: list[Routing]) -> None:
    """Refuses a model whose routers are near a tie, or show too little; see the module docstring."""
    assert min(r.margin() for r in seen) > 3e-4, "a near tie of experts: choose another seed"
    for r in seen:
        chosen = r.chosen(r.masked(-torch.inf))
        assert torch.equal(chosen, r.chosen(r.masked(0.0))), "the score of refused groups matters: choose another seed"
        if r.kept < r.groups:
            assert not torch.equal(chosen, r.chosen(r.scores)), "groups change nothing: choose another seed"
        if r.bias is not None:
            plain = Routing(r.scores - r.bias, r.bias, r.groups, r.kept, r.k)
            assert not torch.equal(chosen, plain.chosen(plain.masked(-torch.inf))), "the bias changes nothing"
            assert r.bias.min() < 0 < r.bias.max()


def golden(model: torch.nn.Module, case: Case) -> dict[str, np.ndarray]:
    """Prompts and results, refused where rounding could change a token or an expert."""
    gen = torch.Generator().manual_seed(1000 + case.seed)
    tokens = torch.randint(EOS + 1, case.config.vocab_size, (2, LENGTH), generator=gen)
    check_routing(list(routings(model, tokens)))
    greedy = generate(model, tokens)
    whole = torch.cat([tokens[:1], greedy[None]], 1)
    best = forward(model, whole)[0, LENGTH - 1 : -1].topk(2)
    assert len(greedy) == NEW and greedy.min() > EOS, "a special token: choose another seed"
    assert len(set(greedy.tolist())) > 5, "a dull continuation: choose another seed"
    assert torch.equal(best.indices[:, 0], greedy)
    assert (best.values[:, 0] - best.values[:, 1]).min() > 0.01, "a near tie of tokens: choose another seed"
    check_routing(list(routings(model, whole)))
    out = {"tokens": tokens.int(), "logits": forward(model, tokens), "greedy": greedy.int()}
    return {k: v.numpy() for k, v in out.items()}


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as DeepSeek published theirs."""
    ours = {"transformers_version", "head_dim", "qk_head_dim", "output_router_logits", "pad_token_id"}
    config = {k: v for k, v in config.items() if k not in ours}
    if config.get("rope_interleave"):  # true, which DeepSeek's code takes for granted
        del config["rope_interleave"]
    scaling = dict(config.pop("rope_parameters"))
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = None if scaling["type"] == "default" else scaling
    config["torch_dtype"] = config.pop("dtype")
    return dict(sorted((config | DEEPSEEK_KEYS[config["model_type"]]).items()))


def make(name: str, case: Case) -> None:
    path = ROOT / name
    model = transformers.AutoModelForCausalLM.from_config(case.config, dtype=torch.float32)
    randomize(model, case.seed)
    shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:  # for transformers to take its stacks of experts apart
        model.save_pretrained(temporary)
        tensors = load_file(Path(temporary) / "model.safetensors")
        config = json.loads((Path(temporary) / "config.json").read_text())
        path.mkdir(parents=True)
        shutil.copy(Path(temporary) / "generation_config.json", path)
    if case.mtp:
        tensors |= mtp_layer(tensors, case.config.num_hidden_layers)
    config["dtype"] = "bfloat16"
    if case.block:
        scheme = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        config["quantization_config"] = {**scheme, "weight_block_size": list(case.block)}
    save_file(stored(tensors, case), path / "model.safetensors", metadata={"format": "pt"})
    for file, content in (("config.json", config), ("config_old.json", old_spelling(config))):
        (path / file).write_text(json.dumps(content, indent=2) + "\n")
    model = load(path, "config.json", attn_implementation="eager", experts_implementation="eager")
    np.savez_compressed(path / "golden.npz", **golden(model, case))


def write_readme(all_cases: dict[str, Case]) -> None:
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "safetensors", "numpy"))
    lines = [
        "# Tiny random DeepSeek checkpoints",
        "",
        "Written by `tests/reference/tiny_deepseek.py`, which describes the files.",
        f"Made with Python {platform.python_version()}, {packages}.",
        "With `--check` it compares every directory with its golden. The weights are random: nothing here comes from a",
        "published model. Do not edit by hand.",
        "",
        "| directory | KB | what is special |",
        "|---|---|---|",
        *(f"| {name} | {directory_size(ROOT / name) / 1024:.0f} | {case.what} |" for name, case in all_cases.items()),
    ]
    (ROOT / "README.md").write_text("\n".join(lines) + "\n")


def differences(path: Path, config_file: str) -> Iterator[str]:
    """What differs from the golden arrays by more than rounding."""
    with np.load(path / "golden.npz") as z:
        gold = dict(z)
    tokens = torch.tensor(gold["tokens"]).long()
    model = load(path, config_file, attn_implementation="sdpa", experts_implementation="batched_mm")
    worst = np.abs(forward(model, tokens).numpy() - gold["logits"]).max()
    if not worst < 1e-4:
        yield f"logits differ by {worst:.2g}"
    if not np.array_equal(generate(model, tokens).numpy(), gold["greedy"]):
        yield "greedy tokens differ"


def check() -> int:
    """Prints a line for each config of each directory; the number that differ."""
    failures = 0
    for name in cases():
        for config in sorted((ROOT / name).glob("config*.json")):
            found = list(differences(ROOT / name, config.name))
            failures += bool(found)
            print(f"{name}/{config.name}: {'; '.join(found) or 'ok'}")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if args.check:
        sys.exit(1 if check() else 0)
    all_cases = cases()
    for name, case in all_cases.items():
        print(name)
        make(name, case)
    write_readme(all_cases)


if __name__ == "__main__":
    main()
