"""Devices that are not here, from text such as "v5e:4x4": their compilers know them.

libtpu compiles for any TPU topology, and XLA's CUDA plugin for GPUs that are described to it; both run on a CPU. A CPU
has no such compiler, so "cpu:8" are this machine's emulated devices.
"""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import topologies

from jaxllm.errors import InputError
from jaxllm.planning.chips import CHIPS, Chip

EXAMPLES = "v5e:4x4, v6e:8x8, v5p:8x8x16, v4:2x2x2, tpu7x:2x2x1, h100:8, h200:8, b200:8 or cpu:8"

# XLA would try out its own matmuls on a GPU, so it may not.
WITHOUT_A_GPU = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}

GPUS_IN_A_NODE = 8
# What distinguishes GPUs of our kind for their compiler; numbers are those that XLA's own target descriptions have.
_GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 1.98, 52428800, 3352320000000, 84978958336),
    "h200": ("NVIDIA H200 141GB HBM3e", 9, 132, 1.98, 52428800, 4800000000000, 151397597184),
    "b200": ("NVIDIA B200", 10, 148, 1.965, 132644864, 7672320000000, 191514411008),
}
_TARGET = """
platform_name: "CUDA"  device_description_str: "{0}"
dnn_version_info {{ major: 9 minor: 8 }}  runtime_version {{ major: 13 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {1} }}  core_count: {2}  fpus_per_core: 128  clock_rate_ghz: {3}
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536  registers_per_block_limit: 65536  l2_cache_size: {4}
  memory_bandwidth: {5}  device_memory_size: {6}
}}
"""


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        name: as the user wrote it.
        devices: in the compiler's order.
        chip: what is published about each of them; None for a CPU.
        compiler_options: what their compiler has to be told.
    """

    name: str
    devices: np.ndarray
    chip: Chip | None
    compiler_options: Mapping[str, bool | int]


def topology(text: str) -> Topology:
    """The devices that a text names.

    Raises:
        InputError: there is no such chip or shape, or its compiler is not installed.
    """
    kind, _, shape = text.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", shape) or kind not in (*CHIPS, "cpu"):
        raise InputError(f"topology '{text}': expected a chip and a shape such as {EXAMPLES}")
    if kind == "cpu":
        return Topology(text, _cpus(text, shape), None, {})
    if kind in _GPUS:
        return Topology(text, _gpus(text, kind, shape), CHIPS[kind], WITHOUT_A_GPU)
    return Topology(text, _tpus(text), CHIPS[kind], {})


def _cpus(text: str, shape: str) -> np.ndarray:
    count, here = math.prod(map(int, shape.split("x"))), jax.devices("cpu")
    if not 0 < count <= len(here):
        raise InputError(
            f"topology '{text}': JAX sees {len(here)} CPU devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before Python starts"
        )
    return np.array(here[:count])


def _tpus(text: str) -> np.ndarray:
    _need("libtpu", "the compiler of TPUs")
    # There is no server to ask about this machine's TPUs, and none to be told of.
    for name, value in (
        ("SKIP_MDS_QUERY", "1"),
        ("WORKER_HOSTNAMES", "localhost"),
        ("ACCELERATOR_TYPE", "v5litepod-8"),
    ):
        os.environ.setdefault(f"TPU_{name}", value)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling does not need the chips for itself
    try:
        return np.array(topologies.get_topology_desc(platform="tpu", topology_name=text).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"topology '{text}': libtpu knows no such shape ({reason}); try {EXAMPLES}") from error


def _gpus(text: str, kind: str, shape: str) -> np.ndarray:
    for name in ("jax_plugins.xla_cuda13", "jax_triton", "triton"):
        _need(name, "for compiling for GPUs")
    count = math.prod(map(int, shape.split("x")))
    node = min(count, GPUS_IN_A_NODE)
    if not count or count % node:
        raise InputError(f"topology '{text}': GPUs come in nodes of {GPUS_IN_A_NODE}, so {count} of them do not")
    target = _TARGET.format(*_GPUS[kind])
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=target, topology=f"1x{count // node}x{node}"
    )
    return np.array(found.devices)


def _need(module: str, what: str) -> None:
    parent = module.partition(".")[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
        name = module.rpartition(".")[2].replace("xla_cuda13", "jax-cuda13-plugin").replace("_", "-")
        raise InputError(f"{name}, {what}, is not installed: pip install 'jaxllm[plan]'")
