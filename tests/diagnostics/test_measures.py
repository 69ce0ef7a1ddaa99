"""Measures of matrices against NumPy's SVD in float64."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import muonclip_jax as mc
from muonclip_jax._diagnostics.measures import factored

SPECTRA = {
    "flat": np.ones(8),
    "1/k": 1 / np.arange(1, 9),
    "exponential": np.exp(-np.arange(8.0)),
    "to 1e-7": 10.0 ** -np.arange(8),
    "rank one": np.eye(8)[0] * 3,
    "rank deficient": np.maximum(np.arange(5, -3, -1), 0),
    "clustered": [1, 1, 1, 1 - 1e-4, 0.5, 0.5, 0.5, 0.5],
    "huge": 1e30 * np.arange(1, 9),
    "tiny": 1e-30 * np.arange(1, 9),
    "zero": np.zeros(8),
}
SHAPES = [(12, 8), (8, 12), (8, 8)]


def with_spectra(spectra, n, m, seed=0):
    rng = np.random.default_rng(seed)
    spectra = np.asarray(spectra, np.float64)
    k = spectra.shape[-1]
    u, v = (np.linalg.qr(rng.normal(size=(len(spectra), side, k)))[0] for side in (n, m))
    return ((u * spectra[:, None]) @ v.mT).astype(np.float32)


def entropy_rank(values, gamma):
    p = values**gamma / (values**gamma).sum()
    return np.exp(-sum(x * np.log(x) for x in p if x > 0))


# Of the singular values of a matrix other than zero.
REFERENCE = {
    "spectral_norm": lambda s: s[0],
    "participation_ratio": lambda s: s.sum() ** 2 / (s**2).sum(),
    "eigenvalue_participation_ratio": lambda s: (s**2).sum() ** 2 / (s**4).sum(),
    "effective_rank": lambda s: entropy_rank(s, 1),
    "stable_rank": lambda s: (s**2).sum() / s[0] ** 2,
    "nuclear_rank": lambda s: s.sum() / s[0],
}
every_measure = pytest.mark.parametrize("name", REFERENCE)


def expected(reference, x):
    spectra = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    return np.array([reference(s) if s[0] else 0 for s in spectra])


# Each of 8 singular values is off by a few float32 roundings of the largest, at most 5e-7 of it.
# A rank adds up eight of these; in an entropy one that should be zero counts 16 times, by its log.
RTOL = 5e-5


@pytest.mark.parametrize(("n", "m"), SHAPES)
@every_measure
def test_against_svd_in_float64(name, n, m):
    x = with_spectra(list(SPECTRA.values()), n, m)
    found = getattr(mc, name)(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected(REFERENCE[name], x), rtol=RTOL, err_msg=name)


@pytest.mark.parametrize("gamma", [0.5, 1, 2, 3])
def test_effective_rank_of_any_power(gamma):
    x = with_spectra(list(SPECTRA.values()), 12, 8)
    reference = lambda s: entropy_rank(s / s[0], gamma)  # noqa: E731
    # A root makes more of what should be zero: 5e-7 of the largest counts as 7e-4 of it.
    rtol = RTOL if gamma >= 1 else 0.05
    np.testing.assert_allclose(mc.effective_rank(x, gamma), expected(reference, x), rtol=rtol)


@pytest.mark.parametrize(("n", "m"), [*SHAPES, (1, 8), (8, 1), (1, 1)])
def test_singular_values(n, m):
    k = min(n, m)
    x = with_spectra([spectrum[:k] for spectrum in SPECTRA.values()], n, m)
    found = mc.singular_values(x)
    chex.assert_shape(found, (len(SPECTRA), k))
    exact = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    # Relative to the largest, see RTOL; a Gram matrix in float32 would be off by 3e-4 of it.
    assert (np.abs(found - exact) <= 1e-6 * exact[:, :1]).all()


@every_measure
def test_vectors(name):
    x = np.array([[3.0, 4, 0, 0]], np.float32)
    # float32 roundings of a norm of four numbers
    wanted = 5 if name == "spectral_norm" else 1
    np.testing.assert_allclose(getattr(mc, name)(x), wanted, rtol=1e-6)
    np.testing.assert_allclose(getattr(mc, name)(x.T), wanted, rtol=1e-6)


class CommonTest(chex.TestCase):
    @chex.variants(without_jit=True)
    def test_what_is_not_finite_stays_in_its_matrix(self):
        x = with_spectra([SPECTRA["1/k"]] * 4, 12, 8)
        x[1, 3, 3], x[2, 0, 0], x[3, :] = np.nan, -np.inf, 0
        for name, reference in REFERENCE.items():
            found = self.variant(getattr(mc, name))(x)
            np.testing.assert_array_equal(np.isnan(found), [False, True, True, False])
            np.testing.assert_allclose(found[:1], expected(reference, x[:1]), rtol=RTOL)
            assert found[3] == 0
        chex.assert_trees_all_equal(jnp.isnan(mc.singular_values(x)).all(-1), jnp.isnan(found))


@pytest.mark.slow
def test_dtypes_and_batches():
    """Of one measure: all share the spectrum."""
    measure, reference = mc.effective_rank, REFERENCE["effective_rank"]
    x = with_spectra([SPECTRA["1/k"]] * 6, 12, 8).reshape(2, 3, 12, 8)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
        rounded = jnp.asarray(x, dtype)
        # The same rounded numbers in float32: computed alike.
        chex.assert_trees_all_equal(measure(rounded), measure(rounded.astype(jnp.float32)))
        chex.assert_shape(measure(rounded), (2, 3))
    with jax.enable_x64(True):
        found = measure(x[0].astype(np.float64))
        assert found.dtype == jnp.float64
        # float64 roundings, see RTOL
        np.testing.assert_allclose(found, expected(reference, x[0]), rtol=1e-12)


def test_traced_once_and_batched_by_vmap():
    measure = jax.jit(chex.assert_max_traces(mc.effective_rank, n=1))
    x = with_spectra([SPECTRA["1/k"]] * 3, 12, 8)
    chex.assert_trees_all_equal(measure(x), measure(2 * x / 2))
    # Another batch may be summed in another order.
    chex.assert_trees_all_close(jax.vmap(mc.effective_rank)(x), measure(x), rtol=1e-6)


@pytest.mark.slow
@given(st.lists(st.integers(0, 1000), min_size=8, max_size=8).filter(any), st.integers(0, 99))
@settings(max_examples=15)
def test_ranks_in_their_order(spectrum, seed):
    """Hölder's inequality, and Rényi's entropies fall with their order."""
    x = with_spectra([spectrum], 12, 8, seed)
    ranks = [
        *(1.0, mc.stable_rank(x), mc.nuclear_rank(x), mc.participation_ratio(x)),
        *(mc.effective_rank(x), np.count_nonzero(spectrum)),
    ]
    # A little more than the rank, see RTOL.
    assert all(low <= high * (1 + RTOL) for low, high in itertools.pairwise(ranks)), ranks
    energies = [1.0, mc.eigenvalue_participation_ratio(x), mc.effective_rank(x, 2), ranks[4]]
    assert all(low <= high * (1 + RTOL) for low, high in itertools.pairwise(energies))


@pytest.mark.parametrize("rows", [12, 5])  # longer than wide, wider than long
def test_factored_keeps_products_of_columns(rows):
    a = with_spectra([SPECTRA["1/k"], SPECTRA["huge"]], 20, 8, 1)
    b = with_spectra([SPECTRA["1/k"][: min(rows, 8)]] * 2, rows, 8, 2)
    (r_a, scale_a), (r_b, scale_b) = factored(a), factored(b)
    wanted = np.linalg.svd(np.float64(a) @ np.float64(b).mT, compute_uv=False)[:, : min(rows, 8)]
    product = np.float64(r_a) @ np.float64(r_b).mT * np.float64(scale_a * scale_b)[..., None]
    found = np.linalg.svd(product, compute_uv=False)
    # Two QRs in float32, see `test_singular_values`.
    assert (np.abs(found - wanted) <= 2e-6 * wanted[:, :1]).all()


@pytest.mark.parametrize(
    ("error", "x", "words"),
    [
        (TypeError, np.ones((2, 2), int), "x is int.*cast it to a float dtype"),
        (TypeError, np.ones((2, 2), np.complex64), "x is complex64"),
        (ValueError, np.ones(3, np.float32), r"x has shape \(3,\)"),
        (ValueError, np.ones((3, 0), np.float32), r"x has shape \(3, 0\).*no axis of length zero"),
    ],
)
@pytest.mark.parametrize("name", [*REFERENCE, "singular_values"])
def test_refuses(name, error, x, words):
    with pytest.raises(error, match=f"^{name}: {words}"):
        getattr(mc, name)(x)


@pytest.mark.parametrize(
    ("error", "gamma"), [(ValueError, 0), (ValueError, -1), (ValueError, np.inf), (TypeError, "2")]
)
def test_effective_rank_refuses(error, gamma):
    with pytest.raises(error, match="effective_rank: gamma must be"):
        mc.effective_rank(np.ones((2, 2), np.float32), gamma)


@pytest.mark.slow
def test_a_program_with_many_batches_ends():
    """On CPUs of few cores JAX 0.10 does not end some that hand whole batches to LAPACK."""
    x = [jax.random.normal(jax.random.key(i), (4, 128, 32)) for i in range(12)]
    norms = jax.jit(lambda x: [mc.spectral_norm(each) for each in x])
    for _ in range(5):
        chex.assert_trees_all_close(
            norms(x), [np.linalg.norm(each, 2, axis=(-2, -1)) for each in x], rtol=1e-5
        )
