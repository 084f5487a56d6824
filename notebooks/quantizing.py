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
# # Quantize, calibrate, and keep the result
#
# Any model that can be loaded can be put into other types, while it is loaded, where it lies, or into a file.

# %%
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import numpy as np

import jaxllm
from jaxllm.calibrate import calibrate
from jaxllm.convert import convert

# %% [markdown]
# ## What would become of each matrix
#
# Rows of 576 are no multiple of the 256 columns of a K-quant's block, so another type takes its place there; the
# table of embeddings, which is the head too, gets a better one.

# %%
folder = Path(mkdtemp())
plan = convert("demo", folder / "small.gguf", to="q4_k", dry_run=True)
print("\n".join(str(plan).splitlines()[:12]), "...")

# %% [markdown]
# ## Which inputs matter
#
# A model notes what its matrices are multiplied by. The mean squares are what llama.cpp calls an importance matrix.

# %%
model = jaxllm.load("demo", dtype="float32", weights="packed", progress=False)
text = "The sea is wide and the boat is small, and nobody on the shore knows when the wind will turn. " * 24
known = calibrate(model, text, chunk=128, progress=False)

importance = np.sort(known["layers.20.mlp.down_proj.weight"].importance)[::-1]
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.loglog(np.arange(1, len(importance) + 1), importance)
axis.set(xlabel="inputs of a matrix, the most important first", ylabel="mean square")
plt.show()

# %% [markdown]
# ## Types that profit
#
# The loaded model is encoded anew, matrix by matrix: in 2.6 bits where rows are whole blocks.

# %%
done = model.quantize("q2_k", importance=known, progress=False)
print(Counter(row.result.format for row in done.rows))
print(model.generate("The sea is", max_new_tokens=12))

# %% [markdown]
# ## A file that others read
#
# llama.cpp runs this file. `to="afq4"` writes a directory for MLX, `to="fp8_block"` or `"int4"` one for transformers
# and vLLM; `to="gptq4", text=...` calibrates on a text.

# %%
convert("demo", folder / "small.gguf", to="q4_k", progress=False)
small = jaxllm.load(folder / "small.gguf", progress=False)
print(f"{(folder / 'small.gguf').stat().st_size / 1e6:.0f} MB:", small.generate("The sea is", max_new_tokens=12))

# %% [markdown]
# What each type costs in bits and in perplexity is a picture in the notebook on formats.
