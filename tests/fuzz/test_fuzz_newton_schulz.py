"""Newton–Schulz on any shape, spectrum, schedule, method and dtype: in bounds and in direction."""

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax import schedules
from muonclip_jax._orthogonalize.orthogonalize import orthogonalize
from tests.fuzz.draws import cases, choose
from tests.orthogonalize.test_orthogonalize import (
    as_taken,
    normalized_svd,
    tolerance,
    with_spectrum,
)

MATRICES = 32


def draw_schedule(rng):
    steps = int(rng.integers(3, 9))
    lower = float(10 ** rng.uniform(-4, -1.5))
    return choose(
        rng,
        [
            schedules.polar_express(5),
            schedules.polar_express(steps),
            schedules.polar_express(steps, lower=lower),
            schedules.cubic(steps, lower=lower),
            schedules.jordan(),
            schedules.you(),
            schedules.cans(),
            schedules.aol(),
            schedules.deepseek_v4(),
        ],
    )


def draw_spectra(rng, rows):
    """`[matrices, rows]`, each spectrum of another kind."""
    shape = (MATRICES, rows)
    kinds = [
        10 ** rng.uniform(-4, 0, shape),
        np.exp(rng.normal(size=shape) * rng.uniform(0.1, 2)),
        np.where(rng.random(shape) < 0.5, 1.0, 2.0 ** -rng.integers(4, 12)),
        np.where(np.arange(rows) == 0, 1.0, 10 ** rng.uniform(-4, -1, shape)),
        1.0 / (1 + np.arange(rows)) ** rng.uniform(0.3, 2, (MATRICES, 1)),
        np.where(np.arange(rows) < max(1, rows // 2), rng.uniform(0.5, 1, shape), 0.0),
    ]
    return kinds[rng.integers(len(kinds))]


def top(schedule):
    """The largest value of the exact polynomial on [0, 1]."""
    return float(schedule.apply(np.linspace(0, 1, 20_001)).max())


@cases(few=8)
def test_newton_schulz_in_bounds_and_direction(rng):
    rows = choose(rng, [1, 2, 4, 6, 9, 16])
    columns = rows * choose(rng, [1, 2, 3]) + choose(rng, [0, 1, 5])
    schedule, method = draw_schedule(rng), choose(rng, ["auto", "standard", "gram"])
    dtype = choose(rng, ["bfloat16", "bfloat16", "float16", "float32", "float64"])
    x = with_spectrum(draw_spectra(rng, rows), columns, seed=int(rng.integers(2**31)))
    x = x * 10 ** rng.uniform(-3, 3, (MATRICES, 1, 1))
    if rng.random() < 0.3:
        x = x.swapaxes(-1, -2)
    with jax.enable_x64(dtype == "float64"):
        given = jnp.asarray(x, "float64" if dtype == "float64" else "float32")
        out = np.asarray(orthogonalize(given, schedule, dtype=dtype, method=method), np.float64)
    sigma = np.linalg.svd(out, compute_uv=False)
    # No schedule ends more than 0.1 above the top of its own exact polynomial
    # (docs/explanation/schedules.md).
    assert sigma.max() <= top(schedule) + 0.1
    check_direction(np.asarray(given, np.float64), out, schedule, method, dtype)


def check_direction(x, out, schedule, method, dtype):
    """Along each matrix's own singular vectors: p(σ), where σ is not lost in rounding."""
    if x.shape[-2] > x.shape[-1]:
        x, out = x.swapaxes(-1, -2), out.swapaxes(-1, -2)
    u, sigma, vt = normalized_svd(x, schedule)
    along = np.einsum("...ij,...ik,...jk->...k", out, u, vt.swapaxes(-1, -2))
    bits = jnp.finfo(dtype).bits
    if bits > 16:
        wanted = as_taken(schedule, method, dtype).apply(sigma)
        for i in range(len(x)):
            allowed = 30 * tolerance(x[i], schedule, dtype)  # Gram matrices, and the SVD's own
            assert np.abs(along[i] - wanted[i]).max() <= allowed
    else:
        # Rounding moves σ by about eps of the largest; what is well above it is not turned around.
        large = smallest_share(sigma, schedule) > 32 * float(jnp.finfo(dtype).eps)
        assert along[large].min(initial=1) > 0


def smallest_share(sigma, schedule):
    """Of each singular value, before any step, its smallest share of the matrix's largest. (The
    first step of `cans` takes 0.83 to 0.01, and rounding to either side of 0.)"""
    share = np.ones_like(sigma)
    for a, b, c in schedule.coefficients:
        share = np.minimum(share, sigma / sigma.max(-1, keepdims=True))
        sigma = np.abs(a * sigma + b * sigma**3 + c * sigma**5)
    return share
