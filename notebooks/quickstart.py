# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A quantized model on a mesh of eight devices
#
# The demo model is a real one: SmolLM2-135M-Instruct, in 4-bit blocks. The eight devices are emulated on this CPU; on
# a machine with accelerators the same code runs on those.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # has to come before JAX looks at its devices

import numpy as np

import jaxllm
from jaxllm import plots

model = jaxllm.load("demo", mesh="tp=8", weights="packed", dtype="float32", progress=False)

# %% [markdown]
# ## Chat

# %%
conversation = [{"role": "user", "content": "What is the capital of France?"}]
answer = model.chat(conversation, max_new_tokens=32)
print(answer)

# %% [markdown]
# Text can also be taken piece by piece, and drawn instead of taken greedily.

# %%
for piece in model.stream("Once upon a time,", max_new_tokens=24, temperature=0.8, top_p=0.9, seed=1):
    print(piece, end="")

# %% [markdown]
# ## What was loaded
#
# Every matrix keeps the file's own bits. "column" shards its outputs over the devices, "row" its inputs. The model
# has 9 query heads on 3 key/value heads, which no power of two divides: zero heads fill up, exactly.

# %%
model.summary()

# %% [markdown]
# ## How the shards lie
#
# Each panel is one matrix `[out, in]`; a number and its color are a device. A packed matrix is split between blocks,
# never inside one.

# %%
names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
held = {p.name: p.weight for p in model.placed}
plots.shards({name: held[f"layers.0.{name}.weight"] for name in names})

# %% [markdown]
# ## One code path
#
# One device is the mesh `tp=1`. The logits are the same up to rounding.

# %%
ids = model.encode(conversation)
single = jaxllm.load("demo", mesh="tp=1", dtype="float32", progress=False)
eight = jaxllm.load("demo", mesh="tp=8", dtype="float32", progress=False)
difference = np.abs(np.asarray(single.logits([ids])) - np.asarray(eight.logits([ids]))).max()
print(f"largest difference between 1 and 8 devices: {difference:.1e}")
assert difference < 1e-3
