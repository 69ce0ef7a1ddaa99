"""Roots of symmetric positive semidefinite matrices, and their inverses."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.meshes import in_auto_axes, specs_of
from muonclip_jax._core.options import check_count
from muonclip_jax._linalg.factors import eigh, identity, product, symmetrized
from muonclip_jax._linalg.options import Accuracy, RootBy, accuracy, check_square
from muonclip_jax._linalg.solves import divided, eigenbasis, solve_powers
from muonclip_jax._orthogonalize.normalization import nonzero
from muonclip_jax._orthogonalize.schedules import Schedule


def matrix_sqrt(
    x: ArrayLike, *, by: RootBy = "newton_schulz", lower: float | None = None
) -> jax.Array:
    """The square root of symmetric positive semidefinite matrices: X → X^½.

    Derivatives are exact, to any order, by the equation S dS + dS S = dX. Eigenvalues of zero give
    zero; there the root has no derivative, and what would be infinite counts as zero. A NaN or Inf
    makes its own matrix NaN.

    Conditioning: relative errors grow with the root of the condition number. In float32 (n = 128,
    spectral norm) they are 1e-6, 4e-6 and 1e-5 at 10, 10³ and 10⁵; with "eigh" 2e-6, 5e-6, 5e-5.

    A root of matrices that are not symmetric: [[0, C], [I, 0]] has the sign
    [[0, C^½], [C^(−½), 0]], see `mcsgn`.

    Args:
      x: Symmetric matrices `[..., n, n]` in bfloat16, float16, float32 or float64, not empty, with
        eigenvalues of at least 0. Only the symmetric part is read: (x + xᵀ)/2. What an eigenvalue
        below zero gives is not defined ("eigh": as zero).
      by: "newton_schulz", matrix products only (four for each step, 9 to 11 steps in float32), or
        "eigh", an eigendecomposition.
      lower: Eigenvalues below this times the largest may count as zero, in (0, 1). None: 1e-6 in
        float32, 1e-4 in 16 bits and 1e-12 in float64; with "eigh" 4 eps √n.

    Returns:
      An array with the shape and dtype of `x`, symmetric.

    Raises:
      TypeError: `x` is not of the four dtypes, or `lower` is no number.
      ValueError: `x` is not square or empty, or `by` or `lower` is none of the above.

    Example:
      >>> root = mc.linalg.matrix_sqrt(jnp.array([[5.0, 4.0], [4.0, 5.0]]))
      >>> jnp.round(root, 3).tolist()
      [[2.0, 1.0], [1.0, 2.0]]

    Source: the coupled iteration is Denman and Beavers' by products (Higham, Functions of Matrices,
    6.3), with the schedules of matrix signs.
    """
    return _root_of("matrix_sqrt", x, 2, by, lower)[0]


def inverse_sqrt(
    x: ArrayLike, *, by: RootBy = "newton_schulz", lower: float | None = None
) -> jax.Array:
    """The inverse square root of symmetric positive definite matrices: X → X^(−½).

    As `matrix_sqrt`, with the same iteration and cost; the derivative is −R dS R with S the root
    and R this. An eigenvalue of zero gives zero with "eigh" (the pseudoinverse), and a large number
    with "newton_schulz"; add a multiple of the identity where they may be.

    Conditioning: relative errors grow with the condition number. In float32 (n = 128, spectral
    norm) they are 1e-6, 8e-6 and 4e-4 at 10, 10³ and 10⁵, with "eigh" 2e-6, 8e-5 and 1e-2: products
    keep small eigenvalues apart better. In float64 4e-15, 2e-14 and 8e-13.

    Args:
      x: As in `matrix_sqrt`.
      by: As in `matrix_sqrt`.
      lower: As in `matrix_sqrt`.

    Returns:
      An array with the shape and dtype of `x`, symmetric.

    Raises:
      TypeError, ValueError: As `matrix_sqrt`.

    Example:
      >>> x = jnp.diag(jnp.array([4.0, 0.25]))
      >>> jnp.round(mc.linalg.inverse_sqrt(x), 3).tolist()
      [[0.5, 0.0], [0.0, 2.0]]
    """
    return _root_of("inverse_sqrt", x, 2, by, lower)[1]


def inverse_root(
    x: ArrayLike, p: int, *, by: RootBy = "eigh", lower: float | None = None
) -> jax.Array:
    """The inverse p-th root of symmetric positive definite matrices: X → X^(−1/p).

    What Shampoo takes of its statistics. Derivatives are exact, to any order: with S = X^(1/p),
    Σ SᵏdS Sᵖ⁻¹⁻ᵏ = dX over k < p. Eigenvalues of zero as in `inverse_sqrt`.

    Conditioning: as `inverse_sqrt`. At p = 4 relative errors in float32 are 2e-6, 5e-5 and 6e-3
    with "eigh", 2e-6, 5e-6 and 2e-4 with "newton_schulz".

    Args:
      x: As in `matrix_sqrt`.
      p: The root, a whole number of at least 1; 1 is the inverse.
      by: "eigh", one eigendecomposition and two products, or "newton_schulz", which takes square
        roots: p must be a power of two, and each costs what `matrix_sqrt` costs.
      lower: As in `matrix_sqrt`.

    Returns:
      An array with the shape and dtype of `x`, symmetric.

    Raises:
      TypeError, ValueError: As `matrix_sqrt`; ValueError for another p.

    Example:
      >>> x = jnp.diag(jnp.array([8.0, 1.0]))
      >>> jnp.round(mc.linalg.inverse_root(x, 3), 3).tolist()
      [[0.5, 0.0], [0.0, 1.0]]
    """
    check_count("inverse_root: p", p)
    return _root_of("inverse_root", x, int(p), by, lower)[1]


def _root_of(
    owner: str, x: ArrayLike, p: int, by: RootBy, lower: float | None
) -> tuple[jax.Array, jax.Array]:
    x = jnp.asarray(x)
    check_square(owner, x)
    how = accuracy(owner, x, by, lower, "eigh", power=2)
    if how.newton_schulz and (p == 1 or p & (p - 1)):
        raise ValueError(
            f'{owner}: p={p} by "newton_schulz", which takes square roots: p must be 2, 4, 8, … '
            'there; use by="eigh".'
        )
    spec = specs_of(x)
    return in_auto_axes(functools.partial(_roots, p=p, how=how), (spec, spec))(x)


@functools.partial(jax.jit, static_argnames=("p", "how"))
def _roots(x: jax.Array, p: int, how: Accuracy) -> tuple[jax.Array, jax.Array]:
    """Of square roots by products each halves the power that is left."""
    root = symmetrized(x.astype(accumulation_dtype(x.dtype)))
    powers = [2] * int(math.log2(p)) if how.newton_schulz else [p]
    inverse = root
    for power in powers:
        root, inverse = roots(root, power, how)
    return root.astype(x.dtype), inverse.astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def roots(x: jax.Array, p: int, how: Accuracy) -> tuple[jax.Array, jax.Array]:
    """X^(1/p) and X^(−1/p) of symmetric matrices, float32 or float64."""
    if how.newton_schulz is not None:
        return coupled_newton_schulz(x, how.newton_schulz.schedule)
    values, vectors = eigh(x)
    values = jnp.where(values <= how.lower * values[..., -1:], 0, values)
    root = values ** (1 / p)

    def matrix(values):
        return symmetrized(product(vectors * values[..., None, :], vectors.mT))

    return matrix(root), matrix(divided(jnp.ones_like(root), root))


@roots.defjvp
def _roots_jvp(p, how, primals, tangents):
    """With S = X^(1/p) and R = S⁻¹: Σ SᵏdS Sᵖ⁻¹⁻ᵏ = dX, and dR = −R dS R."""
    (x,), (dx,) = primals, tangents
    root, inverse = roots(x, p, how)
    basis = eigenbasis(root, how.lower ** (1 / p) / 2)
    droot = solve_powers(root, dx, p, basis)
    return (root, inverse), (droot, -product(inverse, droot, inverse))


def coupled_newton_schulz(x: jax.Array, schedule: Schedule) -> tuple[jax.Array, jax.Array]:
    """Y, Z → X^½, X^(−½) by Y ← YW, Z ← WZ with W = aI + bZY + c(ZY)².

    The schedule of a matrix sign, for singular values √λ: where it makes p(√λ) of √λ, Z has
    p(√λ)/√λ and Y has √λ p(√λ), both divided by the scale. Cost for each step: four products of 2n³
    FLOPs.
    """
    largest = nonzero(jnp.abs(x).max(axis=(-2, -1), keepdims=True))
    # √λ over the schedule's Schatten-4 norm of the root, (Σλ²)^¼, is at most 1.
    norm = jnp.sqrt(((x / largest) ** 2).sum(axis=(-2, -1), keepdims=True))
    scale = largest * nonzero(norm) * schedule.norm_factor**2
    start = x / scale, identity(x)

    def step(state, abc):
        y, z = state
        # ZY, not its symmetric part, in this order: only so do rounding errors not grow.
        r = product(z, y)
        w = abc[0] * identity(r) + abc[1] * r + abc[2] * product(r, r)
        return (product(y, w), product(w, z)), None

    coefficients = jnp.asarray(schedule.coefficients, x.dtype)
    (y, z), _ = lax.scan(step, start, coefficients)
    return symmetrized(y) * jnp.sqrt(scale), symmetrized(z) / jnp.sqrt(scale)
