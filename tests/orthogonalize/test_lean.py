"""The form of the iterations for GPUs: fewer bytes, the same numbers but for rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc

LEAN = {each: mc.Method(each, lean=True) for each in ("standard", "gram")}
each_iteration = pytest.mark.parametrize("iteration", LEAN)
SCHEDULE = mc.schedules.polar_express(5)


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
def test_the_same_numbers(iteration, dtype, tolerance, shape):
    x = gaussian(*shape).astype(np.float32)
    lean, usual = (run(x, how(iteration), dtype) for how in (LEAN.get, plain))
    np.testing.assert_allclose(lean, usual, atol=tolerance)
    assert lean.shape == shape


@each_iteration
@pytest.mark.parametrize("schedule", ["polar_express", "jordan", "aol", "cubic", "cans"])
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
def test_any_scale(iteration, dtype, scale):
    """R is not scaled before it is squared; in float16, which has no room for that, it is."""
    x = gaussian(16, 2048).astype(np.float32)
    np.testing.assert_allclose(
        run(np.float32(scale) * x, LEAN[iteration], dtype),
        run(x, LEAN[iteration], dtype),
        atol=0.01,
    )


@each_iteration
def test_zero_and_what_is_not_finite(iteration):
    x = gaussian(3, 8, 16).astype(np.float32)
    x[0], x[1, 2, 3] = 0, np.inf
    out = run(x, LEAN[iteration], "bfloat16")
    assert not out[0].any() and np.isnan(out[1]).all() and np.isfinite(out[2]).all()


def test_matrices_as_large_as_a_chunk_are_written_over():
    """X + (W - I)X is another program than WX, and the same numbers."""
    x = gaussian(16, 64).astype(np.float32)
    over, product = (
        mc.Method("gram", lean=True, chunk_entries=entries) for entries in (x.size, x.size + 1)
    )
    np.testing.assert_allclose(run(x, over, "float32"), run(x, product, "float32"), atol=1e-5)
    assert adds_to_x(x, over) and not adds_to_x(x, product)


def adds_to_x(x, method):
    text = jax.jit(lambda x: mc.orthogonalize(x, method=method)).lower(x).as_text()
    return any("stablehlo.add" in line and "16x64" in line for line in text.splitlines())


@each_iteration
def test_nothing_in_float32_is_stored(iteration):
    """Every product of 16-bit factors is one: the sums are rounded as they are written."""
    x = jax.ShapeDtypeStruct((32, 128), jnp.bfloat16)
    text = jax.jit(lambda x: mc.orthogonalize(x, method=LEAN[iteration])).lower(x).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products and all(line.rstrip().endswith("xbf16>") for line in products)


@each_iteration
def test_the_gradient_is_that_of_the_usual_form(iteration):
    x = gaussian(8, 12).astype(np.float32)

    def gradient(method):
        return jax.grad(
            lambda x: jnp.sum(jnp.sin(mc.orthogonalize(x, method=method, dtype="float32")))
        )(x)

    lean, usual = gradient(LEAN[iteration]), gradient(plain(iteration))
    np.testing.assert_allclose(lean, usual, atol=1e-3 * np.abs(usual).max())


def test_a_flag_is_true_or_false():
    with pytest.raises(TypeError, match="lean"):
        mc.Method("gram", lean=1)  # type: ignore[arg-type]


@each_iteration
@pytest.mark.parametrize("dtype", ["float32", "float16"])
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
