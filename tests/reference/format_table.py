"""Prints the table of docs/formats.md: what every format can do, and on how many devices, as it does it here and now.

Run it where jaxllm and its tests' dependencies are installed; it takes some minutes:

    python tests/reference/format_table.py

Each row runs the case table of tests/test_quantized_layers.py for the formats that it names. A cell lists the numbers
of emulated devices on which every case behind it passed in this run, or says "none". What went wrong is printed to
stderr.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import conftest  # noqa: F401  (eight devices)
import jax
import jax.numpy as jnp
import numpy as np
import test_quantized_layers as cases
from compiled import dequantized
from test_ggml_formats import example, reference

from jaxllm.errors import InputError
from jaxllm.formats.base import Weight
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES

COLUMNS = {
    "load": ("decode",),
    "matmul": ("matmul",),
    "tp column": ("column",),
    "tp row": ("row",),
    "awkward row": ("awkward row", "padded row"),
    "lookup": ("lookup",),
    "experts": ("experts", "gather_forward"),
}


def ggml(name: str, shape: tuple[int, int], seed: int) -> tuple[Weight, np.ndarray]:
    """Blocks of usual magnitudes, and what gguf-py makes of them."""
    kind = BLOCK_TYPES[name]
    pool = example(name).blocks.reshape(-1, 1, kind.nbytes)
    largest = np.abs(reference(name, pool)).max(axis=-1)
    usual = pool[(largest > 1e-3) & (largest < 1e3)]
    count = shape[0] * shape[1] // kind.size
    picked = np.random.default_rng(seed).integers(len(usual), size=count)
    blocks = usual.reshape(-1, kind.nbytes)[picked].reshape(shape[0], -1, kind.nbytes)
    return GGML(blocks, name), reference(name, blocks)


def dense(dtype: str, shape: tuple[int, int], seed: int) -> tuple[Weight, np.ndarray]:
    values = np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype))
    return Dense(values), values.astype(np.float32)


def ggml_kind(name: str) -> cases.Kind:
    """Sizes in whole blocks: 3 of them do not divide evenly over the devices, and are padded."""
    n = BLOCK_TYPES[name].size
    hidden = max(64, n)
    return cases.Kind(partial(ggml, name), hidden, 8 * n, 3 * n, 7 * n, 8 * n, 3 * n)


GGML_KINDS = {f"gguf-{name}": ggml_kind(name) for name in BLOCK_TYPES}
DENSE_KINDS = {dtype: cases.Kind(partial(dense, dtype)) for dtype in ("float32", "bfloat16", "float16")}
KINDS = cases.KINDS | GGML_KINDS | DENSE_KINDS


def gguf(*names: str) -> list[str]:
    return [f"gguf-{name}" for name in names]


# What a row is called, and the formats that it stands for.
ROWS = {
    "GPTQ 2, 3, 4, 8 bits, v1 and v2": ["gptq-2", "gptq-3", "gptq-4", "gptq-8", "gptq-v2", "gptq-one-group"],
    "GPTQ act-order": ["gptq-act-order"],
    "AWQ": ["awq"],
    "bitsandbytes NF4, FP4": ["bnb-nf4", "bnb-nf4-nested", "bnb-fp4"],
    "bitsandbytes LLM.int8": ["bnb-int8"],
    "MLX 2, 3, 4, 5, 6, 8 bits": [f"mlx-{bits}" for bits in (2, 3, 4, 5, 6, 8)],
    "HQQ 3, 4 bits, axis 0": ["hqq-4-axis0", "hqq-3-axis0"],
    "HQQ 1, 2, 3, 4, 8 bits, axis 1": ["hqq-4-axis1", "hqq-8", "hqq-3", "hqq-2", "hqq-1"],
    "FP8, one scale": ["fp8-tensor", "fp8-static", "fp8-modelopt"],
    "FP8, a scale a row": ["fp8-channel", "ct-fp8"],
    "FP8, blocks": ["fp8-block", "ct-fp8-block"],
    "MXFP8": ["mlx-mxfp8"],
    "NVFP4": ["nvfp4-modelopt", "ct-nvfp4", "mlx-nvfp4"],
    "MXFP4": ["mxfp4", "ct-mxfp4", "mlx-mxfp4"],
    "compressed-tensors INT 3, 4, 8 bits": ["ct-pack-3", "ct-pack-4", "ct-pack-4-asym", "ct-pack-8"],
    "compressed-tensors INT8": ["ct-int8"],
    "GGUF Q4_0 to Q8_0": gguf("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    "GGUF Q2_K to Q6_K": gguf("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    "GGUF IQ4_NL, MXFP4": gguf("IQ4_NL", "MXFP4"),
    "GGUF IQ1, IQ2, IQ3, IQ4_XS": gguf("IQ4_XS", *(n for n in BLOCK_TYPES if n[:3] in ("IQ1", "IQ2", "IQ3"))),
    "GGUF Q1_0, Q8_1, Q8_K, TQ1_0, TQ2_0, NVFP4": gguf("Q1_0", "Q8_1", "Q8_K", "TQ1_0", "TQ2_0", "NVFP4"),
    "dense float32, bfloat16, float16": [*DENSE_KINDS],
}


def passes(case: cases.Case, what: str) -> bool:
    try:
        case.check(what)
    except AssertionError as error:
        print(f"{what}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return False
    return True


def outcomes(name: str) -> dict[str, dict[int, bool]]:
    """For each kind of case, by the number of devices, whether it passed on them."""
    found: dict[str, dict[int, bool]] = {}
    meshes = (
        (cases.LINEAR_MESHES, cases.linears, cases.LINEAR_KINDS),
        (cases.EXPERT_MESHES, cases.stacks, cases.EXPERT_KINDS),
    )
    for names, run, kinds in meshes:
        for mesh in names:
            size = cases.make_mesh(mesh).size
            try:
                made = run(KINDS[name], mesh)
            except Exception as error:  # a bug, and the table says so
                print(f"{name} on {mesh}: {type(error).__name__}: {error}", file=sys.stderr)
                for kind in kinds:
                    found.setdefault(kind, {})[size] = False
                continue
            for kind, case in made.items():
                found.setdefault(kind, {})[size] = passes(case, f"{name} on {mesh}, {kind}")
    return found


def encodes(name: str) -> list[bool]:
    """Whether floats that are encoded like a weight of this format come back nearly; empty if there is no encoder."""
    kind = KINDS[name]
    weight, _ = kind.make((kind.hidden, kind.fits), 0)
    w = np.random.default_rng(1).normal(size=weight.shape).astype(np.float32)
    if name.startswith("gguf-TQ"):
        w = np.clip(np.round(w), -1, 1)  # these are for matrices of three values
    try:
        again = jax.tree.map(np.asarray, weight, is_leaf=lambda leaf: hasattr(leaf, "map")).like(jnp.asarray(w))
    except InputError:
        return []
    error = dequantized(again) - w
    good = again.format == weight.format and np.sqrt((error**2).mean()) < 0.65  # of one bit 0.60 remains
    if not good:
        print(f"{name}: encoded as {again.format}, wrong by {np.sqrt((error**2).mean()):.2g}", file=sys.stderr)
    return [bool(good)]


def devices(found: list[dict[int, bool]]) -> str:
    """The numbers of devices on which everything passed."""
    sizes = sorted({size for each in found for size in each})
    return ", ".join(str(size) for size in sizes if all(each.get(size, True) for each in found)) or "none"


def encoded(names: list[str]) -> str:
    """Whether floats can be put into the formats; how many of them, if not all."""
    results = [ok for name in names for ok in encodes(name)]
    if not results:
        return "no"
    return "yes" if sum(results) == len(names) else f"{sum(results)} of {len(names)}"


def row(names: list[str]) -> list[str]:
    found = [outcomes(name) for name in names]
    return [*(devices([each[k] for each in found for k in kinds]) for kinds in COLUMNS.values()), encoded(names)]


def main() -> None:
    assert {name for names in ROWS.values() for name in names} == set(KINDS)
    heads = ["format", *COLUMNS, "encode"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for title, names in ROWS.items():
        with np.errstate(over="ignore"):  # exp, in silu: random blocks are large
            print(f"| {title} | {' | '.join(row(names))} |", flush=True)


if __name__ == "__main__":
    main()
