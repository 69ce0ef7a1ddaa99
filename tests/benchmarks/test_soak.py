"""The soak in short: what it holds over 5,000 steps it holds over 200, and it tells what is not."""

import dataclasses
import os
import subprocess
import sys

from benchmarks import soak


def test_nothing_grows_over_200_steps():
    found = soak.soak(200)
    assert not found.broken()
    # The clip holds what Muon alone does not: its max logits overshoot by one step's growth.
    assert found.peak < soak.FAR / soak.THRESHOLD


def test_muon_alone_diverges():
    """Compiled as users compile: in which step it does depends on the rounding."""
    code = "from benchmarks import soak; print(*soak.steps_until_divergence(500))"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    steps, peak = run.stdout.split()
    assert steps != "None" and not float(peak) < soak.FAR


def test_what_is_not_held_is_told():
    good = soak.Figures(
        steps=200, live=[7] * 6, resident=[100.0] * 6, compiled=1, clipped=5, gamma=(0.5, 1.0),
        peak=1.5, losses=(4.0, 2.0), finite=True,
    )  # fmt: skip
    assert not good.broken()
    changes = [
        ({"live": [7, 7, 7, 7, 7, 8]}, "live arrays"),
        ({"resident": [100.0, 100, 100, 110, 120, 130]}, "memory is flat .it grew by 20"),
        ({"compiled": 2}, "one program"),
        ({"finite": False}, "finite"),
        ({"gamma": (0.0, 1.0)}, "γ is in"),
        ({"gamma": (0.5, float("nan"))}, "γ is in"),
        ({"clipped": 0}, "heads are clipped"),
    ]
    for change, words in changes:
        (told,) = dataclasses.replace(good, **change).broken()
        assert words.split(" .")[0] in told
