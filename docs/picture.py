"""Draws docs/picture.png, the README's picture: python docs/picture.py"""

from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jaxllm  # noqa: E402
from jaxllm import plots  # noqa: E402

model = jaxllm.load("demo", mesh="tp=8", weights="packed", progress=False)
held = {p.name: p.weight for p in model.placed}
names = ("embed_tokens", *(f"layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")))
picture = plots.shards({name.removeprefix("layers.0."): held[f"{name}.weight"] for name in names})
picture.suptitle("SmolLM2-135M in Q4_1 over eight devices: the number of a color is the device that holds it")
picture.savefig(Path(__file__).with_name("picture.png"), dpi=80)
