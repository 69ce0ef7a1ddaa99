"""Cases drawn at random: a few in the suite, as many as a time allows under `make fuzz`.

    make fuzz SECONDS=600 SEED=1000     each property for ten minutes, from seed 1000 on

A failure names its seed: `make fuzz SECONDS=1 SEED=<it>` runs that case first.
"""

import functools
import itertools
import os
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
FEW = 25  # after so many cases, what was compiled for them is released

Check = Callable[[np.random.Generator], None]


def cases(few: int) -> Callable[[Check], Callable[[], None]]:
    """Makes a test of a check of one case: `few` seeds, or SECONDS if that is more."""

    def decorate(check: Check) -> Callable[[], None]:
        @pytest.mark.fuzz
        @functools.wraps(check)
        def test() -> None:
            end = time.monotonic() + SECONDS
            for count in itertools.count(1):
                seed = SEED + count - 1
                try:
                    check(np.random.default_rng(seed))
                except BaseException as error:
                    error.add_note(f"Seed {seed}: make fuzz SECONDS=1 SEED={seed}")
                    raise
                if count >= few and time.monotonic() > end:
                    break
                if count % FEW == 0:
                    jax.clear_caches()
            print(f"{check.__name__}: {count} cases, seeds {SEED} to {seed}")

        del test.__wrapped__  # pytest would look for a fixture called rng
        return test

    return decorate


def choose(rng: np.random.Generator, options):
    """One of the options, whatever they are."""
    options = list(options)
    return options[rng.integers(len(options))]
