"""The example's training step, compiled for GPUs: a decoder with MLA, QuacK and QK-Clip."""

import pytest

from benchmarks.compiled import collectives
from tests.tpu.test_train_step import CONFIG, SETTINGS, check_arithmetic, compile_step


@pytest.mark.parametrize(
    ("topology", "axes"),
    [("h100:1x1x8", {"fsdp": 4, "tp": 2}), ("b200:1x2x8", {"fsdp": 8, "tp": 2})],
)
def test_fsdp_and_tp(gpu_mesh, topology, axes):
    mesh = gpu_mesh(topology, **axes)
    compiled, parameters = compile_step(mesh)
    check_arithmetic(compiled, parameters, mesh)
    moved = collectives(compiled)
    assert max(each.bytes for each in moved) < 2 * parameters  # all of them in bfloat16
    # Some 30, of several arrays each; when the compiler spreads Muon's matrices by itself, 400.
    assert sum(each.times for each in moved) <= 60
    # As much as the logits and their gradient alone would take if they were not split.
    logits = 4 * SETTINGS.batch_size * SETTINGS.context_length * CONFIG.vocab_size
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * logits
