"""Plans against real loads, published sizes and counts by hand, and the largest model on 256 emulated devices."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import psutil
import pytest
from compiled import QUICK
from covering import in_turn, some
from flax import nnx

import jaxllm
from jaxllm.cli import main
from jaxllm.declaration import Declaration
from jaxllm.device_memory import device_bytes
from jaxllm.formats.ggml import GGML
from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.kernels.cpu import library
from jaxllm.layers.parameter import parameters
from jaxllm.parallel import EXPERT_ROW, make_mesh, parse_mesh
from jaxllm.placing import Source
from jaxllm.planning import picture
from jaxllm.planning.chips import CHIPS
from jaxllm.planning.compiling import Collective, collectives_between
from jaxllm.planning.planner import Sketch, best, meshes, only
from jaxllm.planning.shapes import describe, fill
from jaxllm.planning.topologies import topology

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """The same step of the same sketch is compiled once for all tests."""
    made, compiled = {}, Sketch.compiled

    def once(self, time):
        formats = tuple(self.weights.items())
        key = self.described.name, formats, self.topology.name, self.mesh_text, self.rows, self.capacity, time
        key = *key, self.cache_dtype
        if key not in made:
            made[key] = compiled(self, time)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sketch, "compiled", once)
        yield


# Of a layer. OLMo 2 has one more, for the norms over all heads, and Gemma 3n for the spread of a layer's width.
SUMS = {"checkpoints/qwen2_moe": 2, "checkpoints/phi3": 2, "deepseek/v3": 2, "checkpoints/olmo2": 3}
SUMS |= {"checkpoints/gemma3n": [3, 3, 3, 2, 2, 2]}
PLANNED = in_turn(SUMS, "tp=2,ep=4", "tp=8")
PLANNED = [(name, "tp=2" if "gemma3n" in name else mesh) for name, mesh in PLANNED]  # of six layers, none like another
PLANNED += [(name, "tp=1") for name in some([*SUMS], ["checkpoints/phi3"])]


def planned(name, mesh):
    return jaxllm.plan(str(GOLDEN / name), f"cpu:{math.prod(parse_mesh(mesh).values())}", mesh, context=64)


@cache
def large(model, devices=1, mesh="tp=1"):
    return Sketch.of(describe(model), topology(f"cpu:{devices}"), mesh, 1, 4096)


@pytest.mark.parametrize(("name", "mesh"), PLANNED)
def test_a_plan_is_what_loading_gives(load_once, monkeypatch, name, mesh):
    compiled = Sketch.compiled
    monkeypatch.setattr(Sketch, "compiled", lambda self, time: compiled(self, 1))  # a prompt's step is not looked at
    made = planned(name, mesh)
    loaded = load_once(GOLDEN / name, mesh=mesh, weights="packed")
    held = {p.name: device_bytes(p.weight) for p in loaded.placed}
    assert sum(made.weights.values()) == sum(held.values())
    assert made.cache == device_bytes(loaded.programs.empty_cache(1, 512))
    for kind in made.kinds:
        assert kind.weights == sum(size for n, size in held.items() if n.startswith(f"layers.{kind.first}."))
    assert sum(kind.count for kind in made.kinds) == len(loaded.programs._model.layers)
    # Those of the layers, that of the embedding (Gemma 3n's second table joins in a layer's); the logits are gathered.
    sums = SUMS[name]
    each = sums if isinstance(sums, list) else [sums] * len(made.kinds)
    expected = [["all-reduce"] * n for n in each], ["all-reduce", "all-gather"]
    found = [[c.kind for c in kind.collectives] for kind in made.kinds], [c.kind for c in made.ends]
    assert found == (([[]] * len(made.kinds), []) if mesh == "tp=1" else expected)


@pytest.mark.parametrize(("name", "cached"), [("deepseek/v3", "fp8"), *some([("checkpoints/qwen2_moe", "int8")], [])])
def test_a_cache_in_8_bits_is_what_loading_gives(load_once, monkeypatch, name, cached):
    monkeypatch.setattr(Sketch, "planned", lambda self: self)  # nothing is compiled
    made = jaxllm.plan(str(GOLDEN / name), "cpu:8", "tp=8", context=64, cache_dtype=cached)
    loaded = load_once(GOLDEN / name, mesh="tp=8", weights="packed", cache_dtype=cached)
    assert sum(made.sizes.values()) == sum(device_bytes(p.weight) for p in loaded.placed)
    assert device_bytes(made.cache) == device_bytes(loaded.programs.empty_cache(1, 512))


def test_quantized_as_loading_does(load_once, monkeypatch):
    monkeypatch.setattr(Sketch, "planned", lambda self: self)
    path, options = GOLDEN / "checkpoints/qwen3_moe", {"mesh": "tp=2,ep=2", "quantize": "q4_k"}
    made = jaxllm.plan(str(path), "cpu:4", options["mesh"], context=64, quantize=options["quantize"])
    formats = Counter()
    for p in load_once(path, **options, weights="packed").placed:
        vector = isinstance(p.weight, jax.Array)
        formats["float32 vectors" if vector else p.weight.format] += device_bytes(p.weight)
    assert made.weights == formats


def test_weights_as_kernels_want_them(monkeypatch):
    """GGUF's MXFP4 in another order, where there are no native kernels, which take it as it is."""
    monkeypatch.setattr(library, "missing", lambda: "switched off")
    mesh, declared = make_mesh("tp=2,ep=2"), Declaration((4, 8, 128), EXPERT_ROW)
    model = nnx.Module()
    model.down = nnx.Param(declared, declared=declared)
    blocks = GGML(jax.ShapeDtypeStruct((4, 8, 4, 17), "uint8"), "MXFP4")
    assert fill(model, mesh, lambda name, _: Source(name, (blocks,)), "float32") == {"down": blocks.nbytes // 4}
    made = model.down.get_value()
    assert isinstance(made, MXFP4) and made.shape == declared.shape
    assert [leaf.sharding.spec for leaf in jax.tree.leaves(made)] == [EXPERT_ROW] * 2


CODE = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 256)
from jaxllm.planning.compiling import collectives_between
from jaxllm.planning.planner import Sketch
from jaxllm.planning.shapes import describe
from jaxllm.planning.topologies import topology

for mesh in sys.argv[1:]:
    sketch = Sketch.of(describe("deepseek-v3-671b"), topology("cpu:256"), mesh, 8, 4096)
    layers = [sum(v for n, v in sketch.sizes.items() if n.startswith(f"layers.{i}.")) for i in range(61)]
    found = [(c.layer, c.kind, c.axes) for c in collectives_between(sketch.compiled(1).as_text(), sketch.mesh)]
    print(json.dumps({"mesh": mesh, "layers": layers, "all": sum(sketch.sizes.values()), "collectives": found}))
"""


def test_deepseek_v3_on_256_devices():
    """Sizes by hand; 18432 / 32 = 576 is no multiple of 128. docs/planning.md has the table."""
    meshes = some(["tp=8,ep=32", "tp=16,ep=16", "tp=32,ep=8"], ["tp=32,ep=8"])
    command = [sys.executable, "-c", CODE, *meshes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=os.environ | QUICK)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        got = json.loads(line)
        tp = int(got["mesh"].split(",")[0].split("=")[1])
        dense, sparse = got["layers"][0], got["layers"][3]
        assert got["layers"] == [dense] * 3 + [sparse] * 58
        attention = 7168 * 1536 + 7168 * 576 + (1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168) / tp
        assert dense == pytest.approx(attention + 3 * 7168 * 18432 / tp, rel=0.02)
        assert sparse == pytest.approx(attention + 3 * 7168 * 2048 * 257 / 256 + 2 * 256 * 7168, rel=0.02)
        assert got["all"] - sum(got["layers"]) == pytest.approx(2 * 2 * 129280 * 7168 / tp, rel=0.01)
        assert got["all"] < 8e9
        sums = [[0, "all-reduce", ["tp"]], [0, "all-reduce", ["tp"]], [1, "all-reduce", ["tp"]]]
        sums += [[1, "all-reduce", ["ep", "tp"]], [None, "all-reduce", ["tp"]], [None, "all-gather", ["tp"]]]
        assert sorted(got["collectives"], key=str) == sorted(sums, key=str)
    assert len(done.stdout.splitlines()) == len(meshes)


# Billions of parameters, and of those that a token meets, as their authors count them.
@pytest.mark.parametrize(
    ("model", "billions", "active", "within"),
    [
        ("gpt-oss-20b", 20.9, 3.61, 0.01),
        ("deepseek-v2-lite-16b", 15.7, 2.4, 0.03),
        *some([("deepseek-v2-236b", 235.7, 21, 0.03)], []),
        ("deepseek-v3-671b", 671.0, 37, 0.03),
    ],
)
def test_a_token_meets_the_active_parameters(model, billions, active, within):
    sketch = dataclasses.replace(large(model), context=1)
    count = sum(math.prod(param.get_value().shape) for param in parameters(sketch.model).values())
    assert count / 1e9 == pytest.approx(billions, rel=0.005)
    decode, _ = sketch.costs
    assert decode.flops / 2e9 == pytest.approx(active, rel=within)
    assert decode.nbytes < sum(sketch.sizes.values()) / 3


def test_costs_of_a_dense_model_by_hand():
    """Llama 3.1 8B: 8.03 billion parameters of which 0.525 are the embedding table; 32 layers of 32 heads of 128."""
    sketch = Sketch.of(describe("llama-3.1-8b"), topology("cpu:1"), "tp=1", 4, 1024)
    decode, prefill = sketch.costs
    matrices, attention = 8.03e9 - 2 * 0.525e9, 32 * 32 * 2 * (128 + 128)
    assert decode.flops == pytest.approx(4 * (2 * (matrices + 0.525e9) + 1024 * attention), rel=0.002)
    assert prefill.flops == pytest.approx(
        4 * (1024 * 2 * matrices + 2 * 0.525e9 + 1024 * 1025 / 2 * attention), rel=0.002
    )
    cache = 4 * 1024 * 32 * 8 * 256 * sketch.cache.keys[0].dtype.itemsize
    assert decode.nbytes == pytest.approx(2 * (8.03e9 - 0.525e9) + cache, rel=0.002)
    assert prefill.nbytes == pytest.approx(2 * 2 * matrices + 2 * 0.525e9 + 1.5 * cache, rel=0.002)


@pytest.mark.parametrize(
    ("model", "of_a_position", "of_a_pair"),
    [
        # 12 of 24 layers have a window; 64 heads of 64.
        ("gpt-oss-20b", 12 * 64 * 2 * (64 + 64), 12 * 64 * 2 * (64 + 64)),
        # 128 heads on latents of 512 with 64 of positions; a prompt's are expanded to 192 and 128.
        ("deepseek-v3-671b", 61 * 128 * 2 * (512 + 64 + 512), 61 * 128 * 2 * (192 + 128)),
    ],
)
def test_what_a_longer_context_costs(model, of_a_position, of_a_pair):
    sketch, short, long = large(model), 4096, 8192
    (decode, prefill), (decode_long, prefill_long) = sketch.costs, dataclasses.replace(sketch, context=long).costs
    assert decode_long.flops - decode.flops == of_a_position * (long - short)
    pairs = (long * (long + 1) - short * (short + 1)) / 2
    linear = prefill_long.flops - prefill.flops - of_a_pair * pairs  # the matrices, and windows
    assert 0.9 < linear / ((long - short) * 2 * {"gpt": 3.03e9, "dee": 36.1e9}[model[:3]]) < 1.1


def test_all_devices_do_what_one_does():
    """Over tp; and with ep each does its part of the experts and all of the rest."""
    one, tp, ep = (
        dataclasses.replace(large("gpt-oss-20b", n, mesh), batch=8, context=256).costs[0]
        for n, mesh in ((1, "tp=1"), (2, "tp=2"), (2, "ep=2"))
    )
    assert 2 * tp.flops == pytest.approx(one.flops, rel=0.01)
    assert one.flops / 2 < ep.flops < one.flops and one.nbytes / 2 < ep.nbytes < one.nbytes


LINE = '%a.1 = f32[4,8]{{1,0}} all-reduce(%b), replica_groups={}, metadata={{op_name="jit(step)/layers.1/psum"}}'


@pytest.mark.parametrize(
    ("groups", "axes", "devices"),
    [
        ("mesh['ep'=2,'tp'=4] {'tp'}", ("tp",), 4),
        ("{{0,1,2,3},{4,5,6,7}}", ("tp",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("ep",), 2),
        ("[2,4]<=[8]", ("tp",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("ep",), 2),
        ("[1,8]<=[8]", ("ep", "tp"), 8),
        ("{}", ("ep", "tp"), 8),
    ],
)
def test_collectives_as_xla_writes_them(groups, axes, devices):
    found = collectives_between(LINE.format(groups), make_mesh("tp=4,ep=2"))
    assert found == [Collective("all-reduce", axes, devices, 128, 1)]
    assert found[0].sent == 2 * 128 * (devices - 1) / devices


def test_a_gather_that_is_started():
    text = "%g = ((f32[8,2]{0,1:T(8,128)}), bf16[8,16]{0,1}) all-gather-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}"
    [found] = collectives_between(text, make_mesh("tp=8"))
    assert found == Collective("all-gather", ("tp",), 8, 256, None) and found.sent == 224


def test_a_search_ranks_every_mesh():
    made = jaxllm.plan(str(GOLDEN / "checkpoints/llama"), "cpu:2", context=64, search=True)
    assert sorted(meshes(4)) == ["tp=1,ep=4", "tp=2,ep=2", "tp=4,ep=1"]
    assert sorted(r.mesh for r in made.ranking) == sorted(meshes(2)) == ["tp=1,ep=2", "tp=2,ep=1"]
    assert made.mesh == made.ranking[0].mesh and all(r.fits and r.compiled for r in made.ranking)
    assert all(ranked.mesh in str(made) for ranked in made.ranking)


def test_a_chips_bounds(monkeypatch):
    """Of emulated devices that are taken to be a chip's: the best mesh has the highest bound on decoding. Here keys and
    values are in 8 bits, and compiled so."""
    monkeypatch.setattr("jaxllm.planning.planner.COMPILED", 2)
    chip = CHIPS["v5e"]
    devices = dataclasses.replace(topology("cpu:4"), chip=chip)
    made = best(describe(str(GOLDEN / "checkpoints/llama")), devices, 1, 64, "int8")
    bounds = [ranked.bound for ranked in made.ranking if ranked.compiled]
    assert len(bounds) == 2 < len(made.ranking) and bounds == sorted(bounds, reverse=True)
    assert made.decode.bound(made.limits) == bounds[0] and made.decode.binds(made.limits) == "memory"
    sent = sum(c.sent for c in made.ends) + sum(kind.count * c.sent for kind in made.kinds for c in kind.collectives)
    assert made.decode.sent == sent
    times = made.decode.times(made.limits)
    rates = {"compute": made.decode.flops / chip.flops, "memory": made.decode.nbytes / chip.bandwidth}
    assert times == {**rates, "links": sent / chip.links}
    assert bounds[0] == 1 / max(times.values())
    assert "a bound, not a measurement" in str(made)


def test_layers_that_share_a_cache():
    model = Sketch.of(describe(str(GOLDEN / "checkpoints/gemma3n")), topology("cpu:1"), "tp=1", 1, 64).model
    shared = [layer.cache_of for layer in model.layers]
    assert shared == [None, None, None, None, 2, 3]
    assert [layer.cache_of for layer in only(model, [3, 5]).layers] == [None, 0]
    assert [layer.cache_of for layer in model.layers] == shared


def test_what_does_not_fit_says_what_would(monkeypatch):
    """With a byte too little, on a mesh that holds everything twice and on one that does not; and far too little."""
    path = str(GOLDEN / "checkpoints/llama")
    needed = {mesh: jaxllm.plan(path, "cpu:2", mesh, context=64).total for mesh in meshes(2)}
    tp, ep = meshes(2)
    for mesh, memory, advice in [
        (ep, needed[ep] - 1, f"the mesh {tp} would"),
        (tp, needed[tp] - 1, "--quantize q8_0 would"),
        (tp, needed[tp] / 9.5, "it would take the memory of 19 such devices or more"),
    ]:
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: SimpleNamespace(total=2 * memory))
        made = jaxllm.plan(path, "cpu:2", mesh, context=64)
        assert not made.fits and made.verdict.startswith("does not fit, by ") and made.verdict.endswith(f": {advice}")


def test_published_limits_are_complete():
    """TPUs' beside those that JAX has for its own kernels; Google's pages differ by up to an eighth (v5p's memory)."""
    from jax._src import tpu_info

    names = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e", "tpu7x": "TPU7x"}
    for name, chip in CHIPS.items():
        assert chip.source and chip.flops <= chip.flops_fp8 and chip.flops <= chip.flops_int8
        assert min(chip.memory, chip.bandwidth, chip.links) > 1e9
        assert name in names or "NVIDIA" in chip.source
    for name, kind in names.items():
        info = tpu_info.get_tpu_info_for_chip(tpu_info.chip_version_from_device_kind(kind), 1)
        cores = 2 if name in ("v4", "v5p") else 1  # a device of these chips is two cores, a TPU7x's is one
        assert CHIPS[name].flops == pytest.approx(cores * info.bf16_ops_per_second, rel=0.01)
        assert CHIPS[name].bandwidth == pytest.approx(cores * info.mem_bw_bytes_per_second, rel=0.13)
        assert CHIPS[name].memory == pytest.approx(cores * info.hbm_capacity_bytes, rel=0.01)


def test_as_text_json_and_picture(capsys):
    path = str(GOLDEN / "checkpoints/qwen2_moe")
    options = ["--model", path, "--topology", "cpu:8", "--mesh", "tp=2,ep=4", "--context", "64"]
    assert main(["plan", *options, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    made = planned("checkpoints/qwen2_moe", "tp=2,ep=4")
    assert got == json.loads(json.dumps(made.json())) and got["fits"] is True
    assert main(["plan", *options]) == 0
    assert capsys.readouterr().out == f"{made}\n"
    ET.fromstring(f"<div>{made._repr_html_()}</div>")


def test_a_plan_on_another_chip():
    """The bounds by hand: the slowest of the three limits, from the numbers of NVIDIA's data sheet of the H100 SXM."""
    made = planned("checkpoints/qwen2_moe", "tp=2,ep=4")
    there = made.on("h100")
    assert there.topology == "h100:8" and there.fits and there.verdict.startswith("fits, 74.5")  # of 80e9 bytes
    step = made.decode
    slowest = max(step.flops / 989e12, step.nbytes / 3352e9, step.sent / 450e9)
    assert there.decode.bound(there.limits) == pytest.approx(step.tokens / slowest)
    with pytest.raises(jaxllm.InputError, match="^chip 'h1000': known are v4, v5e, "):
        made.on("h1000")


def test_the_picture_of_a_chip():
    sketch = dataclasses.replace(large("gpt-oss-20b"), context=256)
    chip = CHIPS["b200"]
    points = {"decode": sketch.costs[0].flops / sketch.costs[0].nbytes, "prefill": 4000.0}
    roof = picture.roofline(points, chip.bandwidth, {"bfloat16": chip.flops, "FP8": chip.flops_fp8})
    drawn = ET.fromstring(roof)
    assert len(drawn.findall(".//{*}circle")) == 2 and len(drawn.findall(".//{*}polyline")) == 2
    for text in ("bfloat16: 2250 TFLOP/s", "FP8: 4500 TFLOP/s", "prefill: 4e+03 FLOP/B", "8.00 TB/s"):
        assert text in roof


ERRORS = {
    "a mesh of other devices": (["--mesh", "tp=4"], "mesh tp=4 has 4 devices, but cpu:8 has 8: try tp=8,ep=1 or .*"),
    "no mesh": (["--mesh", "tp=x"], "mesh 'tp=x': expected axis=size pairs .*"),
    "no topology": (["--topology", "v9:2x2"], "topology 'v9:2x2': expected a chip and a shape such as v5e:4x4, .*"),
    "no shape": (["--topology", "v5e"], "topology 'v5e': expected a chip and a shape .*"),
    "no compiler": (["--topology", "v5e:2x2"], "libtpu, .*, is not installed: pip install 'jaxllm\\[plan\\]'"),
    "no such model": (["--model", "gpt-5"], "gpt-5: no such file, and no preset; those are llama-3.1-8b, .*"),
    "context": (["--context", "200000"], "context 200000: gpt-oss-20b has positions for 1 to 131072 tokens"),
    "batch": (["--batch", "0"], "batch 0: must be 1 or above"),
    "type": (["--quantize", "q9"], "cannot quantize to 'q9'; known are .*"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line(case, capsys, monkeypatch):
    changed, said = ERRORS[case]
    if case == "no compiler":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = {"--model": "gpt-oss-20b", "--topology": "cpu:8", "--mesh": "tp=8"} | dict([changed])
    assert main(["plan", *(part for pair in options.items() for part in pair)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(f"error: {said}\n", err), err


def test_a_config_alone_is_enough(tmp_path):
    """In the format that it declares, or else in bfloat16."""
    config = json.loads((GOLDEN / "checkpoints/mixtral/config.json").read_text())
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    for more, format in (({}, "bfloat16"), (fp8, "FP8 16x16")):
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        sketch = Sketch.of(describe(str(tmp_path)), topology("cpu:1"), "tp=1", 1, 64)
        assert any(name.startswith(format) for name in sketch.weights)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(jaxllm.InputError, match="its quantization 'awq' cannot be planned from config.json alone"):
        describe(str(tmp_path))


def test_the_module_is_the_function():
    assert callable(jaxllm.plan)
    module = importlib.import_module("jaxllm.plan")
    assert jaxllm.plan is module and callable(module) and module.collectives_of
