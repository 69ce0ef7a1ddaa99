"""Updates after which a parameter is what a link behind the learning rate wants it to be."""

from typing import Any

import jax
import jax.numpy as jnp

from muonclip_jax._core.dtypes import accumulation_dtype


def check_params(owner: str, params: Any) -> None:
    """Raises ValueError where `update` was called without the weights."""
    if params is None:
        raise ValueError(f"{owner} acts on weights: call tx.update(grads, state, params).")


def arrived(update: jax.Array, param: jax.Array) -> jax.Array:
    """The parameter that the update arrives at, in float32 or wider."""
    dtype = accumulation_dtype(param.dtype, update.dtype)
    return param.astype(dtype) + update.astype(dtype)


def arrive_at(target: jax.Array, update: jax.Array, param: jax.Array) -> jax.Array:
    """The update after which the parameter is the target, in the dtype of the update."""
    return (target - param.astype(target.dtype)).astype(update.dtype)


def arrive_at_multiple(update: jax.Array, param: jax.Array, multiplier: jax.Array) -> jax.Array:
    """The update after which the parameter is `multiplier * (param + update)`.

    Written so that a multiplier of 1 gives the update back as it was.
    """
    dtype = accumulation_dtype(param.dtype, update.dtype)
    m, u, p = (x.astype(dtype) for x in (multiplier, update, param))
    return jnp.where(m == 1, u, m * u + (m - 1) * p).astype(update.dtype)
