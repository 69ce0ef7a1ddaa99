"""The standard iteration: X ← aX + (bA + cA²)X with A = XXᵀ, at every step.

Sums are in the accumulator's dtype, factors of products in that of X.
"""

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._orthogonalize.methods import Method
from muonclip_jax._orthogonalize.normalization import scale_at
from muonclip_jax._orthogonalize.products import (
    each,
    gram,
    joined,
    matmul,
    rounded,
    symmetric,
)
from muonclip_jax._orthogonalize.schedules import Schedule


def standard(x: jax.Array, schedule: Schedule, method: Method) -> jax.Array:
    """The schedule's norm and steps.

    Cost for each matrix and step: 4n²m + 2n³ FLOPs, less what `method.smallest_block` saves of the
    2n²m + 2n³ that are symmetric.

    Args:
      x: Matrices `[..., n, m]`, n <= m.
      schedule: The norm and the steps.
      method: Which products.
    """

    def step(x, this):
        (a, b, c), first = this
        square = gram(x, method)
        # Products are scaled, not X: that costs and rounds nothing.
        scale = scale_at(first, square, schedule)
        square = each(lambda g: scale**2 * g, square)
        rows = joined(rounded(square, x.dtype))
        polynomial = each(
            lambda g, gg: (b * g + c * gg).astype(x.dtype), square, symmetric(rows, rows, method)
        )
        return (scale * (a * x + matmul(joined(polynomial), x, method))).astype(x.dtype), None

    # A scan costs as much as an unrolled loop at run time and compiles once for all steps.
    coefficients = jnp.asarray(schedule.coefficients, accumulation_dtype(x.dtype))
    first = jnp.arange(len(coefficients)) == 0
    return lax.scan(step, x, (coefficients, first))[0]
