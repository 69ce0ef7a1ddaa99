"""In which precision products are computed: the one place that says so, for XLA and for kernels."""

from typing import Any

import jax.numpy as jnp
from jax import lax


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """What products of factors of this dtype are summed in, and given as."""
    return jnp.promote_types(dtype, jnp.float32)


def of_product(dtype: jnp.dtype) -> dict[str, Any]:
    """Arguments of `jnp.matmul` and `lax.dot_general` for factors of this dtype. XLA's default
    precision rounds float32 factors to bfloat16 on TPU and to TF32 on GPU; 16-bit factors lose
    nothing by it."""
    total = accumulator(dtype)
    exact = dtype == total
    return {
        "precision": lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        "preferred_element_type": total,
    }
