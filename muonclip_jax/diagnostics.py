"""Read-only measures of what happens inside the heads."""

import jax
import jax.numpy as jnp


def participation_ratio(x: jax.Array) -> jax.Array:
    """`(Σσ)² / Σσ²` over the **singular values** σ of `x`, uncentred.

    Between 1 (rank one) and min(n, m) (all singular values equal): how many directions the
    matrix uses, e.g. key activations `[tokens, head_features]` of one head.

    Args:
      x: `[..., n, m]`, any float dtype; computed in float32 or wider.

    Returns:
      `[...]`; 0 for a zero matrix. Cost: one SVD without vectors per matrix.
    """
    return _participation(_singular_values(x))


def eigenvalue_participation_ratio(x: jax.Array) -> jax.Array:
    """`(Σλ)² / Σλ²` over the eigenvalues λ = σ² of `xᵀx`: the covariance form, never larger.

    Args:
      x: As for `participation_ratio`.

    Returns:
      `[...]`; 0 for a zero matrix.
    """
    return _participation(_singular_values(x) ** 2)


def _singular_values(x: jax.Array) -> jax.Array:
    """Singular values over the largest one, so that their powers stay inside the dtype's range."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    values = jnp.linalg.svd(wide, compute_uv=False)
    largest = values.max(axis=-1, keepdims=True)
    return values / jnp.where(largest == 0, 1, largest)


def _participation(values: jax.Array) -> jax.Array:
    squares = (values**2).sum(axis=-1)
    return values.sum(axis=-1) ** 2 / jnp.where(squares == 0, 1, squares)
