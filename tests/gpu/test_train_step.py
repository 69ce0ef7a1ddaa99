"""The example's training step, compiled for GPUs: a decoder with MLA, QuacK and QK-Clip."""

import pytest

from tests.tpu.test_train_step import (
    check_arithmetic,
    check_exchange_and_memory,
    compile_step,
)


@pytest.mark.parametrize(
    ("topology", "axes"),
    [("h100:1x1x8", {"fsdp": 4, "tp": 2}), ("b200:1x2x8", {"fsdp": 8, "tp": 2})],
)
def test_fsdp_and_tp(gpu_mesh, topology, axes):
    mesh = gpu_mesh(topology, **axes)
    compiled, parameters = compile_step(mesh)
    check_arithmetic(compiled, parameters, mesh)
    # Some 30, of several arrays each; when the compiler spreads Muon's matrices by itself, 400.
    check_exchange_and_memory(compiled, parameters, most_collectives=60)
