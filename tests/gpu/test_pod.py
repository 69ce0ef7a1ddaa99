"""The sharded engine on eight H100: what it must show."""

import pytest

from benchmarks import pod
from benchmarks.overlap import overlap

HOST = "h100:1x1x8"


@pytest.fixture
def mesh(gpu_mesh):
    return gpu_mesh(HOST, **pod.MESHES[HOST])


def test_a_model_of_scanned_layers(mesh):
    """Three stacks of 32 and 48 matrices, in ten parts."""
    compiled = pod.compile_ours(pod.CASES["c"], mesh)
    moved = overlap(compiled)
    assert moved.bytes <= 1.05 * pod.local_shard_bytes(pod.CASES["c"], mesh)
    assert moved.share >= 0.8


def test_matrices_that_the_devices_do_not_divide(mesh):
    """165 of them: eight travel as zeros by a bit more than half."""
    moved = overlap(pod.compile_ours(pod.CASES["e"], mesh))
    assert moved.bytes <= 1.05 * pod.local_shard_bytes(pod.CASES["e"], mesh)


def test_a_dozen(mesh):
    """Twelve on eight devices: four of these have two, and all that they need is sent, no more."""
    model = pod.CASES["d"]
    moved = overlap(pod.compile_ours(model, mesh))
    # A device's own part does not travel, but is counted.
    assert moved.bytes * 7 / 8 == pytest.approx(pod.least_bytes(model, mesh), rel=1e-3)
