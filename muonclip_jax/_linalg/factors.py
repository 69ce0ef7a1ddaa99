"""Eigenvalues, singular values and inverses of batches of matrices, in which one that is not finite
spoils no other."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._core.lapack import each_matrix
from muonclip_jax._orthogonalize.methods import DENSE
from muonclip_jax._orthogonalize.products import matmul


def product(first: jax.Array, *others: jax.Array) -> jax.Array:
    """Multiplies from left to right, in full precision on every backend."""
    return functools.reduce(lambda left, right: matmul(left, right, DENSE), others, first)


def symmetrized(x: jax.Array) -> jax.Array:
    """The symmetric part, (x + xᵀ) / 2."""
    return (x + x.mT) / 2


def identity(x: jax.Array) -> jax.Array:
    """The identity with the shape and dtype of square matrices."""
    return jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)


def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues `[..., n]` and eigenvectors `[..., n, n]` of symmetric matrices."""
    return guarded(lambda x: tuple(jnp.linalg.eigh(x, symmetrize_input=False)), x)


def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U `[..., n, k]`, σ `[..., k]` and Vᵀ `[..., k, m]` with k = min(n, m)."""
    return guarded(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)), x)


def inverse(x: jax.Array) -> jax.Array:
    """The inverse; of a singular matrix infinite, or NaN."""
    return guarded(jnp.linalg.inv, x)


def guarded(factorize: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """`factorize(x)`, all NaN for a matrix with a NaN or Inf. What LAPACK, cuSOLVER and XLA make of
    these differs, so none reaches them."""
    x = lax.stop_gradient(x)  # who calls these knows a derivative that survives equal eigenvalues
    finite = jnp.isfinite(x).all(axis=(-2, -1))
    found = each_matrix(factorize, jnp.where(finite[..., None, None], x, 0))

    def or_nan(y):
        return jnp.where(finite.reshape(finite.shape + (1,) * (y.ndim - finite.ndim)), y, jnp.nan)

    return jax.tree.map(or_nan, found)
