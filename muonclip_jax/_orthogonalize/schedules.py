"""Newton–Schulz schedules: which odd quintic, or cubic, is applied at which step.

One step maps every singular value σ of the matrix to aσ + bσ³ + cσ⁵ and leaves the singular
vectors alone, so a schedule is a composed scalar polynomial p, and all that can be said about
its accuracy is read off p. σ always means a singular value *after* the schedule's normalization
(at most `1 / norm_factor`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike

from muonclip_jax._core.options import check_choice, check_count, check_number, check_text
from muonclip_jax._core.pictures import curve
from muonclip_jax._core.tables import Sheet, as_html

Step = tuple[float, float, float]
Normalization = Literal["frobenius", "schatten4", "aol"]

# The odd quintic with value 1 and two vanishing derivatives at 1: |1 − p(σ)| ≈ 2.5 |1 − σ|³.
_CONVERGED: Step = (15 / 8, -10 / 8, 3 / 8)
# On intervals narrower than this, `_CONVERGED` is the optimal quintic to double precision.
_CONVERGED_WIDTH = 5e-6
# The Polar Express authors' cushion: the first steps treat singular values below this fraction
# of the largest one as if they were this large, which keeps p away from zero on the interval.
_CUSHION = 0.02407327424182761
# Where singular values must stay: a schedule generated for a tiny `lower` fills (0, 2].
_LARGEST = 2 + 1e-9
# By how much rounding may take σ above the exact top.
_ROUNDING = 0.1
# The same for cubics: |1 − p(σ)| ≈ 1.5 (1 − σ)², and the width is narrower by that power.
_CONVERGED_CUBIC: Step = (3 / 2, -1 / 2, 0.0)
_CONVERGED_CUBIC_WIDTH = 1e-8
# What `repr` says of a schedule: that its values pass this.
_FAR = 1.3


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A normalization and the quintics that follow it, checked when built.

    Frozen and hashable: close over it or pass it as a static jit argument.

    Attributes:
        name: Stands in error messages and tables.
        coefficients: One (a, b, c) for each step. Where c is 0 a step takes a product less.
        norm_factor: The matrix is divided by this times its norm, so that rounding cannot push
            a singular value past the end of the interval the coefficients are made for.
        lower: The smallest normalized singular value the schedule is meant to bring near 1.
        normalization: `"frobenius"` divides by the Frobenius norm (Σσ²)^½, `"schatten4"` by the
            Schatten-4 norm (Σσ⁴)^¼, which is no larger and bounds the largest singular value as
            well: more of them start near 1. `"aol"` divides row i of the smaller side by
            sqrt(Σ_j |XXᵀ|_ij), which brings the singular values close together but rotates the
            singular vectors: the result approximates the polar factor of the rescaled matrix.
        source: Where the coefficients were published.

    Raises:
        ValueError: From the constructor, if the fields are malformed or if some σ in (0, 1]
            leaves (0, 2] at some step. Where p is negative, the result would point *against* the
            polar factor; above 2, σ is farther from 1 than zero is, and soon blows up.

    Example:
        >>> mine = mc.Schedule("mine", ((2.0, -1.5, 0.5),) * 6, lower=0.1)
        >>> mine.slope, mine.worst_error() < 1e-3
        (64.0, True)
    """

    name: str
    coefficients: tuple[Step, ...]
    norm_factor: float = 1.0
    lower: float = 1e-3
    normalization: Normalization = "frobenius"
    source: str = "unpublished"

    def __post_init__(self):
        check_text("Schedule: name", self.name)
        check_text("Schedule: source", self.source)
        object.__setattr__(self, "coefficients", _as_steps(self.name, self.coefficients))
        owner = f"schedule {self.name!r}"
        check_choice(f"{owner}: normalization", self.normalization, get_args(Normalization))
        # Below 1 the largest singular value can leave the interval (0, 1].
        _check_margin(f"{owner}: norm_factor", self.norm_factor)
        _check_lower(owner, self.lower)
        if escape := self.escape():
            raise ValueError(
                f"schedule {self.name!r}: {escape}. Fix the coefficients, their order or their "
                "number (steps made to follow one another cannot be repeated or mixed with "
                "another set's), or raise the safety factor they were generated with"
            )

    @functools.cache  # noqa: B019 (schedules are few and small)
    def escape(self, rounding: float = 0.0) -> str | None:
        """Finds where a singular value leaves (0, 2], or rounding takes it 0.1 above `top`.

        Args:
            rounding: Relative error that each step may add to σ: the eps of the dtype it runs in.

        Returns:
            Step, σ and p(σ) in words; None if every σ from (0, 1] stays inside.
        """
        p = np.zeros(1)
        high = 1 + rounding
        for number, step in enumerate(self.coefficients, start=1):
            sigma = high * _grid(1e-12)
            with np.errstate(over="ignore", invalid="ignore"):
                p = _quintic(step, sigma)
            outside = ~((p > 0) & (p <= _LARGEST))  # so written, NaN is outside
            if outside.any():
                at = int(np.argmax(outside))
                return (
                    f"step {number} of {len(self.coefficients)}, (a, b, c) = {step}, turns "
                    f"σ = {sigma[at]:.4g} into p(σ) = {p[at]:.4g}, outside (0, 2]"
                )
            high = p.max() * (1 + rounding)  # p is continuous, so its values fill (0, p.max()]
        if rounding and p.max() > self.top + _ROUNDING:
            return f"σ can end at {p.max():.4g}, where exactly it ends at {self.top:.4g} at most"
        return None

    def apply(self, sigma: ArrayLike) -> np.ndarray:
        """The exact effect on singular values, in float64.

        Args:
            sigma: Normalized singular values, any shape, in [0, 1].

        Returns:
            p(σ), what exact arithmetic would make of them; same shape.
        """
        sigma = np.asarray(sigma, np.float64)
        for step in self.coefficients:
            sigma = _quintic(step, sigma)
        return sigma

    def __repr__(self) -> str:
        far = f", top={self.top:.4g}: σ can end so far above 1" if self.top > _FAR else ""
        return f"Schedule({self.name!r}, {len(self.coefficients)} steps, {self._accuracy}{far})"

    def _repr_html_(self) -> str:
        rows = [
            (str(number), *(f"{x:.6g}" for x in step))
            for number, step in enumerate(self.coefficients, start=1)
        ]
        caption = (
            f"{self.name}: {self._accuracy}; p'(0) = {self.slope:.4g}; divided by "
            f"{self.norm_factor:g} × the norm ({self.normalization}); {self.source}"
        )
        table = Sheet(("step", "a", "b", "c"), rows, caption=caption, numbers=("a", "b", "c"))
        sigma = np.geomspace(self.lower / 10, 1, 200)
        return as_html([table.html()], curve(sigma, self.apply(sigma), "p(σ) over σ"))

    @property
    def _accuracy(self) -> str:
        return f"|1 − p(σ)| ≤ {self.worst_error():.2g} for σ in [{self.lower:g}, 1]"

    @functools.cached_property
    def top(self) -> float:
        """The largest p(σ) for σ in [0, 1]. Rounding adds 0.1 at most (`escape`)."""
        high = 1.0
        for step in self.coefficients:
            high = float(_quintic(step, high * _grid(1e-12)).max())  # its values fill (0, high]
        return high

    @property
    def slope(self) -> float:
        """p'(0): by how much the smallest singular values grow."""
        return math.prod(a for a, _, _ in self.coefficients)

    def worst_error(self, lower: float | None = None) -> float:
        """The largest |1 − p(σ)| for σ in [lower, 1].

        Args:
            lower: Where to start, in (0, 1); the schedule's own `lower` by default.

        Returns:
            The maximum over a grid dense enough for four digits.
        """
        lower = self.lower if lower is None else lower
        _check_lower("worst_error", lower)
        return float(np.abs(1 - self.apply(_grid(lower))).max())


def jordan(steps: int = 5) -> Schedule:
    """Keller Jordan's quintic, the same at every step: fast growth, singular values in 0.7–1.2.

    Args:
        steps: How often it is applied, at least 1.

    Example:
        >>> round(mc.schedules.jordan().slope)
        485
    """
    steps = _whole(steps)
    return Schedule(
        name=f"jordan({steps})",
        coefficients=((3.4445, -4.7750, 2.0315),) * steps,
        lower=1e-2,
        source="https://kellerjordan.github.io/posts/muon/",
    )


def you() -> Schedule:
    """You Jiacheng's five quintics, known as "quintic" in Megatron and "dion" in Optax.

    Example:
        >>> round(mc.schedules.you().worst_error(1e-2), 3)
        0.032
    """
    return Schedule(
        name="you",
        coefficients=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        lower=1e-2,
        source="https://github.com/KellerJordan/modded-nanogpt",
    )


def polar_express(
    steps: int = 5,
    lower: float = 3e-3,
    safety: float = 1.01,
    normalization: Normalization = "schatten4",
) -> Schedule:
    """The minimax composition for singular values in [lower, 1], for any `lower`.

    Each step is the odd quintic with the least max |1 − p(σ)| on the interval that the steps
    before it have left, found by Remez exchange: milliseconds, once for each (steps, lower).

    Args:
        steps: Number of quintics, at least 1. Steps that come after convergence are
            (15/8, −10/8, 3/8), which restores orthogonality lost to rounding. Too few for a
            small `lower` leave σ above 1: `polar_express(3)` up to 1.66 (`Schedule.top`).
        lower: The smallest normalized singular value to bring to 1, in (0, 1). A smaller one
            needs more steps for the same error.
        safety: Margin against rounding, at least 1: the norm and every step short of convergence
            allow for singular values this factor too large. Without any (`safety=1`), rounding
            at σ = 1 grows at every step, and a `lower` under about 1e-9 can be refused.
        normalization: As in `Schedule`. `"frobenius"` is the publication's; `"schatten4"` brings
            every singular value nearer to 1 and costs nothing.

    Example:
        >>> exact = mc.schedules.polar_express(steps=16, lower=1e-6)
        >>> exact.worst_error(1e-6) < 1e-6
        True

    Source: Amsel, Persson, Musco, Gower, "The Polar Express", arXiv:2505.16932, algorithm 1.
    """
    _check_lower("polar_express", lower)
    steps, lower, safety = _whole(steps), float(lower), _safety("polar_express", safety)
    return Schedule(
        name=f"polar_express({steps}, lower={lower:g})",
        coefficients=_composition(steps, lower, safety, _optimal_quintic),
        norm_factor=safety,
        lower=lower,
        normalization=normalization,
        source="arXiv:2505.16932",
    )


def cubic(
    steps: int = 8,
    lower: float = 3e-3,
    safety: float = 1.01,
    normalization: Normalization = "schatten4",
) -> Schedule:
    """The minimax composition of cubics for singular values in [lower, 1]: `polar_express`, c = 0.

    A cubic step is σ ↦ aσ + bσ³. It needs no (XXᵀ)²: 4n²m FLOPs for a matrix [n, m] in place of
    4n²m + 2n³. But it lets small singular values grow by 2.6 at most, a quintic by 4.1. Eight
    steps, the default, are as accurate as `polar_express(5)` and cost 7% more FLOPs on square
    matrices, 26% more at m = 4n; with fewer steps of both it is the same
    (docs/explanation/schedules.md). So it is no faster at any shape: it is here to repeat runs with
    cubics, and for kernels that have no symmetric product.

    On [l, u] the best a, b are in closed form: with s = l² + lu + u²,

        b = -2 / (2 (s/3)^(3/2) + lu(l + u)),    a = -b s

    Args:
        steps: Number of cubics, at least 1.
        lower: As in `polar_express`.
        safety: As in `polar_express`.
        normalization: As in `Schedule`.

    Example:
        >>> mc.schedules.cubic().coefficients[0][2]
        0.0
        >>> mc.schedules.cubic().worst_error() < 0.01
        True

    Source: Huang, "How Much Orthogonalization Does Muon Need?", arXiv:2606.00371, trains with five
    cubics of its own, relaxed to a wider band around 1; the closed form is of Grishina, Smirnov,
    Rakhuba, arXiv:2506.10935.
    """
    _check_lower("cubic", lower)
    steps, lower, safety = _whole(steps), float(lower), _safety("cubic", safety)
    return Schedule(
        name=f"cubic({steps}, lower={lower:g})",
        coefficients=_composition(steps, lower, safety, _optimal_cubic),
        norm_factor=safety,
        lower=lower,
        normalization=normalization,
        source="arXiv:2606.00371, arXiv:2506.10935",
    )


def cans(safety: float = 1.01) -> Schedule:
    """Five Chebyshev-type quintics for singular values in about [1e-3, 1].

    For float32. The first step takes singular values near 0.83 of the norm to nearly 0, where the
    rounding of 16 bits can turn their sign, and so the direction of the result, around.

    Args:
        safety: Margin against rounding, at least 1, as in `polar_express`. It was published with
            none (`safety=1`), which blows up for some matrices in bfloat16.

    Example:
        >>> mc.schedules.cans().norm_factor
        1.01
    """
    published = (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    )
    safety = _safety("cans", safety)
    return Schedule(
        name=f"cans(safety={safety:g})",
        coefficients=tuple(widen(step, safety) for step in published),
        norm_factor=safety,
        lower=1e-3,
        source="arXiv:2506.10935",
    )


def aol(safety: float = 1.01) -> Schedule:
    """Turbo-Muon: almost-orthogonal-layer preconditioning, then only four steps.

    The result approximates the polar factor of the rescaled matrix, not of the matrix itself.

    Args:
        safety: Margin against rounding, at least 1, as in `polar_express`. It was published with
            none (`safety=1`), which in bfloat16 ends at 1.2 for some matrices of few rows, not at
            1.05, and is refused there.

    Example:
        >>> len(mc.schedules.aol().coefficients)
        4
    """
    published = (
        (4.6051, -9.6552, 5.6769),
        (4.7505, -6.0861, 2.1790),
        (2.7763, -2.3190, 0.5523),
        (2.4231, -2.2861, 0.8193),
    )
    safety = _safety("aol", safety)
    return Schedule(
        name=f"aol(safety={safety:g})",
        coefficients=tuple(widen(step, safety) for step in published),
        norm_factor=safety,
        lower=1e-2,
        normalization="aol",
        source="arXiv:2512.04632",
    )


def deepseek_v4() -> Schedule:
    """DeepSeek-V4's ten steps: eight of Jordan's for growth, two that converge to 1.

    Example:
        >>> mc.schedules.deepseek_v4().worst_error() < 1e-3
        True
    """
    return Schedule(
        name="deepseek_v4",
        coefficients=((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2,
        lower=1e-3,
        source="DeepSeek-V4 technical report",
    )


def _as_steps(name: str, coefficients: ArrayLike) -> tuple[Step, ...]:
    try:
        table = np.asarray(coefficients, np.float64)
    except (TypeError, ValueError):
        table = np.empty(0)
    if table.size == 0 or table.shape[1:] != (3,):
        raise ValueError(
            f"schedule {name!r}: coefficients={coefficients!r}; "
            "give at least one step, each of three numbers (a, b, c)"
        )
    steps = cast(list[list[float]], table.tolist())
    for number, step in enumerate(steps, start=1):
        if not np.isfinite(step).all():
            raise ValueError(f"schedule {name!r}: step {number} is not finite: {step}")
    return tuple((a, b, c) for a, b, c in steps)


def _check_lower(owner: str, lower: float):
    wanted = (
        "strictly between 0 and 1, the smallest normalized singular value to bring near 1 (1e-3 "
        "suits bfloat16)"
    )
    check_number(f"{owner}: lower", lower, lambda x: 0 < x < 1, wanted)


def _whole(steps: int) -> int:
    check_count("steps", steps)
    return int(steps)


def _check_margin(name: str, value: float):
    wanted = "finite and at least 1 (1.01 is usual)"
    check_number(name, value, lambda x: 1 <= x < math.inf, wanted)


def _safety(owner: str, safety: float) -> float:
    _check_margin(f"{owner}: safety", safety)
    return float(safety)


def _grid(lower: float) -> np.ndarray:
    """Logarithmic and linear: a composed quintic wiggles near 0 and near 1."""
    return np.concatenate([np.geomspace(lower, 1, 20_000), np.linspace(lower, 1, 20_000)])


def widen(step: Step, safety: float) -> Step:
    """The polynomial p(σ / safety)."""
    a, b, c = step
    return a / safety, b / safety**3, c / safety**5


def is_cubic(step: Step) -> bool:
    """Whether it needs no fifth power of the matrix."""
    return step[2] == 0


@functools.cache
def _composition(
    steps: int, lower: float, safety: float, best: Callable[[float, float], Step]
) -> tuple[Step, ...]:
    """The optimal composition, with room for rounding at every step short of convergence."""
    return tuple(
        step if step in (_CONVERGED, _CONVERGED_CUBIC) else widen(step, safety)
        for step in _optimal_composition(steps, lower, best)
    )


def _optimal_composition(
    steps: int, lower: float, best: Callable[[float, float], Step]
) -> tuple[Step, ...]:
    """Finds the best polynomial for [low, high], then for the interval that it leaves: greedy is
    optimal."""
    table = []
    low, high = lower, 1.0
    for _ in range(steps):
        step = best(max(low, _CUSHION * high), high)
        if step not in (_CONVERGED, _CONVERGED_CUBIC):
            # The cushion may have moved [p(low), largest p] off centre; put the centre back on 1.
            recentre = 2 / (_quintic(step, low) + _largest(step, high))
            a, b, c = step
            step = (a * recentre, b * recentre, c * recentre)
        table.append(step)
        low = _quintic(step, low)
        high = 2 - low
    return tuple(table)


def _largest(step: Step, high: float) -> float:
    """The largest p on [0, high] of an optimal step: a cubic's in between, a quintic's at the
    end."""
    a, b, _ = step
    return _quintic(step, math.sqrt(-a / (3 * b)) if is_cubic(step) else high)


def _optimal_cubic(low: float, high: float) -> Step:
    """The odd cubic with the least max |1 − p| on [low, high]: 1 − p is E at both ends, −E in
    between."""
    if low >= (1 - _CONVERGED_CUBIC_WIDTH) * high:
        return _CONVERGED_CUBIC
    square = low * low + low * high + high * high
    b = -2 / (2 * (square / 3) ** 1.5 + low * high * (low + high))
    return -b * square, b, 0.0


def _optimal_quintic(low: float, high: float) -> Step:
    """The odd quintic with the least max |1 − p| on [low, high], by Remez exchange.

    It equioscillates: 1 − p is E, −E, E, −E at low < q < r < high, where q and r are the extrema
    of p. What is solved for is the difference from `_CONVERGED`, whose own distance from 1 is
    known without cancellation: this keeps all digits when low and high are close.
    """
    if low >= (1 - _CONVERGED_WIDTH) * high:
        return _CONVERGED
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    a, b, c = _CONVERGED
    for _ in range(12):  # converges quadratically: six are enough for the widest interval
        x = np.array([low, q, r, high])
        system = np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1)
        distance = (1 - x) ** 3 * (8 + 9 * x + 3 * x**2) / 8  # 1 − _CONVERGED(x)
        a, b, c = (_CONVERGED + np.linalg.solve(system, distance)[:3]).tolist()
        centre, spread = -3 * b / (10 * c), math.sqrt(9 * b * b - 20 * a * c) / (10 * c)
        q, r = math.sqrt(centre - spread), math.sqrt(centre + spread)
    return a, b, c


def _quintic(step: Step, x):
    a, b, c = step
    square = x * x
    return x * (a + square * (b + square * c))
