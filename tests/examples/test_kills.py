"""One run, killed again and again, half of the times inside a save: it ends as if it never was.

`make kills` does so more often. The moments are drawn from a seed.
"""

import os
import random
import signal
import subprocess
import sys

import chex
import jax
import pytest

from examples.mla import metrics
from examples.mla.checkpoint import Checkpoints

from .test_train import numbers, state

KILLS = int(os.environ.get("KILLS", "4"))
STEPS = 8 * KILLS  # a run that is resumed gets at most 8 further before it is killed
SAVE_EVERY = 3
CALLS = 150_000  # that Python makes in a save, measured; a few more or less do no harm
SECONDS = 0.1  # of ten steps or so

pytestmark = [pytest.mark.slow, pytest.mark.kills]


def python(*args):
    """A process of its own, with one device; returns its exit status and what it said."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def planned(rng, place, step):
    """Where a run that goes on from `step` is killed: after its next loss is recorded."""
    if place == "save":
        return step + SAVE_EVERY * rng.randint(1, 2), rng.randrange(CALLS)
    return step + rng.randint(2, 8), rng.uniform(0, SECONDS)


def test_a_run_that_is_killed_again_and_again_loses_nothing(flags, tmp_path, record_property):
    changed = {"steps": STEPS, "save_every": SAVE_EVERY}
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    status, said = python("examples.mla.train", *flags(whole, **changed))
    assert status == 0, said
    expected = numbers(whole)

    rng = random.Random(0)
    places = ["save", "training"] * (KILLS // 2)
    rng.shuffle(places)
    saved, unfinished = 0, 0
    for place in places:
        step, moment = planned(rng, place, max(saved, SAVE_EVERY))
        arguments = ["--resume", "--run-dir", run_dir] if saved else flags(run_dir, **changed)
        killed = place, step, moment, *arguments
        status, said = python("tests.examples.killed", *killed)
        assert status == -signal.SIGKILL, (killed, said)

        found = numbers(run_dir)
        assert found == expected[: len(found)], killed
        assert metrics.select(found, "step")[-1]["step"] > saved, killed  # the next loss is there
        unfinished += any("tmp" in name for name in os.listdir(run_dir / "checkpoints"))
        before, saved = saved, Checkpoints.existing(run_dir).latest
        assert saved >= before, killed

    status, said = python("examples.mla.train", "--resume", "--run-dir", run_dir)
    assert status == 0, said
    assert numbers(run_dir) == expected
    chex.assert_trees_all_equal(state(run_dir, STEPS), state(whole, STEPS))
    print(f"{KILLS} kills, {places.count('save')} in a save, {unfinished} saves left unfinished")
    record_property("kills", KILLS)
