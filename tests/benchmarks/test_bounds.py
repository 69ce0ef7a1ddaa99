"""The training that shows what clips hold: its settings, and one of them for some steps."""

import numpy as np
import pytest

from benchmarks import bounds
from studies.common.training import Plan, load_text

PLAN = Plan("package", steps=40, batch=4, context=32, measure_every=40, valid_batches=1)


@pytest.fixture(scope="module")
def text():
    return load_text(PLAN, bounds.MODEL.vocab_size)


def test_outputs_that_are_clipped_stay_near_the_threshold(text):
    free, held = (
        bounds.train(links, text, PLAN, 0, rate=0.1)
        for links in ([], bounds.settings()["outputs ≤ 3"])
    )
    assert free["loss"][0] == held["loss"][0]  # the same batches and parameters
    # One step and another batch add what they add; the text, this package, changes.
    assert max(held["output"]) < 12 and max(free["output"]) > 5 * max(held["output"])
    assert np.isfinite(held["valid_loss"])


def test_what_follows_muon_costs():
    settings = bounds.settings()
    alone, clip, values, cap = (
        bounds.cost(settings[name], 0.1)
        for name in ("Muon", "QK-Clip τ=30", "all σ ≤ 2", "all ‖W‖₂ ≤ 2")
    )
    assert alone == clip < cap < 1.01 * alone  # no matrix products; two vectors a matrix
    assert 5 * alone < values < 7 * alone
