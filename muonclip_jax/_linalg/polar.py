"""The matrix sign of rectangular matrices: M = U Σ Vᵀ → U Vᵀ."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.meshes import in_auto_axes, specs_of
from muonclip_jax._linalg.factors import product, svd, symmetrized
from muonclip_jax._linalg.options import Accuracy, By, accuracy
from muonclip_jax._linalg.solves import eigenbasis, solve_left, solve_powers
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz, check_matrices
from muonclip_jax._orthogonalize.orthogonalize import orthogonalize_as, turned_wide


def msign(
    x: ArrayLike, *, by: By | NewtonSchulz = "newton_schulz", lower: float | None = None
) -> jax.Array:
    """The matrix sign, or polar factor: U Σ Vᵀ → U Vᵀ, with the exact derivative.

    `orthogonalize` is the same up to the error of a few steps, and its derivative is that of these
    steps. Here the steps go on to rounding, and the derivative is that of U Vᵀ itself, to any
    order, forward and reverse: of an equation, solved in the eigenbasis of (x xᵀ)^½. So equal
    singular values do no harm, and the steps are not differentiated: their memory is not kept.

    A singular value below `lower` times the largest may count as zero, and a zero stays zero:
    by="svd" makes U_r V_rᵀ of the first r. Between ranks msign jumps. The derivative at a lower
    rank is that along the matrices of this rank; what would raise it counts as no change. So
    derivatives are finite everywhere, and zero for a zero matrix. With "newton_schulz" a zero that
    rounding has moved grows as all small values do, to anything up to 1 in float32 and to 1e-3 in
    float64: take "svd" where the rank is low. A NaN or Inf makes its own matrix NaN.

    Conditioning: an error of x moves the result by about 2/(σᵢ + σⱼ) of it, so rounding counts by
    the smallest singular value: in float32 the error (spectral norm, n = 128) is about 5e-6 at a
    condition number of 10, 1e-5 at 10³ and 1e-3 at 10⁵; in float64 1e-14, 3e-14 and 2e-12.

    Cost, n ≤ m being the sides: for each step 4n²m + 2n³ FLOPs, with n = m three products; 13 to 15
    steps in float32, 9 in 16 bits (which compute in float32) and about 25 in float64. The
    derivative: one eigendecomposition n × n and about nine products.

    Args:
      x: Matrices `[..., n, m]` in bfloat16, float16, float32 or float64, not empty.
      by: "newton_schulz", matrix products only: `polar_express` with as many steps as `lower`
        takes. "svd", a factorization. Or a `NewtonSchulz` of yours, whose error is then the
        result's; the derivative stays that of the exact sign.
      lower: The smallest singular value, over the largest, that is to be brought to 1, in (0, 1).
        None: 1e-4 in 16 bits, 1e-6 in float32, 1e-12 in float64; with "svd" what is above the
        rounding of zero, 4 eps √max(n, m).

    Returns:
      An array with the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not of the four dtypes, or `lower` is no number.
      ValueError: `x` has fewer than two axes or one of length zero, `by` or `lower` is none of
        the above, or `lower` stands beside a `NewtonSchulz`, which has its own.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (3, 5))
      >>> o = mc.linalg.msign(x)
      >>> bool(mc.orthogonality_error(o) < 1e-5)
      True
      >>> jax.grad(lambda x: mc.linalg.msign(x).sum())(x).shape
      (3, 5)

    Source: the derivative is Su Jianlin's, "The derivative of msign", kexue.fm, June 2025.
    """
    x = jnp.asarray(x)
    check_matrices("msign", x)
    how = accuracy("msign", x, by, lower, "svd")
    return in_auto_axes(functools.partial(_msign, how=how), specs_of(x))(x)


@functools.partial(jax.jit, static_argnames="how")
def _msign(x: jax.Array, how: Accuracy) -> jax.Array:
    result = polar(turned_wide(x).astype(accumulation_dtype(x.dtype)), how)
    return (result if result.shape == x.shape else result.mT).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def polar(x: jax.Array, how: Accuracy) -> jax.Array:
    """O = U Vᵀ of wide matrices `[..., n, m]`, n <= m, float32 or float64."""
    if how.newton_schulz is not None:
        return orthogonalize_as(x, how.newton_schulz)
    u, values, vt = svd(x)
    kept = values > how.lower * values[..., :1]
    return product(u * kept[..., None, :].astype(u.dtype), vt)


@polar.defjvp
def _polar_jvp(how, primals, tangents):
    """With A = M Oᵀ, the root of M Mᵀ: dO = ΩO + A⁻¹dM(I − OᵀO), where AΩ + ΩA = dM Oᵀ − O dMᵀ.

    Follows from M = AO: dM Oᵀ = dA + AΩ with Ω = dO Oᵀ, of which dA is symmetric and Ω is
    antisymmetric. It divides by sums of singular values where A⁻¹(dM − dA O) divides by each. A and
    O are functions of M here, so this is differentiated in its turn.
    """
    (x,), (dx,) = primals, tangents
    o = polar(x, how)
    a = symmetrized(product(x, o.mT))
    basis = eigenbasis(a, how.lower / 2)
    turned = product(dx, o.mT)
    rotation = solve_powers(a, turned - turned.mT, 2, basis)
    # Of square matrices this is zero, but for those of lower rank.
    outside = solve_left(a, dx - product(turned, o), basis)
    return o, product(rotation, o) + outside
