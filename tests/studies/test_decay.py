"""The fit of how logits grow, and the tables of `decay`."""

import math

import numpy as np
import pytest

from studies.common import records
from studies.common.optimizers import Optimizer
from studies.decay import report
from studies.decay.growth import growth

STEPS, START = 2000, 20


def rises(power, time):
    """`[steps]`: 2 up to the start, and from there 2 + 50 timeᵖ, of a time from 0 to 1."""
    return 2 + 50 * np.concatenate([np.zeros(START), time**power])


@pytest.mark.parametrize("power", [0.7, 1.0, 1.6, 2.5])
def test_the_power_of_a_power_is_found(power):
    time = np.linspace(0, 1, STEPS - START)
    found = growth(rises(power, time), np.ones(STEPS), START, share=0.9)
    # Means over ten of 2000 steps move the curve by 4.5 of them; the grid of powers is of 0.01.
    assert found.power == pytest.approx(power, abs=0.03)
    assert found.explained > 0.9999
    assert (found.linear_error > 10) == (power != 1)
    expected = START + (STEPS - START) * 0.9 ** (1 / power)
    assert found.steps + START == pytest.approx(expected, abs=20)


def test_a_falling_rate_bends_nothing():
    rates = np.linspace(1, 0, STEPS)
    time = np.cumsum(rates[START:])
    maxima = rises(1, time / time[-1])
    assert growth(maxima, rates, START, share=0.9).power == pytest.approx(1, abs=0.03)
    assert growth(maxima, np.ones(STEPS), START, share=0.9).power < 0.9  # by steps it is bent


def test_what_comes_after_the_phase_counts_for_nothing():
    time = np.linspace(0, 1, STEPS - START)
    maxima = rises(1.5, time)
    fallen = np.concatenate([maxima, np.linspace(2, 1, STEPS)])
    whole = growth(fallen, np.ones(2 * STEPS), START, share=0.5)
    assert whole == growth(maxima, np.ones(STEPS), START, share=0.5)


def test_no_growth_has_no_power():
    falls = np.linspace(2, 1, 100)
    broken = np.where(np.arange(100) < 50, np.arange(100.0), np.nan)
    jump = np.repeat([1.0, 9.0, 1.0], [23, 17, 60])  # within a few steps
    for maxima in (falls, broken, jump):
        found = growth(maxima, np.ones(100), START, share=0.5)
        assert math.isnan(found.power) and math.isnan(found.linear_error)


def record(peak, end, loss, seed=0, threshold=None):
    """Logits that rise linearly to a peak at half of 100 steps, and fall linearly to an end."""
    rise, fall = np.linspace(0, peak, 50), np.linspace(peak, end, 50)
    maxima = np.concatenate([rise, fall])[:, None, None] * np.ones((1, 1, 2)) + 1e-3
    optimizer = Optimizer(threshold=threshold, warmup=2, decay_steps=100)
    norms = [{"valid_loss": 9.0, "wq": [1.0, 1], "wk": [1.0, 1], "step": 0}]
    return {
        "seed": seed,
        "plan": {"steps": 100},
        "optimizer": records.tidy(optimizer),
        "curves": {"max_logits": maxima.tolist()},
        "measurements": [*norms, {"valid_loss": loss, "wq": [1.0, 3], "wk": [4, 2.0], "step": 100}],
    }


RUNS = {
    "Muon λ=0": [record(40, 40, 3.0 + s / 10, s) for s in range(3)],
    "Muon λ=0.1": [record(20, 10, 3.2 + s / 10, s) for s in range(3)],
    "Muon λ=0.1, Q and K": [record(20, 20, 3.1 + s / 10, s) for s in range(2)],
    "MuonClip λ=0": [record(40, 10, 3.0 + s / 10, s, threshold=30.0) for s in range(2)],
}


def test_decay_is_compared_with_none_and_q_and_k_with_all():
    rows = report.differences(RUNS).splitlines()[2:]
    labels = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert labels == [
        "Muon λ=0.1 less Muon λ=0",
        "Muon λ=0.1, Q and K less Muon λ=0",
        "Muon λ=0.1, Q and K less Muon λ=0.1",
        "MuonClip λ=0 less Muon λ=0",
    ]
    assert "+0.200 [+0.200, +0.200] (3 seeds)" in rows[0] and "| -0.3" in rows[0]
    assert "-0.100 [-0.100, -0.100] (2 seeds)" in rows[2]


def test_turning_is_of_fifths_that_no_value_chose():
    rows = report.turning(RUNS).splitlines()[2:]
    assert "no difference told" in rows[0] and "| -0.197 [" in rows[1]
    assert rows[0].endswith("|  |")  # nothing is clipped
    # Above 30 of 40 in the third fifth, below it in the last.
    assert "-100.0 [-100.0, -100.0] (2 seeds)" in rows[3]


def test_growth_is_told_with_its_spread_and_its_distance_from_linear(tmp_path):
    rows = report.growth_table({"Muon λ=0": RUNS["Muon λ=0"]}).splitlines()[2:]
    assert len(rows) == 1 and rows[0].count("(3 seeds)") == 2
    found = report.fit(RUNS["Muon λ=0"][0], 0.9)
    assert found.power > 1  # it rises linearly by steps, of a rate that falls
    assert report.norm_product(RUNS["Muon λ=0"][0]).tolist() == [1, 6]
    text = report.report(RUNS, None, tmp_path)
    assert (tmp_path / "curves.png").exists() and "Muon λ=0.1, Q and K" in text
