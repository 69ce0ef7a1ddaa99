"""The Gram iteration: the steps' polynomials are multiplied with each other, and then with X.

A step maps X to WX with W = aI + bR + cR², a polynomial of R = XXᵀ, and R to WRW. So R alone tells
all W, and X ← (… W₂ W₁) X is formed once. What is symmetric is computed by half: R, its powers, and
their products, which commute.

Rounding is not made good as long as X is not looked at. Where it makes R's small eigenvalues
negative, or the next polynomial's argument leave its interval, they grow: in bfloat16 five steps
can end with singular values above 10³⁰. Hence `segments`; sums in float32; and identities that are
never rounded: W is kept as aI + Z, the product of several as sI + Q.

Source: Dao-AILab, gram-newton-schulz. Its restart and safety factor suit float16; what bfloat16
needs was found here, by random matrices of few rows, whose rounding errors do not average out.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._orthogonalize.methods import Method
from muonclip_jax._orthogonalize.normalization import scale_at
from muonclip_jax._orthogonalize.products import (
    Symmetric,
    each,
    gram,
    joined,
    matmul,
    rounded,
    symmetric,
)
from muonclip_jax._orthogonalize.schedules import Schedule, Step, widen


class _Limits(NamedTuple):
    """Of a segment: how many steps, and how much they may make small singular values grow."""

    steps: int
    growth: float


# X is exact before the first segment, rounded before the others. Found by random matrices in
# bfloat16; in float32 they keep rounding near that of the standard iteration.
_FIRST = _Limits(2, 36.0)
_LATER = _Limits(3, 18.0)
# X is made smaller by it before the second segment and the others.
_MARGIN = {"bfloat16": 1.2, "float16": 1.03, "float32": 1.0, "float64": 1.0}


def segments(schedule: Schedule, dtype: jnp.dtype) -> list[tuple[Step, ...]]:
    """The schedule's steps between looks at X, as `gram_newton_schulz` takes them in `dtype`.

    After the first segment X is made smaller by a margin, so that rounding cannot take singular
    values beyond the interval that the steps are made for: 20% in bfloat16, 3% in float16. Small
    ones grow less by as much.
    """
    margin = _MARGIN[jnp.dtype(dtype).name]
    found: list[tuple[Step, ...]] = []
    for step in schedule.coefficients:
        limits = _FIRST if len(found) < 2 else _LATER
        longer = (*found[-1], step) if found else ()
        if longer and len(longer) <= limits.steps and _growth(longer) <= limits.growth:
            found[-1] = longer
        else:
            found.append((widen(step, margin if found else 1.0),))
    return found


def _growth(steps: tuple[Step, ...]) -> float:
    return math.prod(a for a, _, _ in steps)


def with_margins(schedule: Schedule, dtype: jnp.dtype) -> Schedule:
    """The steps of `segments`, as a schedule for other iterations to take."""
    return dataclasses.replace(schedule, coefficients=sum(segments(schedule, dtype), ()))


def gram_newton_schulz(x: jax.Array, schedule: Schedule, method: Method) -> jax.Array:
    """The schedule's norm and steps.

    Cost for each matrix: 8n³ FLOPs a step, and 4n²m - 6n³ for each segment; less what
    `method.smallest_block` saves of all but 2n²m of a segment.

    Args:
      x: Matrices `[..., n, m]`, n <= m.
      schedule: The norm and the steps.
      method: Which products.
    """

    def run(x, this):
        return _segment(x, *this, schedule, method), None

    first = True
    # Segments of one length compile once.
    for _, group in itertools.groupby(segments(schedule, x.dtype), key=len):
        equal = jnp.asarray(list(group), accumulation_dtype(x.dtype))
        x, _ = lax.scan(run, x, (equal, first & (jnp.arange(len(equal)) == 0)))
        first = False
    return x


def _segment(
    x: jax.Array, coefficients: jax.Array, first: jax.Array, schedule: Schedule, method: Method
) -> jax.Array:
    """Some steps, by the Gram matrix of X."""
    square = gram(x, method)
    # Products are scaled, not X: that costs and rounds nothing.
    scale = scale_at(first, square, schedule)
    r = each(lambda block: scale**2 * block, square)
    a, z, r_rounded = _polynomial(r, coefficients[0], x.dtype, method)
    s, q = a, rounded(z, accumulation_dtype(x.dtype))
    if len(coefficients) > 1:
        r = _next(r_rounded, a, z, method)

        def step(carry, abc):
            r, s, q = carry
            a, z, r_rounded = _polynomial(r, abc, x.dtype, method)
            return (_next(r_rounded, a, z, method), *_times(s, q, a, z, method)), None

        (r, s, q), _ = lax.scan(step, (r, s, q), coefficients[1:-1])
        a, z, _ = _polynomial(r, coefficients[-1], x.dtype, method)
        s, q = _times(s, q, a, z, method)
    product = matmul(joined(rounded(q, x.dtype)), x, method)
    return (scale * (s * x + product)).astype(x.dtype)


def _polynomial(
    r: Symmetric, abc: jax.Array, dtype: jnp.dtype, method: Method
) -> tuple[jax.Array, Symmetric, Symmetric]:
    """W = aI + Z of the rounded R: (a, Z, rounded R)."""
    a, b, c = abc
    r = rounded(r, dtype)
    whole = joined(r)
    square = symmetric(whole, whole, method)
    return a, each(lambda r, rr: (b * r + c * rr).astype(dtype), r, square), r


def _next(r: Symmetric, a: jax.Array, z: Symmetric, method: Method) -> Symmetric:
    """WRW = a(aR + RZ) + (aR + RZ)Z."""
    whole = joined(z)
    half = each(lambda r, rz: a * r + rz, r, symmetric(joined(r), whole, method))
    more = symmetric(joined(rounded(half, whole.dtype)), whole, method)
    return each(lambda h, hz: a * h + hz, half, more)


def _times(
    s: jax.Array, q: Symmetric, a: jax.Array, z: Symmetric, method: Method
) -> tuple[jax.Array, Symmetric]:
    """(sI + Q)(aI + Z) as the same."""
    whole = joined(z)
    product = symmetric(joined(rounded(q, whole.dtype)), whole, method)
    return s * a, each(lambda q, z, qz: a * q + s * z + qz, q, z, product)
