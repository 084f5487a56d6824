"""Cutting, padding and placing weights: the bytes that every device gets, and the errors of what cannot be cut."""

import jax
import numpy as np
import pytest
from covering import covering, in_turn
from jax.sharding import PartitionSpec as P
from test_ggml_formats import example, reference

from jaxllm.errors import InputError
from jaxllm.formats.base import Cut, block_index, padded_index
from jaxllm.formats.dense import Dense
from jaxllm.formats.ggml import GGML
from jaxllm.formats.ggml_blocks import BLOCK_TYPES
from jaxllm.layers.heads import place_heads
from jaxllm.layers.parameter import Declaration
from jaxllm.parallel import COLUMN, REPLICATED, ROW, linear, make_mesh
from jaxllm.placing import FileArray, Source, place

ROWS, BLOCKS = 12, 6
SPECS = {"column": COLUMN, "row": ROW, "replicated": REPLICATED}


def weight(name):
    """A matrix `[12, 6 blocks]` and its float32 values as an independent decoder gives them."""
    if name == "dense":
        values = np.random.default_rng(0).normal(size=(ROWS, 48)).astype(np.float32)
        return Dense(values), values
    pool = example(name).blocks.reshape(-1, 1, BLOCK_TYPES[name].nbytes)
    largest = np.abs(reference(name, pool)).max(axis=-1)
    usual = pool[(largest > 1e-3) & (largest < 1e3)]  # random bytes have wild scales, too
    blocks = np.resize(usual, (ROWS, BLOCKS, pool.shape[-1]))
    return GGML(blocks, name), reference(name, blocks)


def decode(weight):
    """By the same independent decoder, from whatever bytes the weight holds."""
    return np.asarray(weight.values) if isinstance(weight, Dense) else reference(weight.type, np.asarray(weight.blocks))


@pytest.mark.parametrize(("name", "spec", "tp"), covering(["dense", *BLOCK_TYPES], SPECS, [1, 2, 3, 4, 8]))
def test_every_device_holds_its_own_blocks(name, spec, tp):
    mesh, spec, (source, values) = make_mesh(f"tp={tp}"), SPECS[spec], weight(name)
    padded = source.pad_to(mesh, spec)
    out, in_ = padded.shape
    expected = np.pad(values, ((0, out - ROWS), (0, in_ - values.shape[1])))
    np.testing.assert_array_equal(decode(padded), expected)

    arranged = Declaration(source.shape, spec, padded_index(ROWS, out), padded_index(values.shape[1], in_))
    placed = place(Source("x", (source,)), arranged, mesh)
    cuts = [tp if axis else 1 for axis in spec]
    [leaf] = jax.tree.leaves(placed)
    assert len(leaf.addressable_shards) == tp
    for shard in leaf.addressable_shards:
        local = decode(jax.tree.unflatten(jax.tree.structure(placed), [np.asarray(shard.data)]))
        assert local.shape == (out // cuts[0], in_ // cuts[1])
        r = shard.device.id
        part = [slice(r * n, (r + 1) * n) if cut > 1 else slice(None) for n, cut in zip(local.shape, cuts, strict=True)]
        np.testing.assert_array_equal(local, expected[*part])


@pytest.mark.parametrize(("name", "spec"), in_turn(["dense", *BLOCK_TYPES], "row", "column"))
def test_a_cut_matrix_multiplies_as_a_whole_one(name, spec):
    """On 4 devices: 6 blocks are padded to 8, so some devices hold zeros."""
    mesh, spec, (source, values) = make_mesh("tp=4"), SPECS[spec], weight(name)
    rows, cols = source.pad_to(mesh, spec).shape
    arranged = Declaration(source.shape, spec, padded_index(ROWS, rows), padded_index(values.shape[1], cols))
    placed = place(Source("x", (source,)), arranged, mesh)
    x = np.random.default_rng(1).normal(size=(3, values.shape[1])).astype(np.float32)
    with jax.set_mesh(mesh):
        y = jax.jit(linear, static_argnums=2)(np.pad(x, ((0, 0), (0, cols - x.shape[1]))), placed, spec)
    np.testing.assert_allclose(y[:, :ROWS], x @ values.T, rtol=1e-4, atol=1e-4 * np.abs(x @ values.T).max())


def test_arranged_parts_are_read_by_index():
    source, values = weight("Q4_1")
    rows = np.array([3, -1, 0, 0, 11, 5, -1, 2])
    placed = place(Source("x", (source,)), Declaration(source.shape, COLUMN, rows), make_mesh("tp=4"))
    np.testing.assert_array_equal(decode(placed), np.where(rows[:, None] < 0, 0, values[rows]))


def test_a_stack_is_put_together_from_rows_of_its_experts(tmp_path):
    """Experts one by one, in files, of which the odd rows are wanted; a device gets whole experts and parts of rows."""
    experts = [np.random.default_rng(i).normal(size=(12, 8)).astype(np.float32) for i in range(4)]
    for i, values in enumerate(experts):
        (tmp_path / f"{i}").write_bytes(bytes(3) + values.tobytes())
    stored = [FileArray(tmp_path / f"{i}", 3, (12, 8), np.dtype(np.float32)) for i in range(4)]
    odd = np.arange(1, 12, 2)
    source = Source("x", tuple(map(Dense, stored)), stacked=True, rows=odd)
    assert source.shape == (4, 6, 8)
    declared = Declaration(source.shape, P("ep", "tp", None), rows=np.array([5, 4, -1, 0]), cols=np.arange(8)[::-1])
    placed = place(source, declared, make_mesh("ep=2,tp=4"))
    expected = np.stack([np.where([[True], [True], [False], [True]], e[[11, 9, 1, 1], ::-1], 0) for e in experts])
    np.testing.assert_array_equal(placed.values, expected)
    assert {s.data.shape for s in placed.values.addressable_shards} == {(2, 1, 8)}


@pytest.mark.parametrize(("name", "stacked"), in_turn(["dense", *BLOCK_TYPES], True, False))  # one by one, one tensor
def test_a_stack_is_padded_with_matrices_of_zeros(name, stacked):
    """Four over five devices: the last holds zero bytes, which stand for zeros."""
    source, _ = weight(name)
    each = [jax.tree.map(lambda leaf, i=i: np.roll(leaf, i, axis=0), source) for i in range(4)]
    parts = tuple(each) if stacked else (jax.tree.map(lambda *leaves: np.stack(leaves), *each),)
    declared = Declaration((4, *source.shape), P("ep", None, None), stack=padded_index(4, 5))
    [leaf] = jax.tree.leaves(place(Source("x", parts, stacked), declared, make_mesh("ep=5")))
    for shard, original in zip(leaf.addressable_shards, [*each, None], strict=True):
        [expected] = jax.tree.leaves(original) or [np.zeros(leaf.shape[1:], leaf.dtype)]
        np.testing.assert_array_equal(np.asarray(shard.data)[0], expected)


def test_a_transposed_file_array_is_read_transposed(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    (tmp_path / "x").write_bytes(values.tobytes())
    array = FileArray(tmp_path / "x", 0, (2, 3, 4), values.dtype).swapaxes(-1, -2)
    assert array.shape == (2, 4, 3)
    np.testing.assert_array_equal(array.read(), values.swapaxes(-1, -2))
    np.testing.assert_array_equal(np.asarray(array.swapaxes(-1, -2)), values)


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


@pytest.mark.parametrize("bad", ["tp", "tp=0", "tp=x", "pp=2", "tp=2;ep=2"])
def test_a_mesh_that_is_not_one(bad):
    with pytest.raises(InputError, match="expected axis=size pairs"):
        make_mesh(bad)


def test_a_mesh_larger_than_the_machine():
    with pytest.raises(InputError, match="needs 16 devices, but there are 8"):
        make_mesh("tp=16")


@pytest.mark.parametrize("axes", [("tp",), ("tp", "ep"), ("ep", "tp"), ("dp", "tp")])
def test_a_mesh_of_the_users_own(axes):
    devices = np.array(jax.devices()[:4]).reshape((4,) if len(axes) == 1 else (2, 2))
    theirs = jax.sharding.Mesh(devices, axes)
    ours = make_mesh(theirs)
    assert ours.axis_names == ("dp", "ep", "tp")
    assert {k: ours.shape[k] for k in axes} == dict(theirs.shape)
    if axes == ("tp", "ep"):
        assert (ours.devices[0] == devices.T).all()


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
