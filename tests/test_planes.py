"""Weights as planes of codes, as accelerators' kernels want them: the same numbers, bit for bit, in as many bits."""

from dataclasses import replace
from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import dequantized
from covering import in_turn, some
from jax.sharding import NamedSharding, PartitionSpec
from native_cases import COLS, ROWS, WEIGHTS, affine, floats, ggml

from jaxllm.formats.base import Weight
from jaxllm.formats.planes import FEW, chunk, pack, unpack, widths
from jaxllm.formats.planes_of import PARTS, planes_of, refuses
from jaxllm.formats.scaled import Scaled
from jaxllm.parallel import make_mesh


def nvfp4():
    """A file's NVFP4 without the scale that no encoder writes."""
    weight = WEIGHTS["NVFP4"]()
    return replace(weight, blocks=jnp.where(weight.blocks == 255, 254, weight.blocks))


MORE = {
    "NVFP4": nvfp4,
    "INT8 per row": lambda: Scaled((30 * floats(ROWS, COLS)).astype(jnp.int8), floats(ROWS, 1), (1, None)),
    "LLM.int8": lambda: Scaled((30 * floats(ROWS, COLS)).astype(jnp.int8), floats(ROWS, 1), (1, None), factor=1 / 127),
    "affine, biases of float32": lambda: affine(
        4, scales=lambda rng: rng.normal(size=(ROWS, COLS // 32)).astype(np.float32),
        biases=lambda rng: rng.normal(size=(ROWS, COLS // 32)).astype(np.float32),
    ),
    "affine, act-order": lambda: replace(affine(
        4,
        scales=lambda rng: np.pad(rng.normal(size=(ROWS, COLS // 32)), ((0, 0), (1, 0))).astype(np.float16),
        in_groups=lambda rng: 1 + rng.permutation(np.arange(COLS, dtype=np.int32) // 32),
    ), even=True),
}  # fmt: skip
as_planes = jax.jit(planes_of, static_argnums=1)  # one program is compiled sooner than each operation
ALL = {name: cache(make) for name, make in (WEIGHTS | MORE).items()}
REASONS = {name: refuses(make()) for name, make in ALL.items() if type(make()) in PARTS}
HELD = [name for name, reason in REASONS.items() if reason is None]
REFUSED = {name: reason for name, reason in REASONS.items() if reason is not None}


def test_what_is_refused():
    """Formats without integer codes for groups of at least 16, and rows that are not whole chunks."""
    some = ["TQ1_0", "MXFP4", "affine,", "affine", "FP8", "FP8,", "MXFP8", "INT8", "NVFP4,", "NF4,"]
    assert {name.split()[0] for name in REFUSED} == {*some, *(name for name in REFUSED if name.startswith("IQ"))}
    assert REFUSED["IQ2_XXS"] == "IQ2_XXS is not codes with a scale for each group"
    assert REFUSED["affine, groups of 8"] == "groups of 8 columns, the kernel takes multiples of 16"
    assert REFUSED["affine 3, short"] == "rows of 96 columns, the kernel takes multiples of 256 for 3 bits"


# One of each way from codes to numbers is compiled as users have it: optimizations could change bits.
ARITHMETIC = ["Q4_K", "Q6_K", "IQ4_XS", "affine 3", "affine, float zeros", "affine, act-order", "NF4", "NVFP4, divided"]
ARITHMETIC += ["LLM.int8"]
OPTIMIZED = some(HELD, ARITHMETIC)


@pytest.mark.parametrize(
    ("name", "transposed"),
    [
        pytest.param(*row, marks=[pytest.mark.optimized] if row[0] in OPTIMIZED else [])
        for row in in_turn(HELD, True, False)
    ],
)
def test_the_same_numbers(name, transposed):
    weight = ALL[name]()
    expected = dequantized(weight)
    made = as_planes(weight, transposed)
    assert made.shape == weight.shape
    assert made.format == weight.format
    assert made.nbytes <= {"Q2_K": 1.2}.get(name, 1.15) * weight.nbytes
    np.testing.assert_array_equal(dequantized(made), expected)


@pytest.mark.parametrize(
    ("name", "transposed"), in_turn(["Q5_K", "affine, act-order", "NF4", "NVFP4, divided"], False, True)
)
def test_rows_are_looked_up(name, transposed):
    weight, ids = ALL[name](), jnp.asarray([[3, 0, 36]])
    rows = jax.jit(lambda w: w.take(ids).dequantize())(as_planes(weight, transposed))
    np.testing.assert_array_equal(np.asarray(rows), dequantized(weight)[np.asarray(ids)])


LANES = [*product((3, 37, 300), (2, FEW + 1))]


@pytest.mark.parametrize(("rows", "count"), some(LANES, [(3, 2), (37, 2), (300, FEW + 1)]))
def test_rows_that_lie_along_lanes(rows, count):
    """One by one, of the lanes around each, or all at once."""
    weight = ggml("Q4_K", rows, 256)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, rows, count))
    ids = ids.at[0].set(rows - 1)
    taken = jax.jit(lambda w, ids: w.take(ids))(as_planes(weight, True), ids)
    assert not taken.transposed
    np.testing.assert_array_equal(dequantized(taken), dequantized(weight)[np.asarray(ids)])


@pytest.mark.parametrize(
    ("name", "transposed"),
    in_turn(["Q4_K", "Q6_K", "affine, act-order", "NF4", "NVFP4 in order", "LLM.int8"], True, False),
)
def test_stacks(name, transposed):
    weight = ALL[name]()
    stack = jax.tree.map(lambda leaf: np.stack([leaf, leaf, np.zeros_like(leaf)]), weight)
    expected = dequantized(weight)
    made = as_planes(stack, transposed)
    assert made.shape == (3, *weight.shape)
    np.testing.assert_array_equal(dequantized(made), np.stack([expected, expected, 0 * expected]))


@pytest.mark.parametrize("bits", range(1, 9))
def test_where_a_bit_stands(bits):
    """Against the layout as its description says it, one bit at a time."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, 2 * chunk(bits))
    words = np.asarray(jax.jit(pack, static_argnums=1)(jnp.asarray(codes, jnp.uint8), bits))
    assert words.shape == (2, bits * chunk(bits) // 32)
    np.testing.assert_array_equal(np.asarray(jax.jit(unpack, static_argnums=1)(words, bits)), codes)
    for column, code in enumerate(codes):
        part, at = divmod(column, chunk(bits))
        begin, left = 0, bits
        for width in widths(bits):
            left -= width
            group, place = divmod(at, 256 // width)
            field, pair = divmod(place, 16)
            word = words[part, begin + 8 * group + pair // 2]
            assert word >> 16 * (pair % 2) + width * field & 2**width - 1 == code >> left & 2**width - 1
            begin += chunk(bits) * width // 32


@pytest.mark.parametrize(
    ("name", "spec"),
    in_turn(["Q4_K", "affine 4", "NVFP4 in order"], PartitionSpec(None, "tp"), PartitionSpec("tp", None)),
)
def test_on_a_mesh(name, spec):
    """Repacked where it lies: each device's part is that of the whole matrix."""
    mesh = make_mesh("tp=2")
    weight: Weight = ALL[name]()
    weight = weight.arrange(rows=np.arange(36))
    for transposed in (False, True):
        made = as_planes(weight, transposed)
        specs = made.shard_specs(spec, mesh)
        shards = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), made, specs)
        parts = jax.jit(jax.shard_map(lambda w: w.dequantize(), mesh=mesh, in_specs=(specs,), out_specs=spec))(shards)
        np.testing.assert_array_equal(np.asarray(parts), dequantized(weight))


def test_every_class_that_has_parts_is_known():
    assert {cls.__name__ for cls in PARTS} == {"GGML", "Affine", "Codebook", "NVFP4", "Scaled"}
