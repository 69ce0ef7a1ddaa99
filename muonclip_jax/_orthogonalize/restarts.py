"""Where the Gram iteration restarts: which of a schedule's steps it takes together."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp

from muonclip_jax._orthogonalize.schedules import Schedule, Step, widen


class _Limits(NamedTuple):
    """Of the steps between restarts: how many, and how much they may make small σ grow."""

    steps: int
    growth: float


# Found by `benchmarks.largest_singular_values` in bfloat16. X is exact before the first steps,
# rounded before the others, and nothing makes good the rounding of the last.
_FIRST = _Limits(2, 36.0)
_LATER = _Limits(2, 18.0)
_LAST = _Limits(2, 6.0)
# X is made smaller by it at every restart.
_MARGIN = {"bfloat16": 1.2, "float16": 1.03, "float32": 1.0, "float64": 1.0}


def steps_between_restarts(schedule: Schedule, dtype: jnp.dtype) -> list[tuple[Step, ...]]:
    """The schedule's steps as the Gram iteration takes them in `dtype`, by restart.

    At every restart but the first X is made smaller by a margin, so that rounding cannot take
    singular values beyond the interval that the steps are made for: 20% in bfloat16, 3% in float16.
    Small ones grow less by as much.
    """
    margin = _MARGIN[jnp.dtype(dtype).name]
    found: list[tuple[Step, ...]] = []
    for number, step in enumerate(schedule.coefficients, start=1):
        limits = _FIRST if len(found) < 2 else _LATER
        if number == len(schedule.coefficients):
            limits = _LAST
        longer = (*found[-1], step) if found else ()
        growth = math.prod(a for a, _, _ in longer)
        if longer and len(longer) <= limits.steps and growth <= limits.growth:
            found[-1] = longer
        else:
            found.append((widen(step, margin if found else 1.0),))
    return found


def with_margins(schedule: Schedule, dtype: jnp.dtype) -> Schedule:
    """The steps of `steps_between_restarts`, as a schedule for the standard iteration."""
    steps = steps_between_restarts(schedule, dtype)
    return dataclasses.replace(schedule, coefficients=tuple(itertools.chain(*steps)))
