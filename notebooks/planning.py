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
# # Before you rent them
#
# Whether a model fits on devices that you do not have, and what bounds its speed there. Nothing of the model is
# loaded: its parameters are shapes with shardings, and steps are compiled from them, never run.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # has to come before JAX looks at its devices

import jaxllm
from jaxllm import plots

# %% [markdown]
# ## GPT-OSS 120B on eight devices
#
# Sharded over tp, or with whole experts distributed over ep. `cpu:8` is compiled for emulated devices, which needs no
# other compiler. `jaxllm.plan("gpt-oss-120b", "h100:8", "tp=8")` asks the compiler of an H100, and `v5e:2x4` a TPU's
# (`pip install 'jaxllm[plan]'`); that changes temporaries and perhaps collectives, but nothing else.

# %%
plans = {mesh: jaxllm.plan("gpt-oss-120b", "cpu:8", mesh, batch=8) for mesh in ("tp=8", "ep=8")}
for mesh, plan in plans.items():
    print(mesh)
    for kind in plan.kinds:
        found = ", ".join(f"{c.kind} of {c.nbytes / 1e3:.0f} kB over {' and '.join(c.axes)}" for c in kind.collectives)
        print(f"    {kind.count} layers like layer {kind.first}, each: {found}")

# %% [markdown]
# ## Does it fit?
#
# The method `on` sets a plan beside the published limits of other chips. With ep=8, a device has all of the attention
# (in bfloat16) and 16 of 128 experts (in MXFP4); with tp=8, a part of every matrix, and zeros: a width of 2880 is 90
# blocks of 32, which eight devices do not divide.

# %%
there = {f"{mesh} on {chip}": plan.on(chip) for mesh, plan in plans.items() for chip in ("v5e", "h100")}
for name, plan in there.items():
    print(f"{name}: {plan.verdict}")
plots.memory(there)

# %% [markdown]
# ## What bounds its speed?
#
# A decode step reads all weights that its tokens need, and the cache, for a few operations each: the memory binds,
# which is the slope. A prompt's tokens share what is read: arithmetic binds, which is the flat part. More sequences
# at once move decoding to the right.

# %%
plots.roofline(there)

# %% [markdown]
# The most tokens per second that the limits allow, if everything overlaps perfectly. It is a bound, not a
# measurement.

# %%
for name, plan in there.items():
    decode, prefill = plan.decode, plan.prefill
    print(
        f"{name}: decode at most {decode.bound(plan.limits):,.0f} tokens/s ({decode.binds(plan.limits)} binds), "
        f"prompts at most {prefill.bound(plan.limits):,.0f} ({prefill.binds(plan.limits)} binds)"
    )

# %% [markdown]
# The whole report of one of them:

# %%
there["ep=8 on h100"]
