"""The form of the iterations for GPUs: fewer bytes, the same numbers but for rounding."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from muonclip_jax._orthogonalize import lean as lean_iterations
from muonclip_jax._orthogonalize.products import diagonal, square_by_half, with_diagonal

LEAN = {each: mc.Method(each, lean=True) for each in ("standard", "gram")}
each_iteration = pytest.mark.parametrize("iteration", LEAN)
SCHEDULE = mc.schedules.polar_express(5)


@pytest.fixture(params=["small", "many", "large"])
def size(request, monkeypatch):
    """Which form the matrices of a test take: that of small ones, that of small ones of which there
    are many, that of large ones."""
    if request.param != "small":
        monkeypatch.setattr(lean_iterations, "_MANY", 1)
    if request.param == "large":
        monkeypatch.setattr(lean_iterations, "_LARGE", 1)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def gaussian(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def run(x, method, dtype, schedule=SCHEDULE):
    out = mc.orthogonalize(jnp.asarray(x), schedule, method=method, dtype=dtype)
    return np.asarray(out, np.float64)


def plain(iteration):
    return dataclasses.replace(LEAN[iteration], lean=False)


@each_iteration
@pytest.mark.parametrize(
    # Rounding of W and R, of half an eps, a step, grown by the steps that follow.
    ("dtype", "tolerance"),
    [("float32", 2e-4), ("bfloat16", 0.12), ("float16", 0.02)],
)
@pytest.mark.parametrize("shape", [(16, 16), (3, 16, 64), (64, 16)])
@pytest.mark.usefixtures("size")
def test_the_same_numbers(iteration, dtype, tolerance, shape):
    x = gaussian(*shape).astype(np.float32)
    lean, usual = (run(x, how(iteration), dtype) for how in (LEAN.get, plain))
    np.testing.assert_allclose(lean, usual, atol=tolerance)
    assert lean.shape == shape


@each_iteration
@pytest.mark.parametrize("schedule", ["polar_express", "jordan", "aol", "cubic", "cans"])
@pytest.mark.usefixtures("size")
def test_singular_values_stay_below_the_schedules_top(iteration, schedule):
    """Few rows of hard spectra; RW with a rounded identity took `cans` to 1e4 here."""
    rng = np.random.default_rng(1)
    sigma = 10 ** rng.uniform(-4, 0, (500, 4))
    u = np.linalg.qr(rng.standard_normal((500, 4, 4)))[0]
    v = np.linalg.qr(rng.standard_normal((500, 6, 4)))[0]
    x = ((u * sigma[:, None]) @ v.swapaxes(-1, -2)).astype(np.float32)
    chosen = getattr(mc.schedules, schedule)()
    out = run(x, LEAN[iteration], "bfloat16", chosen)
    assert np.linalg.norm(out, 2, (-2, -1)).max() < chosen.top + 0.05


@each_iteration
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
@pytest.mark.usefixtures("size")
def test_any_scale(iteration, dtype, scale):
    """R is not scaled before it is squared; in float16, which has no room for that, it is."""
    x = gaussian(16, 2048).astype(np.float32)
    np.testing.assert_allclose(
        run(np.float32(scale) * x, LEAN[iteration], dtype),
        run(x, LEAN[iteration], dtype),
        atol=0.01,
    )


@each_iteration
@pytest.mark.parametrize("schedule", ["polar_express", "jordan", "aol"])
@pytest.mark.usefixtures("size")
def test_more_columns_than_float16_can_count(iteration, schedule):
    """XXᵀ of entries near 1 is 70,000, and float16 ends at 65,504."""
    x = np.float32(0.999) * np.ones((2, 70_000), np.float32)
    x[1, ::2] *= -1
    out = run(x, LEAN[iteration], "float16", getattr(mc.schedules, schedule)())
    np.testing.assert_allclose(out @ out.T, np.eye(2), atol=0.5)  # as far as `jordan` goes


@each_iteration
@pytest.mark.usefixtures("size")
def test_zero_and_what_is_not_finite(iteration):
    x = gaussian(3, 8, 16).astype(np.float32)
    x[0], x[1, 2, 3] = 0, np.inf
    out = run(x, LEAN[iteration], "bfloat16")
    assert not out[0].any() and np.isnan(out[1]).all() and np.isfinite(out[2]).all()


def test_large_matrices_are_written_over(size, monkeypatch):
    """X + (W - I)X is another program than WX, and the same numbers."""
    x = gaussian(16, 64).astype(np.float32)
    assert adds_to_x(x, LEAN["gram"]) == (size == "large")
    found = run(x, LEAN["gram"], "float32")
    monkeypatch.setattr(lean_iterations, "_LARGE", x.size + 1)
    jax.clear_caches()
    np.testing.assert_allclose(found, run(x, LEAN["gram"], "float32"), atol=1e-5)


def adds_to_x(x, method):
    text = jax.jit(lambda x: mc.orthogonalize(x, method=method)).lower(x).as_text()
    return any("stablehlo.add" in line and "16x64" in line for line in text.splitlines())


@each_iteration
@pytest.mark.usefixtures("size")
def test_nothing_in_float32_is_stored(iteration):
    """Every product of 16-bit factors is one: the sums are rounded as they are written."""
    x = jax.ShapeDtypeStruct((32, 128), jnp.bfloat16)
    text = jax.jit(lambda x: mc.orthogonalize(x, method=LEAN[iteration])).lower(x).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products and all(line.rstrip().endswith("xbf16>") for line in products)


@each_iteration
@pytest.mark.usefixtures("size")
def test_the_gradient_is_that_of_the_usual_form(iteration):
    x = gaussian(8, 12).astype(np.float32)

    def gradient(method):
        return jax.grad(
            lambda x: jnp.sum(jnp.sin(mc.orthogonalize(x, method=method, dtype="float32")))
        )(x)

    lean, usual = gradient(LEAN[iteration]), gradient(plain(iteration))
    np.testing.assert_allclose(lean, usual, atol=1e-3 * np.abs(usual).max())


# What it is made of.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])  # whose sums are exact beside them
@pytest.mark.parametrize(("a", "b"), [(4.0, -5.0), (2.5, -3.3), (1.6, 0.7)])
def test_a_square_and_two_diagonals_are_the_polynomial(dtype, a, b):
    """The diagonal is as exact as if R² had been rounded once, and the sum once."""
    x = gaussian(4, 24, 96) / 24
    r = jnp.asarray(x @ x.swapaxes(-1, -2), dtype)
    exact = np.asarray(r, np.float64)
    exact = a * np.eye(24) + b * exact + exact @ exact
    found = np.asarray(lean_iterations._by_square(r, a, b, LEAN["gram"]), np.float64)
    rounding = float(jnp.finfo(dtype).eps) / 2
    off = ~np.eye(24, dtype=bool)
    # Off the diagonal each entry of R is multiplied by a rounded b/2, twice.
    np.testing.assert_allclose(found[:, off], exact[:, off], rtol=2 * rounding, atol=rounding)
    shifted = np.diagonal(np.asarray(r, np.float64), axis1=-2, axis2=-1) + b / 2
    spacings = sum(2 ** np.floor(np.log2(np.abs(x).max())) for x in (shifted**2, found))
    error = np.diagonal(found - exact, axis1=-2, axis2=-1)
    assert np.abs(error).max() <= 1.05 * rounding * spacings


@pytest.mark.parametrize("schedule", ["polar_express", "jordan", "aol", "cubic", "cans", "you"])
def test_steps_of_multiples_are_the_same_polynomial(schedule):
    restarts = [(step,) for step in getattr(mc.schedules, schedule)().coefficients]
    found = list(itertools.chain(*lean_iterations._monic(restarts)))
    later = zip(restarts[1:], found[1:], strict=True)
    assert all(c == 1 for ((_, _, old),), (_, _, c) in later if old > 0)

    def value(steps):
        x = np.linspace(0, 1, 101)
        for a, b, c in steps:
            x = a * x + b * x**3 + c * x**5
        return x

    np.testing.assert_allclose(value(found), value(itertools.chain(*restarts)), rtol=1e-9)


def test_the_first_step_of_multiples_takes_x_itself():
    """Of another first coefficient the norm would have to know."""
    (a, b, c), *_ = SCHEDULE.coefficients
    steps = [(step,) for step in SCHEDULE.coefficients]
    [[(first, second, third)], *_] = lean_iterations._monic(steps)
    np.testing.assert_allclose([second / first, third / first], [b / a, c / a])


def test_a_step_whose_square_would_round_more_is_a_sum(size):
    """b²/4c = 57 a: what the diagonals would add is far above the sum."""
    steps = ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0), (1.4, -0.4, 0.0005))
    steep = mc.Schedule("steep", steps, lower=0.1)
    x = gaussian(8, 12).astype(np.float32)
    lean, usual = (run(x, how("standard"), "bfloat16", steep) for how in (LEAN.get, plain))
    # W rounded to bfloat16 makes 0.004; 57 a rounded to it made 0.03.
    np.testing.assert_allclose(lean, usual, atol=0.01)


@pytest.mark.parametrize("shape", [(5, 9), (2, 8, 8), (3, 7, 4)])
def test_a_square_by_half_is_the_square(shape):
    x = jnp.asarray(gaussian(*shape), jnp.float32)
    found = square_by_half(x, LEAN["gram"])
    np.testing.assert_allclose(found, x @ x.mT, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found, found.mT)


def test_a_diagonal_is_read_and_replaced():
    x = jnp.asarray(gaussian(2, 3, 3), jnp.bfloat16)
    new = with_diagonal(x, diagonal(x) + 1)
    assert new.dtype == x.dtype and diagonal(x).dtype == jnp.float32
    np.testing.assert_allclose(new - x, np.broadcast_to(np.eye(3), (2, 3, 3)), atol=0.02)


def test_a_flag_is_true_or_false():
    with pytest.raises(TypeError, match="lean"):
        mc.Method("gram", lean=1)  # type: ignore[arg-type]


@each_iteration
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.usefixtures("size")
def test_parameters_that_share_a_stack(iteration, dtype):
    """Each is rounded where it lies, and turned and brought into range as it joins its stack."""
    rng = np.random.default_rng(3)
    shapes = {"wide": (16, 64), "tall": (64, 16), "scanned": (3, 64, 16)}
    updates = {
        name: jnp.asarray(rng.standard_normal(shape) * 10.0**place, jnp.float32)
        for place, (name, shape) in enumerate(shapes.items())
    }

    def step(method):
        how = mc.NewtonSchulz(SCHEDULE, dtype, method)
        numbers = dict.fromkeys(shapes, optax.contrib.MuonDimensionNumbers(-2, -1))
        tx = mc.scale_by_orthogonalization(how, dimension_numbers=numbers)
        return tx.update(updates, tx.init(updates))[0]

    lean, usual = step(LEAN[iteration]), step(plain(iteration))
    for name, shape in shapes.items():
        assert lean[name].shape == shape and lean[name].dtype == jnp.float32
        np.testing.assert_allclose(
            lean[name], usual[name], atol=2e-4 if dtype == "float32" else 0.02
        )
