"""The gradient of `orthogonalize` is msign's only where the schedule converges.

That it is the polynomial's, test_orthogonalize.py says.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc

SIDE = 5


def matrices(seed):
    """A matrix and the cotangent of its polar factor."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(SIDE, SIDE)), rng.normal(size=(SIDE, SIDE))


def gradient_of_msign(m, cotangent):
    """Of U Vᵀ: with A = (M Mᵀ)^½ and S = sym(A⁻¹ G Oᵀ), Y from A Y + Y A = S; A⁻¹ G − 2 Y M."""
    u, s, vt = np.linalg.svd(m)
    inverse = (u / s) @ u.T
    symmetric = inverse @ cotangent @ (u @ vt).T
    symmetric = (symmetric + symmetric.T) / 2
    y = u @ ((u.T @ symmetric @ u) / (s[:, None] + s)) @ u.T
    return inverse @ cotangent - 2 * y @ m


def differences(fn, m, step):
    """Central differences of a function of a matrix."""
    found = np.zeros_like(m)
    for index in np.ndindex(*m.shape):
        change = np.zeros_like(m)
        change[index] = step
        found[index] = (fn(m + change) - fn(m - change)) / (2 * step)
    return found


def gradient(m, cotangent, schedule, dtype):
    def product(m):
        return jnp.sum(cotangent.astype(m.dtype) * mc.orthogonalize(m, schedule, dtype=dtype))

    return np.asarray(jax.grad(product)(jnp.asarray(m, dtype)), np.float64)


def distance(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_msigns_only_with_a_schedule_that_converges(seed):
    m, cotangent = matrices(seed)
    exact = gradient_of_msign(m, cotangent)

    def product(m):
        u, _, vt = np.linalg.svd(m)
        return np.sum(cotangent * (u @ vt))

    # Central differences err by step², and by rounding over the step.
    assert distance(differences(product, m, 1e-6), exact) < 1e-7
    converged = gradient(m, cotangent, mc.schedules.polar_express(12), "float32")
    assert distance(converged, exact) < 1e-5  # float32 rounding; 2e-6 at most was met
    default = gradient(m, cotangent, mc.schedules.polar_express(), "float32")
    assert 0.05 < distance(default, exact) < 0.7
