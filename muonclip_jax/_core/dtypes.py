"""In which precision sums and products are computed: the one place that says so."""

import functools
from typing import TypedDict

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def accumulation_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """What numbers of these dtypes are summed in: float32, or float64 if one is float64."""
    return widest(jnp.float32, *dtypes)


def widest(*dtypes: DTypeLike) -> jnp.dtype:
    """The dtype that has room for all of these."""
    with jax.numpy_dtype_promotion("standard"):  # this is no implicit promotion
        return jnp.dtype(functools.reduce(jnp.promote_types, dtypes))


class ProductOptions(TypedDict):
    """Arguments of `jnp.matmul` and `lax.dot_general`."""

    precision: lax.Precision
    preferred_element_type: jnp.dtype


def of_product(dtype: DTypeLike) -> ProductOptions:
    """How factors of this dtype are multiplied. XLA's default precision rounds float32 factors to
    bfloat16 on TPU and to TF32 on GPU; 16-bit factors lose nothing by it."""
    total = accumulation_dtype(dtype)
    exact = jnp.dtype(dtype) == total
    return {
        "precision": lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        "preferred_element_type": total,
    }
