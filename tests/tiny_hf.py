"""Tiny random Hugging Face directories whose sizes every quantized format fits: multiples of 64."""

import json
from pathlib import Path

import numpy as np
from quantized_writers import write_safetensors

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 64, 4, 2, 16, 192, 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 1000.0,
    "tie_word_embeddings": False,
}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": WIDTH,
}
QWEN3_MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
MODELS = {"llama": LLAMA, "qwen3_moe": QWEN3_MOE, "deepseek": DEEPSEEK}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    out = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        out |= {f"{layer}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        attention = latent(config) if "kv_lora_rank" in config else plain(config)
        out |= {f"{layer}.self_attn.{n}.weight": shape for n, shape in attention.items()}
        sparse = config["model_type"] in ("qwen3_moe", "deepseek_v3") and i >= config.get("first_k_dense_replace", 0)
        if not sparse:
            out |= block(f"{layer}.mlp", hidden, config["intermediate_size"])
            continue
        experts, width = config.get("num_experts") or config["n_routed_experts"], config["moe_intermediate_size"]
        out[f"{layer}.mlp.gate.weight"] = (experts, hidden)
        for e in range(experts):
            out |= block(f"{layer}.mlp.experts.{e}", hidden, width)
        if "n_shared_experts" in config:
            out[f"{layer}.mlp.gate.e_score_correction_bias"] = (experts,)
            out |= block(f"{layer}.mlp.shared_experts", hidden, width)
    return out


def plain(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    norms = {} if config["model_type"] == "llama" else {"q_norm": (head_dim,), "k_norm": (head_dim,)}
    kv, rows = (kv_heads * head_dim, hidden), heads * head_dim
    return {"q_proj": (rows, hidden), "k_proj": kv, "v_proj": kv, "o_proj": (hidden, rows)} | norms


def latent(config: dict) -> dict[str, tuple[int, ...]]:
    return {
        "q_a_proj": (64, HIDDEN),
        "q_a_layernorm": (64,),
        "q_b_proj": (HEADS * 32, 64),
        "kv_a_proj_with_mqa": (64 + 16, HIDDEN),
        "kv_a_layernorm": (64,),
        "kv_b_proj": (HEADS * 32, 64),
        "o_proj": (HIDDEN, HEADS * 16),
    }


def block(name: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    narrow = (hidden, width)
    return {f"{name}.gate_proj.weight": narrow[::-1], f"{name}.up_proj.weight": narrow[::-1]} | {
        f"{name}.down_proj.weight": narrow
    }


def write(path: Path, name: str, seed: int = 0, **other: object) -> Path:
    """A directory of one of MODELS, with `other` entries in its config. Matrices keep the variance of their input,
    norms are uniform in 0.5 .. 1.5."""
    rng, config = np.random.default_rng(seed), COMMON | MODELS[name] | other
    tensors = {}
    for key, shape in shapes(config).items():
        w = rng.normal(size=shape) / shape[-1] ** 0.5 if len(shape) > 1 else rng.uniform(0.5, 1.5, shape)
        tensors[key] = (rng.normal(size=shape) if "bias" in key else w).astype(np.float32)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    write_safetensors(path / "model.safetensors", tensors)
    return path
