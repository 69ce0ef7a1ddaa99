"""GPUs that are not there: JAX's CUDA plugin compiles for them on any Linux machine, and runs
nothing."""

import importlib.util
import os

from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks.chips import CHIPS, Chip

PLUGIN = "jax_plugins.xla_cuda13"
# There is no device to try kernels on.
FLAG = "--xla_gpu_autotune_level=0"
CUBLAS = {"xla_gpu_enable_triton_gemm": False}
"""Options of `Lowered.compile` with which products are cuBLAS's. As it comes, without a device to
choose by, all that Triton can multiply is Triton's."""


def make_mesh(topology: str, **axes: int) -> Mesh:
    """A mesh of devices to compile for, such as `make_mesh("h100:1x1x8", fsdp=4, tp=2)`.

    Args:
      topology: A GPU of `benchmarks.chips.CHIPS`, and how many there are: slices × hosts of each ×
        GPUs of each.
      **axes: The mesh's axes, Auto, and their sizes. Their product is the number of GPUs.

    Raises:
      ImportError: JAX's CUDA plugin is not installed.
      LookupError: There is no such GPU in the table.
    """
    if importlib.util.find_spec(PLUGIN) is None:
        raise ImportError(
            "Compiling for GPUs needs JAX's CUDA plugin, which there is for Linux: pip install "
            "jax-cuda13-plugin jax-cuda13-pjrt, of jax's version (make test-gpu makes an "
            "environment with it, .venv-compilers)."
        )
    name, _, shape = topology.partition(":")
    chip = CHIPS.get(name)
    if chip is None or chip.multiprocessors is None:
        gpus = [name for name, chip in CHIPS.items() if chip.multiprocessors]
        raise LookupError(f"No GPU {name!r} in benchmarks.chips: it has {', '.join(gpus)}")
    if FLAG not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()
    described = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(chip), topology=shape
    )
    return topologies.make_mesh(described, tuple(axes.values()), tuple(axes))


def target_config(chip: Chip) -> str:
    """The GPU as XLA's compiler wants it: a text protobuf, `GpuTargetConfigProto`."""
    gpu = chip.multiprocessors
    return f"""
gpu_device_info {{
  name: "{chip.name}"
  cuda_compute_capability {{ major: {gpu.capability} feature_extension: ACCELERATED_FEATURES }}
  core_count: {gpu.count}
  clock_rate_ghz: {gpu.clock_ghz}
  l2_cache_size: {gpu.l2_bytes}
  memory_bandwidth: {chip.hbm_rate:.0f}
  device_memory_size: {chip.hbm_bytes}
  {_COMMON}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{chip.name}"
"""


# What Hopper and Blackwell have alike.
_COMMON = """
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  fpus_per_core: 128
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
""".strip()
