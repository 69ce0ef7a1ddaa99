"""Matrices of few rows, where rounding errors do not average out, in the Gram iteration."""

import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from benchmarks import largest_singular_values as search
from muonclip_jax._orthogonalize import lean

X = np.array(
    [
        [
            0.03345,
            -0.1138,
            0.02551,
            -0.1523,
            -0.1147,
            -0.3711,
            0.3496,
            -0.1787,
            0.01819,
            0.1836,
            -1.0,
            -0.007111,
        ],
        [
            -0.7773,
            -0.1748,
            0.209,
            0.6953,
            0.05493,
            0.0564,
            -0.2295,
            1.258e-05,
            -0.3496,
            -0.2334,
            -0.1816,
            -0.3184,
        ],
        [
            -0.9492,
            -0.1719,
            0.1924,
            0.8281,
            0.2109,
            0.02979,
            -0.1699,
            -0.06201,
            -0.4922,
            -0.3223,
            -0.5625,
            -0.5312,
        ],
        [
            0.1709,
            0.1079,
            2.468e-05,
            -0.1797,
            0.2314,
            -0.05542,
            0.2207,
            8.233e-07,
            -0.03113,
            9.203e-05,
            -0.4746,
            8.154e-05,
        ],
        [
            0.6328,
            0.498,
            -0.582,
            -0.5547,
            0.875,
            0.1406,
            0.4668,
            0.5625,
            -0.07178,
            -0.1875,
            -0.6758,
            -0.5352,
        ],
        [
            0.418,
            0.3945,
            -0.3496,
            -0.2344,
            0.5391,
            0.4609,
            -0.106,
            0.4805,
            0.008179,
            -0.2441,
            0.7891,
            -0.1855,
        ],
    ]
)
Y = np.array(
    [
        [0.32812, -0.48047, 0.11914, -0.33203, -1.0, 0.29883],
        [0.24609, -0.02771, -0.38672, 0.049561, 0.59766, -0.18555],
        [0.59375, -0.42773, -0.41602, -0.21387, -0.027466, 0.0036011],
    ]
)


def largest(x, **options):
    out = np.asarray(mc.orthogonalize(x, **options), np.float64)
    return np.linalg.norm(out, 2) if np.isfinite(out).all() else np.inf


def with_spectrum(rng, sigma, n, m):
    u = np.linalg.qr(rng.standard_normal((len(sigma), n, n)))[0]
    v = np.linalg.qr(rng.standard_normal((len(sigma), m, n)))[0]
    return jnp.asarray((u * sigma[:, None]) @ v.swapaxes(-1, -2), jnp.float32)


@pytest.mark.parametrize("steps", [5, 6, 7, 8, 10])
@pytest.mark.parametrize("method", ["auto", "gram"])
def test_an_ordinary_matrix_of_six_rows(steps, method):
    """It ended at 2.1 (5 steps), 50 (7), 1e8 (8) and infinity (10)."""
    x = jnp.asarray(X, jnp.bfloat16).astype(jnp.float32)
    schedule = mc.schedules.polar_express(steps, lower=2e-3)
    assert largest(x, schedule=schedule, method=method) < schedule.top + 0.02


@pytest.mark.parametrize("method", ["auto", "gram", mc.Method("gram", smallest_block=1)])
def test_the_default_on_three_rows(method):
    """It ended at 1.47; with products cut in halves, at up to 2.4."""
    assert largest(jnp.asarray(Y, jnp.bfloat16).astype(jnp.float32), method=method) < 1.03


@pytest.mark.parametrize("method", ["auto", "gram"])
@pytest.mark.parametrize("small", [2.0**-8, 2.0**-6, 0.0])
def test_half_of_the_singular_values_small(small, method):
    """Ones and 2⁻⁸ at [8, 64]: 0.7% ended above 1.22."""
    sigma = np.where(np.arange(8) < 4, 1.0, small) * np.ones((500, 1))
    out = np.asarray(
        mc.orthogonalize(with_spectrum(np.random.default_rng(0), sigma, 8, 64), method=method)
    )
    assert np.linalg.norm(out, 2, axis=(-2, -1)).max() < 1.03


@pytest.mark.parametrize("method", ["auto", "gram"])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1e-2])
def test_momentum_of_rank_one_keeps_its_one_singular_value(noise, method):
    """In few rows it fell to 0.5."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 4, 1)) * rng.standard_normal((200, 1, 12))
    x = x + noise * rng.standard_normal(x.shape)
    out = np.asarray(mc.orthogonalize(jnp.asarray(x, jnp.float32), method=method), np.float64)
    top = np.linalg.norm(out, 2, axis=(-2, -1))
    assert top.min() > 0.93 and top.max() < 1.03


@pytest.mark.parametrize(
    ("schedule", "dtype"),
    [
        ("polar_express(5, lower=0.003)", "bfloat16"),
        pytest.param("polar_express(8, lower=0.002)", "bfloat16", marks=pytest.mark.slow),
        pytest.param("polar_express(6, lower=1e-05)", "bfloat16", marks=pytest.mark.slow),
        pytest.param("polar_express(6, lower=0.003)", "bfloat16", marks=pytest.mark.slow),
        pytest.param("polar_express(5, lower=0.002)", "float16", marks=pytest.mark.slow),
        pytest.param("aol(safety=1.01)", "bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", ["standard", "gram", "lean standard", "lean gram"])
def test_no_matrix_is_found_that_ends_far_above_the_exact_polynomial(
    schedule, dtype, method, monkeypatch
):
    """A short search, at random and by climbing. docs/explanation/schedules.md has a long one."""
    for limit in ("_MANY", "_LARGE"):  # GPUs' forms for many and for large matrices
        monkeypatch.setattr(lean, limit, 1)
    options = search.Options(shapes=((3, 6), (8, 16)), count=100, generations=8, inside=(8, 16))
    row = search.search(search.SCHEDULES[schedule], method, dtype, options)
    assert max(row["random"], row["climbed"]) <= row["allowed"]
    assert row["matrices"] > 5000 and row["random"] > row["exact"] - 0.1  # it comes near


def test_the_search_finds_what_is_wrong():
    """Without margin for rounding, some of these matrices end far out."""
    x = search.matrices(np.random.default_rng(0), 100, 3, 6)
    unsafe = mc.schedules.aol(safety=1)
    with pytest.raises(ValueError, match=r"aol.*no margin.*bfloat16.*σ can end at 1\.2\d+, where"):
        mc.NewtonSchulz(unsafe)
    exact = search.tops(x, (3, 6), unsafe, "standard", "float32")
    expected = [largest(jnp.asarray(one), schedule=unsafe, dtype="float32") for one in x[:20]]
    # A norm of the 128th power of three singular values, and what float32 rounds.
    np.testing.assert_allclose(exact[:20], expected, rtol=0.01)
    assert (exact[:20] >= np.asarray(expected) * (1 - 1e-5)).all()
