"""The kernel for TPUs, by Pallas's interpreter; tests/tpu compiles it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from muonclip_jax._orthogonalize import symmetric_tpu

# What is in no matrix is NaN, so that nothing of it can be in the result unnoticed.
NAN_OUTSIDE = pltpu.InterpretParams(uninitialized_memory="nan")
slow = pytest.mark.slow


@pytest.fixture
def product(monkeypatch):
    """`symmetric_product`, with tiles so small that few numbers make many."""
    small = {"TILE": 256, "BLOCK": 128, "DEPTH_BYTES": 512, "CHUNK_BYTES": 256}
    for name, size in small.items():
        monkeypatch.setattr(symmetric_tpu, name, size)

    def run(left, right, add=None, alpha=1.0, beta=1.0, *, out_dtype):
        def call(left, right, add, alpha, beta):
            return symmetric_tpu.symmetric_product(
                left,
                right,
                add=add,
                alpha=alpha,
                beta=beta,
                out_dtype=out_dtype,
                interpret=NAN_OUTSIDE,
            )

        return jax.jit(call)(left, right, add, alpha, beta)

    return run


def normal(seed, *shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def mirrored(x):
    """What is on and below the diagonal, and its mirror image."""
    return np.tril(x) + np.tril(x, -1).swapaxes(-1, -2)


@pytest.mark.parametrize(
    ("shape", "dtype", "out_dtype"),
    [
        pytest.param((1, 1), "float32", "float32", marks=slow),
        pytest.param((2, 40, 9), "bfloat16", "float32", marks=slow),
        ((300, 300), "bfloat16", "bfloat16"),  # part of a tile; the same of k
        pytest.param((2, 1, 130, 150), "float16", "float16", marks=slow),
        ((520, 128), "float32", "bfloat16"),
    ],
)
def test_against_float64(product, shape, dtype, out_dtype):
    """Factors of which only the lower triangle of the product is right: the rest must not count."""
    n = shape[-2]
    left, right = (normal(seed, *shape, dtype=dtype) for seed in (0, 1))
    add = normal(2, *shape[:-1], n, dtype=dtype)
    result = product(left, right, add, 0.5, -2.0, out_dtype=out_dtype)
    chex.assert_shape(result, add.shape)
    assert result.dtype == out_dtype
    exactly = [np.asarray(x, np.float64) for x in (left, right, add)]
    x, y, a = exactly
    expected = mirrored(0.5 * x @ y.swapaxes(-1, -2) - 2 * a)
    # Each of k + 2 additions in float32, in any order, rounds at most all there is to add.
    x, y, a = map(np.abs, exactly)
    everything = mirrored(0.5 * x @ y.swapaxes(-1, -2) + 2 * a)
    error = (shape[-1] + 2) * 2**-24 * everything + float(jnp.finfo(out_dtype).eps) * abs(expected)
    result = np.asarray(result, np.float64)
    assert np.all(abs(result - expected) <= error)
    np.testing.assert_array_equal(result, result.swapaxes(-1, -2))


@slow
def test_without_add(product):
    """No factors but one, whose diagonal blocks are symmetric up to rounding already."""
    x = normal(0, 70, 40, dtype="float32")
    result = product(x, x, alpha=3.0, beta=7.0, out_dtype="float32")
    exactly = np.asarray(x, np.float64)
    error = 42 * 2**-24 * 3 * abs(exactly) @ abs(exactly).T  # as above
    assert np.all(abs(result - 3 * exactly @ exactly.T) <= error)


def test_bad_numbers_stay_in_their_matrix(product):
    x = np.array(normal(0, 4, 40, 20, dtype="float32"))
    good = product(x, x, out_dtype="float32")
    x[1, 35, 3], x[2, 35, 3] = np.nan, np.inf
    result = product(x, x, out_dtype="float32")
    np.testing.assert_array_equal(result[::3], good[::3])
    np.testing.assert_array_equal(result[1:3, :35, :35], good[1:3, :35, :35])
    assert not np.isfinite(result[1:3, 35]).any()
