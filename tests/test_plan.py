"""Plans against real loads, and the largest model on 256 emulated devices."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from covering import some

from jaxllm.checkpoint.opening import open_checkpoint
from jaxllm.parallel import make_mesh
from jaxllm.plan import plan

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("mesh", ["tp=1", "tp=8", "tp=2,ep=4"])
@pytest.mark.parametrize(
    ("name", "sums"),  # of a layer: OLMo 2 has one more, for the norms over all heads
    [("checkpoints/qwen2_moe", 2), ("checkpoints/qwen2", 2), ("deepseek/v3", 2), ("checkpoints/olmo2", 3)],
)
def test_a_plan_is_what_loading_gives(load_once, name, sums, mesh):
    checkpoint = open_checkpoint(GOLDEN / name)
    loaded = load_once(GOLDEN / name, mesh=mesh, dtype="float32", weights="packed")
    placed = {p.name: p for p in loaded.placed}
    model = checkpoint.family.model(checkpoint.config, make_mesh(mesh), 1)
    got = plan(model, make_mesh(mesh), lambda name, shape: placed[name].source, batch=1, capacity=256)
    held = {
        name: sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        for name, p in placed.items()
        for leaves in [jax.tree.leaves(p.weight)]
    }
    assert got.parameter_bytes == held
    layers = len(loaded.programs.empty_cache(1, 256).keys)
    # A sum over one device is a copy, but stands there as a sum; nothing is gathered from one.
    gathers = {} if mesh == "tp=1" else {"all-gather": 1}
    assert got.collectives == {"all-reduce": sums * layers + 1, **gathers}


CODE = """
import dataclasses, json, sys
import jax
jax.config.update("jax_num_cpu_devices", 256)
from jaxllm.models.deepseek.model import deepseek
from jaxllm.models.deepseek.config import PRESETS, DeepseekConfig
from jaxllm.parallel import make_mesh
from jaxllm.plan import deepseek_fp8, plan

config = DeepseekConfig.from_demo(PRESETS["deepseek-v3-671b"])
one_of_each = dataclasses.replace(config, num_hidden_layers=2, first_k_dense_replace=1)
for text in sys.argv[1:]:
    mesh = make_mesh(text)
    got = plan(deepseek(one_of_each, mesh), mesh, deepseek_fp8(), batch=8, capacity=4096)
    parts = {"dense": "layers.0.", "sparse": "layers.1."}
    sizes = {k: sum(v for n, v in got.parameter_bytes.items() if n.startswith(p)) for k, p in parts.items()}
    sizes["ends"] = sum(got.parameter_bytes.values()) - sum(sizes.values())
    sizes["all"] = sizes["ends"] + 3 * sizes["dense"] + 58 * sizes["sparse"]
    print(json.dumps({"mesh": text, **sizes, **got.collectives}))
"""


def test_deepseek_v3_on_256_devices():
    """Sizes by hand; 18432 / 32 = 576 is no multiple of 128. The README has the table."""
    meshes = some(["tp=8,ep=32", "tp=16,ep=16", "tp=32,ep=8"], ["tp=8,ep=32", "tp=32,ep=8"])
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", CODE, *meshes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        got = json.loads(line)
        tp, ep = (int(part.split("=")[1]) for part in got["mesh"].split(","))
        assert (got["all-reduce"], got["all-gather"]) == (2 * 2 + 1, 1)
        attention = 7168 * 1536 + 7168 * 576 + (1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168) / tp
        assert got["dense"] == pytest.approx(attention + 3 * 7168 * 18432 / tp, rel=0.02)
        assert got["sparse"] == pytest.approx(attention + 3 * 7168 * 2048 * 257 / 256 + 2 * 256 * 7168, rel=0.02)
        assert got["ends"] == pytest.approx(2 * 2 * 129280 * 7168 / tp, rel=0.01)
        assert got["all"] < 8e9
    assert len(done.stdout.splitlines()) == len(meshes)


def test_presets_have_the_sizes_in_their_names():
    from jaxllm.models.deepseek.config import PRESETS, DeepseekConfig
    from jaxllm.models.deepseek.model import deepseek
    from jaxllm.plan import dense, fill_with_shapes

    for name, billions in (("v2-lite-16b", 15.7), ("v2-236b", 235.7), ("v3-671b", 671.0)):
        config, mesh = DeepseekConfig.from_demo(PRESETS[f"deepseek-{name}"]), make_mesh("tp=1")
        layers = {"n": config.num_hidden_layers, "dense": config.first_k_dense_replace}
        small = dataclasses.replace(config, num_hidden_layers=2, first_k_dense_replace=1)
        sizes = fill_with_shapes(deepseek(small, mesh), mesh, dense("int8"))
        part = {p: sum(v for k, v in sizes.items() if k.startswith(f"layers.{p}.")) for p in (0, 1)}
        total = sum(sizes.values()) + (layers["dense"] - 1) * part[0] + (layers["n"] - layers["dense"] - 1) * part[1]
        assert total / 1e9 == pytest.approx(billions, rel=0.005)
