"""Eight GPUs that are not here, for XLA's compiler."""

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

# XLA would try out its own matmuls on a GPU, so it may not.
WITHOUT_A_GPU = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}

H100 = """
platform_name: "CUDA"  device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }  runtime_version { major: 13 }
gpu_device_info {
  cuda_compute_capability { major: 9 }  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536  registers_per_block_limit: 65536  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000  device_memory_size: 84978958336
}
"""


def devices() -> np.ndarray:
    return np.array(
        topologies.get_topology_desc(platform="cuda", topology_name="", target_config=H100, topology="1x1x8").devices
    )


def mesh() -> Mesh:
    return Mesh(devices(), ("tp",))
