"""Whole decode steps for chips that are not here: layers use the kernels, packed weights stay packed, no scores are in
memory, a block sums twice, and nothing waits for the host."""

import dataclasses
import importlib.util
import math
import re

import jax.numpy as jnp
import pytest

import jaxllm
from jaxllm.formats.scaled import Activations
from jaxllm.kernels import dispatch
from jaxllm.kernels.shapes import quantized
from jaxllm.models.deepseek.config import PRESETS as DEEPSEEK
from jaxllm.models.deepseek.config import DeepseekConfig
from jaxllm.models.deepseek.model import deepseek
from jaxllm.models.gpt_oss.config import PRESETS as GPT_OSS
from jaxllm.models.gpt_oss.config import GptOssConfig
from jaxllm.models.gpt_oss.model import gpt_oss
from jaxllm.models.llama.config import PRESETS as LLAMA
from jaxllm.models.llama.config import LlamaConfig
from jaxllm.models.llama.model import llama
from jaxllm.parallel import make_mesh
from jaxllm.plan import collectives, deepseek_fp8, dense, fill_with_shapes, lower_decode
from jaxllm.planning.shapes import mxfp4_experts
from jaxllm.planning.topologies import WITHOUT_A_GPU, topology


def has(*modules):
    return all(importlib.util.find_spec(name) for name in modules)


WHERE = "is not installed: pip install 'jaxllm[plan]'"
no_libtpu = pytest.mark.skipif(not has("libtpu"), reason=f"libtpu, the compiler of TPUs, {WHERE}")
no_cuda = pytest.mark.skipif(
    not has("jax_triton", "triton", "jax_plugins.xla_cuda13") if has("jax_plugins") else True,
    reason=f"jax-triton or jax-cuda13-plugin {WHERE}",
)


# Qwen3-235B-A22B's config.json.
QWEN3_235B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
}


def every_matrix_in(kind):
    """A format by its name in `shapes.quantized`; routers stay in bfloat16."""

    def format(name, shape):
        if name.endswith("mlp.gate.weight"):
            return dense(jnp.bfloat16)(name, shape)
        *stack, out, in_ = shape
        return quantized(kind, out, in_, tuple(stack))

    return format


def two_layers(name, mesh):
    """Two layers of a published model, its parameters shapes: what differs between layers is there once."""
    if name == "gpt-oss-120b":
        config = GptOssConfig.from_hf(GPT_OSS[name])
        model = gpt_oss(dataclasses.replace(config, sliding_windows=config.sliding_windows[:2]), mesh, 32)
        fill_with_shapes(model, mesh, mxfp4_experts)
        return model
    model, _, kind = name.partition(" ")
    if model in ("Llama-70B", "Qwen3-235B"):
        config = LLAMA["llama-3.1-70b"] if model == "Llama-70B" else QWEN3_235B
        model = llama(LlamaConfig.from_hf(config | {"num_hidden_layers": 2}), mesh, 256 if kind == "Q4_K" else 64)
        fill_with_shapes(model, mesh, every_matrix_in(kind), jnp.bfloat16)
        return model
    config = DeepseekConfig.from_demo(DEEPSEEK["deepseek-v3-671b"])
    model = deepseek(dataclasses.replace(config, num_hidden_layers=2, first_k_dense_replace=1), mesh)
    fill_with_shapes(model, mesh, deepseek_fp8(Activations(128) if name.endswith("W8A8") else None))
    return model


def decoded_matrices(text, shapes):
    """Floating-point arrays of a packed matrix's shape, or transposed, which would be decoded copies of it."""
    floats = {tuple(map(int, dims.split(",")[-2:])) for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]*,[\d,]+)\]", text)}
    return floats & (shapes | {shape[::-1] for shape in shapes})


CASES = {
    # name, mesh: which kernels a step has, and shapes of one device's packed matrices that nothing else has
    ("gpt-oss-120b", "tp=1,ep=8"): ({"mxfp4_grouped_matmul": 6}, {(2880, 2880)}),
    ("gpt-oss-120b", "tp=8"): ({"mxfp4_grouped_matmul": 6}, {(384, 2880), (2880, 384)}),
    ("DeepSeek-V3", "tp=8"): ({"block_fp8_grouped_matmul": 3}, {(2304, 7168), (7168, 2304), (7168, 2048)}),
    ("DeepSeek-V3 W8A8", "tp=2,ep=4"): ({"block_fp8_grouped_matmul": 3}, {(9216, 7168), (7168, 9216), (1024, 7168)}),
    **{
        (f"Llama-70B {kind}", "tp=8"): ({"planes_matmul": 2 * 7 + 1}, {(1024, 8192), (3584, 8192), (16032, 8192)})
        for kind in ("Q4_K", "GPTQ 4-bit", "AWQ 4-bit")
    },
    ("Qwen3-235B MLX 4-bit", "tp=1,ep=8"): ({"planes_grouped_matmul": 6, "planes_matmul": 2 * 4 + 1}, {(1536, 4096)}),
    ("Qwen3-235B MLX 4-bit", "tp=8"): ({"planes_grouped_matmul": 6, "planes_matmul": 2 * 4 + 1}, {(192, 4096)}),
}
BATCH, CAPACITY, FEWEST_HEADS = 8, 1280, 8  # no matrix has 1280 rows or columns


def scores(text):
    """Arrays of numbers for each cached position and each head or more."""
    found = re.findall(r"\bf32\[([\d,]+)\]", text)
    sizes = (tuple(map(int, dims.split(","))) for dims in found)
    return {dims for dims in sizes if CAPACITY in dims and math.prod(dims) >= BATCH * FEWEST_HEADS * CAPACITY}


def transfers(text):
    """Instructions by which a program waits for the host, or keeps arrays in its memory (space 5)."""
    return re.findall(r" (?:infeed|outfeed|send|recv)\(|S\(5\)|callback|annotate_device_placement", text)


def moved(text):
    """Instructions that make another array of packed bytes, which a kernel would read them from. (The scales of Llama's
    embedding table, 4 MB of it, are turned before its rows are looked up.)"""
    made = re.findall(r"= (?:u8|s8|u16|u32|f8e4m3fn)\[([\d,]+)\]\S* (copy|transpose|fusion)\(", text)
    made = [(op, dims) for dims, op in made if dims != "256,16032"]
    return [(op, dims) for op, dims in made if math.prod(map(int, dims.split(","))) > 2**20]


def sums(mesh):
    """Two a layer and one for the embedding; where nothing is cut over tp, those of experts remain."""
    return 2 if "tp=1" in mesh else 2 * 2 + 1


def compiled(name, mesh_text, devices, options=None):
    mesh = make_mesh(mesh_text, devices.reshape(-1))
    lowered = lower_decode(two_layers(name, mesh), mesh, batch=BATCH, capacity=CAPACITY)
    return lowered.compile(compiler_options=options)


@no_libtpu
@pytest.mark.parametrize("chips", ["v6e:2x4", "tpu7x:2x2x1"])
@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_step_on_eight_tpus(name, mesh, chips):
    kernels, packed = CASES[name, mesh]
    program = compiled(name, mesh, topology(chips).devices)
    text = program.as_text()
    found = re.findall(r"%(\w+)[.\d]* = [^\n]*tpu_custom_call", text)
    for kernel, count in kernels.items():
        assert found.count(kernel) == count
    assert found.count("attention") == 2
    if name.startswith("DeepSeek"):
        assert found.count("block_fp8_matmul") >= 2 * 4 + 3 + 3  # latents, q, o; the dense block; the shared expert
    assert not decoded_matrices(text, packed)
    assert not moved(text)
    assert not scores(text)
    assert not transfers(text)
    assert collectives(text)["all-reduce"] == sums(mesh)


@no_cuda
@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_step_on_eight_gpus(name, mesh):
    import jax_triton

    kernels, packed = CASES[name, mesh]
    text = compiled(name, mesh, topology("h100:8").devices, WITHOUT_A_GPU).as_text()
    calls = text.count(f'custom_call_target="{jax_triton.CUSTOM_CALL_TARGET_NAME}"')
    assert calls >= sum(kernels.values()) + 2  # attention
    assert not decoded_matrices(text, packed)
    assert not scores(text)
    assert not transfers(text)
    assert collectives(text)["all-reduce"] == sums(mesh)


@no_libtpu
def test_scores_are_seen_where_there_are_some():
    """The definition of attention makes them, so the tests above would notice."""
    with dispatch.using("reference"):
        text = compiled("Llama-70B Q4_K", "tp=8", topology("v5e:2x4").devices).as_text()
    assert (BATCH, FEWEST_HEADS, CAPACITY) in {tuple(n for n in dims if n > 1) for dims in scores(text)}


PLANS = {
    "v5e:2x4": pytest.param("v5e:2x4", 16 * 2**30, 819e9, marks=no_libtpu),
    "b200:8": pytest.param("b200:8", 180e9, 8000e9, marks=no_cuda),
}


@pytest.mark.parametrize(("chips", "memory", "bandwidth"), PLANS.values(), ids=PLANS)
def test_a_plan(chips, memory, bandwidth):
    """Llama 3.1 8B in bfloat16: 16.06 GB and a cache of 8 x 1024 positions of 128 kB; nothing reads less."""
    made = jaxllm.plan("llama-3.1-8b", chips, "tp=8", batch=8, context=1024)
    assert sum(made.weights.values()) == pytest.approx(2 * 8.03e9 / 8, rel=0.001)
    assert made.cache == 8 * 1024 * 32 * 2 * 128 * 2 + 2 * 8 * 4  # of 8 heads one on each device; lengths and limits
    assert made.fits and made.limits.memory == memory
    assert 0 < max(made.temporaries.values()) < 2**30
    assert made.decode.binds(made.limits) == "memory"
    read = (16.06e9 - 2 * 0.525e9) / 8 + made.cache
    assert made.decode.bound(made.limits) == pytest.approx(8 * bandwidth / read, rel=0.01)
    assert [[(c.kind, c.axes) for c in kind.collectives] for kind in made.kinds] == [[("all-reduce", ("tp",))] * 2]
    assert [c.kind for c in made.ends] == ["all-reduce", "all-gather"]


@no_cuda
def test_fp8_on_blackwell_compiles():
    """Triton would write PTX that XLA's ptxas refuses, see `gpu.PTX_VERSION`."""
    compiled("DeepSeek-V3", "tp=8", topology("b200:8").devices, WITHOUT_A_GPU)


@no_libtpu
def test_a_shape_that_tpus_do_not_have():
    with pytest.raises(
        jaxllm.InputError, match=r"^topology 'v5e:3x77': libtpu knows no such shape \(.*\); try v5e:4x4"
    ):
        topology("v5e:3x77")
