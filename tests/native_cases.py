"""What the native CPU kernels have to pass, for every format. `python native_cases.py` runs it in a process of its own,
because a process uses one instruction set (JAXLLM_CPU) and one number of threads (JAXLLM_THREADS)."""

import itertools
import math
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from quantized_writers import pack_bits

from jaxllm.formats.affine import Affine
from jaxllm.formats.codebook import Codebook
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.nvfp4 import NVFP4
from jaxllm.formats.scaled import Scaled
from jaxllm.kernels.activations import rounding
from jaxllm.kernels.cpu import library, native_cpu

ROWS, COLS = 37, 512
COUNTS = (*range(1, 10), 70)  # rows of x
# Where a block has its float16 scales, if not in its first bytes.
SCALES = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q8_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    **dict.fromkeys(("Q8_K", "IQ1_M", "MXFP4", "NVFP4"), ()),
}


def ggml(type, rows=ROWS, cols=COLS):
    """Random blocks, with scales that are finite and of any sign."""
    rng, block = np.random.default_rng(0), BLOCK_TYPES[type]
    blocks = rng.integers(0, 256, (rows, cols // block.size, block.nbytes), dtype=np.uint8)
    scales = rng.normal(scale=0.02, size=(*blocks.shape[:2], 2))
    for i, at in enumerate(SCALES.get(type, (0,))):
        blocks[..., at : at + 2] = scales[..., i : i + 1].astype(np.float16).view(np.uint8)
    if type == "Q8_K":
        blocks[..., :4] = scales[..., :1].astype(np.float32).view(np.uint8)
    if type == "IQ1_M":  # a quarter of the float16 in each of four bytes
        bits = scales[..., 0].astype(np.float16).view(np.uint16)
        for i in range(4):
            blocks[..., 49 + 2 * i] = blocks[..., 49 + 2 * i] & 15 | (bits >> 4 * i & 15) << 4
    if type == "MXFP4":
        blocks[..., 0] = rng.integers(118, 130, blocks.shape[:2])
    return GGML(jax.device_put(blocks), type)


def affine(bits, cols=COLS, group=32, **leaves):
    rng = np.random.default_rng(bits)
    values = 32 // math.gcd(bits, 32)  # of whole words
    codes = pack_bits(rng.integers(0, 2**bits, (ROWS, cols)).reshape(ROWS, -1, values), bits)
    given = {name: make(rng) for name, make in leaves.items()}
    scales = given.pop("scales", None)
    if scales is None:
        scales = rng.normal(scale=0.02, size=(ROWS, -(-cols // group))).astype(np.float16)
    return jax.device_put(Affine(codes, scales, bits, group, "test", 1, **given))


def floats(*shape, seed=0, dtype=np.float32):
    """In numpy: JAX compiles a program for each operation, on each shape."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(dtype)


def scaled(dtype, block, scale_dtype=jnp.float32, cols=COLS):
    sizes = (ROWS, cols)
    counts = [1 if n is None else -(-size // n) for n, size in zip(block, sizes, strict=True)]
    values = floats(*sizes) * np.float32(30 if dtype == jnp.int8 else 1)
    scales = np.exp2(np.round(floats(*counts))).astype(scale_dtype)
    return jax.device_put(Scaled(values.astype(dtype), scales, block, factor=0.5))


def codebook(cols=COLS, group=64):
    codes = np.random.default_rng(0).integers(0, 256, (ROWS, cols // 2), dtype=np.uint8)
    return jax.device_put(Codebook(codes, floats(ROWS, -(-cols // group)), floats(16, seed=1), group, "NF4"))


nvfp4 = jax.jit(NVFP4.from_dense)
GROUPS = (ROWS, COLS // 32)
WEIGHTS = {
    **{type: lambda type=type: ggml(type) for type in BLOCK_TYPES},
    **{f"affine {bits}": lambda bits=bits: affine(bits) for bits in range(1, 9)},
    "affine, zeros": lambda: affine(4, zeros=lambda rng: rng.integers(0, 16, GROUPS, dtype=np.uint8)),
    "affine, float zeros": lambda: affine(8, zeros=lambda rng: rng.normal(size=GROUPS).astype(ml_dtypes.bfloat16)),
    "affine, biases": lambda: affine(5, biases=lambda rng: rng.normal(size=GROUPS).astype(np.float16)),
    "affine, groups of 16": lambda: affine(4, group=16),
    "affine, groups of 8": lambda: affine(4, group=8),
    "affine, groups of columns": lambda: affine(
        4, in_groups=lambda rng: rng.permutation(np.arange(COLS, dtype=np.int32) // 32)
    ),
    "affine, groups of rows": lambda: affine(
        8,
        scales=lambda rng: rng.normal(size=(4, COLS)).astype(np.float32),
        zeros=lambda rng: rng.normal(size=(4, COLS)).astype(np.float32),
        out_groups=lambda rng: rng.integers(0, 4, ROWS, dtype=np.int32),
    ),
    "MXFP4 in order": lambda: jax.jit(MXFP4.encoded)(floats(ROWS, COLS)),
    "NVFP4 in order": lambda: nvfp4(floats(ROWS, COLS)),
    "NVFP4, divided": lambda: NVFP4(
        *jax.tree.leaves(nvfp4(floats(ROWS, COLS)))[:2], jax.device_put(np.array([3.0], np.float32)), divides=True
    ),
    "NF4": codebook,
    "FP8": lambda: scaled(jnp.float8_e4m3fn, (16, 128)),
    "FP8 per row": lambda: scaled(jnp.float8_e4m3fn, (1, None), jnp.bfloat16),
    "MXFP8": lambda: scaled(jnp.float8_e5m2, (1, 32), jnp.float8_e8m0fnu),
    "INT8": lambda: scaled(jnp.int8, (None, None)),
    "bfloat16": lambda: Dense(jax.device_put(floats(ROWS, COLS, dtype=jnp.bfloat16))),
    "float16": lambda: Dense(jax.device_put(floats(ROWS, COLS, dtype=np.float16))),
    # Rows that end within a block of 32 columns.
    "affine, short": lambda: affine(4, 40, 16),
    "affine 3, short": lambda: affine(3, 96),
    "affine 8, short": lambda: affine(8, 20),
    "NVFP4, short": lambda: nvfp4(floats(ROWS, 48)),
    "NF4, short": lambda: codebook(62, 2),
    "FP8, short": lambda: scaled(jnp.float8_e4m3fn, (8, 20), cols=50),
    "bfloat16, short": lambda: Dense(jax.device_put(floats(ROWS, 33, dtype=jnp.bfloat16))),
}


def rounds(name):
    """Whether the format's products may take rounded activations: it is integers with scales for 16 or more."""
    exact = "NF4", "FP8", "MXFP8", "INT8", "bfloat16", "float16", "affine, groups of"
    return not name.startswith(exact) or name == "affine, groups of 16"


def rounded(x):
    """Rows as llama.cpp's Q8_0 holds them, but with a float32 scale: an independent definition."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    scale = np.abs(padded).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(np.divide(padded, scale, out=np.zeros_like(padded), where=scale > 0))
    return (codes * scale).reshape(len(x), -1)[:, : x.shape[1]]


@jax.jit
def products(xs, weights):
    """Each of xs times its weight, exact and rounded, and the dequantized matrices; one program compiles faster."""
    found = {}
    for int8_blocks in (False, True):
        with rounding(int8_blocks):
            found[int8_blocks] = {name: [native_cpu.matmul(x, w) for x in xs[name]] for name, w in weights.items()}
    return found, {name: weight.dequantize() for name, weight in weights.items()}


def check(*names, counts=COUNTS):
    """Products of `counts` rows, exact and rounded, with the dequantized matrix in float64."""
    weights = {name: WEIGHTS[name]() for name in names}
    xs = {name: [floats(count, weight.shape[1], seed=count) for count in counts] for name, weight in weights.items()}
    for name, count in itertools.product(names, range(len(counts))):
        xs[name][count][0, :32] = 0  # a block without a scale
    found, matrices = jax.device_get(products(xs, weights))
    for int8_blocks, name in itertools.product(found, names):
        for x, got in zip(xs[name], found[int8_blocks][name], strict=True):
            seen = rounded(x) if int8_blocks and rounds(name) else x
            expected = seen.astype(np.float64) @ matrices[name].astype(np.float64).T
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max() + 1e-5, err_msg=name)


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)  # as conftest.py has it
    check(*WEIGHTS, counts=(1, 7, 70))  # every branch once
    sys.stdout.write(f"{library.native().instructions} {library.threads()}\n")
