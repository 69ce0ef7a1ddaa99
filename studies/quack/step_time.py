"""What a training step takes with each method, the methods taking turns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import interleaved, medians
from studies.common.study import Grid
from studies.common.training import Plan, Setting, start, take_steps

REPEATS = 9
COMPARED = ("none", "QK-norm", "QuacK")


def step_time(grid: Grid) -> dict[str, Any]:
    """Seconds a step, the median of `REPEATS` turns, of those of `COMPARED` that the grid has; all
    at its first learning rate."""
    functions = {}
    for label, setting in grid.settings.items():
        method, _ = label.rsplit(", ", 1)
        if method.split(", ")[1] in COMPARED and method not in functions:
            functions[method] = stepper(setting, grid.plan)
    steps = grid.plan.measure_every
    found = {m: s / steps for m, s in medians(interleaved(functions, REPEATS)).items()}
    return {"repeats": REPEATS, "steps_a_turn": steps, "seconds_a_step": found}


def stepper(setting: Setting, plan: Plan) -> Callable[[], jax.Array]:
    """A function that trains on, by as many steps as there are between measurements."""
    model, optimizer = setting
    shape = plan.measure_every, plan.batch, plan.context + 1
    tokens = np.random.default_rng(0).integers(model.vocab_size, size=shape)
    batches = jnp.asarray(tokens, jnp.int32)
    probe = batches[0, :1]
    state = start(model, optimizer, 0, probe)

    def step() -> jax.Array:
        nonlocal state
        state, curves = take_steps(model, optimizer, state, batches, probe)
        return curves["loss"]

    return step
