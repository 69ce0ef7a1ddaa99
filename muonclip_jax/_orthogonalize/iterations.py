"""The two Newton–Schulz iterations. X is `[..., n, m]`, n <= m, with singular values in (0, 1].

A step maps X to WX, where W = aI + bR + cR² and R = XXᵀ: every singular value σ becomes
aσ + bσ³ + cσ⁵. The standard iteration forms R from X and X from W at every step. The Gram iteration
needs R only, since the next one is WRW: it multiplies two steps' W first, and X by the product.

Factors of products are in the dtype of X; sums, norms and coefficients in its accumulation dtype.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._orthogonalize.methods import Method
from muonclip_jax._orthogonalize.normalization import rescaled_rows, scale_at
from muonclip_jax._orthogonalize.products import (
    ONE_DEVICE,
    OneDevice,
    Symmetric,
    each,
    gram,
    joined,
    matmul,
    rounded,
    symmetric,
)
from muonclip_jax._orthogonalize.schedules import Schedule, Step, is_cubic, widen


def iterate(
    x: jax.Array, schedule: Schedule, method: Method, group: OneDevice = ONE_DEVICE
) -> jax.Array:
    """Normalizes matrices and takes the schedule's steps.

    Args:
      x: Matrices `[..., n, m]`, n <= m, as `in_range` gives them; in a device group, this device's
        columns of them.
      schedule: The norm and the steps.
      method: Which iteration and which products. A device group takes the standard iteration, with
        whole products.
      group: The devices that have the other columns.
    """
    x = rescaled_rows(x, schedule, method, group)
    if method.iteration == "gram":
        return gram_iteration(x, schedule, method)
    return standard_iteration(x, schedule, method, group)


def standard_iteration(
    x: jax.Array, schedule: Schedule, method: Method, group: OneDevice
) -> jax.Array:
    """X ← aX + (bR + cR²)X, with R = XXᵀ formed at every step.

    Cost for each matrix and step: 4n²m + 2n³ FLOPs, less what `method.smallest_block` saves of the
    2n²m + 2n³ that are symmetric; where c = 0 there is no R², and no 2n³. A device group shares
    them evenly: each device multiplies its columns, and its share of the rows of what is n × n.
    """

    def step(x, abc, first, cubic):
        square = group.sum_rows(gram(x, method))
        # Products are scaled, not X: that costs and rounds nothing.
        scale = scale_at(first, x, square, schedule, group)
        r = each(lambda g: scale**2 * g, square)
        z = _polynomial(r, abc, x.dtype, method, cubic, group)
        return _multiplied(x, scale, abc[0], z, method, group)

    # A scan costs as much as an unrolled loop at run time and compiles once for all its steps.
    first = True
    for cubic, some in itertools.groupby(schedule.coefficients, key=is_cubic):
        coefficients = jnp.asarray(list(some), accumulation_dtype(x.dtype))
        take = functools.partial(step, cubic=cubic)
        if group.size > 1:  # the first step by itself: only there the devices sum up a norm
            if first:
                x, coefficients = take(x, coefficients[0], True), coefficients[1:]
            x, _ = lax.scan(lambda x, abc, take=take: (take(x, abc, False), None), x, coefficients)
        else:
            firsts = first & (jnp.arange(len(coefficients)) == 0)
            steps = coefficients, firsts
            x, _ = lax.scan(lambda x, this, take=take: (take(x, *this), None), x, steps)
        first = False
    return x


def gram_iteration(x: jax.Array, schedule: Schedule, method: Method) -> jax.Array:
    """X ← (W₂W₁)X by R alone, with a restart, R = XXᵀ, every two steps at most.

    Cost for each matrix: 8n³ FLOPs a step (6n³ where c = 0), and 4n²m - 6n³ for each restart; less
    what `method.smallest_block` saves of all but 2n²m of a restart.

    Between restarts rounding is not made good. Where it makes R's small eigenvalues negative, or
    the next polynomial's argument leave its interval, they grow: in bfloat16 five steps without a
    restart can end with singular values above 10³⁰. Hence `steps_between_restarts`; sums in
    float32; and identities that are never rounded: W is kept as aI + Z, a product of several as
    sI + Q. R, Z and Q are symmetric and commute, so that half of each product is enough.

    Source: Dao-AILab, gram-newton-schulz. Its restart and safety factor suit float16; what bfloat16
    needs was found here, by random matrices of few rows, whose rounding errors do not average out
    (nor do those of large matrices of which few rows are not zero).
    """
    # polar_express(5) takes its five steps as 2, 2 and 1. With X [8, 256, 1024] in bfloat16:
    #   R = XXᵀ [8, 256, 256], of which the norm is read off
    #   W₁ from R;  R ← W₁RW₁;  W₂ from R;  X ← (W₂W₁)X [8, 256, 1024], made smaller by 20%
    #   R = XXᵀ of this X, free of the rounding of the two steps before
    #   W₃ from R;  R ← W₃RW₃;  W₄;  X ← (W₄W₃)X, made smaller by 20%
    #   R = XXᵀ;  W₅;  X ← W₅X
    first = True
    restarts = steps_between_restarts(schedule, x.dtype)
    # Those with equally many steps compile once, if the same of them are cubic.
    for cubic, group in itertools.groupby(restarts, key=lambda steps: tuple(map(is_cubic, steps))):
        equal = jnp.asarray(list(group), accumulation_dtype(x.dtype))

        def restart(x, this, cubic=cubic):
            coefficients, first = this
            return _until_restart(x, coefficients, first, schedule, method, cubic), None

        x, _ = lax.scan(restart, x, (equal, first & (jnp.arange(len(equal)) == 0)))
        first = False
    return x


def _until_restart(
    x: jax.Array,
    coefficients: jax.Array,
    first: jax.Array,
    schedule: Schedule,
    method: Method,
    cubic: tuple[bool, ...],
) -> jax.Array:
    """Some steps by the Gram matrix of X, whose coefficients are `[steps, 3]`."""

    def polynomial(r, number):
        r, abc = rounded(r, x.dtype), coefficients[number]
        return r, abc[0], _polynomial(r, abc, x.dtype, method, cubic[number])

    def next_gram(r, a, z):  # WRW = a(aR + RZ) + (aR + RZ)Z
        whole = joined(z)
        half = each(
            lambda r, rz: a * r.astype(rz.dtype) + rz, r, symmetric(joined(r), whole, method)
        )
        more = symmetric(joined(rounded(half, x.dtype)), whole, method)
        return each(lambda h, hz: a * h + hz, half, more)

    def product(s, q, a, z):  # (sI + Q)(aI + Z), as another sI + Q
        more = symmetric(joined(rounded(q, x.dtype)), joined(z), method)
        return s * a, each(lambda q, z, qz: a * q + s * z.astype(q.dtype) + qz, q, z, more)

    square = gram(x, method)
    scale = scale_at(first, x, square, schedule, ONE_DEVICE)
    r, a, z = polynomial(each(lambda block: scale**2 * block, square), 0)
    s, q = a, rounded(z, accumulation_dtype(x.dtype))
    for number in range(1, len(cubic)):
        r, a, z = polynomial(next_gram(r, a, z), number)
        s, q = product(s, q, a, z)
    return _multiplied(x, scale, s, q, method)


def _polynomial(
    r: Symmetric,
    abc: jax.Array,
    dtype: jnp.dtype,
    method: Method,
    cubic: bool,
    group: OneDevice = ONE_DEVICE,
) -> Symmetric:
    """Z = bR + cR², rounded; R² is left out of a cubic. A device group has some rows of R, and of
    Z, on each device."""
    _, b, c = abc
    if cubic:
        return each(lambda r: (b * r.astype(b.dtype)).astype(dtype), r)
    rows = joined(rounded(r, dtype))
    square = symmetric(rows, group.all_rows(rows), method)
    return each(lambda r, rr: (b * r.astype(rr.dtype) + c * rr).astype(dtype), r, square)


def _multiplied(
    x: jax.Array,
    scale: jax.Array,
    s: jax.Array,
    q: Symmetric,
    method: Method,
    group: OneDevice = ONE_DEVICE,
) -> jax.Array:
    """`scale` (sI + Q)X."""
    whole = group.all_rows(joined(rounded(q, x.dtype)))
    more = matmul(whole, x, method)
    return (scale * (s * x.astype(more.dtype) + more)).astype(x.dtype)


class _Limits(NamedTuple):
    """Of the steps between restarts: how many, and how much they may make small σ grow."""

    steps: int
    growth: float


# Found by `benchmarks.largest_singular_values` in bfloat16. X is exact before the first steps,
# rounded before the others, and nothing makes good the rounding of the last.
_FIRST = _Limits(2, 36.0)
_LATER = _Limits(2, 18.0)
_LAST = _Limits(2, 6.0)
# X is made smaller by it at every restart.
_MARGIN = {"bfloat16": 1.2, "float16": 1.03, "float32": 1.0, "float64": 1.0}


def steps_between_restarts(schedule: Schedule, dtype: jnp.dtype) -> list[tuple[Step, ...]]:
    """The schedule's steps as `gram_iteration` takes them in `dtype`, by restart.

    At every restart but the first X is made smaller by a margin, so that rounding cannot take
    singular values beyond the interval that the steps are made for: 20% in bfloat16, 3% in float16.
    Small ones grow less by as much.
    """
    margin = _MARGIN[jnp.dtype(dtype).name]
    found: list[tuple[Step, ...]] = []
    for number, step in enumerate(schedule.coefficients, start=1):
        limits = _FIRST if len(found) < 2 else _LATER
        if number == len(schedule.coefficients):
            limits = _LAST
        longer = (*found[-1], step) if found else ()
        growth = math.prod(a for a, _, _ in longer)
        if longer and len(longer) <= limits.steps and growth <= limits.growth:
            found[-1] = longer
        else:
            found.append((widen(step, margin if found else 1.0),))
    return found


def with_margins(schedule: Schedule, dtype: jnp.dtype) -> Schedule:
    """The steps of `steps_between_restarts`, as a schedule for the standard iteration."""
    steps = steps_between_restarts(schedule, dtype)
    return dataclasses.replace(schedule, coefficients=tuple(itertools.chain(*steps)))
