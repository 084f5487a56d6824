"""The Triton kernels compiled for GPUs that are not here: down to machine code, and by XLA for eight H100s.

Needs no GPU, but triton, jax-triton, jax-cuda13-plugin and jax-cuda13-pjrt (none of NVIDIA's own wheels).
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.kernels import shapes
from jaxllm.planning.topologies import WITHOUT_A_GPU, topology

WHERE = "they compile for GPUs, on machines that may have none: pip install 'jaxllm[plan]'"
for module in ("triton", "jax_triton", "jax_plugins.xla_cuda13"):
    pytest.importorskip(module, reason=f"{module} is missing; {WHERE}")

import jax_triton  # noqa: E402
import triton  # noqa: E402

from jaxllm.kernels import gpu_report as report  # noqa: E402
from jaxllm.kernels.block_fp8 import triton_gpu as block_fp8  # noqa: E402
from jaxllm.kernels.flash import triton_gpu as flash  # noqa: E402
from jaxllm.kernels.mxfp4 import triton_gpu as mxfp4  # noqa: E402
from jaxllm.kernels.planes import triton_gpu as planes  # noqa: E402

SHARED = 227 * 1024  # bytes that a program can have on both architectures
INSTRUCTION = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
NAMED = {f"{op} {name}": (op, shape) for op, table in shapes.named().items() for name, shape in table.items()}
# Of planes a matrix in every kind, and many rows in one. (Others make the same kernel, and compiling takes seconds.)
SHAPES = {
    name: call
    for name, call in NAMED.items()
    if not name.startswith("planes")
    or "gate_proj Q4_K x 4096" in name
    or ("gate_proj" in name and name.endswith("x 1"))
}
# Rows for each entry of a table; the last k is no multiple of its tiles' k.
ROWS, MATRICES = (1, 32, 64, 200), ((1536, 7168), (2880, 2880))


def kernel_calls():
    """Every entry of the tables, for each kind of activations, and experts for some."""
    for op, table in (("block_fp8", block_fp8.TILES), ("mxfp4", mxfp4.TILES)):
        groups = (None, 128) if op == "block_fp8" else (None,)
        for tile, m in zip(table, ROWS, strict=True):
            for n, k in MATRICES:
                yield from ((f"{op}.matmul", shapes.Shape(m, n, k), jnp.bfloat16, group, tile) for group in groups)
        for group in groups:
            yield f"{op}.grouped_matmul", shapes.Shape(16, 2880, 2880, 16), jnp.bfloat16, group, table[0]
    for op, table in (("block_fp8", block_fp8.TILES_FLOAT32), ("mxfp4", mxfp4.TILES_FLOAT32)):
        for tile, m in zip(table, (1, 200), strict=True):
            yield f"{op}.matmul", shapes.Shape(m, 1536, 7168), jnp.float32, None, tile
    for tile in planes.TILES:
        yield "planes.matmul", shapes.Shape(tile.m, 1536, 7168, kind="Q4_K"), jnp.bfloat16, None, tile
    for kind in ("GPTQ 4-bit", "MLX 4-bit", "Q3_K", "Q5_K", "Q6_K", "Q8_0", "NF4", "NVFP4"):
        yield "planes.matmul", shapes.Shape(1, 1536, 7168, kind=kind), jnp.bfloat16, None, planes.TILES[0]
    for kind in ("GPTQ 4-bit", "Q6_K", "NF4"):
        yield "planes.matmul", shapes.Shape(200, 1536, 7168, kind=kind), jnp.bfloat16, None, planes.TILES[-1]
    yield "planes.grouped_matmul", shapes.Shape(16, 1536, 4096, 16, "MLX 4-bit"), jnp.bfloat16, None, planes.TILES[1]
    for tile, m in zip(planes.TILES_FLOAT32, (1, 200), strict=True):
        yield "planes.matmul", shapes.Shape(m, 1536, 7168, kind="NF4"), jnp.float32, None, tile


CALLS = {
    f"{op} {tuple(shape)} {np.dtype(dtype)} {group}": call
    for call in kernel_calls()
    for op, shape, dtype, group, _ in [call]
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Triton's, which would be in the user's home."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.mark.parametrize("arch", INSTRUCTION)
@pytest.mark.parametrize("call", CALLS)
def test_matmul_in_machine_code(call, arch):
    op, shape, dtype, group, tile = CALLS[call]
    made = report.compile_report(op, shape, arch, dtype, group)
    assert made["tile"] == tile[:3] and made["warps"] == tile.warps and made["stages"] == tile.stages
    assert made["shared"] <= SHARED
    assert made["spills"] == 0
    if dtype == jnp.float32:
        assert made["instructions"] == []  # none of them multiplies float32
    else:
        instruction = "mma.sync" if op.startswith("planes") and tile.m <= 16 else INSTRUCTION[arch]
        assert all(name.startswith(instruction) for name in made["instructions"]) and made["instructions"]
    if arch == 90 and dtype == jnp.bfloat16:
        # What is decoded goes on to the instruction. Nothing is, when codes are multiplied as they are.
        assert made["from_registers"] == (group is None)


@pytest.mark.parametrize("arch", INSTRUCTION)
def test_products_of_codes_keep_subnormals(arch):
    """MXFP4's decoder multiplies subnormal numbers, which `.ftz` would flush to zero."""
    for dtype, multiply in ((jnp.bfloat16, "mul.bf16x2"), (jnp.float32, "mul.f32")):
        args = report.arguments("mxfp4.matmul", shapes.Shape(1, 64, 256), dtype)
        ptx = report.compiled(report.launches(mxfp4.matmul, *args)[0], arch).asm["ptx"]
        assert multiply in ptx and ".ftz" not in ptx


@pytest.mark.parametrize("op", ["block_fp8.grouped_matmul", "mxfp4.grouped_matmul", "planes.grouped_matmul"])
def test_experts_are_64_bits_apart(op):
    """A stack is larger than 2^31."""
    shape = shapes.Shape(4, 2048, 7168, 256, "MLX 4-bit")
    (launch,) = report.launches(report.function(op), *report.arguments(op, shape))
    ttir = report.compiled(launch, 90).asm["ttir"]
    assert re.search(r"tt\.addptr %w, %\S+ : !tt\.ptr<\w+>, i64|tt\.addptr %w_\d+, .*tensor<\w+xi64>", ttir)


@pytest.mark.parametrize("arch", INSTRUCTION)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_act_quant_in_machine_code(arch, power_of_two):
    x = jax.ShapeDtypeStruct((16, 7168), jnp.bfloat16)
    (launch,) = report.launches(lambda x: block_fp8.act_quant(x, 128, power_of_two), x)
    compiled = report.compiled(launch, arch)
    assert report.resources(compiled)["spills"] == 0
    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled.asm["ptx"] and "div.rn.f32" in compiled.asm["ptx"]


@pytest.mark.parametrize("arch", INSTRUCTION)
@pytest.mark.parametrize("scales", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e8m0fnu])
@pytest.mark.parametrize("values", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8])
def test_every_dtype_of_codes_and_scales(values, scales, arch):
    x, weight = report.arguments("block_fp8.matmul", shapes.Shape(1, 256, 1024))
    dtypes = {"values": values, "scales": scales}
    weight = dataclasses.replace(weight, **{name: getattr(weight, name).update(dtype=d) for name, d in dtypes.items()})
    launches = [*report.launches(block_fp8.matmul, x, weight), *report.launches(block_fp8.weight_dequant, weight)]
    assert [report.resources(report.compiled(launch, arch))["spills"] for launch in launches] == [0, 0]


@pytest.mark.parametrize("arch", INSTRUCTION)
@pytest.mark.parametrize("time", [1, shapes.CHUNK])
@pytest.mark.parametrize("name", shapes.ATTENTION)
def test_attention_in_machine_code(name, time, arch):
    made = report.resources(report.compiled(report.attention_launch(name, time), arch))
    assert made["shared"] <= SHARED
    assert made["spills"] == 0
    # Tiles of 16 rows are bound by the memory, and too few for the larger instructions.
    expected = INSTRUCTION[arch] if time > 1 else "mma.sync"
    assert all(instruction.startswith(expected) for instruction in made["instructions"]) and made["instructions"]


@pytest.mark.parametrize("arch", INSTRUCTION)
@pytest.mark.parametrize("name", ["Llama-70B", "DeepSeek-V3"])
def test_attention_to_a_cache_of_int8(name, arch):
    made = report.resources(report.compiled(report.attention_launch(name, 1, cache_dtype=jnp.int8), arch))
    assert made["shared"] <= SHARED
    assert made["spills"] == 0


@pytest.mark.parametrize("arch", INSTRUCTION)
def test_attention_in_float32(arch):
    for name in ("Llama-70B", "DeepSeek-V3"):
        made = report.resources(report.compiled(report.attention_launch(name, 1, dtype=jnp.float32), arch))
        assert made["shared"] <= SHARED
        assert made["spills"] == 0
        assert made["instructions"] == []


@pytest.fixture(scope="module")
def eight_h100():
    return Mesh(topology("h100:8").devices, ("tp",))


@pytest.mark.parametrize("name", SHAPES)
def test_xla_compiles_for_eight_gpus(eight_h100, name):
    """One device's share is the named shape; the kernel is all there is, and no decoded matrix is anywhere."""
    op, shape = SHAPES[name]
    group = 128 if op.startswith("block_fp8") and "DeepSeek" in name else None
    local = report.arguments(op, shape, group=group)
    # Rows of the matrix or experts are divided; so are the tiles of experts, and x is the same everywhere otherwise.
    specs = jax.tree.map(lambda _: P("tp"), local)
    specs = specs if shape.experts else (P(), *specs[1:])
    out = P("tp") if shape.experts else P(None, "tp")

    def everywhere(leaf, spec):
        first = leaf.shape[0] * (8 if spec else 1)
        return leaf.update(shape=(first, *leaf.shape[1:]), sharding=NamedSharding(eight_h100, spec))

    f = jax.shard_map(report.function(op), mesh=eight_h100, in_specs=specs, out_specs=out)
    compiled = jax.jit(f).lower(*jax.tree.map(everywhere, local, specs)).compile(compiler_options=WITHOUT_A_GPU)
    text = compiled.as_text()
    assert text.count(f'custom_call_target="{jax_triton.CUSTOM_CALL_TARGET_NAME}"') == (2 if group else 1)
    floats = re.findall(r"\b(?:f32|f16|bf16)\[([\d,]+)\]", text)
    assert not [dims for dims in floats if dims.endswith(f"{shape.n},{shape.k}")]
    # x once more (as codes, or with its columns in another order), and the splits' sums.
    splits = report.launches(report.function(op), *local)[-1].grid[2]
    x = local[0]
    sums = 4 * splits * x.shape[0] * shape.n if splits > 1 else 0
    allowed = 2 * x.size + sums + 64 * 1024
    assert compiled.memory_analysis().temp_size_in_bytes <= allowed


@pytest.mark.parametrize("op", ["block_fp8.matmul", "mxfp4.matmul", "planes.matmul"])
def test_results_differ_between_devices(eight_h100, op):
    """`shard_map` knows, and so does not take them for everyone's."""
    args = report.arguments(op, shapes.Shape(16, 1024, 1024, kind="Q4_K"))
    f = jax.shard_map(report.function(op), mesh=eight_h100, in_specs=(P(), P("tp")), out_specs=P())
    with pytest.raises(ValueError, match="replicated"):
        jax.eval_shape(f, *args)


@pytest.mark.parametrize("time", [1, shapes.CHUNK])
@pytest.mark.parametrize("name", ["gpt-oss-120b window", "DeepSeek-V3"])
def test_xla_compiles_attention(eight_h100, name, time):
    """The kernel, what finds its blocks, and the sum of its parts: scores are nowhere."""
    given, scoring = shapes.attention(name, time, batch=8)
    f = jax.shard_map(lambda given: flash.attention(given, scoring), mesh=eight_h100, in_specs=P(), out_specs=P())
    everywhere = jax.tree.map(lambda leaf: leaf.update(sharding=NamedSharding(eight_h100, P())), given)
    compiled = jax.jit(f).lower(everywhere).compile(compiler_options=WITHOUT_A_GPU)
    assert compiled.as_text().count(f'custom_call_target="{jax_triton.CUSTOM_CALL_TARGET_NAME}"') == 1
    parts = sum(out.size * out.dtype.itemsize for out in report.attention_launch(name, time, batch=8).out_type)
    assert compiled.memory_analysis().temp_size_in_bytes <= parts + 4 * given.q.size + 128 * 1024
