"""Maxima that keep NaNs. XLA's maximum on CPU drops them, within rows and between devices."""

from typing import TypeVar

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None
Tree = TypeVar("Tree")


def largest(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """The maximum, NaN where there is one, -inf of nothing."""
    return jnp.where(jnp.isnan(x).any(axis), jnp.nan, x.max(axis, initial=-jnp.inf))


def largest_of_devices(maxima: Tree, axis_name: AxisName) -> Tree:
    """The maximum over axes of `jax.shard_map` or `jax.pmap`, NaN where any device has one."""
    if axis_name is None:
        return maxima
    is_nan = jax.tree.map(lambda s: jnp.isnan(s).astype(jnp.float32), maxima)
    maxima, is_nan = jax.lax.pmax((maxima, is_nan), axis_name)
    return jax.tree.map(lambda s, nan: jnp.where(nan > 0, jnp.nan, s), maxima, is_nan)
