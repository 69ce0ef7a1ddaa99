"""Nothing here runs on a GPU: JAX's CUDA plugin compiles for one on a machine that has none."""

import pytest

from benchmarks import gpu


@pytest.fixture
def gpu_mesh():
    """`benchmarks.gpu.make_mesh`; without the plugin, a skip."""
    pytest.importorskip(gpu.PLUGIN, reason="make test-gpu installs it and runs this")
    return gpu.make_mesh
