"""Whole decode steps for chips that are not here: layers use the kernels, packed weights stay packed, and a block sums
twice."""

import dataclasses
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxllm.formats.mxfp4 import MXFP4
from jaxllm.formats.scaled import Activations
from jaxllm.models.deepseek.config import PRESETS as DEEPSEEK
from jaxllm.models.deepseek.config import DeepseekConfig
from jaxllm.models.deepseek.model import deepseek
from jaxllm.models.gpt_oss.config import PRESETS as GPT_OSS
from jaxllm.models.gpt_oss.config import GptOssConfig
from jaxllm.models.gpt_oss.model import gpt_oss
from jaxllm.parallel import make_mesh
from jaxllm.plan import collectives, deepseek_fp8, dense, fill_with_shapes, lower_decode


def has(*modules):
    return all(importlib.util.find_spec(name) for name in modules)


WHERE = "is not installed: pip install 'jaxllm[plan]'"
no_libtpu = pytest.mark.skipif(not has("libtpu"), reason=f"libtpu, the compiler of TPUs, {WHERE}")
no_cuda = pytest.mark.skipif(
    not has("jax_triton", "triton", "jax_plugins.xla_cuda13") if has("jax_plugins") else True,
    reason=f"jax-triton or jax-cuda13-plugin {WHERE}",
)


def tpus(name):
    from jaxllm.kernels.tpu_report import topology_mesh

    return topology_mesh(name).devices


def h100s():
    from eight_h100 import devices

    return devices()


def mxfp4_experts(name, shape):
    if not re.search(r"experts\.(gate|up|down)_proj$", name):
        return dense(jnp.bfloat16)(name, shape)
    *lead, in_ = shape
    return MXFP4(*(jax.ShapeDtypeStruct((*lead, in_ // n), jnp.uint8) for n in (2, 32)))


def two_layers(name, mesh):
    """Two layers of a published model, its parameters shapes: what differs between layers is there once."""
    if name == "gpt-oss-120b":
        config = GptOssConfig.from_hf(GPT_OSS[name])
        model = gpt_oss(dataclasses.replace(config, sliding_windows=config.sliding_windows[:2]), mesh, 32)
        fill_with_shapes(model, mesh, mxfp4_experts)
        return model
    config = DeepseekConfig.from_demo(DEEPSEEK["deepseek-v3-671b"])
    model = deepseek(dataclasses.replace(config, num_hidden_layers=2, first_k_dense_replace=1), mesh)
    fill_with_shapes(model, mesh, deepseek_fp8(Activations(128) if name.endswith("W8A8") else None))
    return model


def decoded_matrices(text, shapes):
    """Floating-point arrays of a packed matrix's shape, which would be decoded copies of it."""
    floats = {tuple(map(int, dims.split(",")[-2:])) for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]*,[\d,]+)\]", text)}
    return floats & shapes


CASES = {
    # name, mesh: which kernels a step has, and shapes of one device's packed matrices that nothing else has
    ("gpt-oss-120b", "tp=1,ep=8"): ({"mxfp4_grouped_matmul": 6}, {(2880, 2880)}),
    ("gpt-oss-120b", "tp=8"): ({"mxfp4_grouped_matmul": 6}, {(384, 2880), (2880, 384)}),
    ("DeepSeek-V3", "tp=8"): ({"block_fp8_grouped_matmul": 3}, {(2304, 7168), (7168, 2304), (7168, 2048)}),
    ("DeepSeek-V3 W8A8", "tp=2,ep=4"): ({"block_fp8_grouped_matmul": 3}, {(9216, 7168), (7168, 9216), (1024, 7168)}),
}


def moved(text):
    """Instructions that make another array of packed bytes, which a kernel would read them from."""
    made = re.findall(r"= (?:u8|f8e4m3fn)\[([\d,]+)\]\S* (copy|transpose|fusion)\(", text)
    return [(op, dims) for dims, op in made if math.prod(map(int, dims.split(","))) > 2**20]


def sums(mesh):
    """Two a layer and one for the embedding; where nothing is cut over tp, those of experts remain."""
    return 2 if "tp=1" in mesh else 2 * 2 + 1


def compiled(name, mesh_text, devices, options=None):
    mesh = make_mesh(mesh_text, devices.reshape(-1))
    lowered = lower_decode(two_layers(name, mesh), mesh, batch=8, capacity=1024)
    return lowered.compile(compiler_options=options)


@no_libtpu
@pytest.mark.parametrize("topology", ["v6e:2x4", "tpu7x:2x2x1"])
@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_step_on_eight_tpus(name, mesh, topology):
    kernels, packed = CASES[name, mesh]
    program = compiled(name, mesh, tpus(topology))
    text = program.as_text()
    found = re.findall(r"%(\w+)[.\d]* = [^\n]*tpu_custom_call", text)
    for kernel, count in kernels.items():
        assert found.count(kernel) == count
    if name.startswith("DeepSeek"):
        assert found.count("block_fp8_matmul") >= 2 * 4 + 3 + 3  # latents, q, o; the dense block; the shared expert
    assert not decoded_matrices(text, packed)
    assert not moved(text)
    assert collectives(text)["all-reduce"] == sums(mesh)


@no_cuda
@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_step_on_eight_gpus(name, mesh):
    import jax_triton
    from eight_h100 import WITHOUT_A_GPU

    kernels, packed = CASES[name, mesh]
    text = compiled(name, mesh, h100s(), WITHOUT_A_GPU).as_text()
    calls = text.count(f'custom_call_target="{jax_triton.CUSTOM_CALL_TARGET_NAME}"')
    assert calls >= sum(kernels.values())
    assert not decoded_matrices(text, packed)
    assert collectives(text)["all-reduce"] == sums(mesh)
