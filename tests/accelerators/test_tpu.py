"""The Pallas kernels through the TPUs' own compiler, for chips that are not there: that it takes them, and what the
programs need. How fast they run, and whether they are right on silicon, this cannot tell."""

import functools
import importlib.util

import covering
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.formats.scaled import Activations, Scaled
from jaxllm.kernels import shapes, tpu_report
from jaxllm.kernels.block_fp8 import pallas_tpu as block_fp8

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install 'jaxllm[plan]'"
)

V5E, V6E, TPU7X = "v5e:2x2", "v6e:2x4", "tpu7x:2x2x1"
# Of planes one matrix in every kind, few rows and many; `make bench-kernels` compiles the others too.
NAMED = [
    (op, name, shape)
    for op, named in shapes.named().items()
    for name, shape in named.items()
    if covering.FULL or not op.startswith("planes") or ("gate_proj" in name and not name.endswith("x 16"))
]
ELSEWHERE = "DeepSeek", "gpt-oss", "gate_proj Q4_K x 1", "gate_proj GPTQ 4-bit x 1"
TRAINED_AS = ["DeepSeek-V3 q_a_proj x 1", "DeepSeek-V3 kv_a_proj x 16", "DeepSeek-V3 q_b_proj x 4096"]

report = functools.lru_cache(tpu_report.compile_report)  # some shapes are called by two names


def check(made, shape, kernels):
    assert made["kernels"] == kernels
    assert made["copies"] == []
    # Padded copies would pass under another shape: rows of x and y may be padded, a weight may not be held twice.
    rows = shape.m + 64 * shape.experts
    assert made["temp_bytes"] <= 64 * 2**10 + 6 * rows * (shape.n + shape.k) + made["weight_bytes"] // 50
    assert made["vmem_bytes"] < 56 * 2**20


@pytest.mark.parametrize(("op", "name", "shape"), NAMED, ids=[f"{op}-{name}" for op, name, _ in NAMED])
@pytest.mark.parametrize("topology", [V6E, V5E, TPU7X])
def test_real_shapes(op, name, shape, topology):
    if topology != V6E and not any(part in name for part in ELSEWHERE):
        pytest.skip("half of the shapes are compiled for v6e alone")
    check(report(op, shape, topology), shape, [op.replace(".", "_")])


@pytest.mark.parametrize("name", TRAINED_AS)
@pytest.mark.parametrize("topology", [V6E, V5E, TPU7X])
def test_activations_in_fp8(name, topology):
    shape = shapes.named()["block_fp8.matmul"][name]
    check(report("block_fp8.matmul", shape, topology, group=128), shape, ["block_fp8_act_quant", "block_fp8_matmul"])


@pytest.mark.parametrize("topology", [V6E, V5E, TPU7X])
def test_experts_with_activations_in_fp8(topology):
    shape = shapes.named()["block_fp8.grouped_matmul"]["DeepSeek-V3 expert_down_proj x 16"]
    made = report("block_fp8.grouped_matmul", shape, topology, group=128)
    check(made, shape, ["block_fp8_act_quant", "block_fp8_grouped_matmul"])


@pytest.mark.parametrize("op", ["block_fp8.matmul", "mxfp4.matmul", "planes.matmul"])
@pytest.mark.parametrize("rows", [1, 96])
def test_activations_in_float32(op, rows):
    shape = shapes.Shape(rows, 1024, 3584, kind="Q4_K")
    check(report(op, shape, V5E, "float32"), shape, [op.replace(".", "_")])


@pytest.mark.parametrize("shape", [(1, 72, 96), (3, 200, 352), (130, 576, 2880)])
@pytest.mark.parametrize("topology", [V6E, V5E, TPU7X])
@pytest.mark.parametrize("op", ["block_fp8.matmul", "mxfp4.matmul", "planes.matmul"])
def test_odd_shapes(op, shape, topology):
    shape = shapes.Shape(*shape, kind="Q8_0")
    assert report(op, shape, topology)["kernels"] == [op.replace(".", "_")]


def compiled_for(topology, f, *arguments):
    mesh = tpu_report.topology_mesh(topology)
    everywhere = PartitionSpec()
    local = jax.shard_map(f, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    arguments = jax.tree.map(lambda leaf: tpu_report.placed(leaf, NamedSharding(mesh, everywhere)), arguments)
    return jax.jit(local).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("topology", [V6E, V5E, TPU7X])
def test_fp8_with_a_scale_for_each_row(topology):
    struct = jax.ShapeDtypeStruct
    weight = Scaled(struct((3584, 8192), jnp.float8_e4m3fn), struct((3584, 1), jnp.float32), (1, None))
    text = compiled_for(topology, block_fp8.matmul, struct((1, 8192), jnp.bfloat16), weight)
    assert "block_fp8_matmul" in text
    assert "f32[3584,8192]" not in text
    assert "bf16[3584,8192]" not in text


@pytest.mark.parametrize("block", [(64, 128), (128, 64), (16, 32), (8, 16), (256, 256)])
@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("topology", [V6E, V5E, TPU7X])
def test_blocks_of_other_sizes(block, group, topology):
    scales = jax.ShapeDtypeStruct((-(-1152 // block[0]), -(-2880 // block[1])), jnp.bfloat16)
    activations = None if group is None else Activations(group)
    weight = Scaled(jax.ShapeDtypeStruct((1152, 2880), jnp.float8_e4m3fn), scales, block, activations)
    x = jax.ShapeDtypeStruct((4, 2880), jnp.bfloat16)
    assert block_fp8.refuses("matmul", x, weight) is None
    assert "tpu_custom_call" in compiled_for(topology, block_fp8.matmul, x, weight)


@pytest.mark.parametrize("topology", [V6E, V5E, TPU7X])
def test_decoding_to_memory(topology):
    weight = shapes.abstract_weight("block_fp8", shapes.Shape(1, 576, 7168, experts=4))
    for dtype in (jnp.float32, jnp.bfloat16):
        text = compiled_for(topology, functools.partial(block_fp8.weight_dequant, dtype=dtype), weight)
        assert "block_fp8_weight_dequant" in text


def test_default_layouts_cost_a_copy(monkeypatch):
    """Why weights have to be placed row-major: else the whole stack is transposed before every call."""
    shape = shapes.named()["mxfp4.grouped_matmul"]["gpt-oss-120b expert_gate_proj x 1"]
    monkeypatch.setattr(
        tpu_report, "placed", lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    )
    assert any(
        "16,2880,1440" in copy for copy in tpu_report.compile_report("mxfp4.grouped_matmul", shape, V6E)["copies"]
    )


@pytest.mark.parametrize("topology", [V6E, V5E, TPU7X])
@pytest.mark.parametrize("time", [1, shapes.CHUNK])
@pytest.mark.parametrize("name", shapes.ATTENTION)
def test_attention(name, time, topology):
    check_attention(name, time, topology)


@pytest.mark.parametrize("topology", [V6E, V5E, TPU7X])
@pytest.mark.parametrize("cache", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("name", ["gpt-oss-120b window", "DeepSeek-V3"])
def test_attention_to_a_cache_in_8_bits(name, cache, topology):
    check_attention(name, 1, topology, batch=8, cache_dtype=cache)


@pytest.mark.parametrize("name", ["gpt-oss-120b window", "DeepSeek-V3"])
def test_attention_in_float32(name):
    check_attention(name, 1, V5E, dtype=jnp.float32)


def check_attention(name, time, topology, **options):
    """The cache is read as it lies, and no scores of all heads and positions are made."""
    made, (given, _) = tpu_report.attention_report(name, time, topology, **options), shapes.attention(name, time)
    assert made["kernels"] == ["attention"]
    assert made["copies"] == []
    assert made["vmem_bytes"] < 40 * 2**20
    scores = 4 * given.q.size // given.q.shape[3] * given.keys.shape[2]
    assert made["temp_bytes"] < max(scores, 2**20)  # those of one token in a window are smaller than what else there is
