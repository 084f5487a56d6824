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
# # What a quantized matrix looks like
#
# A quantized weight is a small group of numbers with something in common: a scale, perhaps an offset, perhaps a list
# of values that are allowed. This notebook encodes one matrix in several formats and looks inside.

# %%
import json
from pathlib import Path

import numpy as np
from tabulate import tabulate

import jaxllm
from jaxllm import plots

rng = np.random.default_rng(0)
matrix = rng.normal(size=(256, 512)).astype(np.float32)
types = ["q8_0", "q4_0", "q4_k", "q2_k", "iq4_nl", "afq4", "nf4", "int4", "mxfp4", "nvfp4", "fp8_block", "int8"]
weights = {type: jaxllm.quantize(matrix, type) for type in types}

# %% [markdown]
# ## What is stored
#
# A weight is a pytree. Its leaves are the checkpoint's own bits; `axes` says what each axis of a leaf runs along,
# which is all that sharding has to know: one step along "in by 32" covers 32 columns. Types of GGUF keep codes and
# scales in one block of bytes; others keep them apart.

# %%
for type in ("q4_k", "nf4", "mxfp4", "fp8_block"):
    weight = weights[type]
    print(f"{type}: {weight.bits_per_weight:.4g} bits a weight")
    for name, axes in weight.axes.items():
        leaf = weight.leaf(name)
        along = ", ".join("-" if cut is None else f"{cut.dim} by {cut.unit}" for cut in axes)
        print(f"    {name}: {leaf.dtype} {[*leaf.shape]}, along {along}")

# %% [markdown]
# ## One block, in bytes
#
# Q8_0 is the simplest: a float16 scale, then 32 codes of a byte each. A weight is its code times the scale.

# %%
block = np.asarray(weights["q8_0"].blocks)[0, 0]
scale, codes = block[:2].view(np.float16)[0], block[2:].view(np.int8)
print(f"{len(block)} bytes: scale {scale:.5f}, codes {codes[:8]} ...")
by_hand = np.float32(scale) * codes.astype(np.float32)
assert (by_hand == np.asarray(weights["q8_0"].dequantize())[0, :32]).all()
print("as decoded by hand:", by_hand[:4])
print("what they were:    ", matrix[0, :4])

# %% [markdown]
# ## Which values a block can hold
#
# The first 32 weights, from left to right as they are, from bottom to top as they are held; gray lines are the values
# that occur. Integers with a scale (q4_0) are evenly spaced. NF4's and IQ4_NL's values are dense where weights are
# frequent. MXFP4's are those of a float with four bits, and its scale is a power of two, so it often wastes part of
# its range.

# %%
shown = ("q8_0", "q4_0", "iq4_nl", "nf4", "mxfp4")
plots.levels(matrix[0, :32], {type: weights[type] for type in shown})

# %% [markdown]
# ## Bits and error
#
# The error is the root of the mean square, on normally distributed weights with variance 1.


# %%
def error(weight):
    return float(np.sqrt(((np.asarray(weight.dequantize()) - matrix) ** 2).mean()))


measured = {type: (weight.bits_per_weight, error(weight)) for type, weight in weights.items()}
print(tabulate([(type, *values) for type, values in measured.items()], ("type", "bits", "error"), floatfmt=".4g"))
assert measured["q8_0"][1] < measured["q4_k"][1] < measured["q4_0"][1] < measured["q2_k"][1]
plots.quality(measured, metric="error")

# %% [markdown]
# ## One large weight
#
# Why blocks at all? A scale has to reach the largest weight of its group. If one weight is 50 times as large as the
# others, its neighbours in the group become coarse. In blocks of 32, those are 31 weights; with one scale for a row,
# all 512.

# %%
outlier = matrix.copy()
outlier[:, 7] = 50
for type, group in (("int8", "a row"), ("q8_0", "32 columns")):
    held = np.asarray(jaxllm.quantize(outlier, type).dequantize())
    far = np.abs(held - outlier)[:, 32:].mean()
    print(f"{type}, a scale for {group}: other blocks are wrong by {far:.4f} on average")

# %% [markdown]
# ## Bits against perplexity
#
# What counts is what a model makes of it. Measured by `tests/reference/encoding_table.py`, which took some 15
# minutes: the demo's matrices in every type, and the perplexity of a text (lower is better; the dashed line is the
# file as it is). Triangles: with an importance matrix, which says how much each input matters and comes from another
# text. Most of the demo's rows are no whole blocks of 256, so low-bit types fall back to types of 32, and the bits
# are higher than their names say.

# %%
golden = Path("../tests/golden/encoding_table.json")
table = json.loads((golden if golden.exists() else Path("tests/golden/encoding_table.json")).read_text())
shown = ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_xs", "iq3_s", "iq2_xs", "iq1_m", "afq4", "hqq4", "mxfp4")


def points(key):
    return {row["type"]: (row["bits"], row[key]) for row in table["rows"] if row["type"] in shown and key in row}


plots.quality(points("plain"), points("helped"), reference=table["file"])
