"""Writes tests/golden/checkpoints: tiny random Hugging Face models, and what transformers computes with them.

Run with a Python that has torch, transformers and safetensors (README.md beside the checkpoints names the versions).
Without arguments the directories and the README are written anew, with names these directories only; with --check
nothing is written, and every directory is loaded again and compared with its golden.npz.

Each directory is what `save_pretrained` writes, plus golden.npz:

    tokens  int32   [2, T]     random prompts
    logits  float32 [2, T, V]  of the float32 model
    greedy  int32   [12]       what `generate` appends to the first prompt
    tokens_short, logits_short (phi3_longrope only): prompts within the original context, where other factors hold
    tokens_beyond, logits_beyond (gemma3n only): prompts with ids beyond the table of per-layer embeddings
    logits_sliced (gemma3n only): of the slice SLICE of matformer.csv, which is cut here on its own, tensor by tensor

and for some cases config_old.json, the same config as transformers 4 spelled it.

The weights are not those of transformers' own initialisation, whose logits are almost flat: linear layers keep the
variance of their input, norms are uniform in 0.5..1.5 (or what is stored of them, one less), biases are large, so that
a forgotten one shows. Goldens come from transformers' eager attention and experts; --check uses other implementations,
so that two have to agree.
"""

import argparse
import json
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

ROOT = Path(__file__).resolve().parents[1] / "golden" / "checkpoints"
LENGTH, NEW = 24, 12
BOS, EOS = 1, 2
SLICE = "small"
SLICES = """\
name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped
all,6,0.1,60.00%,"[16 * 3, 48, 40, 48, 48, 48]",
small,4,0.05,50.00%,"[4_8, 8 * 4, 16 * 2, 24]","[0, 4]"
"""
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,  # large enough that a wrong one shows
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}


def rope(theta: float = 1000.0, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


@dataclass(frozen=True)
class Case:
    """One checkpoint. `old` is written into config_old.json over the old spelling, `old_drops` left out of it."""

    what: str
    config: transformers.PreTrainedConfig
    seed: int
    dtype: torch.dtype = torch.float32
    shards: int = 1
    short: int = 0
    old: dict[str, Any] | None = None
    old_drops: tuple[str, ...] = ()
    slices: str | None = None


def cases() -> dict[str, Case]:
    llama = {**SMALL, "head_dim": 16}
    odd = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 80}
    fused = {**SMALL, "hidden_size": 48, "intermediate_size": 40}  # head_dim 12
    moe = {**SMALL, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 8.0]}
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    yarn = {"factor": 4.0, "original_max_position_embeddings": 1024}
    window = {"sliding_window": 8}
    gemma3n = {
        "intermediate_size": [48, 48, 40, 48, 48, 48],
        "num_hidden_layers": 6,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(6)],
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.9, 0.6, 0.8, 0.0, 0.0, 0.0],
        "vocab_size_per_layer_input": 60,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 6,
        "altup_active_idx": 1,
        "final_logit_softcapping": 4.0,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta}
            for kind, theta in (("full_attention", 1000.0), ("sliding_attention", 100.0))
        },
    }
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0}
    ropes = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
    gemma3 = {**llama, **window, "rope_parameters": ropes, "query_pre_attn_scalar": 16}
    images = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    images |= {"image_size": 8, "patch_size": 4}
    t = transformers
    return {
        "llama": Case("grouped queries, untied, head_dim != hidden_size / heads", t.LlamaConfig(**llama, **rope()), 3),
        "llama3_rope": Case(
            "rope_type llama3: one frequency kept, two blended, five divided",
            t.LlamaConfig(**{**llama, "max_position_embeddings": 512}, **rope(10000.0, "llama3", **llama3)),
            3,
            old={},
        ),
        "llama_bias": Case(
            "attention_bias (q, k, v and o), mlp_bias, tied embeddings",
            t.LlamaConfig(**llama, **rope(), attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
            18,
        ),
        "llama_linear": Case(
            'rope_type linear (old spelling: "type")',
            t.LlamaConfig(**{**llama, "max_position_embeddings": 256}, **rope(1000.0, "linear", factor=4.0)),
            7,
            old={"rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
        "llama_yarn": Case(
            "rope_type yarn with the default betas and attention factor",
            t.LlamaConfig(**{**llama, "max_position_embeddings": 4096}, **rope(100.0, "yarn", **yarn)),
            8,
        ),
        "odd": Case(
            "llama with 6 heads, 2 KV heads, intermediate_size 80; bfloat16 in 3 files with an index",
            t.LlamaConfig(**{**SMALL, **odd}, **rope()),
            8,
            torch.bfloat16,
            shards=3,
            old={},
            old_drops=("head_dim",),
        ),
        "mistral": Case(
            "sliding window of 8 in every layer",
            t.MistralConfig(**llama, **window, **rope()),
            9,
        ),
        "qwen2": Case(
            "biases on q, k, v only; tied; config_old.json names a window that use_sliding_window turns off",
            t.Qwen2Config(**SMALL, **rope(), tie_word_embeddings=True),
            13,
            old={"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
            old_drops=("layer_types",),
        ),
        "qwen2_window": Case(
            "layer 0 full, layer 1 with a window of 8: layer_types, in config_old.json only max_window_layers",
            t.Qwen2Config(**SMALL, **rope(), **window, use_sliding_window=True, max_window_layers=1),
            9,
            old={},
            old_drops=("layer_types",),
        ),
        "qwen3": Case("norms on q and k, head_dim != hidden_size / heads", t.Qwen3Config(**llama, **rope()), 13),
        "phi3": Case(
            "fused qkv_proj and gate_up_proj, half of each head rotated",
            t.Phi3Config(**fused, **rope(partial_rotary_factor=0.5), partial_rotary_factor=0.5),
            11,
        ),
        "phi3_longrope": Case(
            "rope_type longrope, original context 16: long factors for tokens, short ones for tokens_short",
            t.Phi3Config(**fused, **rope(1000.0, "longrope", **factors), original_max_position_embeddings=16),
            12,
            short=12,
            old={"rope_scaling": {"type": "longrope", **factors}},
        ),
        "mixtral": Case(
            "4 experts, 2 used, weights renormalised; one tensor an expert (w1, w3, w2)",
            t.MixtralConfig(**{**SMALL, "intermediate_size": 24}, **rope(), num_local_experts=4, num_experts_per_tok=2),
            13,
        ),
        "qwen3_moe": Case(
            "8 experts, 2 used, norm_topk_prob; of 4 layers only layer 1 is sparse (decoder_sparse_step 2, "
            "mlp_only_layers [3]); num_local_experts, in config_old.json num_experts",
            t.Qwen3MoeConfig(
                **{**moe, "num_hidden_layers": 4, "intermediate_size": 32, "moe_intermediate_size": 16},
                **rope(),
                head_dim=8,
                num_experts=8,
                decoder_sparse_step=2,
                mlp_only_layers=[3],
                norm_topk_prob=True,
            ),
            18,
            old={"num_experts": 8},
            old_drops=("num_local_experts",),
        ),
        "qwen3_moe_b": Case(
            "4 experts, 2 used, weights not renormalised; head_dim != hidden_size / heads",
            t.Qwen3MoeConfig(**moe, **rope(), head_dim=16, num_experts=4, norm_topk_prob=False),
            26,
        ),
        "qwen2_moe": Case(
            "4 experts, 2 used, not renormalised; a shared expert with a gate; biases on q, k, v",
            t.Qwen2MoeConfig(**moe, **rope(), num_experts=4, shared_expert_intermediate_size=40, norm_topk_prob=False),
            27,
        ),
        "gemma3n": Case(
            "layers 0, 2, 4 with a window of 8, 4 and 5 with others' keys and values; sparse gates; float16; ids "
            "beyond the table of per-layer embeddings; a slice (matformer.csv)",
            t.Gemma3nTextConfig(**{**llama, **gemma3n, **window}),
            33,
            torch.float16,
            slices=SLICES,
        ),
        "gemma2": Case(
            "caps of 3 for scores, 1 for logits; layers 0 and 2 of 3 with a window of 8",
            t.Gemma2Config(
                **{**llama, **window, "num_hidden_layers": 3, "query_pre_attn_scalar": 16},
                **rope(),
                attn_logit_softcapping=3.0,
                final_logit_softcapping=1.0,
            ),
            27,
            old={},
            old_drops=("layer_types",),
        ),
        "gemma3": Case(
            "text beside a vision tower; queries scaled by 24 ** -0.5, biases; of 4 layers only layer 2 has no window",
            t.Gemma3Config(
                text_config=t.Gemma3TextConfig(
                    **{**gemma3, "num_hidden_layers": 4, "query_pre_attn_scalar": 24},
                    sliding_window_pattern=3,
                    attention_bias=True,
                ),
                vision_config=t.SiglipVisionConfig(**images),
                mm_tokens_per_image=4,
            ),
            175,
            torch.bfloat16,
        ),
        "gemma3_text": Case(
            "of 7 layers only layer 5 has no window; one KV head; two ropes, in config_old.json rope_local_base_freq; "
            "bfloat16",
            t.Gemma3TextConfig(**{**gemma3, "num_hidden_layers": 7, "num_key_value_heads": 1}),
            33,
            torch.bfloat16,
            old={},
            old_drops=("layer_types",),
        ),
        "granite": Case(
            "embedding, residual and attention multipliers, logits divided",
            t.GraniteConfig(
                **SMALL,
                **rope(),
                embedding_multiplier=3,  # an integer, as some files have it
                residual_multiplier=0.6,
                attention_multiplier=0.2,
                logits_scaling=0.5,
            ),
            3,
            old={},
        ),
        "smollm3": Case(
            "of 4 layers the last has no rotary positions (no_rope_layers, in config_old.json no_rope_layer_interval)",
            t.SmolLM3Config(**{**SMALL, "num_hidden_layers": 4}, **rope(), tie_word_embeddings=False),
            1,
            old={},
            old_drops=("no_rope_layers", "layer_types"),
        ),
        "smollm3_listed": Case(
            "no_rope_layers says that of 2 layers the first has no rotary positions; biases everywhere",
            t.SmolLM3Config(
                **SMALL,
                **rope(),
                no_rope_layers=[0, 1],
                attention_bias=True,
                mlp_bias=True,
                tie_word_embeddings=False,
            ),
            3,
        ),
        "olmo2": Case(
            "norms after blocks, q and k normalised over all heads together; 6 heads, 3 KV heads",
            t.Olmo2Config(**{**SMALL, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}, **rope()),
            1,
        ),
        "glm4": Case(
            "norms before and after blocks, fused gate_up_proj, biases on q, k, v; half of each head rotated, in pairs",
            t.Glm4Config(**llama, **rope(partial_rotary_factor=0.5)),
            1,
            old={},
        ),
        "glm4_moe": Case(
            "a dense layer, then 4 experts, 2 used by sigmoid and bias, 2 shared, times 1.5; norms and biases on q, k",
            t.Glm4MoeConfig(
                **llama,
                **rope(partial_rotary_factor=0.5),
                moe_intermediate_size=24,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_shared_experts=2,
                routed_scaling_factor=1.5,
                use_qk_norm=True,
                attention_bias=True,
                num_nextn_predict_layers=0,
            ),
            1,
            old={},
        ),
        "glm4_moe_groups": Case(
            "8 experts in 4 groups, 3 used in 2 groups, not renormalised; no dense layer, no norms on q and k",
            t.Glm4MoeConfig(
                **SMALL,
                **rope(partial_rotary_factor=0.5),
                moe_intermediate_size=16,
                first_k_dense_replace=0,
                n_routed_experts=8,
                num_experts_per_tok=3,
                n_group=4,
                topk_group=2,
                norm_topk_prob=False,
                num_nextn_predict_layers=0,
            ),
            3,
        ),
    }


# Other layouts of mixtral's experts, made from its tensors; the golden is a copy.
RELAYOUTS = {
    "mixtral_stacked": "mixtral as transformers 5 holds it: experts.gate_up_proj [E, 2I, H], down_proj [E, H, I]",
    "mixtral_transposed": "mixtral with experts.gate_up_proj [E, H, 2I], down_proj [E, I, H]",
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Gives every parameter a value that matters; see the module docstring."""
    gen = torch.Generator().manual_seed(seed)
    # Gemma's norms add 1, and its embeddings are scaled up: with small ones it does not just repeat a token.
    gemma = model.config.model_type in ("gemma2", "gemma3", "gemma3_text")
    less, embeddings = (1.0, 0.1) if gemma else (0.0, 0.3)
    for name, p in model.named_parameters():
        with torch.no_grad():
            if name.endswith("norm.weight"):
                p.uniform_(0.5 - less, 1.5 - less, generator=gen)
            elif p.ndim == 1:
                p.normal_(0.0, 0.5, generator=gen)
            elif "embed_tokens" in name:
                p.normal_(0.0, embeddings, generator=gen)
            else:  # [..., out, in]
                gain = 1.5 if re.search("q_proj|k_proj|qkv_proj|lm_head", name) else 1.0
                gain = p.shape[-1] if "modality_router" in name else gain  # its input is divided by that
                p.normal_(0.0, gain * p.shape[-1] ** -0.5, generator=gen)
    for name, b in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            b.normal_(0.0, 0.2, generator=gen)


def load(path: Path, config_file: str, **more: Any) -> torch.nn.Module:
    """The model in float32, every tensor of the file used and none missing."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        config=transformers.AutoConfig.from_pretrained(path / config_file),
        dtype=torch.float32,
        output_loading_info=True,
        **more,
    )
    bad = {k: v for k, v in info.items() if v}
    if bad:
        raise ValueError(f"{path.name}: {bad}")
    return model.eval()


def forward(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [2, T, V]."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def generate(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The NEW tokens that greedy decoding appends to the first row."""
    row = tokens[:1]
    out = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=NEW, do_sample=False)
    return out[0, row.shape[1] :]


def narrowest_routing(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Least difference between the last chosen and the first refused expert's probability, or group's score."""
    c, biases = model.config, [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        routers = model(input_ids=tokens, use_cache=False, output_router_logits=True).router_logits
    if not biases:
        return margin(torch.cat(routers).softmax(-1), c.num_experts_per_tok)
    choice = torch.cat([r.sigmoid() + bias for r, bias in zip(routers, biases, strict=True)])
    grouped = choice.view(len(choice), c.n_group, -1)
    sums = grouped.topk(2).values.sum(-1)
    kept = torch.zeros_like(sums).scatter(1, sums.topk(c.topk_group).indices, 1).bool()
    chosen = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    return min(margin(chosen, c.num_experts_per_tok), margin(sums, c.topk_group))


def margin(scores: torch.Tensor, k: int) -> float:
    """Least difference between the k-th and the next score; infinite if there are only k."""
    best = scores.sort(descending=True).values
    return (best[:, k - 1] - best[:, k]).min().item() if best.shape[1] > k else torch.inf


def golden(model: torch.nn.Module, case: Case) -> dict[str, np.ndarray]:
    """Prompts and results, refused where rounding could change a token or an expert."""
    gen = torch.Generator().manual_seed(1000 + case.seed)
    config = case.config.get_text_config()
    known = getattr(config, "vocab_size_per_layer_input", config.vocab_size)
    tokens = torch.randint(EOS + 1, known, (2, LENGTH), generator=gen)
    greedy = generate(model, tokens)
    whole = torch.cat([tokens[:1], greedy[None]], 1)
    best = forward(model, whole)[0, LENGTH - 1 : -1].topk(2)
    assert len(greedy) == NEW and greedy.min() > EOS and greedy.max() < known, "a special token: choose another seed"
    assert len(set(greedy.tolist())) > 5, "a dull continuation: choose another seed"
    assert torch.equal(best.indices[:, 0], greedy)
    assert (best.values[:, 0] - best.values[:, 1]).min() > 0.01, "a near tie of tokens: choose another seed"
    if hasattr(model.config, "num_experts_per_tok"):
        least = min(narrowest_routing(model, tokens), narrowest_routing(model, whole))
        assert least > 1e-3, "a near tie of experts: choose another seed"
    out = {"tokens": tokens.int(), "logits": forward(model, tokens), "greedy": greedy.int()}
    if case.short:
        out |= {"tokens_short": tokens[:, : case.short].int(), "logits_short": forward(model, tokens[:, : case.short])}
    if known < config.vocab_size:
        beyond = torch.where(tokens < known // 2, tokens, tokens + config.vocab_size - known)
        out |= {"tokens_beyond": beyond.int(), "logits_beyond": forward(model, beyond)}
    return {k: v.numpy() for k, v in out.items()}


def sliced(path: Path, **more: Any) -> torch.nn.Module:
    """The model of `path` without layers 0 and 4, its blocks as wide as SLICES has it."""
    widths, kept = [48, 32, 32, 24], [1, 2, 3, 5]
    config = transformers.AutoConfig.from_pretrained(path)
    sizes = {"intermediate_size": widths, "num_hidden_layers": 4, "num_kv_shared_layers": 1}
    lists = {key: [getattr(config, key)[i] for i in kept] for key in ("layer_types", "activation_sparsity_pattern")}
    config = type(config)(**{**config.to_dict(), **sizes, **lists})
    tensors, narrow = {}, config.hidden_size_per_layer_input
    own = np.concatenate([np.arange(i * narrow, (i + 1) * narrow) for i in kept])
    for name, tensor in load_torch(path / "model.safetensors").items():
        tensor = tensor.float().numpy()
        if m := re.match(r"model\.layers\.(\d+)\.", name):
            if int(m[1]) not in kept:
                continue
            new = kept.index(int(m[1]))
            name = f"model.layers.{new}." + name[m.end() :]
            if "gate_proj" in name or "up_proj" in name:
                tensor = tensor[: widths[new]]
            if "down_proj" in name:
                tensor = tensor[:, : widths[new]]
        elif "embed_tokens_per_layer" in name:
            tensor = tensor[:, own]
        elif "per_layer_model_projection" in name:
            tensor = tensor[own]
        tensors[name] = torch.from_numpy(np.ascontiguousarray(tensor))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **more)
    lacking = model.load_state_dict(tensors, strict=False)
    assert lacking.missing_keys in ([], ["lm_head.weight"]) and not lacking.unexpected_keys, lacking
    model.tie_weights()
    return model.eval()


def old_spelling(config: dict[str, Any], case: Case) -> dict[str, Any]:
    """config.json as transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype."""
    config = {k: v for k, v in config.items() if k not in ("transformers_version", *case.old_drops)}
    scaling = config.pop("rope_parameters")
    if "full_attention" in scaling:
        config["rope_local_base_freq"] = scaling["sliding_attention"]["rope_theta"]
        scaling = scaling["full_attention"]
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    config["torch_dtype"] = config.pop("dtype")
    return dict(sorted((config | case.old).items()))


def make(name: str, case: Case) -> None:
    path = ROOT / name
    model = transformers.AutoModelForCausalLM.from_config(case.config, dtype=torch.float32)
    randomize(model, case.seed)
    model.to(case.dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path, max_shard_size=int(size / case.shards * 1.1))
    assert len(list(path.glob("*.safetensors"))) == case.shards
    # Not from `model`: to(bfloat16) has rounded its RoPE frequencies as well.
    model = load(path, "config.json", attn_implementation="eager", experts_implementation="eager")
    results = golden(model, case)
    if case.slices is not None:
        (path / "matformer.csv").write_text(case.slices)
        small = sliced(path, attn_implementation="eager")
        results["logits_sliced"] = forward(small, torch.tensor(results["tokens"]).long()).numpy()
    np.savez_compressed(path / "golden.npz", **results)
    if case.old is not None:
        config = old_spelling(json.loads((path / "config.json").read_text()), case)
        (path / "config_old.json").write_text(json.dumps(config, indent=2) + "\n")


def stack_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mixtral's `block_sparse_moe.experts.{e}.{w1,w3,w2}.weight` as `mlp.experts.{gate_up,down}_proj`."""
    out = {}
    layers: dict[str, dict[tuple[int, str], np.ndarray]] = {}
    for name, x in tensors.items():
        if found := re.fullmatch(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight", name):
            layer, expert, part = found.groups()
            layers.setdefault(layer, {})[int(expert), part] = x
        else:
            out[name.replace(".block_sparse_moe.", ".mlp.")] = x
    for layer, w in layers.items():
        experts = range(1 + max(e for e, _ in w))
        gate_up = [np.concatenate([w[e, "w1"], w[e, "w3"]]) for e in experts]
        out[f"{layer}.mlp.experts.gate_up_proj"] = np.stack(gate_up)  # [E, 2I, H]
        out[f"{layer}.mlp.experts.down_proj"] = np.stack([w[e, "w2"] for e in experts])  # [E, H, I]
    return out


def transpose_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Swaps the last two axes of stacked experts; its own inverse."""
    return {k: np.ascontiguousarray(x.swapaxes(1, 2)) if ".experts." in k else x for k, x in tensors.items()}


def rewrite(source: Path, to: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """A copy of a directory, its tensors changed."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(source, to)
    save_file(change(load_file(source / "model.safetensors")), to / "model.safetensors", metadata={"format": "pt"})


def directory_size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.iterdir())


def write_readme(all_cases: dict[str, Case]) -> None:
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "safetensors", "numpy"))
    rows = [(name, case.what) for name, case in all_cases.items()] + list(RELAYOUTS.items())
    lines = [
        "# Tiny random checkpoints",
        "",
        "Written by `tests/reference/tiny_checkpoints.py`, which describes golden.npz and config_old.json.",
        f"Made with Python {platform.python_version()}, {packages}.",
        "With `--check` it compares every directory with its golden. The weights are random: nothing here comes from a",
        "published model. Do not edit by hand.",
        "",
        "| directory | KB | what is special |",
        "|---|---|---|",
        *(f"| {name} | {directory_size(ROOT / name) / 1024:.0f} | {what} |" for name, what in rows),
    ]
    (ROOT / "README.md").write_text("\n".join(lines) + "\n")


def differences(path: Path, config_file: str, gold: dict[str, np.ndarray]) -> Iterator[str]:
    """What differs from the golden arrays by more than rounding."""
    attention = "eager" if path.name == "gemma2" else "sdpa"  # which cannot cap scores
    model = load(path, config_file, attn_implementation=attention, experts_implementation="batched_mm")
    for suffix in ("", "_short", "_beyond"):
        if f"tokens{suffix}" in gold:
            logits = forward(model, torch.tensor(gold[f"tokens{suffix}"]).long()).numpy()
            worst = np.abs(logits - gold[f"logits{suffix}"]).max()
            if not worst < 1e-4:
                yield f"logits{suffix} differ by {worst:.2g}"
    if "logits_sliced" in gold:
        logits = forward(sliced(path, attn_implementation="sdpa"), torch.tensor(gold["tokens"]).long()).numpy()
        if not (worst := np.abs(logits - gold["logits_sliced"]).max()) < 1e-4:
            yield f"logits_sliced differ by {worst:.2g}"
    if not np.array_equal(generate(model, torch.tensor(gold["tokens"]).long()).numpy(), gold["greedy"]):
        yield "greedy tokens differ"


def check() -> int:
    """Prints a line for each config of each directory; the number that differ."""
    failures = 0
    names = [*cases(), *RELAYOUTS]
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            path = ROOT / name
            with np.load(path / "golden.npz") as z:
                gold = dict(z)
            if name == "mixtral_transposed":  # transformers does not read this layout
                rewrite(path, Path(temporary) / name, transpose_experts)
                path = Path(temporary) / name
            for config in sorted(path.glob("config*.json")):
                found = list(differences(path, config.name, gold))
                failures += bool(found)
                print(f"{name}/{config.name}: {'; '.join(found) or 'ok'} (logits std {gold['logits'].std():.2f})")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare what is there")
    parser.add_argument("names", nargs="*", help="write these only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if args.check:
        sys.exit(1 if check() else 0)
    all_cases = cases()
    for name in args.names or all_cases:
        print(name)
        make(name, all_cases[name])
    if not args.names or "mixtral" in args.names:
        rewrite(ROOT / "mixtral", ROOT / "mixtral_stacked", stack_experts)
        rewrite(ROOT / "mixtral_stacked", ROOT / "mixtral_transposed", transpose_experts)
    write_readme(all_cases)


if __name__ == "__main__":
    main()
