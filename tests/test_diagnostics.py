"""Diagnostics against SVD in float64 NumPy."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc


def with_spectrum(values, n=12, m=8, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(k, m)))[0] for k in (n, m))
    return (u * np.asarray(values)) @ v.T


SPECTRA = {
    "flat": np.ones(8),
    "rank one": [3, 0, 0, 0, 0, 0, 0, 0],
    "rank deficient": [5, 4, 3, 2, 1, 0, 0, 0],
    "geometric": 10.0 ** -np.arange(8),
    "huge": 1e30 * np.arange(1, 9),
    "tiny": 1e-30 * np.arange(1, 9),
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_participation_ratios(spectrum):
    x = with_spectrum(spectrum)
    sigma = np.asarray(spectrum, np.float64)
    expected = sigma.sum() ** 2 / (sigma**2).sum()
    of_eigenvalues = (sigma**2).sum() ** 2 / (sigma**4).sum()
    # float32 SVD: each σ to about 1e-6 of the largest, eight of them.
    np.testing.assert_allclose(mc.participation_ratio(jnp.float32(x)), expected, rtol=2e-5)
    np.testing.assert_allclose(
        mc.eigenvalue_participation_ratio(jnp.float32(x)), of_eigenvalues, rtol=2e-5
    )


class BatchTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_batches_dtypes_and_zero(self):
        x = jnp.stack([jnp.zeros((12, 8)), jnp.eye(12, 8), 7 * jnp.ones((12, 8))])
        for dtype in (jnp.float32, jnp.bfloat16):
            ratios = self.variant(mc.participation_ratio)(x[None].astype(dtype))
            chex.assert_shape(ratios, (1, 3))
            # ones has σ of 1e-6 of the largest seven times over: float32 rounding.
            np.testing.assert_allclose(ratios[0], [0, 8, 1], atol=1e-4)

    def test_nan_stays_visible(self):
        assert jnp.isnan(mc.participation_ratio(jnp.full((3, 3), jnp.nan)))
