"""What a matrix's singular values say: how large it is, and how many directions it uses.

All of these take matrices `[..., n, m]` to a number each, `[...]`, and have in common:

- Any float dtype goes in. They compute in float32, float64 for float64, and give that.
- Ranks and participation ratios lie between 1 and min(n, m).
- A zero matrix gives 0. One with a NaN or Inf gives NaN and leaves the rest of the batch alone.
- Scale is taken out by a power of two first, so that huge and tiny matrices neither overflow nor
  vanish; entries below the smallest normal number may count as zero.
- Cost: one SVD without vectors, about 8/3 k³ FLOPs with k the shorter side. A matrix that is not
  square is first brought to k × k by Householder's QR, 2 k² times the longer side. On two CPU cores
  that takes a fifth to a half off the SVD alone (eight matrices [8192, 64] or [512, 128]). A Gram
  matrix would be cheaper still, but it squares the singular values: in float32 all below 3e-4 of
  the largest are lost in rounding. QR loses no more than the SVD does. On CPU matrices of a batch
  go one by one (`lapack.py`).
- Accuracy: singular values come out within a few roundings, 1e-6 in float32, of the **largest**.
  Below that they are noise, so a rank-deficient matrix counts a little more than its rank.

On meshes the results are replicated; a matrix whose rows or columns are spread is gathered.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from muonclip_jax._core.lapack import each_matrix
from muonclip_jax._core.meshes import in_auto_axes
from muonclip_jax._core.options import check_number
from muonclip_jax._orthogonalize.normalization import in_range, nonzero


def singular_values(x: ArrayLike) -> jax.Array:
    """The singular values, the largest first.

    Takes matrices `[..., n, m]` of any float dtype (else TypeError; ValueError for fewer than two
    axes, or one of length zero) and gives `[..., min(n, m)]` in float32, float64 for float64: all
    NaN for a matrix with a NaN or Inf.

    Example:
      >>> mc.singular_values(jnp.ones((5, 4, 3))).shape
      (5, 3)
    """
    values, scale = _spectrum_of("singular_values", x)
    return values * scale


def spectral_norm(x: ArrayLike) -> jax.Array:
    """‖x‖₂, the largest singular value: exact, by SVD.

    Takes matrices `[..., n, m]` of any float dtype (else TypeError; ValueError for fewer than two
    axes, or one of length zero) and gives `[...]` in float32, float64 for float64.

    Example:
      >>> round(float(mc.spectral_norm(jnp.diag(jnp.array([3.0, 1.0])))), 3)
      3.0
    """
    values, scale = _spectrum_of("spectral_norm", x)
    return values[..., 0] * scale[..., 0]


def participation_ratio(x: ArrayLike) -> jax.Array:
    """`(Σσ)² / Σσ²` over the **singular values** σ, uncentred.

    Between 1 (rank one) and min(n, m) (all singular values equal): how many directions the
    matrix uses, e.g. the key activations `[tokens, head_features]` of one head. The exponential of
    a Rényi entropy of order 2 if σ/Σσ are probabilities; `effective_rank(x, gamma=1)` is Shannon's.

    Takes matrices `[..., n, m]` of any float dtype (else TypeError; ValueError for fewer than two
    axes, or one of length zero) and gives `[...]` in float32, float64 for float64.

    Example:
      >>> round(float(mc.participation_ratio(jnp.diag(jnp.array([3.0, 1.0])))), 3)
      1.6
    """
    values, _ = _spectrum_of("participation_ratio", x)
    return _participation(values)


def eigenvalue_participation_ratio(x: ArrayLike) -> jax.Array:
    """`(Σλ)² / Σλ²` over the **eigenvalues** λ = σ² of `xᵀx`: the covariance form, never larger.

    Takes matrices `[..., n, m]` of any float dtype (else TypeError; ValueError for fewer than two
    axes, or one of length zero) and gives `[...]` in float32, float64 for float64.

    Example:
      >>> round(float(mc.eigenvalue_participation_ratio(jnp.diag(jnp.array([3.0, 1.0])))), 3)
      1.22
    """
    values, _ = _spectrum_of("eigenvalue_participation_ratio", x)
    return _participation(_relative(values) ** 2)


def effective_rank(x: ArrayLike, gamma: float = 1.0) -> jax.Array:
    """`exp(−Σ p log p)` with `p = σ^gamma / Σ σ^gamma`: the entropy of the spectrum as a rank.

    `gamma=1` is Roy and Vetterli's (EUSIPCO 2007); `gamma=2`, of the energies, is what Moonlight
    (arXiv 2502.16982) plots as SVD entropy, there over log min(n, m):
    `jnp.log(effective_rank(x, 2)) / math.log(min(n, m))`.

    Args:
      x: Matrices `[..., n, m]`, any float dtype.
      gamma: The power, above 0. The larger, the less small singular values count.

    Returns:
      `[...]` in float32, float64 for float64, between 1 and min(n, m).

    Raises:
      TypeError: `x` is not of a float dtype, or gamma no number.
      ValueError: `x` has fewer than two axes, or one of length zero; gamma is not above 0.

    Example:
      >>> round(float(mc.effective_rank(jnp.eye(3))), 3)
      3.0
    """
    wanted = "above 0 and finite, such as 1 or 2"
    check_number("effective_rank: gamma", gamma, lambda x: 0 < x < float("inf"), wanted)
    values, _ = _spectrum_of("effective_rank", x)
    weights = _relative(values) ** gamma
    total = weights.sum(axis=-1, keepdims=True)
    entropy = jax.scipy.special.entr(weights / nonzero(total)).sum(axis=-1)
    return jnp.where(total[..., 0] == 0, 0, jnp.exp(entropy))


def stable_rank(x: ArrayLike) -> jax.Array:
    """`‖x‖_F² / ‖x‖₂²`, which is Σσ² over the largest σ².

    Takes matrices `[..., n, m]` of any float dtype (else TypeError; ValueError for fewer than two
    axes, or one of length zero) and gives `[...]` in float32, float64 for float64.

    Example:
      >>> round(float(mc.stable_rank(jnp.diag(jnp.array([3.0, 1.0])))), 3)
      1.111
    """
    values, _ = _spectrum_of("stable_rank", x)
    return (_relative(values) ** 2).sum(axis=-1)


def nuclear_rank(x: ArrayLike) -> jax.Array:
    """`‖x‖_* / ‖x‖₂`, nuclear over spectral norm, which is Σσ over the largest σ.

    Takes matrices `[..., n, m]` of any float dtype (else TypeError; ValueError for fewer than two
    axes, or one of length zero) and gives `[...]` in float32, float64 for float64.

    Example:
      >>> round(float(mc.nuclear_rank(jnp.diag(jnp.array([3.0, 1.0])))), 3)
      1.333
    """
    values, _ = _spectrum_of("nuclear_rank", x)
    return _relative(values).sum(axis=-1)


def _spectrum_of(owner: str, x: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Singular values `[..., k]` of the matrices over a power of two, and this, `[..., 1]`."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{owner}: x is {x.dtype}; cast it to a float dtype.")
    if x.ndim < 2 or 0 in x.shape:
        raise ValueError(
            f"{owner}: x has shape {x.shape}, but matrices [..., n, m] are needed, no axis of "
            "length zero."
        )
    return in_auto_axes(_spectrum, PartitionSpec())(x)


@jax.jit
def _spectrum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    r, scale = factored(x if x.shape[-2] >= x.shape[-1] else x.mT)
    broken = jnp.isnan(r[..., 0, :1])
    # What LAPACK, cuSOLVER and XLA's own SVD make of a NaN differs, so none reaches them.
    svd = functools.partial(jnp.linalg.svd, compute_uv=False)
    values = each_matrix(svd, jnp.where(broken[..., None], 0, r))
    return jnp.where(broken, jnp.nan, values), scale


def factored(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """r and a power of two such that `x = Q · r · scale` with orthonormal columns Q.

    Args:
      x: Matrices `[..., n, m]`, any float dtype.

    Returns:
      r `[..., min(n, m), m]`, float32 or wider, all NaN where x is not finite, and the power
      `[..., 1]`.
    """
    x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    finite = jnp.isfinite(x).all(axis=(-2, -1), keepdims=True)
    x = jnp.where(finite, x, 0)
    scaled = in_range(x, x.dtype)
    largest, of_scaled = (jnp.abs(y).max(axis=(-2, -1))[..., None] for y in (x, scaled))
    scale = jnp.where(largest == 0, 1, largest / nonzero(of_scaled))
    qr = functools.partial(jnp.linalg.qr, mode="r")
    r = each_matrix(qr, scaled) if x.shape[-2] > x.shape[-1] else scaled
    return jnp.where(finite, r, jnp.nan), scale


def _participation(values: jax.Array) -> jax.Array:
    return values.sum(axis=-1) ** 2 / nonzero((values**2).sum(axis=-1))


def _relative(values: jax.Array) -> jax.Array:
    """To the largest."""
    return values / nonzero(values[..., :1])
