"""The standard iteration on matrices of which every device of a team has some columns.

All products are shared evenly: each device multiplies its columns, and its share of the rows of
what is n × n. The Gram iteration would save a team little: it has more of the latter.
"""

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax.orthogonalize.iteration import nonzero
from muonclip_jax.orthogonalize.methods import DENSE
from muonclip_jax.orthogonalize.precision import accumulator
from muonclip_jax.orthogonalize.products import matmul
from muonclip_jax.orthogonalize.schedules import Schedule
from muonclip_jax.orthogonalize.team import Team


def normalize(x: jax.Array, schedule: Schedule, dtype: jnp.dtype, team: Team) -> jax.Array:
    """The matrices in `dtype`, with a norm of 1 / norm_factor, or for AOL, which takes its norm
    from the Gram matrix, a largest entry of 1.

    Args:
      x: A team's parts of matrices `[..., n, m]`.
      schedule: Which norm.
      dtype: Of the iteration.
      team: Those with the other parts.
    """
    x = x.astype(jnp.promote_types(accumulator(x.dtype), dtype))
    # XLA divides by multiplying with the reciprocal, hence the bound: a subnormal one would count
    # as zero.
    largest = team.largest(lax.stop_gradient(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)))
    x = x / nonzero(jnp.minimum(largest, 1 / jnp.finfo(x.dtype).tiny))
    if schedule.normalization == "frobenius":
        squares = team.sum(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
        x = x / (jnp.sqrt(nonzero(squares)) * schedule.norm_factor)
    return x.astype(dtype)


def iterate(x: jax.Array, schedule: Schedule, team: Team) -> jax.Array:
    """The schedule's steps on what `normalize` gives.

    Args:
      x: This device's columns of matrices, `[..., n, m/size]`; n is a multiple of the team's size.
      schedule: The steps.
      team: Those with the other columns.
    """

    def step(x, abc):
        a, b, c = abc
        square = _rows_of_gram(x, team)
        rows = square.astype(x.dtype)
        polynomial = (b * square + c * matmul(rows, team.all_rows(rows), DENSE)).astype(x.dtype)
        return (a * x + matmul(team.all_rows(polynomial), x, DENSE)).astype(x.dtype), None

    if schedule.normalization == "aol":
        sums = jnp.sum(jnp.abs(_rows_of_gram(x, team)), axis=-1, keepdims=True)
        scale = jnp.sqrt(nonzero(team.all_rows(sums))) * schedule.norm_factor
        x = (x / scale).astype(x.dtype)
    return lax.scan(step, x, jnp.asarray(schedule.coefficients, accumulator(x.dtype)))[0]


def _rows_of_gram(x: jax.Array, team: Team) -> jax.Array:
    return team.sum_rows(matmul(x, x.mT, DENSE))
