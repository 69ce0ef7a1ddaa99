"""Checks of what the transformations are built with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_concrete_number(name: str, value: Any) -> bool:
    """Whether the value of an option can be looked at. Traced ones come from
    `optax.inject_hyperparams`, which was given the concrete ones.

    Raises:
      TypeError: It is not one number.
    """
    if isinstance(value, jax.core.Tracer):
        return False
    if np.ndim(value) or not jnp.issubdtype(np.asarray(value).dtype, jnp.number):
        raise TypeError(f"{name} must be one number, got {value!r}.")
    return True
