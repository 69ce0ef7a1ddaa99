import dataclasses
import functools
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonclip_jax._orthogonalize import schedules
from muonclip_jax._orthogonalize.schedules import Schedule

# arXiv:2505.16932, algorithm 1 with lower bound 1e-3, before the safety factor.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
CONVERGED = (1.875, -1.25, 0.375)
# A published set for almost-orthogonal-layer preconditioning that is negative near σ = 1.
NEGATIVE_AT_ONE = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)


def test_generator_reproduces_the_published_table():
    coefficients = schedules.polar_express(8, lower=1e-3, safety=1).coefficients
    # The table was computed with fewer digits in its seventh row; exact arithmetic differs
    # from it by 1.8e-11 there.
    np.testing.assert_allclose(coefficients, POLAR_EXPRESS, rtol=0, atol=1e-10)


def test_a_tiny_lower_bound_fills_all_that_may_be_filled():
    """Up to 8e-12 below 2, where rounding begins."""
    assert 2 - 1e-11 < schedules.polar_express(1, lower=1e-12, safety=1).top < 2 + 1e-9


def test_from_where_on_each_schedule_is_made_for():
    """As their authors say, or as far as they bring 1e-2 to 1 at all."""
    named = (schedules.jordan(), schedules.you(), schedules.aol(), schedules.cans())
    assert [schedule.lower for schedule in named] == [1e-2, 1e-2, 1e-2, 1e-3]


def test_safety_widens_every_step_short_of_convergence():
    plain = schedules.polar_express(10, lower=1e-3, safety=1)
    safe = schedules.polar_express(10, lower=1e-3, safety=1.01)
    assert (plain.norm_factor, safe.norm_factor) == (1, 1.01)
    np.testing.assert_allclose(
        safe.coefficients[:7], np.divide(plain.coefficients[:7], (1.01, 1.01**3, 1.01**5))
    )
    assert safe.coefficients[7:] == (CONVERGED,) * 3


@settings(deadline=None)
@given(lower=st.floats(0.025, 0.99))
def test_one_generated_step_equioscillates(lower):
    """Chebyshev's criterion: the error of the best of three coefficients takes its maximum with
    alternating sign four times, and no other quintic's does."""
    sigma = np.linspace(lower, 1, 200_001)
    error = 1 - schedules.polar_express(1, lower, safety=1).apply(sigma)
    worst = np.abs(error).max()
    # The grid is so fine that it misses an extremum by less than 1e-9 of its value; p itself is
    # rounded to 1e-15.
    extremal = np.abs(error) >= worst - 1e-8 * worst - 1e-15
    signs = np.sign(error[extremal])
    assert 1 + np.count_nonzero(np.diff(signs)) == 4


@settings(deadline=None)
@given(lower=st.floats(0.025, 0.99))
def test_one_cubic_equioscillates(lower):
    """The same for the best of two coefficients: three times."""
    sigma = np.linspace(lower, 1, 200_001)
    error = 1 - schedules.cubic(1, lower, safety=1).apply(sigma)
    worst = np.abs(error).max()
    signs = np.sign(error[np.abs(error) >= worst - 1e-8 * worst - 1e-15])
    assert 1 + np.count_nonzero(np.diff(signs)) == 3


@pytest.mark.parametrize("lower", [0.5, 0.1, 1e-3, 1e-9])
def test_cubics_converge_and_keep_to_their_widths(lower):
    schedule = schedules.cubic(60, lower)
    assert schedule.worst_error() < 1e-12 and schedule.coefficients[-1] == (1.5, -0.5, 0)
    assert all(c == 0 for _, _, c in schedule.coefficients)
    plain = schedules.cubic(3, lower, safety=1).coefficients
    widened = np.divide(plain, (1.01, 1.01**3, 1.01**5))
    np.testing.assert_allclose(schedules.cubic(3, lower).coefficients, widened, rtol=1e-14)
    errors = [schedules.cubic(steps, lower, safety=1).worst_error() for steps in range(1, 40)]
    assert (np.diff(errors) <= 1e-12).all()


@pytest.mark.slow
@settings(deadline=None)
@given(exponent=st.floats(-14, -0.01), steps=st.integers(1, 40))
def test_generator_takes_any_lower_bound_and_step_count(exponent, steps):
    lower = 10**exponent
    schedule = schedules.polar_express(steps, lower)
    assert len(schedule.coefficients) == steps
    # Each step multiplies the smallest singular value by more than 1.8 until it reaches 1, and
    # the first ones by about 4, so 40 steps are enough from 1e-14 on.
    if steps == 40:
        assert schedule.worst_error() < 1e-12


@pytest.mark.slow
@settings(deadline=None)
@given(exponent=st.floats(-5, -0.1), steps=st.integers(1, 12))
def test_one_more_generated_step_is_never_worse(exponent, steps):
    lower = 10**exponent
    errors = [schedules.polar_express(n, lower, safety=1).worst_error() for n in (steps, steps + 1)]
    assert errors[1] <= errors[0] + 1e-12  # rounding, once converged


# From the papers' coefficients in float64: slope at 0, worst error on [1e-3, 1] and [1e-2, 1].
ACCURACY = {
    schedules.jordan(): (485, 0.530, 0.318),
    schedules.you(): (493, 0.525, 0.032),
    schedules.polar_express(5, lower=1e-3): (976, 0.154, 0.130),
    schedules.cans(safety=1): (1049, 0.120, 0.120),
    schedules.aol(safety=1): (147, 0.853, 0.059),
    schedules.polar_express(8, lower=1e-3): (6363, 0, 0),
    schedules.deepseek_v4(): (79263, 5e-4, 5e-4),
    schedules.cubic(): (601, 0.446, 0.001),
}


@pytest.mark.parametrize(
    ("schedule", "expected"), ACCURACY.items(), ids=lambda v: getattr(v, "name", "")
)
def test_accuracy(schedule, expected):
    slope, worst_error, worst_error_of_large = expected
    assert schedule.slope == pytest.approx(slope, abs=0.5)
    # The figures are rounded to three digits.
    assert schedule.worst_error(1e-3) == pytest.approx(worst_error, abs=6e-4)
    assert schedule.worst_error(1e-2) == pytest.approx(worst_error_of_large, abs=6e-4)
    assert schedule.worst_error() == schedule.worst_error(schedule.lower)


@pytest.mark.parametrize("schedule", ACCURACY, ids=lambda s: s.name)
def test_worst_error_has_four_digits(schedule):
    sigma = np.concatenate([np.geomspace(1e-3, 1, 500_001), np.linspace(1e-3, 1, 500_001)])
    finer = np.abs(1 - schedule.apply(sigma)).max()
    assert schedule.worst_error(1e-3) == pytest.approx(finer, rel=1e-4, abs=1e-12)


def test_apply_is_the_recursion():
    schedule = Schedule("two", ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0)))
    y = 2 * 0.3 - 1.5 * 0.3**3 + 0.5 * 0.3**5
    assert schedule.apply(0.3) == pytest.approx(1.5 * y - 0.5 * y**3, rel=1e-15)
    assert schedule.apply([[0.0, 1.0]]).shape == (1, 2)
    assert schedule.apply(0.0) == 0


def test_schedules_are_values():
    assert schedules.polar_express(5) == schedules.polar_express(np.int64(5))
    assert hash(schedules.polar_express(5)) == hash(schedules.polar_express(5))
    assert schedules.polar_express(5) != schedules.polar_express(6)
    assert schedules.jordan(np.int64(5)) == schedules.jordan(5)
    from_arrays = Schedule("mine", np.array([[2, -1.5, 0.5]]), source="a notebook")
    assert from_arrays.coefficients == ((2.0, -1.5, 0.5),)
    hash(from_arrays)
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_arrays.norm_factor = 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coefficients": ()}, "coefficients=.*at least one step"),
        ({"coefficients": (1.5, -0.5, 0.0)}, "at least one step, each of three numbers"),
        ({"coefficients": ((1.5, -0.5),)}, "each of three numbers"),
        ({"coefficients": (("a", "b", "c"),)}, "each of three numbers"),
        ({"coefficients": ((1.5, -0.5, 0), (1.5, np.nan, 0))}, "step 2 is not finite"),
        ({"norm_factor": 0.99}, "norm_factor must be finite and at least 1.*got 0.99"),
        ({"norm_factor": np.inf}, "norm_factor must .*got inf"),
        ({"lower": 0.0}, "lower must be strictly between 0 and 1.*got 0.0"),
        ({"lower": 1.0}, "lower must .*got 1.0"),
        (
            {"normalization": "spectral"},
            'normalization must be .*"schatten4", "aol"',
        ),
        # Jordan's signs swapped: negative from the smallest σ on.
        ({"coefficients": ((-3.4445, 4.775, -2.0315),)}, r"step 1 of 1.*σ = 1e-12.*p\(σ\) = -3.4"),
        # Unbounded: the matrix would blow up.
        ({"coefficients": ((3.0, 0.0, 0.0),) * 3}, r"step 1 of 3.*\(0, 2\]"),
        ({"coefficients": ((1e300, 1e300, 1e300),) * 9}, "step 1 of 9"),
    ],
)
def test_a_malformed_schedule_says_what_is_wrong(fields, message):
    fields = {"coefficients": ((1.5, -0.5, 0.0),)} | fields
    with pytest.raises(ValueError, match=f"(?s)schedule 'mine'.*{message}"):
        Schedule("mine", **fields)


@pytest.mark.parametrize("steps", [4, 5])
def test_coefficients_that_turn_the_matrix_around_are_refused(steps):
    coefficients = (NEGATIVE_AT_ONE * 2)[:steps]
    with pytest.raises(ValueError, match=rf"step 1 of {steps}, .*p\(σ\) = -.*order or"):
        Schedule("aol", coefficients, normalization="aol")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: schedules.jordan(0), "steps must be a whole number of at least 1, got 0"),
        (lambda: schedules.jordan(True), "steps must .*got True"),
        (lambda: schedules.polar_express(2.0), "steps must .*got 2.0"),
        (lambda: schedules.polar_express(-1), "steps must .*got -1"),
        (lambda: schedules.polar_express(lower=0), "polar_express: lower must .*got 0"),
        (lambda: schedules.polar_express(lower=1), "polar_express: lower must .*got 1"),
        (
            lambda: schedules.polar_express(safety=0.9),
            "safety must be finite and at least 1",
        ),
        (lambda: schedules.cubic(lower=0), "cubic: lower must .*got 0"),
        (lambda: schedules.you().worst_error(2), "worst_error: lower must .*got 2"),
    ],
)
def test_a_wrong_argument_says_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


DOCS = pathlib.Path(__file__).parents[2] / "docs/explanation/schedules.md"


def documented():
    """The rows of the page's table whose first cell is a schedule's constructor."""
    rows = [line.strip("| \n").split("|") for line in DOCS.read_text("utf-8").splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [row for row in cells if re.fullmatch(r"`\w+\(.*\)`", row[0])]


def equal_as_printed(cell: str, value: float) -> bool:
    """Whether `value` rounds to what the cell says."""
    decimals = len(cell.partition(".")[2])
    return abs(float(cell) - value) <= 0.501 * 10**-decimals


NORMS = {"frobenius": ("Frobenius", 2), "schatten4": ("Schatten-4", 4)}


@functools.cache
def gaussian_spectrum(shape, normalization):
    x = np.random.default_rng(0).standard_normal(shape)
    if normalization == "aol":
        x /= np.sqrt(np.abs(x @ x.T).sum(axis=1, keepdims=True))
        return np.linalg.svd(x, compute_uv=False)
    sigma = np.linalg.svd(x, compute_uv=False)
    return sigma / np.linalg.norm(sigma, NORMS[normalization][1])


def gaussian_error(schedule, shape):
    """‖OOᵀ − I‖_F / √n in exact arithmetic, for a Gaussian matrix."""
    sigma = gaussian_spectrum(shape, schedule.normalization) / schedule.norm_factor
    return np.sqrt(np.mean((schedule.apply(sigma) ** 2 - 1) ** 2))


@pytest.mark.slow
@pytest.mark.parametrize("row", documented(), ids=lambda row: row[0].strip("`"))
def test_documented_accuracy(row):
    name, steps, norm, factor, slope, worst, worst_of_large, wide, square, source = row
    schedule = eval(name.strip("`"), vars(schedules))
    assert int(steps) == len(schedule.coefficients)
    assert norm == ("AOL" if schedule.normalization == "aol" else NORMS[schedule.normalization][0])
    assert factor == f"{schedule.norm_factor:g}"
    assert equal_as_printed(slope, schedule.slope)
    assert equal_as_printed(worst, schedule.worst_error(1e-3))
    assert equal_as_printed(worst_of_large, schedule.worst_error(1e-2))
    assert equal_as_printed(wide, gaussian_error(schedule, (512, 2048)))
    assert equal_as_printed(square, gaussian_error(schedule, (512, 512)))
    assert schedule.source in source


def test_every_schedule_is_documented():
    documented_names = {re.match(r"`(\w+)", row[0])[1] for row in documented()}
    assert documented_names == {
        name
        for name, value in vars(schedules).items()
        if getattr(value, "__annotations__", {}).get("return") is Schedule
    }


def test_top_is_the_largest_value_and_repr_tells_a_high_one():
    sigma = np.linspace(0, 1, 400_001)
    for schedule in (schedules.polar_express(3), schedules.jordan(), schedules.aol()):
        assert schedule.top == pytest.approx(schedule.apply(sigma).max(), abs=1e-5)
    assert "top=1.655: σ can end so far above 1" in repr(schedules.polar_express(3))
    assert "top=" not in repr(schedules.polar_express(4))  # 1.21


def test_only_cans_takes_large_singular_values_nearly_to_zero():
    """docs/explanation/schedules.md: there the rounding of 16 bits turns directions around."""

    def smallest_share(schedule):
        sigma = np.linspace(0.05, 1, 20_001)
        shares = [sigma]
        for a, b, c in schedule.coefficients:
            sigma = np.abs(a * sigma + b * sigma**3 + c * sigma**5)
            shares.append(sigma / sigma.max())
        return np.min(shares[1:])

    others = (schedules.polar_express(), schedules.polar_express(8), schedules.jordan())
    others += (schedules.you(), schedules.aol(), schedules.deepseek_v4(), schedules.cubic())
    assert min(map(smallest_share, others)) > 0.09
    assert smallest_share(schedules.cans()) < 0.0043
