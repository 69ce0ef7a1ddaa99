"""Matrix products as the iterations need them: summed in float32 at least, and symmetric ones
without their upper half."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from muonclip_jax._core import dtypes as precision
from muonclip_jax._orthogonalize import symmetric_gpu, symmetric_tpu
from muonclip_jax._orthogonalize.methods import DENSE, Method

# [[A, Bᵀ], [B, C]] as (A, B, C), of which A and C may be cut again; an array where it is not cut.
Symmetric = jax.Array | tuple["Symmetric", jax.Array, "Symmetric"]


def matmul(left: jax.Array, right: jax.Array, method: Method) -> jax.Array:
    """`left @ right` in the accumulator's dtype."""
    if method.row_major:
        left, right = _row_major(left), _row_major(right)
    return jnp.matmul(left, right, **precision.of_product(left.dtype))


def gram(x: jax.Array, method: Method) -> Symmetric:
    """XXᵀ. Cost: as `symmetric`."""
    # Copied here, once for all blocks.
    return symmetric(x, _row_major(x.mT) if method.row_major else x.mT, method)


def symmetric(left: jax.Array, right: jax.Array, method: Method) -> Symmetric:
    """`left @ right`, `[..., n, n]`, where the caller knows it to be symmetric.

    Cost: of the full product's FLOPs 3/4 if it is cut once, 5/8 if twice.
    """
    if method.kernel == "pallas" and left.dtype != jnp.float64:
        return _by_kernel(left, right)
    n = left.shape[-2]
    if method.smallest_block is None or n < 2 * method.smallest_block:
        return matmul(left, right, method)
    top, bottom = jnp.split(left, [n // 2], axis=-2)
    ahead, behind = jnp.split(right, [n // 2], axis=-1)
    return (
        symmetric(top, ahead, method),
        matmul(bottom, ahead, method),
        symmetric(bottom, behind, method),
    )


@jax.custom_jvp
def _by_kernel(left: jax.Array, right: jax.Array) -> jax.Array:
    total = precision.accumulation_dtype(left.dtype)

    def run(product):
        return lambda left, right: product(left, right.mT, out_dtype=total)

    return lax.platform_dependent(
        left,
        right,
        tpu=run(symmetric_tpu.symmetric_product),
        cuda=run(symmetric_gpu.symmetric_product),
        default=lambda left, right: matmul(left, right, DENSE),
    )


@_by_kernel.defjvp
def _by_kernel_jvp(factors, tangents):
    (left, right), (left_dot, right_dot) = factors, tangents
    tangent = matmul(left_dot, right, DENSE) + matmul(left, right_dot, DENSE)
    return _by_kernel(left, right), tangent


def joined(x: Symmetric) -> jax.Array:
    """The whole matrix, exactly symmetric where it was cut."""
    if not isinstance(x, tuple):
        return x
    a, b, c = x
    top = concatenate([joined(a), b.mT], -1)
    bottom = concatenate([b, joined(c)], -1)
    return concatenate([top, bottom], -2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def concatenate(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    """As `jnp.concatenate`; 16-bit floats go as integers, since XLA on CPU would widen them."""
    dtype = arrays[0].dtype
    if dtype.itemsize != 2:
        return jnp.concatenate(arrays, axis)
    bits = [lax.bitcast_convert_type(array, jnp.uint16) for array in arrays]
    return lax.bitcast_convert_type(jnp.concatenate(bits, axis), dtype)


@concatenate.defjvp
def _concatenate_jvp(axis, arrays, tangents):
    return concatenate(*arrays, axis), jnp.concatenate(*tangents, axis)


def each(fn: Callable[..., jax.Array], *matrices: Symmetric) -> Symmetric:
    """Entry by entry."""
    return jax.tree.map(fn, *matrices)


def trace(x: Symmetric) -> jax.Array:
    """`[..., 1, 1]`."""
    if isinstance(x, tuple):
        return trace(x[0]) + trace(x[2])
    return jnp.trace(x, axis1=-2, axis2=-1)[..., None, None]


def sum_of_squares(x: Symmetric) -> jax.Array:
    """Of all entries, `[..., 1, 1]`."""
    if isinstance(x, tuple):
        a, b, c = x
        return sum_of_squares(a) + 2 * sum_of_squares(b) + sum_of_squares(c)
    return jnp.sum(
        jnp.square(x.astype(precision.accumulation_dtype(x.dtype))), (-2, -1), keepdims=True
    )


def rounded(x: Symmetric, dtype: jnp.dtype) -> Symmetric:
    return each(lambda block: block.astype(dtype), x)


def _row_major(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
