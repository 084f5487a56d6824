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
# # Quantized layers on a mesh of eight devices
#
# `jaxllm.layers` has the layers that models are made of, for use on their own. Each takes a matrix in any format,
# places it on the mesh, and computes with it where it lies. The eight devices are emulated on this CPU.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # has to come before JAX looks at its devices

import numpy as np

import jaxllm
from jaxllm import plots
from jaxllm.layers import COLUMN, REPLICATED, ROW, Embedding, Experts, Linear
from jaxllm.plan import collectives_of

mesh = jaxllm.make_mesh("tp=8")
jax.set_mesh(mesh)

rng = np.random.default_rng(0)
matrix = rng.normal(size=(128, 256)).astype(np.float32)
weight = jaxllm.quantize(matrix, "q8_0")  # as a checkpoint has it: blocks of 32 columns
x = rng.normal(size=(4, 256)).astype(np.float32)

# %% [markdown]
# ## Column, row, replicated
#
# Column: each device computes some of the outputs. Row: each device has some of the inputs, and the partial products
# are summed. Replicated: every device has it all. The layer is the same, and so is its result.

# %%
reference = x @ np.asarray(weight.dequantize()).T
layers = {"column": Linear.from_weight(weight, COLUMN)}
layers["row"] = Linear.from_weight(weight, ROW)
layers["replicated"] = Linear.from_weight(weight, REPLICATED)
for name, layer in layers.items():
    error = np.abs(layer(x) - reference).max()
    print(f"{name}: largest error {error:.0e}; collectives of a call: {dict(collectives_of(layer, x)) or 'none'}")

# %% [markdown]
# Who holds what: each panel is one matrix `[out, in]`, a number and its color are a device. What every device holds
# is white.

# %%
plots.shards({name: layer.weight.get_value() for name, layer in layers.items()})

# %% [markdown]
# ## Awkward sizes
#
# 100 rows do not divide by eight, nor do three blocks of columns. Zeros fill up what is missing, in whole blocks; the
# layer pads x and trims the result by itself, and gives the matrix back as it was.

# %%
odd = jaxllm.quantize(rng.normal(size=(100, 96)), "q8_0")
for name, spec in {"column": COLUMN, "row": ROW}.items():
    layer = Linear.from_weight(odd, spec)
    print(f"{name}: {odd.shape} is placed as {layer.weight.get_value().shape}; {layer(x[:, :96]).shape} comes out")
    assert (layer.dequantize() == odd.dequantize()).all()

# %% [markdown]
# ## Several matrices in one layer
#
# Queries, keys and values take the same x. They may differ in format and size, and each result stays sharded, so they
# are a tuple.

# %%
qkv = Linear.from_weight([weight, jaxllm.quantize(matrix[:32], "q4_0"), matrix[:32]], COLUMN)
for part, y in zip(qkv.layers, qkv(x), strict=True):
    print(part.weight.get_value().format, y.shape, "of which a device has", y.sharding.shard_shape(y.shape))
print("collectives:", dict(collectives_of(qkv, x)) or "none")

# %% [markdown]
# ## Changed where they lie
#
# A delta comes in the checkpoint's order and size. A layer can be quantized anew; every device encodes its own shard.
# Both give a new layer and leave the old one alone.

# %%
layer = layers["row"]
changed = layer.add_delta(0.1 * np.ones_like(matrix))
print(f"the mean moved by {float((changed.dequantize() - layer.dequantize()).mean()):.3f}")
for type in ("q4_0", "q4_k"):
    held = layer.requantize(type).weight.get_value()
    error = np.std(held.dequantize() - matrix)
    print(f"{type}: held as {held.format} with {held.bits_per_weight:.1f} bits a weight, error {error:.3f}")

# %% [markdown]
# Of 256 columns each device has 32: no block of Q4_K, 256 columns, fits, and llama.cpp's fallback is taken.
#
# ## An embedding table

# %%
table = Embedding.from_weight(weight)
ids = np.array([3, 1, 4, 1, 5], np.int32)
assert (table(ids) == weight.dequantize()[ids]).all()
print("collectives of a lookup:", dict(collectives_of(table, ids)))

# %% [markdown]
# ## Experts
#
# A stack of feed-forward blocks: whole experts are sharded over ep, and each of them over tp. Every token chooses
# two.

# %%
jax.set_mesh(jaxllm.make_mesh("ep=4,tp=2"))
stacks = [rng.normal(size=shape).astype(np.float32) / 16 for shape in ((8, 128, 256), (8, 128, 256), (8, 256, 128))]
experts = Experts.from_weight(*(jaxllm.quantize(stack, "q8_0") for stack in stacks))
chosen = np.array([[0, 7], [5, 3], [7, 2], [1, 6]], np.int32)
scores = np.full(chosen.shape, 0.5, np.float32)
y = jax.jit(experts)(x, scores, chosen)
print(y.shape, "collectives:", dict(collectives_of(experts, x, scores, chosen)))
plots.shards({name: getattr(experts, name).get_value() for name in ("gate_proj", "up_proj", "down_proj")})

# %%
gate, up, down = (np.asarray(stack)[chosen] for stack in experts.dequantize())
g, u = np.einsum("tkoi,ti->tko", gate, x), np.einsum("tkoi,ti->tko", up, x)
expected = np.einsum("tkoi,tki,tk->to", down, g / (1 + np.exp(-g)) * u, scores)
assert np.abs(y - expected).max() < 1e-3
print("The experts agree with numpy.")
