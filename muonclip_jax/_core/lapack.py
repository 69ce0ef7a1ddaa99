"""QR, SVD and eigenvalues of many matrices, which on CPU are LAPACK's."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def each_matrix(factorize: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """`factorize(x)`, on CPU one matrix at a time.

    JAX 0.10 spreads a batch over the threads that run the program and waits for them. In a program
    with several batches all threads may be waiting, and it never ends; on two cores six are enough.

    Args:
      factorize: Takes matrices `[..., n, m]` to an array, or a tree of them, with the same leading
        axes.
      x: The matrices.
    """

    def one_at_a_time(x):
        results = lax.map(factorize, x.reshape(-1, *x.shape[-2:]))
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), results)

    return lax.platform_dependent(x, cpu=one_at_a_time, default=factorize)
