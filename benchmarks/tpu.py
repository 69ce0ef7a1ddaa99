"""TPUs that are not there: libtpu compiles for them on any Linux machine, and runs nothing."""

import importlib.util
import os

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

# libtpu asks the cloud's metadata server what machine this is, unless told, and serves one process
# at a time, which matters only to those that use a TPU.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def make_mesh(topology: str, **axes: int) -> Mesh:
    """A mesh of devices to compile for, such as `make_mesh("v5p:2x2x2", fsdp=4, tp=2)`.

    Args:
      topology: A generation of TPUs and the chips along each axis of its torus: "v5e:4x4",
        "v5p:2x2x1", "v6e:2x2".
      **axes: The mesh's axes, Auto, and their sizes. Their product is the number of chips.

    Raises:
      ImportError: libtpu is not installed.
      LookupError: It knows no such topology.
      NotImplementedError: The mesh's axes cannot be made of the torus's.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "Compiling for TPUs needs libtpu, which there is for Linux on x86-64: "
            "pip install 'jax[tpu]' (make test-tpu makes an environment with it, .venv-compilers)."
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except jax.errors.JaxRuntimeError as error:
        raise LookupError(f"libtpu knows no TPU topology {topology!r}: {error}") from error
    return topologies.make_mesh(described, tuple(axes.values()), tuple(axes))
