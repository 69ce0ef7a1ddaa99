"""The standard iteration on matrices of which every device of a team has some columns.

All products are shared evenly: each device multiplies its columns, and its share of the rows of
what is n × n. The Gram iteration would save a team little: it has more of the latter.
"""

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._orthogonalize.methods import DENSE
from muonclip_jax._orthogonalize.normalization import inverse_norm, nonzero
from muonclip_jax._orthogonalize.products import matmul, sum_of_squares
from muonclip_jax._orthogonalize.schedules import Schedule
from muonclip_jax._spread.device_group import Team


def iterate(x: jax.Array, schedule: Schedule, team: Team) -> jax.Array:
    """The schedule's norm and steps.

    Args:
      x: This device's columns of matrices as `in_range` gives them, `[..., n, m/size]`; n is a
        multiple of the team's size.
      schedule: The norm and the steps.
      team: Those with the other columns.
    """

    x = _rescaled_rows(x, schedule, team)
    square = _rows_of_gram(x, team)
    measured = x if schedule.normalization == "frobenius" else square
    scale = inverse_norm(team.sum(sum_of_squares(measured)), schedule)
    coefficients = jnp.asarray(schedule.coefficients, accumulation_dtype(x.dtype))
    # The first step by itself: only there all tell each other about the norm.
    x = _step(x, square, scale, coefficients[0], team)

    def step(x, abc):
        square = _rows_of_gram(x, team)
        return _step(x, square, jnp.ones_like(scale), abc, team), None

    return lax.scan(step, x, coefficients[1:])[0]


def _step(
    x: jax.Array, square: jax.Array, scale: jax.Array, abc: jax.Array, team: Team
) -> jax.Array:
    """A polynomial of `scale * x`, of whose Gram matrix, not scaled, this device has some rows."""
    a, b, c = abc
    square = scale**2 * square
    rows = square.astype(x.dtype)
    polynomial = (b * square + c * matmul(rows, team.all_rows(rows), DENSE)).astype(x.dtype)
    product = matmul(team.all_rows(polynomial), x, DENSE)
    return (scale * (a * x + product)).astype(x.dtype)


def _rescaled_rows(x: jax.Array, schedule: Schedule, team: Team) -> jax.Array:
    """As on one device: `normalization.rescaled_rows`."""
    if schedule.normalization != "aol":
        return x
    sums = jnp.sum(jnp.abs(_rows_of_gram(x, team)), axis=-1, keepdims=True)
    divisor = jnp.sqrt(nonzero(team.all_rows(sums))) * schedule.norm_factor
    return (x / divisor).astype(x.dtype)


def _rows_of_gram(x: jax.Array, team: Team) -> jax.Array:
    return team.sum_rows(matmul(x, x.mT, DENSE))
