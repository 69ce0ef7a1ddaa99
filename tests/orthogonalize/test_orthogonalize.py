import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from muonclip_jax._orthogonalize import products, schedules
from muonclip_jax._orthogonalize.methods import Method
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._orthogonalize.orthogonalize import in_chunks, orthogonality_error, orthogonalize
from muonclip_jax._orthogonalize.products import concatenate, sum_of_squares, trace
from muonclip_jax._orthogonalize.restarts import steps_between_restarts, with_margins

SCHEDULES = [
    schedules.jordan(),
    schedules.you(),
    schedules.polar_express(5),
    schedules.polar_express(8),
    schedules.cans(),
    schedules.aol(),
    schedules.deepseek_v4(),
    schedules.cubic(),
]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
each_normalization = pytest.mark.parametrize(
    "schedule",
    [schedules.jordan(), schedules.polar_express(5), schedules.aol()],
    ids=lambda s: s.normalization,
)
slow = pytest.mark.slow
in_float32 = functools.partial(orthogonalize, dtype=jnp.float32)


def normalized_svd(x, schedule):
    """In float64, of wide matrices."""
    x = np.asarray(x, np.float64)
    if schedule.normalization == "aol":
        gram = x @ x.swapaxes(-1, -2)
        x = x / np.sqrt(np.abs(gram).sum(axis=-1, keepdims=True))
        return np.linalg.svd(x / schedule.norm_factor, full_matrices=False)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    power = {"frobenius": 2, "schatten4": 4}[schedule.normalization]
    norm = np.linalg.norm(s, power, axis=-1, keepdims=True)
    return u, s / (norm * schedule.norm_factor), vt


def reference(x, schedule):
    """U p(S) Vᵀ: the scalar recursion, independent of the matrix iteration."""
    if x.shape[-2] > x.shape[-1]:
        return reference(x.swapaxes(-1, -2), schedule).swapaxes(-1, -2)
    u, s, vt = normalized_svd(x, schedule)
    return (u * schedule.apply(s)[..., None, :]) @ vt


def as_taken(schedule, method, dtype):
    """The schedule with the margins that the method needs."""
    return with_margins(schedule, dtype) if method == "gram" else schedule


def tolerance(x, schedule, dtype):
    """How far rounding may take the result from `reference`, in the spectral norm.

    The error of one step, relative to the largest σ, is half an eps in 16 bits, where the factors
    of the matmuls are rounded, but not the sums; 5 eps in 32 and 64 bits for sums of a dozen
    terms. The steps that follow multiply it by p'(σ) as far as it changed σ, and by p(σ)/σ as far
    as it rotated singular vectors.
    """
    one_step = (0.5 if jnp.finfo(dtype).bits == 16 else 5) * float(jnp.finfo(dtype).eps)
    sigma = normalized_svd(x, schedule)[1]
    changed = rotated = sigma.max()
    for a, b, c in schedule.coefficients:
        slope = a + 3 * b * sigma**2 + 5 * c * sigma**4
        growth = a + b * sigma**2 + c * sigma**4
        sigma = sigma * growth
        changed = np.abs(slope) * changed + sigma.max()
        rotated = growth * rotated + sigma.max()
    return one_step * (changed + rotated).max()


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def with_spectrum(sigma, columns, seed=0):
    """Random matrices [..., n, columns] with singular values sigma [..., n]."""
    n = sigma.shape[-1]
    u = np.linalg.qr(gaussian(*sigma.shape, n, seed=seed))[0]
    v = np.linalg.qr(gaussian(*sigma.shape[:-1], columns, n, seed=seed + 1))[0]
    return (u * sigma[..., None, :]) @ v.swapaxes(-1, -2)


# Against the scalar recursion


def programs():
    """Every dtype and method with every norm. The other schedules' programs differ from these by
    their constants only."""
    for schedule in SCHEDULES:
        if schedule in (schedules.jordan(), schedules.polar_express(5), schedules.aol()):
            for method, dtype in itertools.product(
                ["standard", "gram"], ["bfloat16", "float16", "float32", "float64"]
            ):
                yield pytest.param(
                    schedule, method, dtype, marks=slow if dtype == "float16" else ()
                )
        else:
            for method, dtype in [("standard", "float64"), ("gram", "bfloat16")]:
                yield pytest.param(schedule, method, dtype, marks=slow)


def name_of(value):
    return getattr(value, "name", value)


@pytest.mark.parametrize(("schedule", "method", "dtype"), list(programs()), ids=name_of)
def test_the_iteration_is_the_scalar_recursion_on_singular_values(schedule, method, dtype):
    x = with_spectrum(np.geomspace(1, 0.15, 8), columns=12)
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(x, dtype)
        out = orthogonalize(x, schedule, dtype=None, method=method)
        assert out.dtype == x.dtype
        steps = as_taken(schedule, method, dtype)
        error = np.linalg.norm(np.asarray(out, np.float64) - reference(x, steps), 2)
    # On Gram matrices the errors of two or three steps add up before a restart.
    assert error < tolerance(x, schedule, dtype) * (1 if method == "standard" else 3)


@each_schedule
def test_documented_worst_error_bounds_the_matrix_iteration(schedule):
    sigma = np.random.default_rng(0).uniform(np.log(schedule.lower), 0, (64, 6))
    x = with_spectrum(np.exp(sigma), columns=6)
    smallest = normalized_svd(x, schedule)[1].min()
    with jax.enable_x64(True):
        out = np.asarray(orthogonalize(jnp.asarray(x), schedule, dtype=None))
    error = np.abs(np.linalg.svd(out, compute_uv=False) - 1).max()
    # Rounding of the smallest σ, 1e-16, grows with the slope, 1e5 at most.
    assert error <= schedule.worst_error(smallest) + 1e-10


@pytest.mark.parametrize(
    ("schedule", "method", "dtype"),
    [
        pytest.param(
            schedule,
            method,
            dtype,
            marks=() if dtype == "bfloat16" and schedule == schedules.cans() else slow,
        )
        for method, dtype in [("gram", "bfloat16"), ("gram", "float16"), ("standard", "bfloat16")]
        for schedule in SCHEDULES
    ],
    ids=name_of,
)
def test_sixteen_bits_are_stable_for_any_spectrum(schedule, method, dtype):
    """Few rows, where rounding errors do not average out. Without safety factors polar_express and
    cans give NaN and 1e9 here, and "gram" without margins 1e4."""
    sigma = 10 ** np.random.default_rng(0).uniform(-4, 0, (1000, 4))
    x = jnp.asarray(with_spectrum(sigma, columns=6), jnp.float32)
    out = orthogonalize(x, schedule, dtype=dtype, method=method)
    largest = np.linalg.svd(np.asarray(out), compute_uv=False).max()
    assert largest < schedule.top + 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("iteration", "n", "m"), [("standard", 7, 20), ("gram", 9, 9)])
def test_blocks_and_copies_change_rounding_only(iteration, n, m):
    x = jnp.asarray(gaussian(2, n, m), jnp.float32)
    whole = in_float32(x, method=Method(iteration))
    cut = in_float32(x, method=Method(iteration, smallest_block=2, row_major=True))
    np.testing.assert_allclose(cut, whole, atol=1e-4)  # a dozen sums in another order, grown


@pytest.mark.parametrize("n", [8, 9, 17])
def test_products_of_cut_matrices_are_those_of_whole_ones(n):
    """Halves of what is cut, in both directions and at all levels, also of uneven sides."""
    method, whole = Method("standard", smallest_block=2), Method("standard")
    x = jnp.asarray(np.random.default_rng(0).integers(-4, 5, (2, n, n + 3)), jnp.float32)
    square = products.gram(x, method)
    assert isinstance(square, tuple)
    expected = products.matmul(x, x.mT, whole)  # whole numbers, which no order rounds
    np.testing.assert_array_equal(products.joined(square), expected)
    fourth = products.symmetric(square, square, method)
    np.testing.assert_array_equal(
        products.joined(fourth), products.matmul(expected, expected, whole)
    )


def hard_matrices(n=64, m=160):
    rng = np.random.default_rng(0)
    rows, columns = np.arange(n)[:, None], np.arange(m)
    half = np.where(np.arange(n) < n // 2, 1.0, 0.0)
    scales = functools.partial(rng.uniform, -4, 0)
    return {
        "near singular": with_spectrum(np.geomspace(1, 1e-8, n), m),
        "a spike": with_spectrum(np.where(np.arange(n) == 0, 1.0, 1e-3), m),
        "half of them small": with_spectrum(half + 1e-3, m),
        "rank n/2": with_spectrum(half, m),
        "rank 1": np.ones((n, m)),
        "orthogonal": with_spectrum(np.ones(n), m),
        "unit vectors": np.eye(n, m) * half[:, None],
        "large mean": rng.standard_normal((n, m)) + 3,
        "scaled rows": rng.standard_normal((n, m)) * 10 ** scales((n, 1)),
        "scaled columns": rng.standard_normal((n, m)) * 10 ** scales(m),
        "rows twice": np.repeat(rng.standard_normal((n // 2, m)), 2, axis=0),
        "few entries": rng.standard_normal((n, m)) * (rng.uniform(size=(n, m)) < 0.02),
        "Hilbert": 1 / (1 + rows + columns),
    }


@pytest.mark.parametrize(
    ("schedule", "method", "dtype"),
    [
        (schedules.polar_express(5), "gram", "bfloat16"),
        (schedules.polar_express(5), "standard", "bfloat16"),
        pytest.param(schedules.polar_express(5), "gram", "float16", marks=slow),
        pytest.param(schedules.polar_express(8), "gram", "bfloat16", marks=slow),
        pytest.param(schedules.polar_express(8), "standard", "float16", marks=slow),
    ],
    ids=name_of,
)
def test_hard_matrices(schedule, method, dtype):
    hard = np.stack(list(hard_matrices().values()))
    out = orthogonalize(jnp.asarray(hard, jnp.float32), schedule, dtype=dtype, method=method)
    out = np.asarray(out, np.float64)
    chex.assert_tree_all_finite(out)
    sigma = np.linalg.svd(out, compute_uv=False)
    steps = as_taken(schedule, method, dtype)
    for name, x, o, s in zip(hard_matrices(), hard, out, sigma, strict=True):
        u, before, vt = normalized_svd(x, steps)
        grown = np.diag(u.T @ o @ vt.T)
        assert s.max() < schedule.top + 0.05, name
        # What starts within a twentieth of the largest ends where the polynomial says: rounding
        # moves it by 1/256 of the largest, and p by up to 9 times as much.
        large = before > 0.05 * before[0]
        np.testing.assert_allclose(grown[large], steps.apply(before)[large], atol=0.3, err_msg=name)


@slow
@settings(max_examples=15, deadline=None)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    n=st.integers(1, 7),
    m=st.integers(1, 7),
    schedule=st.sampled_from(SCHEDULES),
)
def test_any_shape_and_batch(batch, n, m, schedule):
    x = gaussian(*batch, n, m)
    with jax.enable_x64(True):
        out = orthogonalize(jnp.asarray(x), schedule, dtype=None)
    chex.assert_shape(out, (*batch, n, m))
    # A singular value of 1e-6 would have its direction rounded to 1e-10 and grow by a slope
    # of up to 1e5, but so small ones do not come up in a few Gaussian matrices.
    np.testing.assert_allclose(out, reference(x, schedule), rtol=0, atol=1e-8)


# Scale, zeros and non-finite entries


@each_normalization
@pytest.mark.parametrize("norm", [1e-30, 1e30, 3e38])
def test_scale_does_not_matter(schedule, norm):
    x = with_spectrum(np.geomspace(1, 0.15, 8), columns=12)
    x = jnp.asarray(x / np.linalg.norm(x), jnp.float32)
    scaled = x * jnp.float32(norm)
    np.testing.assert_allclose(
        in_float32(scaled, schedule),
        in_float32(x, schedule),
        rtol=0,
        atol=tolerance(x, schedule, "float32"),
    )


@pytest.mark.parametrize("scale", [6e4, 1e-4])
def test_the_ends_of_float16(scale):
    x = np.sign(gaussian(4, 300))  # in float16 the sum of squares would be infinite or zero
    schedule = schedules.polar_express(5)
    x16 = jnp.asarray(x * scale, jnp.float16)
    out = orthogonalize(x16, schedule, dtype=None, method="standard")
    error = np.linalg.norm(np.asarray(out, np.float64) - reference(x, schedule), 2)
    assert error < tolerance(x, schedule, "float16")


@each_normalization
def test_zero_stays_zero_with_finite_gradient(schedule):
    x = jnp.zeros((3, 5))
    np.testing.assert_array_equal(orthogonalize(x, schedule), x)
    gradient = jax.grad(lambda x: orthogonalize(x, schedule, method="standard").sum())(x)
    assert np.isfinite(gradient).all()


@each_normalization
def test_zero_rows_and_columns_stay_zero(schedule):
    x = gaussian(4, 7)
    x[1] = 0
    x[:, 2] = 0
    out = np.asarray(in_float32(jnp.asarray(x, jnp.float32), schedule))
    assert not out[1].any() and not out[:, 2].any()
    rest = np.ix_([0, 2, 3], [0, 1, 3, 4, 5, 6])
    np.testing.assert_allclose(
        out[rest],
        reference(x[rest], schedule),
        rtol=0,
        atol=tolerance(x[rest], schedule, "float32"),
    )


def test_zero_singular_values_stay_zero():
    x = gaussian(8, 2) @ gaussian(2, 12)
    schedule = schedules.polar_express(8)
    with jax.enable_x64(True):
        out = orthogonalize(jnp.asarray(x), schedule, dtype=None)
    sigma = np.linalg.svd(out, compute_uv=False)
    np.testing.assert_allclose(sigma[:2], 1, atol=1e-12)
    # What rounding leaves of zero, 1e-17 after normalization, grows by the slope, 6e3.
    np.testing.assert_allclose(sigma[2:], 0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
@each_normalization
def test_a_vector_is_only_normalized(schedule, shape):
    x = gaussian(*shape)
    expected = x / np.linalg.norm(x) * schedule.apply(1 / schedule.norm_factor)
    out = in_float32(jnp.asarray(x, jnp.float32), schedule)
    atol = tolerance(x.reshape(1, -1), schedule, "float32")
    np.testing.assert_allclose(out, expected, rtol=0, atol=atol)


@each_normalization
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), pytest.param((1, 5), marks=slow)])
def test_a_non_finite_entry_shows_in_its_matrix_alone(schedule, shape):
    x = gaussian(3, *shape).astype(np.float32)
    clean = np.asarray(orthogonalize(x, schedule))
    for poison in (np.nan, np.inf, -np.inf):
        poisoned = x.copy()
        poisoned[1, 0, 1 % shape[1]] = poison
        out = np.asarray(orthogonalize(poisoned, schedule))
        assert np.isnan(out[1]).all()
        np.testing.assert_array_equal(out[[0, 2]], clean[[0, 2]])


# Transformations and layout


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("bfloat16", "float32")
    def test_vmap_is_the_batch(self, dtype):
        x = jnp.asarray(gaussian(2, 3, 5, 8), jnp.float32)
        function = functools.partial(orthogonalize, dtype=dtype)
        one_by_one = [[function(x[i, j]) for j in range(3)] for i in range(2)]
        # Batched and single matmuls may sum in another order.
        tol = tolerance(x, schedules.polar_express(5), dtype)
        for batched in (self.variant(function)(x), self.variant(jax.vmap(function))(x)):
            chex.assert_trees_all_close(batched, jnp.asarray(one_by_one), rtol=0, atol=tol)

    @chex.variants(with_jit=True, without_jit=True)
    def test_tall_is_wide_transposed(self):
        x = jnp.asarray(gaussian(2, 8, 5), jnp.float32)
        function = self.variant(functools.partial(orthogonalize, schedule=schedules.aol()))
        chex.assert_trees_all_equal(function(x), function(x.mT).mT)


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(schedules.jordan(), marks=slow),
        schedules.polar_express(5),
        pytest.param(schedules.aol(), marks=slow),
    ],
    ids=lambda s: s.normalization,
)
def test_gradient(schedule):
    x = with_spectrum(np.geomspace(1, 0.15, 4), columns=6)
    weight, direction = gaussian(4, 6, seed=7), gaussian(4, 6, seed=8)

    def value(x):
        return jnp.vdot(weight, orthogonalize(x, schedule, dtype=None))

    with jax.enable_x64(True):
        gradient = np.asarray(jax.grad(value)(jnp.asarray(x)))
        plus, minus = (float(value(jnp.asarray(x + h * direction))) for h in (1e-6, -1e-6))
    # Central differences err by eps / h, 1e-9, and by h² times the third derivative, below 1e5.
    assert np.vdot(gradient, direction) == pytest.approx((plus - minus) / 2e-6, abs=1e-6)
    # The result does not depend on scale, so the gradient is orthogonal to x.
    assert np.vdot(gradient, x) == pytest.approx(0, abs=1e-11)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_concatenate_moves_every_bit_and_has_a_gradient(dtype):
    odd = jnp.array([[jnp.nan, -jnp.inf, -0.0, jnp.finfo(dtype).smallest_subnormal]], dtype)
    plain = jnp.arange(4, dtype=dtype)[None]
    for axis in (0, -1):
        found = concatenate([odd, plain], axis)
        as_jnp = jnp.concatenate([odd, plain], axis)
        np.testing.assert_array_equal(np.asarray(found).view("u1"), np.asarray(as_jnp).view("u1"))
    pull = jax.vjp(lambda x, y: concatenate([x, y], 0), plain, plain)[1]
    left, right = pull(jnp.arange(8, dtype=dtype).reshape(2, 4))
    np.testing.assert_array_equal(np.asarray(left, "f4"), [[0, 1, 2, 3]])
    np.testing.assert_array_equal(np.asarray(right, "f4"), [[4, 5, 6, 7]])


@slow
def test_gradient_at_an_extreme_scale():
    x = jnp.asarray(gaussian(3, 5), jnp.float32)
    gradient = jax.grad(lambda x: (in_float32(x) ** 3).sum())
    # f(s x) = f(x), so the gradient at s x is that at x divided by s; powers of two are exact.
    np.testing.assert_allclose(gradient(x * 2.0**66) * 2.0**66, gradient(x), rtol=1e-6)


def test_equal_schedules_do_not_retrace():
    @functools.partial(jax.jit, static_argnums=1)
    @chex.assert_max_traces(n=1)
    def update(x, schedule):
        return orthogonalize(x, schedule)

    update(jnp.ones((3, 4)), schedules.polar_express(5))
    update(jnp.zeros((3, 4)), schedules.polar_express(5))


def lowered(x, dtype):
    method = Method("standard")
    return jax.jit(functools.partial(orthogonalize, dtype=dtype, method=method)).lower(x).as_text()


def test_a_batch_is_three_matmuls_whatever_the_step_count():
    assert lowered(jnp.ones((2, 3, 4, 8)), jnp.bfloat16).count("stablehlo.dot_general") == 3


def test_matmul_precision():
    """On TPU and GPU a default float32 matmul is not float32; on CPU only the program shows it."""
    x = jnp.ones((3, 4))
    with jax.default_matmul_precision("highest"):
        half = lowered(x, jnp.bfloat16)
    assert "HIGHEST" not in half  # the slow algorithm would gain nothing
    products = [line for line in half.splitlines() if "dot_general" in line]
    assert len(products) == 3
    for product in products:  # 16-bit factors, 32-bit sums
        assert re.search(r"\(tensor<\w+xbf16>, tensor<\w+xbf16>\) -> tensor<\w+xf32>", product)
    with jax.default_matmul_precision("bfloat16"):
        single = lowered(x, jnp.float32)
    assert single.count("precision = [HIGHEST, HIGHEST]") == 3


def test_long_sums_do_not_lose_digits_in_bfloat16():
    x = gaussian(2, 30_000)
    out = orthogonalize(jnp.asarray(x, jnp.bfloat16), schedules.polar_express(8))
    # A bfloat16 running sum of 30,000 squares would stop growing at 256 of them. What is left is
    # the rounding of the last segment's three polynomials, each by up to half an eps of 0.008.
    assert orthogonality_error(out) < 0.015


# Orthogonality error


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (2, 3, 4, 7)])
def test_orthogonality_error(shape):
    x = gaussian(*shape)
    gram = x @ x.swapaxes(-1, -2) if shape[-2] < shape[-1] else x.swapaxes(-1, -2) @ x
    expected = np.linalg.norm(gram - np.eye(4), axis=(-2, -1)) / 2
    error = orthogonality_error(jnp.asarray(x, jnp.float32))
    chex.assert_shape(error, shape[:-2])
    np.testing.assert_allclose(error, expected, rtol=1e-5)  # a hundred float32 roundings


def test_orthogonality_error_of_known_matrices():
    assert orthogonality_error(jnp.eye(3, 5)) == 0
    assert orthogonality_error(jnp.zeros((3, 5))) == 1
    assert orthogonality_error(jnp.eye(3, dtype=jnp.bfloat16)).dtype == jnp.float32
    assert np.isnan(orthogonality_error(jnp.full((2, 2), jnp.nan)))


@slow
def test_bfloat16_rounding_bounds_what_converges():
    """docs/explanation/schedules.md: about 0.005, whichever schedule."""
    x = jnp.asarray(gaussian(64, 256), jnp.float32)
    for schedule in (schedules.polar_express(8), schedules.deepseek_v4()):
        assert 1e-3 < orthogonality_error(orthogonalize(x, schedule, method="standard")) < 1e-2
        assert 1e-3 < orthogonality_error(orthogonalize(x, schedule, method="gram")) < 2e-2
        assert orthogonality_error(in_float32(x, schedule)) < 1e-3


# Errors


UNSAFE = schedules.cans(safety=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((jnp.ones(3),), ValueError, r"x has shape \(3,\), but matrices \[\.\.\., n, m\]"),
        ((jnp.ones((0, 3)),), ValueError, r"x has shape \(0, 3\), with an axis of length zero"),
        ((jnp.ones((0, 3, 3)),), ValueError, "axis of length zero"),
        ((jnp.ones((3, 3), jnp.int32),), TypeError, r"x must be one of bfloat16, .*got int32"),
        ((jnp.ones((3, 3), jnp.complex64),), TypeError, "x must .*got complex64"),
        ((jnp.ones((3, 3)), schedules.jordan), TypeError, "is not a Schedule; pass for example"),
        ((jnp.ones((3, 3)), UNSAFE.coefficients), TypeError, r'Schedule\("mine"'),
        ((jnp.ones((3, 3)), UNSAFE), ValueError, r"'cans.*no margin.*bfloat16.*step 1 of 5.*1.01"),
    ],
)  # fmt: skip
def test_a_wrong_input_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=f"(orthogonalize|NewtonSchulz): .*{message}"):
        orthogonalize(*arguments)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (jnp.int8, "dtype must be one of bfloat16, float16, float32, float64, or None, got int8"),
        ("float99", "dtype must .*got 'float99'"),
        (
            jnp.float64,
            "dtype is float64, which JAX would silently run as float32; .*jax_enable_x64",
        ),
    ],
)
def test_a_wrong_dtype_says_what_is_wrong(dtype, message):
    with pytest.raises(TypeError, match=message):
        orthogonalize(jnp.ones((3, 3)), dtype=dtype)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"schedule": "jordan"}, TypeError, "schedule='jordan' is not a Schedule; pass for"),
        ({"schedule": schedules.jordan}, TypeError, "is not a Schedule; pass for"),
        ({"dtype": "int8"}, TypeError, "dtype must be one of bfloat16, .*got int8"),
        ({"dtype": 16}, TypeError, "dtype must .*got 16"),
        ({"method": "newton"}, TypeError, 'method=\'newton\'; use "auto", "standard",'),
        ({"schedule": UNSAFE}, ValueError, "no margin for rounding in bfloat16.*larger safety"),
    ],
)
def test_a_wrong_newton_schulz_raises_when_built(fields, error, message):
    with pytest.raises(error, match=f"NewtonSchulz: .*{message}"):
        NewtonSchulz(**fields)


def test_newton_schulz_is_a_static_argument():
    spellings = [NewtonSchulz(dtype=dtype) for dtype in ("float32", jnp.float32, np.dtype("f4"))]
    assert len({hash(how) for how in spellings}) == 1
    assert len(set(spellings)) == 1 and spellings[0] != NewtonSchulz()


def test_newton_schulz_says_what_is_not_enabled_when_used():
    how = NewtonSchulz(dtype="float64")
    with pytest.raises(TypeError, match=r"dtype is float64, which JAX would .*jax_enable_x64"):
        how.for_matrices(jnp.ones((3, 3)))


def test_a_schedule_without_margin_runs_where_rounding_is_small():
    x = with_spectrum(np.geomspace(1, 0.15, 8), columns=12)
    out = in_float32(jnp.asarray(x, jnp.float32), UNSAFE)
    atol = tolerance(x, UNSAFE, "float32")
    np.testing.assert_allclose(out, reference(x, UNSAFE), rtol=0, atol=atol)


def test_orthogonality_error_checks_its_input_too():
    with pytest.raises(ValueError, match=r"orthogonality_error: x has shape \(3,\)"):
        orthogonality_error(jnp.ones(3))


@pytest.mark.parametrize("method", ["newton", None, 3])
def test_a_wrong_method_says_what_is_wrong(method):
    with pytest.raises(TypeError, match=r'use "auto", "standard", "gram" or a muonclip_jax.Method'):
        orthogonalize(jnp.ones((2, 3)), method=method)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iteration": "auto"}, 'iteration must be one of "standard", "gram", got .auto'),
        (
            {"iteration": "gram", "smallest_block": 0},
            "smallest_block must be a whole .*got 0",
        ),
        ({"iteration": "gram", "smallest_block": 2.0}, r"smallest_block must be .*got 2\.0"),
        ({"iteration": "gram", "chunk_entries": None}, "chunk_entries must be a whole .*got None"),
        (
            {"iteration": "gram", "kernel": "cuda"},
            'kernel must be one of "xla", "pallas"',
        ),
        *(
            ({"iteration": "gram", "lean": True} | more, "lean=True goes with whole products .*")
            for more in ({"smallest_block": 64}, {"row_major": True}, {"kernel": "pallas"})
        ),
    ],
)
def test_a_wrong_method_raises_when_built(fields, message):
    with pytest.raises(ValueError, match=message):
        Method(**fields)


# What "auto" chooses


@pytest.mark.parametrize(
    ("n", "m", "expected"),
    [
        (64, 95, "standard"),
        (64, 96, "gram"),
        (96, 64, "gram"),
        (63, 252, "standard"),  # few rows, whose rounding errors do not average out
        (4, 6, "standard"),
    ],
)
def test_auto_goes_by_shape(n, m, expected):
    def program(method):
        run = functools.partial(orthogonalize, method=method)
        return jax.jit(run).lower(jax.ShapeDtypeStruct((n, m), jnp.float32)).as_text()

    other = {"standard": "gram", "gram": "standard"}[expected]
    assert program(expected) == program("auto") != program(other)


def test_each_backend_has_its_products():
    """On CPU large symmetric products are cut, and factors copied; elsewhere not."""
    x = jax.ShapeDtypeStruct((1024, 2048), jnp.float32)
    traced = jax.jit(orthogonalize).trace(x)
    cpu, tpu = (traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu"))
    halves = "tensor<512x512xf32>"
    assert halves in cpu
    assert halves not in tpu
    assert "LayoutConstraint" in cpu
    assert "LayoutConstraint" not in tpu


def test_steps_between_restarts_grow_less_after_the_first():
    def lengths(schedule):
        return [len(some) for some in steps_between_restarts(schedule, "bfloat16")]

    default = schedules.polar_express(5)
    assert lengths(default) == [2, 2, 1]
    assert lengths(schedules.polar_express(5, lower=2e-3)) == [2, 2, 1]
    assert lengths(schedules.polar_express(8)) == [2, 2, 2, 2]
    assert lengths(schedules.polar_express(4)) == [2, 1, 1]  # nothing mends the last
    assert lengths(schedules.jordan(5)) == [2, 2, 1]
    in_float32 = steps_between_restarts(schedules.you(), "float32")
    assert sum(in_float32, ()) == schedules.you().coefficients
    first, second, third = steps_between_restarts(default, "bfloat16")
    assert (*first, second[1]) == tuple(default.coefficients[i] for i in (0, 1, 3))
    assert second[0][0] == default.coefficients[2][0] / 1.2
    assert third[0][0] == default.coefficients[4][0] / 1.2


@pytest.mark.slow
def test_the_kernel_is_for_accelerators_only():
    x = jnp.asarray(gaussian(3, 5), jnp.float32)
    methods = Method("standard", kernel="pallas"), Method("standard")
    (value, gradient), (expected_value, expected_gradient) = (
        jax.value_and_grad(lambda x, how=how: (in_float32(x, method=how) ** 3).sum())(x)
        for how in methods
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    method = Method("gram", kernel="pallas")
    plain = in_float32(x, method=Method("gram"))
    np.testing.assert_allclose(in_float32(x, method=method), plain, atol=1e-6)
    lowered_for_tpu = (
        jax.jit(functools.partial(orthogonalize, method=method))
        .trace(jax.ShapeDtypeStruct((1024, 1024), jnp.float32))
        .lower(lowering_platforms=("tpu",))
    )
    assert "tpu_custom_call" in lowered_for_tpu.as_text()


@pytest.mark.parametrize("entries", [1, 12, 13, 24, 100])
def test_chunks_of_a_stack_are_the_stack(entries):
    """Five matrices of six entries: by ones, twos with one left, fours with one left, all."""
    x = jnp.arange(30.0).reshape(5, 2, 3)
    seen = []

    def run(part):
        seen.append(len(part))
        return 2 * part

    np.testing.assert_array_equal(in_chunks(run, x, entries), 2 * x)
    assert max(seen) == min(5, max(1, entries // 6))


def test_what_is_summed_of_a_triangle_is_that_of_the_matrix():
    """Lower block triangles in each other: the blocks beside the diagonal count twice."""
    x = np.random.default_rng(0).standard_normal((2, 8, 8)).astype(np.float32)
    x = x + x.swapaxes(1, 2)

    def triangle(x):
        half = x.shape[1] // 2
        if half < 2:
            return jnp.asarray(x)
        return triangle(x[:, :half, :half]), x[:, half:, :half], triangle(x[:, half:, half:])

    wanted = np.trace(x, axis1=1, axis2=2)
    np.testing.assert_allclose(trace(triangle(x))[:, 0, 0], wanted, rtol=1e-5)
    np.testing.assert_allclose(sum_of_squares(triangle(x))[:, 0, 0], (x**2).sum((1, 2)), rtol=1e-5)
