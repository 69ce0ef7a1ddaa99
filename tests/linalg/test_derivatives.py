"""Derivatives against finite differences in float64: to second order, forward and reverse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from muonclip_jax import linalg
from tests.linalg.references import general, rectangular, symmetric

STEP = 1e-5
# Central differences err by STEP², times third derivatives below 1e3, and by rounding over STEP.
CLOSE = dict(rtol=1e-6, atol=1e-6)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


A, B, C = general(0, [1, 2, 3])[0], general(1, [1, 1.5])[0], np.arange(6.0).reshape(3, 2)
CASES = {
    "msign, wide, batched": (linalg.msign, rectangular(1, 2, 3, 5)),
    "msign by svd, tall": (functools.partial(linalg.msign, by="svd"), rectangular(2, 5, 3)),
    "msign by svd, square": (functools.partial(linalg.msign, by="svd"), rectangular(3, 4, 4)),
    "mclip, tall": (lambda x: linalg.mclip(x, 0.8, 1.3), rectangular(4, 5, 3)),
    "mclip by svd, wide": (
        lambda x: linalg.mclip(x, high=1.3, by="svd"),
        rectangular(5, 3, 4),
    ),
    "matrix_sqrt": (linalg.matrix_sqrt, symmetric(6, 4, 4)),
    "inverse_sqrt by eigh": (
        functools.partial(linalg.inverse_sqrt, by="eigh"),
        symmetric(7, 4, 4),
    ),
    "inverse_root, batched": (lambda x: linalg.inverse_root(x, 3), symmetric(8, 2, 3, 3)),
    "mcsgn": (linalg.mcsgn, general(9, [-1, -2, 1, 0.5])[0]),
    "solve_sylvester, of a": (lambda a: linalg.solve_sylvester(a, B, C), A),
    "solve_sylvester, symmetric, of b": (
        lambda b: linalg.solve_sylvester(symmetric(0, 3, 3), b, C, symmetric=True),
        symmetric(1, 2, 2),
    ),
    "inverse_low_rank_triangular, of q": (
        lambda q: linalg.inverse_low_rank_triangular(jnp.ones(5), q, jnp.cos(3 * q)),
        np.sin(np.arange(10.0)).reshape(5, 2),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_first_and_second_order(case):
    fn, x = CASES[case]
    rng = np.random.default_rng(0)
    direction = rng.normal(size=x.shape)
    cotangent = rng.normal(size=jax.eval_shape(fn, x).shape)

    def product(x):
        return jnp.sum(cotangent * fn(x))

    @jax.jit
    def found(x):
        value, along = jax.jvp(fn, (x,), (direction,))
        gradient, forward = jax.jvp(jax.grad(product), (x,), (direction,))
        reverse = jax.grad(lambda x: jnp.sum(jax.grad(product)(x) * direction))(x)
        return value, along, gradient, forward, reverse

    before, after = found(x - STEP * direction), found(x + STEP * direction)
    _, along, gradient, forward, reverse = found(x)
    np.testing.assert_allclose(along, (after[0] - before[0]) / (2 * STEP), **CLOSE)
    # Transposed, not differenced: equal to rounding.
    np.testing.assert_allclose(np.sum(gradient * direction), np.sum(cotangent * along), rtol=1e-9)
    np.testing.assert_allclose(forward, (after[2] - before[2]) / (2 * STEP), **CLOSE)
    np.testing.assert_allclose(reverse, forward, rtol=1e-9, atol=1e-9)


def test_jax_agrees_with_msign_to_second_order():
    x = jnp.asarray(rectangular(0, 2, 3))
    check_grads(functools.partial(linalg.msign, by="svd"), (x,), order=2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["nested", "squared"])
def test_other_forms_of_mclip(form):
    x, direction = rectangular(4, 3, 4), np.random.default_rng(0).normal(size=(3, 4))

    @jax.jit
    def found(x, low, high):
        return jax.jvp(
            lambda x, high: linalg.mclip(x, low, high, form=form),
            (x, high),
            (direction, jnp.ones(())),
        )

    low, high = jnp.asarray(0.8), jnp.asarray(1.3)
    after = found(x + STEP * direction, low, high + STEP)[0]
    before = found(x - STEP * direction, low, high - STEP)[0]
    np.testing.assert_allclose(found(x, low, high)[1], (after - before) / (2 * STEP), **CLOSE)


SINGULAR = {
    "zero": np.zeros((3, 3)),
    "equal": np.eye(3),
    "equal and zero": np.diag([2.0, 2.0, 0.0]),
    "rank one": np.ones((3, 3)),
}
FUNCTIONS = {
    "msign": linalg.msign,
    "msign by svd": functools.partial(linalg.msign, by="svd"),
    "mclip": functools.partial(linalg.mclip, high=2.0),  # one that is at the bound
    "mclip by svd": functools.partial(linalg.mclip, high=2.0, by="svd"),
    "matrix_sqrt": linalg.matrix_sqrt,
    "inverse_sqrt by eigh": functools.partial(linalg.inverse_sqrt, by="eigh"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equal_and_zero_singular_values_give_finite_derivatives(name):
    weights = np.cos(np.arange(9.0)).reshape(3, 3)

    @jax.jit
    @jax.vmap
    def found(x):
        gradient = jax.grad(lambda x: jnp.sum(weights * jnp.sin(FUNCTIONS[name](x))))
        return gradient(x), jax.jvp(gradient, (x,), (jnp.asarray(weights),))[1]

    first, second = found(jnp.stack(list(SINGULAR.values())))
    assert np.isfinite(first).all() and np.isfinite(second).all()
    if name != "mclip" and name != "mclip by svd":
        assert not first[0].any()  # of the zero matrix, as documented
    if "sign" in name:  # of the identity: the antisymmetric part of the cotangent
        np.testing.assert_allclose(first[1], antisymmetric(weights), atol=1e-9)


def antisymmetric(weights):
    """Of sin at the identity: cos(1) on the diagonal, 1 beside it."""
    cotangent = weights * np.where(np.eye(3), np.cos(1), 1)
    return (cotangent - cotangent.T) / 2


@pytest.mark.parametrize("by", ["newton_schulz", "svd"])
def test_of_lower_rank_the_derivative_is_that_along_matrices_of_this_rank(by):
    rng = np.random.default_rng(0)
    left, right, dleft, dright = (rng.normal(size=(n, 2)) for n in (3, 4, 3, 4))

    def sign(t):
        u, _, vt = np.linalg.svd((left + t * dleft) @ (right + t * dright).T)
        return u[:, :2] @ vt[:2]

    x, direction = left @ right.T, dleft @ right.T + left @ dright.T
    along = jax.jvp(functools.partial(linalg.msign, by=by), (x,), (direction,))[1]
    close = CLOSE if by == "svd" else {"atol": 1e-3}  # what the steps make of a rounded zero
    np.testing.assert_allclose(along, (sign(STEP) - sign(-STEP)) / (2 * STEP), **close)


def test_through_a_loop_and_a_batch():
    """A scan keeps the equation's residuals, `vmap` makes a batch of it."""

    def loss(x):
        return jax.lax.scan(lambda x, _: (x - 0.1 * linalg.msign(x), None), x, None, length=3)[0][0]

    x = jnp.asarray(rectangular(0, 2, 3, 4))
    together = jax.jit(jax.vmap(jax.grad(lambda x: loss(x).sum())))(x)
    apart = jnp.stack([jax.grad(lambda x: loss(x).sum())(each) for each in x])
    np.testing.assert_allclose(together, apart, atol=1e-12)
