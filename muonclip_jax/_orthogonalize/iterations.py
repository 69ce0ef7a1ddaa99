"""The Newton–Schulz iterations. X is `[..., n, m]`, n <= m, with singular values in (0, 1].

A step maps X to WX, where W = aI + bR + cR² and R = XXᵀ: every singular value σ becomes
aσ + bσ³ + cσ⁵. The standard iteration forms R from X and X from W at every step. The Gram iteration
needs R only, since the next one is WRW: it multiplies two steps' W first, X by the product, and
restarts. The standard iteration is the one that restarts at every step.

Factors of products are in the dtype of X; sums, norms and coefficients in its accumulation dtype.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._orthogonalize import lean
from muonclip_jax._orthogonalize.methods import Method
from muonclip_jax._orthogonalize.normalization import rescaled_rows, scale_at
from muonclip_jax._orthogonalize.products import (
    ONE_DEVICE,
    OneDevice,
    Symmetric,
    gram,
    joined,
    matmul,
    rounded,
    symmetric,
    weighted_sum,
    with_identity,
)
from muonclip_jax._orthogonalize.restarts import steps_between_restarts
from muonclip_jax._orthogonalize.schedules import Schedule, is_cubic


def iterate(
    x: jax.Array, schedule: Schedule, method: Method, group: OneDevice = ONE_DEVICE
) -> jax.Array:
    """Normalizes matrices and takes the schedule's steps.

    Cost for each matrix: 4n²m + 2n³ FLOPs a step of the standard iteration (4n²m where c = 0); 8n³
    a step of the Gram iteration (6n³ where c = 0) and 4n²m - 6n³ a restart; less what
    `method.smallest_block` saves. A device group shares them evenly: each device multiplies its
    columns, and its share of the rows of what is n × n.

    Args:
      x: Matrices `[..., n, m]`, n <= m, as `in_range` gives them; in a device group, this device's
        columns of them.
      schedule: The norm and the steps.
      method: Which iteration and which products. A device group takes the standard iteration, with
        whole products.
      group: The devices that have the other columns.
    """
    # polar_express(5) takes its five steps one by one, or by the Gram matrix as 2, 2 and 1. With X
    # [8, 256, 1024] in bfloat16 the latter is
    #   R = XXᵀ [8, 256, 256], of which the norm is read off
    #   W₁ from R;  R ← W₁RW₁;  W₂ from R;  X ← (W₂W₁)X [8, 256, 1024], made smaller by 20%
    #   R = XXᵀ of this X, free of the rounding of the two steps before
    #   W₃ from R;  R ← W₃RW₃;  W₄;  X ← (W₄W₃)X, made smaller by 20%
    #   R = XXᵀ;  W₅;  X ← W₅X
    x = rescaled_rows(x, schedule, method, group)
    restarts = [(step,) for step in schedule.coefficients]
    if method.iteration == "gram":
        restarts = steps_between_restarts(schedule, x.dtype)
    if method.lean:
        return lean.iterate(x, restarts, schedule, method)
    first, first_apart = True, group.size > 1
    # Restarts of a kind compile once: equally many steps, of which the same are cubic.
    for cubic, some in itertools.groupby(restarts, key=lambda steps: tuple(map(is_cubic, steps))):
        take = functools.partial(
            _until_restart, schedule=schedule, method=method, cubic=cubic, group=group
        )
        coefficients = jnp.asarray(list(some), accumulation_dtype(x.dtype))
        if first and first_apart:  # and the others need no norm, whose sum devices would wait for
            x, coefficients, first = take(x, coefficients[0], True), coefficients[1:], False
        firsts = None if first_apart else first & (jnp.arange(len(coefficients)) == 0)
        x, _ = lax.scan(
            lambda x, this, take=take: (take(x, *this), None), x, (coefficients, firsts)
        )
        first = False
    return x


def _until_restart(
    x: jax.Array,
    coefficients: jax.Array,
    first: jax.Array | bool | None,
    *,
    schedule: Schedule,
    method: Method,
    cubic: tuple[bool, ...],
    group: OneDevice,
) -> jax.Array:
    """X ← (W₂W₁)X by R alone: one or more steps, whose coefficients are `[steps, 3]`.

    Between restarts rounding is not made good. Where it makes R's small eigenvalues negative, or
    the next polynomial's argument leave its interval, they grow: in bfloat16 five steps without a
    restart can end with singular values above 10³⁰. Hence `steps_between_restarts`, and RW as
    aR + RZ, summed in float32, where W = aI + Z: the identity is never rounded there. R, Z and W
    are symmetric and commute, so that half of each product is enough.

    Source: Dao-AILab, gram-newton-schulz. Its restart and safety factor suit float16; what bfloat16
    needs was found here, by random matrices of few rows, whose rounding errors do not average out
    (nor do those of large matrices of which few rows are not zero).
    """
    dtype, last = x.dtype, len(cubic) - 1
    square = group.sum_rows(gram(x, method))
    # Products are scaled, not X: that costs and rounds nothing.
    scale = scale_at(first, x, square, schedule, group)
    r = rounded(weighted_sum((scale**2, square)), dtype)
    product: Symmetric = jnp.zeros((), dtype)  # of the W, once there is one
    for number in range(last + 1):
        a, b, c = coefficients[number]
        z = _polynomial(r, b, None if cubic[number] else c, method, group)
        w = with_identity(z, a, group)
        w = rounded(weighted_sum((scale, w)) if number == last else w, dtype)
        product = rounded(symmetric(w, product, method), dtype) if number else w
        if number < last:
            rz = symmetric(r, rounded(z, dtype), method)
            rw = rounded(weighted_sum((a, r), (1, rz)), dtype)
            r = rounded(symmetric(rw, w, method), dtype)
    product = group.all_rows(joined(product))
    return matmul(product, x, method).astype(dtype)


def _polynomial(
    r: Symmetric,
    b: jax.Array,
    c: jax.Array | None,
    method: Method,
    group: OneDevice,
) -> Symmetric:
    """Z = bR + cR², in the accumulation dtype. A device group has some rows of R, and of Z, on each
    device."""
    if c is None:
        return weighted_sum((b, r))
    # Device groups do not cut R, but have some rows of it each.
    whole = r if group.size == 1 else group.all_rows(joined(r))
    return weighted_sum((b, r), (c, symmetric(r, whole, method)))
