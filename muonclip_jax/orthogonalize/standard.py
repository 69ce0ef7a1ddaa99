"""The standard iteration: X ← aX + (bA + cA²)X with A = XXᵀ, at every step.

Sums are in the accumulator's dtype, factors of products in that of X.
"""

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax.orthogonalize.methods import Method
from muonclip_jax.orthogonalize.precision import accumulator
from muonclip_jax.orthogonalize.products import (
    each,
    gram,
    joined,
    matmul,
    rounded,
    symmetric,
)
from muonclip_jax.orthogonalize.schedules import Schedule


def standard(x: jax.Array, scale: jax.Array, schedule: Schedule, method: Method) -> jax.Array:
    """All steps on `scale * x`.

    Cost for each matrix and step: 4n²m + 2n³ FLOPs, less what `method.smallest_block` saves of the
    2n²m + 2n³ that are symmetric.

    Args:
      x: Matrices `[..., n, m]`, n <= m.
      scale: `[..., 1, 1]`. It is applied to products, where it costs and rounds nothing.
      schedule: The steps.
      method: Which products.
    """

    def step(carry, abc):
        x, scale = carry
        a, b, c = abc
        square = each(lambda g: scale**2 * g, gram(x, method))
        rows = joined(rounded(square, x.dtype))
        polynomial = each(
            lambda g, gg: (b * g + c * gg).astype(x.dtype), square, symmetric(rows, rows, method)
        )
        x = (scale * (a * x + matmul(joined(polynomial), x, method))).astype(x.dtype)
        return (x, jnp.ones_like(scale)), None

    # A scan costs as much as an unrolled loop at run time and compiles once for all steps.
    coefficients = jnp.asarray(schedule.coefficients, accumulator(x.dtype))
    return lax.scan(step, (x, scale), coefficients)[0][0]
