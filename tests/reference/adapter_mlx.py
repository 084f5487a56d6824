"""Writes tests/golden/adapters/mlx: small random adapters of mlx-lm for tiny checkpoints, and mlx-lm's logits.

Run with a Python that has mlx-lm 0.32 and mlx (on Linux `mlx[cpu]`). Each directory is what mlx-lm's trainer writes,
plus logits.npy: float32 [2, T, V] for the `tokens` of the base's golden.npz.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ROOT = GOLDEN / "adapters" / "mlx"
EXPERTS = [f"mlp.switch_mlp.{name}_proj" for name in ("gate", "up", "down")]
CASES = {
    "ends": ("checkpoints/llama", ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens", "lm_head"]),
    "experts": ("checkpoints/qwen2_moe", ["self_attn.k_proj", "mlp.gate", "mlp.shared_expert.up_proj", *EXPERTS]),
}


def base_of(name: str) -> tuple[object, mx.array]:
    config = json.loads((GOLDEN / name / "config.json").read_text())
    older = {"rope_theta": config["rope_parameters"]["rope_theta"], "rope_scaling": None}  # the names that mlx-lm reads
    older["num_experts"] = config.get("num_local_experts") or config.get("num_experts")
    model, _ = load_model(GOLDEN / name, model_config=older)
    model.eval()
    golden = np.load(GOLDEN / name / "golden.npz")
    tokens = mx.array(golden["tokens"])
    assert np.abs(np.array(model(tokens)) - golden["logits"]).max() < 1e-4
    return model, tokens


def main() -> None:
    mx.set_default_device(mx.cpu)
    rng = np.random.default_rng(7)
    for name, (base, keys) in CASES.items():
        path = ROOT / name
        path.mkdir(parents=True, exist_ok=True)
        parameters = {"rank": 2, "scale": 5.0, "dropout": 0.0, "keys": keys}
        config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": base}
        (path / "adapter_config.json").write_text(json.dumps(config, indent=4) + "\n")
        model, tokens = base_of(base)
        model.freeze()
        linear_to_lora_layers(model, 2, parameters)
        trained = {}
        for key, x in tree_flatten(model.trainable_parameters()):
            size = 0.3 if key.endswith("lora_a") else 0.1
            trained[key] = mx.array((rng.normal(size=x.shape) * size).astype(np.float32))
        model.update(tree_unflatten(list(trained.items())))
        mx.save_safetensors(str(path / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
        fresh, _ = base_of(base)
        plain = np.array(fresh(tokens))
        logits = np.array(load_adapters(fresh, str(path))(tokens))
        np.save(path / "logits.npy", logits)
        print(f"{name}: {len(trained)} tensors, largest change of a logit {np.abs(logits - plain).max():.2f}")


if __name__ == "__main__":
    main()
