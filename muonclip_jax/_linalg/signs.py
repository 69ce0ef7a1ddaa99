"""The sign of square matrices, which keeps eigenvectors, and the equations it solves."""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.meshes import in_auto_axes, specs_of
from muonclip_jax._core.options import check_choice, check_flag
from muonclip_jax._linalg.factors import identity, inverse, product, symmetrized
from muonclip_jax._linalg.options import check_square, schedule_for
from muonclip_jax._linalg.solves import (
    newton_sign,
    solve_sylvester_by_sign,
    solve_symmetric_sylvester,
)
from muonclip_jax._orthogonalize.newton_schulz import check_matrices
from muonclip_jax._orthogonalize.normalization import nonzero
from muonclip_jax._orthogonalize.schedules import Schedule

SignBy = Literal["newton", "newton_schulz"]


def mcsgn(x: ArrayLike, *, by: SignBy = "newton") -> jax.Array:
    """The sign of square matrices: P diag(λ) P⁻¹ → P diag(sign Re λ) P⁻¹, or (X²)^(−½) X.

    Unlike `msign` it keeps eigenvectors, and of symmetric matrices it is the same. It solves
    equations: of [[A, C], [0, B]], A's eigenvalues on the left and B's on the right, it is
    [[−I, 2X], [0, I]] with XB − AX = C (`solve_sylvester`); of [[0, C], [I, 0]] it is
    [[0, C^½], [C^(−½), 0]] for any C without eigenvalues at or below zero.

    No eigenvalue may lie on the imaginary axis, zero included: there no sign is defined, and the
    result is NaN; so is that of a matrix with a NaN or Inf. Derivatives are exact, to any order, by
    a Sylvester equation.

    Conditioning: rounding counts by the condition κ of the eigenvectors P, squared, and over the
    least |Re λ|. In float32 relative errors (n = 128, |λ| from 0.01 to 1) are 4e-6, 6e-6 and 9e-5
    at κ = 1, 10 and 100; of "newton_schulz" 7e-6, 1e-5 and 1e-3. In float64 1e-14, 1e-14 and 2e-13.

    Cost: "newton" takes an inverse (2n³ FLOPs) for each of 6 to 14 steps; "newton_schulz" three
    products, 6n³ FLOPs, for each of 13 to 15 in float32 and 25 in float64. The derivative: a
    Sylvester equation and three products.

    Args:
      x: Square matrices `[..., n, n]` in bfloat16, float16, float32 or float64, not empty.
      by: "newton", X ← (μX + X⁻¹/μ)/2, for all that have a sign. "newton_schulz", matrix products
        only, for real eigenvalues, the smallest at least 1e-6 of the largest (1e-12 in float64,
        1e-4 in 16 bits); NaN where complex ones keep it from settling.

    Returns:
      An array with the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not of the four dtypes.
      ValueError: `x` is not square or empty, or `by` is neither of the two.

    Example:
      >>> x = jnp.array([[3.0, 8.0], [0.0, -1.0]])
      >>> jnp.round(mc.linalg.mcsgn(x), 3).tolist()
      [[1.0, 4.0], [0.0, -1.0]]

    Source: Su Jianlin, "What can the matrix sign function mcsgn compute?", kexue.fm, June 2025;
    Roberts' iteration and its scaling: Higham, Functions of Matrices, chapter 5.
    """
    x = jnp.asarray(x)
    check_square("mcsgn", x)
    check_choice("mcsgn: by", by, get_args(SignBy))
    schedule = schedule_for(x) if by == "newton_schulz" else None
    return in_auto_axes(functools.partial(_mcsgn, schedule=schedule), specs_of(x))(x)


def solve_sylvester(
    a: ArrayLike, b: ArrayLike, c: ArrayLike, *, symmetric: bool = False
) -> jax.Array:
    """Solves AX + XB = C, in batches, on every backend.

    As `scipy.linalg.solve_sylvester`, where the eigenvalues of A and of B lie on one side of the
    imaginary axis: all on the right, or all on the left. Elsewhere the result is NaN. (A multiple
    of the identity added to A and taken from B changes nothing, and may bring them there.) With
    `symmetric=True` they may lie anywhere, so long as no sum λᵢ(A) + λⱼ(B) is zero, which gives
    infinities.

    Derivatives by all three are exact, to any order, by the same equation. A NaN or Inf makes its
    own equation NaN.

    Conditioning: rounding counts by (‖A‖ + ‖B‖) over the separation, which for symmetric matrices
    is the least λᵢ(A) + λⱼ(B). Where it is 100 and 10⁴ the relative error is 1e-6 and 2e-4 in
    float32, 3e-15 and 4e-13 in float64, by either way.

    Cost: an inverse of A and of B and two products for each step, 6 to 14 of them; with
    `symmetric=True` an eigendecomposition of each and four products.

    Args:
      a: A, `[..., n, n]`.
      b: B, `[..., m, m]`.
      c: C, `[..., n, m]`. All of one dtype, bfloat16, float16, float32 or float64; leading axes are
        broadcast.
      symmetric: Whether A and B are symmetric. Then only their symmetric parts are read.

    Returns:
      X, `[..., n, m]` in the dtype of `c`.

    Raises:
      TypeError: The dtypes differ or are none of the four, or `symmetric` is no bool.
      ValueError: A or B is not square, or C does not fit.

    Example:
      >>> a, b = jnp.diag(jnp.array([1.0, 2.0])), jnp.eye(3)
      >>> x = mc.linalg.solve_sylvester(a, b, jnp.ones((2, 3)))
      >>> bool(jnp.allclose(a @ x + x @ b, 1))
      True

    Source: Su Jianlin, as `mcsgn`; Roberts' method: Higham, Functions of Matrices, 2.4.
    """
    a, b, c = (jnp.asarray(x) for x in (a, b, c))
    check_square("solve_sylvester: a", a)
    check_square("solve_sylvester: b", b)
    check_matrices("solve_sylvester: c", c)
    check_flag("solve_sylvester: symmetric", symmetric)
    if not a.dtype == b.dtype == c.dtype:
        raise TypeError(
            f"solve_sylvester: a is {a.dtype}, b is {b.dtype} and c is {c.dtype}; cast them to one "
            "dtype."
        )
    if c.shape[-2:] != (a.shape[-1], b.shape[-1]):
        raise ValueError(
            f"solve_sylvester: c has shape {c.shape}; with a {a.shape} and b {b.shape} it must be "
            f"[..., {a.shape[-1]}, {b.shape[-1]}]."
        )
    run = functools.partial(_solve_sylvester, symmetric=symmetric)
    return in_auto_axes(run, PartitionSpec())(a, b, c)


@functools.partial(jax.jit, static_argnames="schedule")
def _mcsgn(x: jax.Array, schedule: Schedule | None) -> jax.Array:
    return matrix_sign(x.astype(accumulation_dtype(x.dtype)), schedule).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="symmetric")
def _solve_sylvester(a: jax.Array, b: jax.Array, c: jax.Array, symmetric: bool) -> jax.Array:
    batch = jnp.broadcast_shapes(*(x.shape[:-2] for x in (a, b, c)))
    a, b, total = (
        jnp.broadcast_to(x, batch + x.shape[-2:]).astype(accumulation_dtype(x.dtype))
        for x in (a, b, c)
    )
    if symmetric:
        found = solve_symmetric_sylvester(symmetrized(a), symmetrized(b), total)
    else:
        found = solve_sylvester_by_sign(a, b, total)
    return found.astype(c.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def matrix_sign(x: jax.Array, schedule: Schedule | None) -> jax.Array:
    """(X²)^(−½)X of square matrices, float32 or float64; NaN where an iteration does not settle."""
    if schedule is None:
        sign = newton_sign(lambda x: (inverse(x),), x)[0]
    else:
        sign = sign_by_products(x, schedule)
    squares = (sign * sign).sum(axis=(-2, -1), keepdims=True)
    rest = product(sign, sign) - identity(sign)
    # Rounding of S² grows with ‖S‖²; an iteration that has not settled is off by all of it.
    settled = jnp.abs(rest).max(axis=(-2, -1), keepdims=True) < 1e-2 * squares / x.shape[-1]
    return jnp.where(settled, sign, jnp.nan)


@matrix_sign.defjvp
def _matrix_sign_jvp(schedule, primals, tangents):
    """With N = SX, the root of X²: N dS + dS N = dX − S dX S (Higham, Functions of Matrices, 5.3).

    The eigenvalues of N are on the right of the imaginary axis.
    """
    (x,), (dx,) = primals, tangents
    sign = matrix_sign(x, schedule)
    root = product(sign, x)
    return sign, solve_sylvester_by_sign(root, root, dx - product(sign, dx, sign))


def sign_by_products(x: jax.Array, schedule: Schedule) -> jax.Array:
    """X ← X(aI + bX² + cX⁴), for real eigenvalues: at most (tr X⁴)^¼ of them is what the schedule
    divides singular values by."""
    largest = jnp.abs(x).max(axis=(-2, -1), keepdims=True)
    x = x / nonzero(largest)
    square = product(x, x)
    fourth = (square * square.mT).sum(axis=(-2, -1), keepdims=True)
    x = x / (jnp.sqrt(jnp.sqrt(fourth)) * schedule.norm_factor)

    def step(x, abc):
        square = product(x, x)
        w = abc[0] * identity(x) + abc[1] * square + abc[2] * product(square, square)
        return product(w, x), None

    return lax.scan(step, x, jnp.asarray(schedule.coefficients, x.dtype))[0]
