"""Steps with c = 0: the square of the Gram matrix is left out of the program, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from benchmarks.compiled import dots, flops
from muonclip_jax._orthogonalize.schedules import Schedule
from tests.orthogonalize.test_orthogonalize import (
    as_taken,
    reference,
    tolerance,
    with_spectrum,
)

# Growth by quintics, convergence by cubics, and one of each by turns.
SOME = Schedule("some", ((2.0, -1.5, 0.5),) * 2 + ((1.5, -0.5, 0.0),) * 3, lower=0.1)
BY_TURNS = Schedule("by turns", ((1.5, -0.5, 0.0), (2.0, -1.5, 0.5)) * 3, lower=0.1)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("schedule", [mc.schedules.cubic(), SOME, BY_TURNS], ids=lambda s: s.name)
def test_the_result_is_the_scalar_recursion(schedule, method):
    x = with_spectrum(np.geomspace(1, 0.15, 8), columns=12)
    for dtype in ("float64", "bfloat16"):
        with jax.enable_x64(dtype == "float64"):
            x = jnp.asarray(x, dtype)
            out = mc.orthogonalize(x, schedule, dtype=None, method=method)
            wanted = reference(x, as_taken(schedule, method, dtype))
            error = np.linalg.norm(np.asarray(out, np.float64) - wanted, 2)
        # On Gram matrices the errors of two or three steps add up before a restart.
        assert error < tolerance(x, schedule, dtype) * (1 if method == "standard" else 3), dtype


def multiplied(schedule, shape, method):
    """FLOPs of the compiled program's products, in n³."""
    run = jax.jit(lambda x: mc.orthogonalize(x, schedule, method=method, dtype="float32"))
    return flops(dots(run.lower(jnp.zeros(shape)).compile())) / min(shape) ** 3


def quintic(steps, like):
    """As many quintics as there are steps, restarted where these are."""
    return Schedule("quintic", tuple((a, b, 1e-9) for a, b, _ in like.coefficients[:steps]))


@pytest.mark.parametrize("wide", [1, 4])
@pytest.mark.parametrize("iteration", ["standard", "gram"])
def test_each_cubic_step_takes_2n3_less(iteration, wide):
    shape, method = (64, 64 * wide), mc.Method(iteration)
    cubic = mc.schedules.cubic(8)
    saved = multiplied(quintic(8, cubic), shape, method) - multiplied(cubic, shape, method)
    assert saved == 8 * 2
    assert multiplied(SOME, shape, method) == multiplied(quintic(5, SOME), shape, method) - 3 * 2


def test_half_of_it_where_products_are_cut():
    """Of symmetric products 3/4 is computed if they are cut once."""
    method, cubic = mc.Method("standard", smallest_block=32), mc.schedules.cubic(8)
    saved = multiplied(quintic(8, cubic), (64, 64), method) - multiplied(cubic, (64, 64), method)
    assert saved == 8 * 2 * 0.75


def test_what_the_documentation_says_of_costs():
    """docs/explanation/schedules.md: FLOPs in n³ by shape, standard and by "gram"."""
    every = (
        mc.schedules.polar_express(5),
        mc.schedules.cubic(),
        mc.schedules.cubic(7),
        mc.schedules.polar_express(4, lower=5e-3),
        mc.schedules.cubic(6, lower=5e-3),
        mc.schedules.cubic(5, lower=2e-2),
    )
    square = [multiplied(s, (64, 64), mc.Method("standard")) for s in every]
    assert square == [30, 32, 28, 24, 24, 20]
    wide = [multiplied(s, (64, 256), mc.Method("gram")) for s in every]
    assert wide == [70, 88, 82, 62, 66, 60]
