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
# # GPT-OSS, small: MXFP4, windows, sinks
#
# The architecture of GPT-OSS in a size for this CPU, with random weights. Three things are special about it: its
# experts are stored in MXFP4, every other layer sees a window of the last tokens only, and a head may attend to
# nothing. Eight devices are emulated.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # has to come before JAX looks at its devices

from collections import Counter

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxllm
from jaxllm import plots
from jaxllm.kernels import mxfp4
from jaxllm.kernels.attention import Cached, Scoring, attend

config = {"model_type": "gpt_oss", "vocab_size": 1000, "hidden_size": 192, "intermediate_size": 192, "head_dim": 32}
config |= {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": 16}
config |= {"num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 512}
config |= {"rope_theta": 10000.0, "tie_word_embeddings": False}

# %% [markdown]
# ## MXFP4
#
# A code has four bits: a sign, two bits of exponent and one of mantissa, which makes eight magnitudes. 32 codes share
# a scale, a power of two: 4.25 bits a weight. Here are all codes, with the scale 2^0 (a byte of 127) and with 2^1.

# %%
codes = np.arange(16, dtype=np.uint8)
packed = np.concatenate([codes[0::2] | codes[1::2] << 4] * 2)  # two codes in a byte, the first in its low bits
values = mxfp4.dequantize(np.stack([packed, packed])[:, None], np.array([[127], [128]], np.uint8), dtype=jnp.float32)
for scale, row in zip(("2^0", "2^1"), np.asarray(values), strict=True):
    print(f"scale {scale}:", *(f"{value:g}" for value in row[:16]))

# %% [markdown]
# Published checkpoints have their experts in MXFP4 and the rest in bfloat16. So that becomes of a model with random
# weights:

# %%
model = jaxllm.initialize(config, mesh="ep=8", dtype="float32", progress=False)
done = model.quantize("mxfp4", organization="moqe", progress=False)
print(Counter(row.result.format for row in done.rows))
held = {p.name: p.weight for p in model.placed}
names = ("experts.gate_proj", "experts.down_proj", "gate.weight")
plots.shards({name: held[f"layers.0.mlp.{name}"] for name in names})

# %% [markdown]
# ep=8 gives every device one expert. Why not tp? A width of 192 is 6 blocks of 32, which 8 devices do not divide (in
# GPT-OSS itself, 2880 is 90 blocks): tp=8 would fill up with blocks of zeros.
#
# ## Windows
#
# A layer with a window keeps a ring of the last positions, whatever the length of the text; 64 more than the window,
# so that a conversation can be taken back a little. The other layers keep everything.

# %%
cache = model.empty_cache(batch=1, capacity=512)
for i, keys in enumerate(cache.keys):
    print(f"layer {i}: keys of {keys.shape[2]} positions")

# %% [markdown]
# Who sees whom: two models with a single layer each. Each of 48 tokens is replaced in turn, and what that does to the
# logits after the last one is drawn. In a window of 16 only the last 16 tokens count, to the bit.

# %%
tokens = np.random.default_rng(0).integers(0, config["vocab_size"], 48)
changed = np.tile(tokens, (48, 1))
np.fill_diagonal(changed, (tokens + 1) % config["vocab_size"])
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for kind in ("full_attention", "sliding_attention"):
    one = jaxllm.initialize(
        config | {"num_hidden_layers": 1, "layer_types": [kind]}, mesh="tp=1", dtype="float32", progress=False
    )
    logits = np.asarray(one.logits(np.concatenate([tokens[None], changed]), last_only=True))
    change = np.abs(logits[1:] - logits[0]).max(axis=1)
    axis.plot(change[:-1], "o-", markersize=3, label=kind)
    assert (change[:-16] == 0).all() == (kind == "sliding_attention")
axis.set(xlabel="position of the token that is replaced", ylabel="change of the last logits")
axis.legend()
plt.show()

# %% [markdown]
# ## Sinks
#
# Softmax makes a head attend to something, always. GPT-OSS gives each head a learned score for nothing: it takes part
# in the softmax, and its value is zero. If all values are 1, the output of attention is the share that is left for
# tokens. Here every query and key is random, and the score of nothing rises from one head to the next.

# %%
rng = np.random.default_rng(0)
sinks = jnp.array([-20.0, 0.0, 2.0, 4.0, 6.0])
q = jnp.asarray(rng.normal(size=(1, 1, 5, 32)), jnp.float32) / 32**0.5
keys, ones = jnp.asarray(rng.normal(size=(1, 1, 16, 32)), jnp.float32), jnp.ones((1, 1, 16, 1))
share = attend(Cached(q, keys, ones, jnp.array([[15]]), sinks=sinks), Scoring(16))[0, 0, :, 0]
for sink, left in zip(sinks.tolist(), share.tolist(), strict=True):
    print(f"sink {sink:5.1f}: {left:.3f} of the attention goes to the 16 tokens")
assert share[0] > 0.999 and (jnp.diff(share) < 0).all()
