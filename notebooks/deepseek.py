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
# # DeepSeek-V3, small: latents, experts in groups, FP8
#
# The architecture of DeepSeek-V3 in a size for this CPU, with random weights: what it caches, which experts it
# chooses, and how its matrices are held. Eight devices are emulated.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # has to come before JAX looks at its devices

import jax.numpy as jnp
import numpy as np

import jaxllm
from jaxllm import plots
from jaxllm.kernels import block_fp8
from jaxllm.layers import TopKRouter

config = {"model_type": "deepseek_v3", "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4}
config |= {"intermediate_size": 512, "num_attention_heads": 8, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
config |= {"q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
config |= {"first_k_dense_replace": 1, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4}
config |= {"moe_intermediate_size": 128, "n_group": 4, "topk_group": 2, "scoring_func": "sigmoid"}
config |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_theta": 10000.0, "tie_word_embeddings": False}

model = jaxllm.initialize(config, mesh="tp=2,ep=4", quantize="fp8_block", dtype="float32", progress=False)
tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (4, 64))

# %% [markdown]
# ## What is cached
#
# Multi-head latent attention caches one latent per token, which all heads share, and one rotary key. Keys and values
# of every head are linear functions of the latent. A decode step never computes them: it takes the queries to the
# latents instead. With `attention="naive"` they are what is cached. The logits of a step are the same.

# %%
naive = jaxllm.initialize(
    config, mesh="tp=2,ep=4", quantize="fp8_block", dtype="float32", attention="naive", progress=False
)
logits = []
for name, one in (("latents", model), ("every head", naive)):
    cache = one.empty_cache(batch=4, capacity=128)
    shapes = cache.keys[0].shape, cache.values[0].shape
    per_token = sum(heads * size for _, heads, _, size in shapes)
    print(f"{name}: {shapes[0]} and {shapes[1]}, {per_token} numbers a token and layer")
    _, cache = one.forward(tokens, cache, last_only=True)
    logits.append(np.asarray(one.forward(tokens[:, :1], cache, last_only=True)[0]))
difference = np.abs(logits[0] - logits[1]).max()
print(f"largest difference of the logits: {difference:.0e}, of logits up to {np.abs(logits).max():.1f}")
assert difference < 1e-3

# %% [markdown]
# In the model of 671 billion parameters, a latent and its rotary key are 512 + 64 numbers; 128 heads with keys of 128
# + 64 and values of 128 are 40,960: 71 times as much.
#
# ## Which experts are chosen
#
# The router gives every expert a score between 0 and 1. Experts form groups; a token may only choose from the groups
# whose two best experts are best. Below are scores of five tokens for 16 experts in 4 groups: each token has its 4
# experts in 2 groups.

# %%
router = TopKRouter(4, normalize=True, scoring="sigmoid", groups=4, chosen_groups=2, group_score="top2", scale=2.5)
scores, chosen = router(jax.random.normal(jax.random.key(0), (5, 16)), None)
for s, experts in zip(np.asarray(scores), np.asarray(chosen), strict=True):
    groups = sorted(set((experts // 4).tolist()))
    print(f"experts {np.sort(experts)} of groups {groups}, weights that sum to {s.sum():.2f}")
    assert len(groups) <= 2

# %% [markdown]
# In the model: how many of 256 tokens chose each expert, in each of the sparse layers (the first layer is dense). A
# trained model evens this out by a bias that is added to the scores only while choosing.

# %%
model.begin_track_stats()
model.logits(tokens)
seen = model.end_track_stats()
for layer in (1, 2, 3):
    counts = seen[f"layers.{layer}.mlp.experts.down_proj"].counts
    assert counts.sum() == tokens.size * config["num_experts_per_tok"]
plots.expert_load(seen)

# %% [markdown]
# ep=4 puts four experts on each pair of devices, and tp=2 shards each of them between the two.

# %%
held = {p.name: p.weight for p in model.placed}
names = ("experts.up_proj", "experts.down_proj", "shared_expert.up_proj.weight")
plots.shards({name: held[f"layers.1.mlp.{name}"] for name in names})

# %% [markdown]
# ## FP8
#
# A number of eight bits with a scale for each block of 128 x 128. These are the functions of DeepSeek's `kernel.py`:
# activations get a scale for each 128 neighbours, weights for each block, and products are summed in float32.

# %%
rng = np.random.default_rng(0)
x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, 512), (256, 512)))
weight = jaxllm.quantize(w, "fp8_block")
codes, scales = block_fp8.act_quant(x)
y = block_fp8.fp8_gemm(codes, scales, weight.values, weight.scales, dtype=jnp.float32)
exact = np.asarray(x @ w.T)
print("codes", codes.dtype, codes.shape, "scales", scales.shape, "of the weight", weight.scales.shape)
print(f"error of the product: {np.std(np.asarray(y) - exact) / np.std(exact):.1%}")
