"""What pictures show, read back from what was drawn."""

import importlib
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.colors import to_rgba

import jaxllm
from jaxllm import plots
from jaxllm.formats.dense import Dense
from jaxllm.layers import COLUMN, REPLICATED, ROW, Experts, Linear
from jaxllm.planning.chips import CHIPS
from jaxllm.planning.report import Limits, Phase, Plan
from jaxllm.tracking import Statistics


def drawn(axis):
    """Top, bottom, left, right and the devices of each part, as fractions of the panel."""
    (width, height), parts = (axis.get_xlim()[1], axis.get_ylim()[0]), {}
    for patch, text in zip(axis.patches, axis.texts, strict=True):
        (x, y), w, h = patch.get_xy(), patch.get_width(), patch.get_height()
        parts[text.get_text()] = y / height, (y + h) / height, x / width, (x + w) / width
    return parts


def test_shards_are_where_their_devices_hold_them():
    matrix = np.zeros((16, 256), np.float32)
    with jax.set_mesh(jaxllm.make_mesh("tp=2,ep=2")):
        layers = [Linear.from_weight(jaxllm.quantize(matrix, "q8_0"), spec) for spec in (COLUMN, ROW, REPLICATED)]
        stacks = Experts.from_weight(*(jnp.zeros(shape) for shape in ((4, 8, 32), (4, 8, 32), (4, 32, 8))))
    names = ("column", "row", "replicated")
    weights = {name: layer.weight.get_value() for name, layer in zip(names, layers, strict=True)}
    picture = plots.shards(weights | {n: getattr(stacks, n).get_value() for n in ("up_proj", "down_proj")})
    column, row, replicated, up, down = picture.axes
    assert drawn(column) == {"0 2": (0, 0.5, 0, 1), "1 3": (0.5, 1, 0, 1)}  # tp is the mesh's last axis
    assert drawn(row) == {"0 2": (0, 1, 0, 0.5), "1 3": (0, 1, 0.5, 1)}
    assert drawn(replicated) == {"all": (0, 1, 0, 1)}
    assert replicated.patches[0].get_facecolor() == to_rgba("white")
    quarters = {"0": (0, 0.5, 0, 0.5), "1": (0, 0.5, 0.5, 1), "2": (0.5, 1, 0, 0.5), "3": (0.5, 1, 0.5, 1)}
    assert drawn(up) == drawn(down) == quarters
    assert (up.get_xlabel(), down.get_xlabel(), up.get_ylabel()) == ("out", "in", "experts")
    assert column.get_title() == "column\n16 x 256"
    assert len({patch.get_facecolor() for patch in up.patches}) == 4


def test_shapes_with_a_sharding_are_enough_and_those_without_are_not():
    mesh = jaxllm.make_mesh("tp=8")
    shape = jax.ShapeDtypeStruct((8, 2), np.float32, sharding=NamedSharding(mesh, PartitionSpec("tp", None)))
    assert [*drawn(plots.shards({"w": shape}).axes[0])] == [*"01234567"]
    with pytest.raises(jaxllm.InputError, match="^w is not placed on devices: "):
        plots.shards({"w": Dense(np.zeros((32, 32), np.float32))})


GIB = 2**30
PLAN = Plan(
    model="m",
    topology="cpu:8",
    mesh="tp=8",
    devices=8,
    batch=1,
    context=64,
    dtype="bfloat16",
    weights={"MXFP4": 3 * GIB, "bfloat16": GIB},
    cache=2 * GIB,
    temporaries={"decode": GIB // 2, "prefill": GIB},
    kinds=(),
    ends=(),
    decode=Phase(1, 4e9, 2e9, 0.0),  # 2 operations a byte
    prefill=Phase(64, 9e12, 9e9, 0.0),  # 1000
    limits=Limits(10 * GIB, None, {}, None, "a test"),
)


def test_memory_is_a_bar_of_its_parts():
    other = replace(PLAN, weights={"bfloat16": 5 * GIB})
    axis = plots.memory({"first": PLAN, "second": other}).axes[0]
    ends = [(bar.get_y() + bar.get_height() / 2, bar.get_x() + bar.get_width()) for bar in axis.patches]
    assert ends == [(0, 3), (0, 4), (0, 6), (0, 7), (1, 5), (1, 7), (1, 8)]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["MXFP4", "bfloat16", "cache", "temporaries"]
    assert axis.patches[1].get_facecolor() == axis.patches[4].get_facecolor() != axis.patches[0].get_facecolor()
    assert [line.get_segments()[0][0][0] for line in axis.collections] == [10, 10]


def test_points_lie_on_the_roof():
    """The H100 reads 3352 GB and does 989 TFLOP a second: 2 operations a byte are 6.704 TFLOP/s, 1000 are 989."""
    axis = plots.roofline({"m": PLAN.on("h100")}).axes[0]
    roof, decode, prefill = (line.get_xydata() for line in axis.lines)
    assert decode[0] == pytest.approx((2, 6.704e12)) and prefill[0] == pytest.approx((1000, 989e12))
    assert roof[0] == pytest.approx((0.5, 0.5 * 3352e9)) and roof[-1] == pytest.approx((4000, 989e12))
    assert [text.get_text() for text in axis.texts] == ["h100: 989 TFLOP/s"]
    assert axis.get_xscale() == axis.get_yscale() == "log" and CHIPS["h100"].bandwidth == 3352e9
    with pytest.raises(jaxllm.InputError, match="^m: no limits are published for cpu:8, "):
        plots.roofline({"m": PLAN})


def test_types_are_points_and_what_helps_them_is_connected():
    axis = plots.quality({"a": (4, 30.0), "b": (8, 20.0)}, {"a": (4, 25.0), "c": (2, 90.0)}, reference=19.0).axes[0]
    lines = [line.get_xydata().tolist() for line in axis.lines]
    assert lines[1:] == [[[4, 30]], [[8, 20]], [[4, 30], [4, 25]], [[4, 25]], [[2, 90]]]
    assert lines[0][0][1] == 19
    assert {text.get_text(): text.xy for text in axis.texts} == {"a": (4, 25), "b": (8, 20), "c": (2, 90)}


def test_levels_are_those_of_the_values_that_are_shown():
    row = np.zeros(64, np.float32)
    row[:32] = np.arange(-16, 16) / 8  # of Q4_0, whose scale is -16 / 8 / -8: a multiple of a quarter
    row[32] = 1000
    axis = plots.levels(row[:32], {"q4_0": jaxllm.quantize(row[None], "q4_0")}).axes[0]
    assert axis.get_title() == "q4_0\n4.5 bits a weight"
    held = axis.lines[1].get_ydata()
    assert held[0] == -2 and np.abs(held - row[:32]).max() <= 0.25 and not (held % 0.25).any()
    assert len(axis.collections[0].get_segments()) == len(np.unique(held)) <= 16


def test_the_load_of_experts_is_a_row_for_each_layer():
    counts = {1: [5, 0, 3], 12: [1, 7, 0]}
    seen = {
        f"layers.{i}.mlp.experts.{name}": Statistics(np.zeros((3, 4)), np.array(n), None)
        for i, n in counts.items()
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    axis = plots.expert_load(seen | {"layers.0.mlp.down_proj.weight": Statistics(np.zeros(4), np.array(9))}).axes[0]
    assert axis.images[0].get_array().tolist() == [*counts.values()]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "12"]
    with pytest.raises(jaxllm.InputError, match="^none of these statistics are of experts"):
        plots.expert_load({})


def test_notebooks_show_pictures_and_a_missing_matplotlib_is_named(monkeypatch):
    assert plots.quality({"a": (4, 30.0)})._repr_png_().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "jaxllm.plots")
    with pytest.raises(jaxllm.InputError, match="^jaxllm.plots draws with matplotlib: pip install"):
        importlib.import_module("jaxllm.plots")
