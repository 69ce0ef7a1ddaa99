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

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax.orthogonalize.methods import Method
from muonclip_jax.orthogonalize.precision import accumulator
from muonclip_jax.orthogonalize.products import (
    Symmetric,
    each,
    gram,
    joined,
    matmul,
    rounded,
    symmetric,
)
from muonclip_jax.orthogonalize.schedules import Schedule, Step, widen

# How many steps without a look at X, and the factor by which X is made smaller before the next.
_LENGTH_AND_MARGIN = {
    "bfloat16": (2, 1.12),
    "float16": (2, 1.03),
    "float32": (3, 1.0),
    "float64": (3, 1.0),
}
# In 16 bits a step that makes small singular values grow by more is a segment of its own.
_STEEP = 5.0


def segments(schedule: Schedule, dtype: jnp.dtype) -> list[tuple[Step, ...]]:
    """The schedule's steps between looks at X, as `gram_newton_schulz` takes them in `dtype`.

    After the first segment X is made smaller by a margin, so that rounding cannot take singular
    values beyond the interval that the steps are made for: 12% in bfloat16, 3% in float16. Small
    ones grow less by as much.
    """
    longest, margin = _LENGTH_AND_MARGIN[jnp.dtype(dtype).name]
    steep = _STEEP if margin > 1 else float("inf")
    found: list[tuple[Step, ...]] = []
    for step in schedule.coefficients:
        if found and len(found[-1]) < longest and max(found[-1][-1][0], step[0]) <= steep:
            found[-1] = (*found[-1], step)
        else:
            found.append((widen(step, margin if found else 1.0),))
    return found


def with_margins(schedule: Schedule, dtype: jnp.dtype) -> Schedule:
    """The steps of `segments`, as a schedule for other iterations to take."""
    return dataclasses.replace(schedule, coefficients=sum(segments(schedule, dtype), ()))


def gram_newton_schulz(
    x: jax.Array, scale: jax.Array, schedule: Schedule, method: Method
) -> jax.Array:
    """All steps on `scale * x`.

    Cost for each matrix: 8n³ FLOPs a step, and 4n²m - 6n³ for each segment; less what
    `method.smallest_block` saves of all but 2n²m of a segment.

    Args:
      x: Matrices `[..., n, m]`, n <= m.
      scale: `[..., 1, 1]`. It is applied to products, where it costs and rounds nothing.
      schedule: The steps.
      method: Which products.
    """

    def run(carry, coefficients):
        x, scale = carry
        return (_segment(x, scale, coefficients, method), jnp.ones_like(scale)), None

    carry = x, scale
    # Segments of one length compile once.
    for _, equal in itertools.groupby(segments(schedule, x.dtype), key=len):
        carry, _ = lax.scan(run, carry, jnp.asarray(list(equal), accumulator(x.dtype)))
    return carry[0]


def _segment(x: jax.Array, scale: jax.Array, coefficients: jax.Array, method: Method) -> jax.Array:
    """Some steps on `scale * x`, by its Gram matrix."""
    r = each(lambda block: scale**2 * block, gram(x, method))
    a, z, r_rounded = _polynomial(r, coefficients[0], x.dtype, method)
    s, q = a, rounded(z, accumulator(x.dtype))
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
