"""What a matrix is divided by before the steps, for its singular values to lie in (0, 1].

A norm is read off the Gram matrix XXᵀ, which the first step forms anyway: the Frobenius norm is the
square root of its trace, the Schatten-4 norm that of its Frobenius norm.
"""

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._orthogonalize.methods import Method
from muonclip_jax._orthogonalize.products import Symmetric, gram, joined, sum_of_squares, trace
from muonclip_jax._orthogonalize.schedules import Schedule
from muonclip_jax._spread.device_group import ALONE, Team


def in_range(x: jax.Array, dtype: jnp.dtype, team: Team = ALONE) -> jax.Array:
    """The matrices in `dtype`, times powers of two that bring their largest entries to 1/2 … 1, so
    that squares neither overflow nor vanish. That rounds nothing, and since the result is
    scale-invariant, holding the power constant leaves the gradient exact.

    Args:
      x: Matrices `[..., n, m]`, or parts of them.
      dtype: Of the iteration.
      team: Those with the other parts.
    """
    x = x.astype(jnp.promote_types(accumulation_dtype(x.dtype), dtype))
    largest = team.largest(lax.stop_gradient(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)))
    # Bounded, for the power to be a normal number: XLA may take others for zero.
    limit = -jnp.finfo(x.dtype).minexp
    exponent = jnp.clip(jnp.frexp(largest)[1], -limit, limit)
    return (x * jnp.ldexp(jnp.ones_like(largest), -exponent)).astype(dtype)


def rescaled_rows(x: jax.Array, schedule: Schedule, method: Method) -> jax.Array:
    """AOL's normalization, of every row by itself; other matrices as they are."""
    if schedule.normalization != "aol":
        return x
    sums = jnp.sum(jnp.abs(joined(gram(x, method))), axis=-1, keepdims=True)
    return (x / (jnp.sqrt(nonzero(sums)) * schedule.norm_factor)).astype(x.dtype)


def scale_at(first: jax.Array, square: Symmetric, schedule: Schedule) -> jax.Array:
    """What X is multiplied by before a step: 1 but for the first. A norm that is not needed costs
    less than a condition, at which GPUs would wait for their host.

    Args:
      first: bool, whether this is the first step.
      square: XXᵀ, `[..., n, n]`.
      schedule: Which norm.

    Returns:
      `[..., 1, 1]`.
    """
    frobenius = schedule.normalization == "frobenius"
    power_sum = trace(square) if frobenius else sum_of_squares(square)
    return jnp.where(first, inverse_norm(power_sum, schedule), 1)


def inverse_norm(power_sum: jax.Array, schedule: Schedule) -> jax.Array:
    """From Σσ², or Σσ⁴ for the Schatten-4 norm; 1 for AOL, which has divided rows already."""
    if schedule.normalization == "aol":
        return jnp.ones_like(power_sum)
    root = jnp.sqrt(nonzero(power_sum))
    norm = root if schedule.normalization == "frobenius" else jnp.sqrt(root)
    return 1 / (norm * schedule.norm_factor)


def nonzero(x: jax.Array) -> jax.Array:
    """1 for 0, so that zeros stay zeros; NaN stays NaN."""
    return jnp.where(x == 0, 1, x)
