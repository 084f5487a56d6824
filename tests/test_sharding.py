"""Cutting, padding and placing weights: the bytes that every device gets, and the errors of what cannot be cut."""

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import quants
from jax.sharding import PartitionSpec as P
from tiny_gguf import random_tensor

from jaxllm.checkpoint.placing import place
from jaxllm.errors import InputError
from jaxllm.formats.base import Cut, block_index, padded_index
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.layers.heads import place_heads
from jaxllm.parallel import COLUMN, REPLICATED, ROW, make_mesh

ROWS = 12


def weight(name):
    """A matrix `[12, 6 blocks]` and its float32 values as gguf-py decodes them."""
    if name == "dense":
        values = np.random.default_rng(0).normal(size=(ROWS, 48)).astype(np.float32)
        return Dense(values), values
    size, nbytes, _ = BLOCK_TYPES[name]
    data = random_tensor(np.random.default_rng(0), (ROWS, 6 * size), T[name])
    return GGML(data.reshape(ROWS, 6, nbytes), name), quants.dequantize(data, T[name])


def decode(weight):
    """By gguf-py, from whatever bytes the weight holds."""
    if isinstance(weight, Dense):
        return np.asarray(weight.values)
    blocks = np.asarray(weight.blocks)
    return quants.dequantize(blocks.reshape(len(blocks), -1), T[weight.type])


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("spec", [COLUMN, ROW, REPLICATED])
@pytest.mark.parametrize("name", ["dense", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_every_device_holds_its_own_blocks(name, spec, tp):
    mesh, (source, values) = make_mesh(f"tp={tp}"), weight(name)
    padded = source.pad_to(mesh, spec)
    out, in_ = padded.shape
    expected = np.pad(values, ((0, out - ROWS), (0, in_ - values.shape[1])))
    np.testing.assert_array_equal(decode(padded), expected)

    placed = place(source, spec, mesh, padded_index(ROWS, out), padded_index(values.shape[1], in_))
    cuts = [tp if axis else 1 for axis in spec]
    [leaf] = jax.tree.leaves(placed)
    assert len(leaf.addressable_shards) == tp
    for shard in leaf.addressable_shards:
        local = decode(jax.tree.unflatten(jax.tree.structure(placed), [np.asarray(shard.data)]))
        assert local.shape == (out // cuts[0], in_ // cuts[1])
        index = [
            slice(r * n, (r + 1) * n) if cut > 1 else slice(None)
            for r, n, cut in zip([shard.device.id] * 2, local.shape, cuts, strict=True)
        ]
        np.testing.assert_array_equal(local, expected[*index])


def test_arranged_parts_are_read_by_index():
    source, values = weight("Q4_1")
    rows = np.array([3, -1, 0, 0, 11, 5, -1, 2])
    placed = place(source, COLUMN, make_mesh("tp=4"), rows)
    np.testing.assert_array_equal(decode(placed), np.where(rows[:, None] < 0, 0, values[rows]))


@pytest.mark.parametrize(
    ("spec", "tp", "message"),
    [
        (
            ROW,
            4,
            r"blk\.0\.x: dimension 'in' of 1536 is 6 blocks of 256, .* 4 devices; tp = 1, 2, 3, 6 works, or pad_to",
        ),
        (COLUMN, 8, r"blk\.0\.x: dimension 'out' of 12 is 12 blocks of 1, .* tp = 1, 2, 3, 4, 6, 12 works"),
    ],
)
def test_what_cannot_be_cut_says_what_can(spec, tp, message):
    with pytest.raises(InputError, match=message):
        weight("Q4_K")[0].shard_specs(spec, make_mesh(f"tp={tp}"), "blk.0.x")


def test_shard_specs_work_on_shapes_alone_and_on_stacks_of_experts():
    stack = GGML(jax.ShapeDtypeStruct((4, 6, 2, 18), np.uint8), "Q4_0")
    assert stack.shape == (4, 6, 64)
    specs = stack.shard_specs(P("ep", None, "tp"), make_mesh("tp=2,ep=4"))
    assert specs.blocks == P("ep", None, "tp", None)


@pytest.mark.parametrize("bad", ["tp", "tp=0", "tp=x", "dp=2", "tp=2;ep=2"])
def test_a_mesh_that_is_not_one(bad):
    with pytest.raises(InputError, match="expected axis=size pairs"):
        make_mesh(bad)


def test_a_mesh_larger_than_the_machine():
    with pytest.raises(InputError, match="needs 16 devices, but there are 8"):
        make_mesh("tp=16")


@pytest.mark.parametrize("axes", [("tp",), ("tp", "ep"), ("ep", "tp")])
def test_a_mesh_of_the_users_own(axes):
    devices = np.array(jax.devices()[:4]).reshape((4,) if len(axes) == 1 else (2, 2))
    theirs = jax.sharding.Mesh(devices, axes)
    ours = make_mesh(theirs)
    assert ours.axis_names == ("ep", "tp")
    assert {k: ours.shape[k] for k in axes} == dict(theirs.shape)
    if axes == ("tp", "ep"):
        assert (ours.devices == devices.T).all()


# (query heads, key/value heads, tp, query heads that fill a block) -> heads on each device
HEADS = {
    (9, 3, 1, 1): [([0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2])],
    (9, 3, 2, 1): [([0, 1, 2, 3, 4, 5], [0, 1]), ([6, 7, 8, -1, -1, -1], [2, -1])],
    (9, 3, 3, 1): [([0, 1, 2], [0]), ([3, 4, 5], [1]), ([6, 7, 8], [2])],
    (9, 3, 4, 1): [([0, 1, 2], [0]), ([3, 4, 5], [1]), ([6, 7, 8], [2]), ([-1, -1, -1], [-1])],
    (9, 3, 8, 1): [
        ([0, 1], [0]),
        ([2, -1], [0]),
        ([3, 4], [1]),
        ([5, -1], [1]),
        ([6, 7], [2]),
        ([8, -1], [2]),
        ([-1, -1], [-1]),
        ([-1, -1], [-1]),
    ],
    (8, 2, 4, 1): [([0, 1], [0]), ([2, 3], [0]), ([4, 5], [1]), ([6, 7], [1])],
    (8, 2, 4, 4): [([0, 1, 2, 3], [0]), ([-1] * 4, [0]), ([4, 5, 6, 7], [1]), ([-1] * 4, [1])],
    (4, 1, 2, 2): [([0, 1], [0]), ([2, 3], [0])],
    (4, 4, 3, 2): [([0, 1], [0, 1]), ([2, 3], [2, 3]), ([-1, -1], [-1, -1])],
    (4, 4, 8, 2): [([0, 1], [0, 1]), ([2, 3], [2, 3]), *[([-1, -1], [-1, -1])] * 6],
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_are_placed(case):
    heads, kv_heads, tp, unit = case
    layout = place_heads(heads, kv_heads, tp, head_dim=16, block=16 * unit)
    got = list(zip(layout.query.reshape(tp, -1).tolist(), layout.kv.reshape(tp, -1).tolist(), strict=True))
    assert got == HEADS[case]


@pytest.mark.parametrize("unit", [1, 2, 4])
@pytest.mark.parametrize("tp", range(1, 17))
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 4), (8, 8), (8, 1), (28, 4), (20, 5), (64, 8)])
def test_every_head_is_somewhere_with_its_key_head_and_whole_blocks(heads, kv_heads, tp, unit):
    layout = place_heads(heads, kv_heads, tp, head_dim=16, block=16 * unit)
    query, kv = layout.query.reshape(tp, -1), layout.kv.reshape(tp, -1)
    real = query[query >= 0]
    assert sorted(real) == list(range(heads))
    assert query.shape[1] % unit == 0
    share = query.shape[1] // kv.shape[1]
    for device in range(tp):
        for slot, q in enumerate(query[device]):
            assert q < 0 or q // (heads // kv_heads) == kv[device][slot // share]
    # Columns of the output projection move in whole blocks: this raises where they do not.
    block_index((Cut("out"), Cut("in", 16 * unit)), None, layout.rows(layout.query, 16))


def test_query_heads_must_share_evenly():
    with pytest.raises(InputError, match="9 query heads cannot share 2"):
        place_heads(9, 2, 1)
