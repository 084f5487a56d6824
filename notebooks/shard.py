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
# # The same model on 1, 2 and 8 devices
#
# A model never knows how many devices there are. Each of its matrices states how it is sharded; the mesh says over
# how many devices; everything else follows. The devices are emulated on this CPU, and the model is a small Qwen3-MoE
# with random weights, in 8-bit blocks.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # has to come before JAX looks at its devices

import json
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

import jaxllm
from jaxllm import plots

config = {"model_type": "qwen3_moe", "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4}
config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 256}
config |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
config |= {"max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False}
folder = Path(mkdtemp()) / "tiny"
folder.mkdir()
(folder / "config.json").write_text(json.dumps(config))

meshes = ["tp=1", "tp=2", "tp=8", "tp=2,ep=4"]
models = {
    mesh: jaxllm.initialize(folder, mesh=mesh, quantize="q8_0", dtype="float32", progress=False) for mesh in meshes
}

# %% [markdown]
# ## The same numbers
#
# Devices add up partial sums in another order, so the last bits differ, and nothing else.

# %%
tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (2, 16))
logits = {mesh: np.asarray(model.logits(tokens)) for mesh, model in models.items()}
for mesh in meshes[1:]:
    difference = np.abs(logits[mesh] - logits["tp=1"]).max()
    print(f"{mesh}: within {difference:.0e} of one device, with logits up to {np.abs(logits[mesh]).max():.1f}")
    assert difference < 1e-4

# %% [markdown]
# ## Who holds what
#
# tp shards matrices: the queries' by rows ("column": each device computes some of the outputs), `o_proj` by columns
# ("row": each device has some of the inputs, and partial products are summed). ep distributes experts. A router is
# small, and every device has it. Four key/value heads on eight devices: each is held twice, so that every device
# finds the one that its queries need.


# %%
def layer(model):
    held = {p.name: p.weight for p in model.placed}
    names = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.gate.weight")
    names += ("mlp.experts.up_proj", "mlp.experts.down_proj")
    return plots.shards({name.removesuffix(".weight"): held[f"layers.0.{name}"] for name in names})


layer(models["tp=8"])

# %%
layer(models["tp=2,ep=4"])

# %% [markdown]
# ## What a device holds
#
# In bytes, of the weights and of a cache for one sequence. With tp=8 it is little more than an eighth: norms and
# routers are replicated, and key/value heads are held twice. With tp=2,ep=4 a device has an eighth of the experts,
# but half of the attention.


# %%
def device_bytes(arrays):
    return sum(np.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(arrays))


for mesh, model in models.items():
    cache = model.empty_cache(batch=1)
    weights, cached = device_bytes([p.weight for p in model.placed]), device_bytes((cache.keys, cache.values))
    print(f"{mesh}: {weights / 1e6:.2f} MB of weights, {cached / 1e6:.2f} MB of cache")

# %% [markdown]
# ## What devices tell one another
#
# The collectives of a decode step, read from the compiled program: two sums a layer, whatever the mesh, and at both
# ends the embedding's sum and a gather of the logits.

# %%
for mesh in meshes[2:]:
    plan = jaxllm.plan(str(folder), "cpu:8", mesh, context=256)
    print(mesh)
    for name, found in (("a layer", plan.kinds[0].collectives), ("both ends", plan.ends)):
        print(f"    {name}:", ", ".join(f"{c.kind} of {c.nbytes} bytes over {' and '.join(c.axes)}" for c in found))

# %% [markdown]
# ## Sizes that do not divide
#
# Three devices do not divide 8 heads, nor blocks of 32 columns. Heads and blocks of zeros fill up what is missing;
# they change nothing, and the table says where they are.

# %%
odd = jaxllm.initialize(folder, mesh="tp=3", quantize="q8_0", dtype="float32", progress=False)
assert np.abs(np.asarray(odd.logits(tokens)) - logits["tp=1"]).max() < 1e-4
print("\n".join(str(odd.summary()).splitlines()[:9]))
