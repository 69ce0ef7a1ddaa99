"""Values against dense float64 NumPy, by dtype; what conditioning makes of them; NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax import linalg
from tests.linalg.references import (
    distance,
    general,
    on_eigenvalues,
    on_singular_values,
    rectangular,
    symmetric,
)

# Roundings of a result of norm 1 in the dtype, after products that are summed in float32 at least.
ROUNDING = {"bfloat16": 1e-2, "float32": 1e-5, "float64": 1e-13}


@pytest.fixture(autouse=True)
def strict():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


def ones(values):
    return np.ones_like(values)


def unit(values):
    return np.clip(values, 0, 1)


SIGNS = {
    "msign": (linalg.msign, ones),
    "msign by svd": (functools.partial(linalg.msign, by="svd"), ones),
    "mclip": (linalg.mclip, unit),
    "mclip nested": (functools.partial(linalg.mclip, form="nested"), unit),
    "mclip squared": (functools.partial(linalg.mclip, form="squared"), unit),
    "mclip by svd": (functools.partial(linalg.mclip, by="svd"), unit),
    "mclip from below": (
        functools.partial(linalg.mclip, low=0.8, high=1.5),
        lambda values: np.clip(values, 0.8, 1.5),
    ),
}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", SIGNS)
def test_of_singular_values(name, dtype):
    fn, of_values = SIGNS[name]
    x = jnp.asarray(rectangular(0, 2, 5, 3), dtype)  # tall; wide is its transpose
    found = fn(x)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    assert distance(found, on_singular_values(x, of_values)) < ROUNDING[dtype]


ROOTS = {
    "matrix_sqrt": (linalg.matrix_sqrt, 1 / 2),
    "inverse_sqrt by eigh": (functools.partial(linalg.inverse_sqrt, by="eigh"), -1 / 2),
    "inverse_root 3": (functools.partial(linalg.inverse_root, p=3), -1 / 3),
    "inverse_root 4": (functools.partial(linalg.inverse_root, p=4, by="newton_schulz"), -1 / 4),
}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", ROOTS)
def test_of_eigenvalues(name, dtype):
    fn, power = ROOTS[name]
    x = jnp.asarray(symmetric(0, 2, 4, 4), dtype)
    expected = on_eigenvalues(x, lambda values: values**power)
    found = fn(x)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    assert distance(found, expected) < ROUNDING[dtype]
    np.testing.assert_array_equal(found, found.mT)


def test_zero_eigenvalues_count_as_zero():
    x = symmetric(0, 3, 3, values=[0, 1, 4])
    assert distance(linalg.matrix_sqrt(x), symmetric(0, 3, 3, values=[0, 1, 2])) < 1e-6  # √eps
    pseudo = symmetric(0, 3, 3, values=[0, 1, 1 / 2])
    assert distance(linalg.inverse_sqrt(x, by="eigh"), pseudo) < 1e-12
    assert not np.any(linalg.inverse_sqrt(np.zeros((2, 2)), by="eigh"))


@pytest.mark.parametrize("by", ["newton", "newton_schulz"])
def test_mcsgn(by):
    """Its error grows with the square of the eigenvectors' condition, here 5."""
    x, expected = general(0, [-3, -1, 0.1, 2, 1, -0.2])
    for dtype in ("float32", "float64"):
        assert distance(linalg.mcsgn(jnp.asarray(x, dtype), by=by), expected) < 30 * ROUNDING[dtype]


def test_mcsgn_of_complex_eigenvalues_and_of_none_that_has_a_sign():
    turn = np.array([[1.0, -3.0], [3.0, 1.0]])  # 1 ± 3i
    for matrix, expected in ((turn, np.eye(2)), (-turn, -np.eye(2))):
        np.testing.assert_allclose(linalg.mcsgn(matrix), expected, atol=1e-12)
    axis = np.array([[0.0, -1.0], [1.0, 0.0]])  # ± i
    assert np.isnan(linalg.mcsgn(np.stack([axis, np.zeros((2, 2)), axis * np.nan]))).all()
    assert np.isnan(linalg.mcsgn(axis, by="newton_schulz")).all()


def test_a_root_without_symmetry_by_mcsgn():
    root = general(0, [1, 2, 3])[0]
    square = root @ root
    block = np.block([[np.zeros((3, 3)), square], [np.eye(3), np.zeros((3, 3))]])
    sign = linalg.mcsgn(block)
    assert distance(sign[:3, 3:], root) < 1e-12
    assert distance(sign[3:, :3], np.linalg.inv(root)) < 1e-12


@pytest.mark.parametrize("symmetric_", [False, True])
def test_solve_sylvester(symmetric_):
    """The error is that of rounding over the separation of A from −B, which is at least 0.2."""
    a, b = (
        (symmetric(0, 3, 3, values=[0.1, 1, 2]), symmetric(1, 2, 4, 4))
        if symmetric_
        else (general(0, [0.1, 1, 2])[0], np.stack([general(s, [0.1, 1, 2, 3])[0] for s in (1, 2)]))
    )
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    for dtype in ("float32", "float64"):
        arguments = (jnp.asarray(y, dtype) for y in (a, b, a @ x + x @ b))
        found = linalg.solve_sylvester(*arguments, symmetric=symmetric_)
        assert distance(found, x) < 50 * ROUNDING[dtype]


def test_solve_sylvester_says_where_it_cannot():
    a, b = general(0, [1, 2, 3])[0], general(1, [1, 2])[0]
    x = np.ones((3, 2))
    np.testing.assert_allclose(linalg.solve_sylvester(-a, -b, -(a @ x + x @ b)), x, atol=1e-12)
    assert np.isnan(linalg.solve_sylvester(a, -b, x)).all()
    moved = linalg.solve_sylvester(a + 4 * np.eye(3), -b - 4 * np.eye(2) + 8 * np.eye(2), x)
    assert np.isfinite(moved).all()


@pytest.mark.parametrize("n", [1, 6, 16])
def test_inverse_low_rank_triangular(n):
    rng = np.random.default_rng(n)
    diagonal, q, k = rng.uniform(1, 2, size=n), *rng.normal(size=(2, 2, n, 3)) / 2
    expected = np.linalg.inv(np.diag(diagonal) + np.tril(q @ np.swapaxes(k, -1, -2), -1))
    for dtype in ROUNDING if n == 6 else ["float64"]:
        arguments = [jnp.asarray(x, dtype) for x in (diagonal, q, k)]
        found = linalg.inverse_low_rank_triangular(*arguments)
        assert found.dtype == dtype
        assert distance(found, expected) < 10 * ROUNDING[dtype]
        assert not np.triu(found, 1).any()


def test_a_matrix_with_nan_spoils_no_other():
    good, bad = rectangular(0, 3, 3), np.full((3, 3), np.nan)
    both = np.stack([good, bad, good * np.inf])
    for fn in (
        linalg.msign,
        functools.partial(linalg.msign, by="svd"),
        linalg.mclip,
        linalg.matrix_sqrt,
        functools.partial(linalg.inverse_root, p=2),
        linalg.mcsgn,
    ):
        found = fn(both)
        assert np.isnan(found[1:]).all()
        np.testing.assert_allclose(found[0], fn(good), atol=1e-12)


def test_scale_is_no_matter():
    x = rectangular(0, 3, 4).astype(np.float32)
    for scale in (1e-30, 1e30):
        assert distance(linalg.msign(jnp.asarray(x * np.float32(scale))), linalg.msign(x)) < 1e-5
        square = jnp.asarray(symmetric(0, 3, 3) * scale, jnp.float32)
        expected = symmetric(0, 3, 3, values=np.linspace(0.3, 2, 3) ** 0.5) * scale**0.5
        assert distance(linalg.matrix_sqrt(square), expected) < 1e-5


@pytest.mark.parametrize("n", [128, 512])
def test_mclip_keeps_the_norm_of_bfloat16(n):
    """Products in bfloat16 give 1.6 at n = 128 and 5.1 at 512."""
    values = np.geomspace(1e-2, 1000, n)
    x = jnp.asarray(rectangular(0, n, n, values=values), "bfloat16")
    with jax.enable_x64(False):
        found = np.asarray(linalg.mclip(x), np.float64)
    assert np.linalg.norm(found, 2) < 1.01


@pytest.mark.parametrize(
    ("top", "of_entries", "of_norm"), [(10, 1e-5, 5e-5), (100, 1e-4, 5e-4), (1000, 1e-3, 5e-3)]
)
def test_mclip_in_float32_errs_with_the_largest_singular_value(top, of_entries, of_norm):
    """Rounding of x oᵀ: a few eps · σmax. By SVD it is a tenth of that, and not documented away."""
    x = jnp.asarray(rectangular(0, 64, 64, values=np.geomspace(1e-2, top, 64)), "float32")
    expected = on_singular_values(x, unit)
    difference = np.asarray(linalg.mclip(x)) - expected
    assert np.abs(difference).max() < of_entries
    assert np.linalg.norm(difference, 2) < of_norm
    assert distance(linalg.mclip(x, by="svd"), expected) < of_entries


def test_with_newton_schulz_of_ones_own():
    """Its steps are the value's, and the derivative stays that of the exact sign."""
    x = jnp.asarray(rectangular(0, 3, 4))
    few = mc.NewtonSchulz(mc.schedules.polar_express(5), dtype=None)
    steps = mc.orthogonalize(x, few.schedule, dtype=None, method="auto")
    np.testing.assert_allclose(linalg.msign(x, by=few), steps, atol=1e-12)
    slopes = [
        jax.jvp(functools.partial(linalg.msign, by=by), (x,), (jnp.cos(x),))[1]
        for by in (few, "svd")
    ]
    assert distance(slopes[0], np.asarray(slopes[1])) < 0.05  # the steps' error is 1e-2


def test_on_explicit_axes():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = rectangular(0, 2, 3, 4)
    spread = jax.device_put(x, NamedSharding(mesh, P("d")))
    found = linalg.msign(spread)
    assert found.sharding.spec == P("d", None, None)
    np.testing.assert_allclose(found, linalg.msign(x), atol=1e-12)
