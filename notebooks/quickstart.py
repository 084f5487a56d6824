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
# The demo model is a real one: SmolLM2-135M-Instruct, in 4-bit blocks. The eight devices are emulated on this CPU;
# on a machine with accelerators the same code runs on those.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # has to come before JAX looks at its devices

import matplotlib.pyplot as plt
import numpy as np

import jaxllm

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
# Every matrix keeps the file's own bits. "column" cuts its outputs over the devices, "row" its inputs. The model has 9
# query heads on 3 key/value heads, which no power of two divides: zero heads fill up, exactly.

# %%
model.summary()

# %% [markdown]
# ## How the shards lie
#
# Each picture is one matrix `[out, in]`; a color is a device. A packed matrix is cut between blocks, never inside one.


# %%
def owners(weight):
    """Which device holds each block of a packed matrix."""
    grid = np.zeros(weight.blocks.shape[:2], int)
    for shard in weight.blocks.addressable_shards:
        grid[shard.index[:2]] = shard.device.id
    return grid


names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
weights = {p.name: p.weight for p in model.placed}
figure, axes = plt.subplots(1, len(names), figsize=(12, 3), layout="constrained")
for axis, name in zip(axes, names, strict=True):
    weight = weights[f"layers.0.{name}.weight"]
    image = axis.imshow(owners(weight), aspect="auto", cmap="tab10", vmin=-0.5, vmax=9.5, interpolation="nearest")
    axis.set(title=f"{name}\n{weight.shape[0]} x {weight.shape[1]}", xlabel="block along in", ylabel="out")
figure.colorbar(image, ax=axes, label="device", ticks=range(8), boundaries=np.arange(9) - 0.5)
plt.show()

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
