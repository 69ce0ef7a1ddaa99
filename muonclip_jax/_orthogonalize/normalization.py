"""What a matrix is divided by before the steps, for its singular values to lie in (0, 1].

A norm is read off the Gram matrix XXᵀ, which the first step forms anyway: the Frobenius norm is the
square root of its trace, the Schatten-4 norm that of its Frobenius norm.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._orthogonalize.methods import Method
from muonclip_jax._orthogonalize.products import (
    ONE_DEVICE,
    OneDevice,
    Symmetric,
    gram,
    joined,
    sum_of_squares,
    trace,
)
from muonclip_jax._orthogonalize.schedules import Schedule


def in_range(x: jax.Array, dtype: jnp.dtype, group: OneDevice = ONE_DEVICE) -> jax.Array:
    """Scales matrices by powers of two that bring their largest entries to 1/2 … 1.

    Squares then neither overflow nor vanish. That rounds nothing, and since the result is
    scale-invariant, holding the power constant leaves the gradient exact.

    Args:
      x: Matrices `[..., n, m]`, or parts of them.
      dtype: Of the result.
      group: The devices that have the other parts.
    """
    x = x.astype(accumulation_dtype(x.dtype, dtype))
    largest = group.largest(lax.stop_gradient(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)))
    # Bounded, for the power to be a normal number: XLA may take others for zero.
    limit = -jnp.finfo(x.dtype).minexp
    exponent = jnp.clip(jnp.frexp(largest)[1], -limit, limit)
    return (x * jnp.ldexp(jnp.ones_like(largest), -exponent)).astype(dtype)


def rescaled_rows(
    x: jax.Array, schedule: Schedule, method: Method, group: OneDevice = ONE_DEVICE
) -> jax.Array:
    """Divides each row as AOL does; for other norms, returns the matrices as they are."""
    if schedule.normalization != "aol":
        return x
    # Not rounded, not even for GPUs: float16 has no room for sums over many columns.
    square = gram(x, dataclasses.replace(method, lean=False))
    rows = jnp.abs(joined(group.sum_rows(square)))
    sums = group.all_rows(jnp.sum(rows, axis=-1, keepdims=True))
    norms = jnp.sqrt(nonzero(sums)) * schedule.norm_factor
    return (x.astype(norms.dtype) / norms).astype(x.dtype)


def scale_at(
    first: jax.Array | bool | None,
    x: jax.Array,
    square: Symmetric,
    schedule: Schedule,
    group: OneDevice,
) -> jax.Array:
    """What X is multiplied by before a step, `[..., 1, 1]`: 1 but for the first step.

    Args:
      first: Whether this is the first step; None: it is not. A norm that an array then says is not
        needed costs less than a condition, at which GPUs would wait for their host.
      x: X; in a device group, this device's columns.
      square: XXᵀ; in a device group, this device's rows.
      schedule: Which norm.
      group: The devices that have the other parts.
    """
    if first is None or schedule.normalization == "aol":  # which has divided the rows already
        return jnp.ones((*x.shape[:-2], 1, 1), accumulation_dtype(x.dtype))
    if schedule.normalization == "schatten4":
        norm = jnp.sqrt(jnp.sqrt(nonzero(group.sum(sum_of_squares(square)))))
    else:
        power_sum = trace(square) if group.size == 1 else group.sum(sum_of_squares(x))
        norm = jnp.sqrt(nonzero(power_sum))
    return jnp.where(first, 1 / (norm * schedule.norm_factor), 1)


def nonzero(x: jax.Array) -> jax.Array:
    """Replaces 0 by 1, so that zeros divided by it stay zeros; NaN stays NaN."""
    return jnp.where(x == 0, 1, x)
