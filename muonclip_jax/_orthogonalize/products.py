"""What the iterations are made of: matrix products summed in float32 at least, symmetric ones
without their upper half, and the parts of matrices on several devices."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TypeVar, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from muonclip_jax._core import dtypes as precision
from muonclip_jax._orthogonalize.methods import DENSE, Method
from muonclip_jax._orthogonalize.row_major import row_major


class OneDevice:
    """The device group of one device, which has all of every matrix.

    `_spread.device_group.DeviceGroup` is that of several, each with some columns of X and some rows
    of XXᵀ and its polynomials.
    """

    @property
    def size(self) -> int:
        return 1

    def largest(self, x: jax.Array) -> jax.Array:
        """The maximum over the devices, entry by entry."""
        return x

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the devices, entry by entry."""
        return x

    def sum_rows(self, x: "Symmetric") -> "Symmetric":
        """This device's share of the rows of the sum."""
        return x

    def all_rows(self, x: jax.Array) -> jax.Array:
        """All devices' shares of the rows below each other."""
        return x

    def own_rows(self, x: jax.Array) -> jax.Array:
        """This device's share of the rows of what all devices have."""
        return x


ONE_DEVICE = OneDevice()

# [[A, Bᵀ], [B, C]] as (A, B, C), of which A and C may be cut again; an array where it is not cut.
Symmetric = jax.Array | tuple["Symmetric", jax.Array, "Symmetric"]
# Cut or not, as it came.
_AsItCame = TypeVar("_AsItCame", jax.Array, Symmetric)


def matmul(left: jax.Array, right: jax.Array, method: Method) -> jax.Array:
    """`left @ right`, summed in the accumulation dtype, and written in it unless `method.lean`."""
    if method.row_major:
        left, right = row_major(left), row_major(right)
    options = precision.of_product(left.dtype)
    if method.lean:
        options["preferred_element_type"] = left.dtype
    return jnp.matmul(left, right, **options)


def gram(x: jax.Array, method: Method) -> Symmetric:
    """XXᵀ, at the cost of `symmetric`."""
    # Copied whole: XLA on CPU takes twice as long to transpose a half while it cuts it out.
    return symmetric(x, row_major(x.mT) if method.row_major else x.mT, method)


@functools.partial(jax.jit, static_argnames="method", inline=True)  # traced once for each shape
def symmetric(left: Symmetric, right: Symmetric, method: Method) -> Symmetric:
    """`left @ right`, `[..., n, n]`, where the caller knows it to be symmetric.

    Cost: of the full product's FLOPs 3/4 if it is cut once, 5/8 if twice. Factors that are cut
    already are not joined and cut again.
    """
    if method.kernel == "pallas":
        left, right = joined(left), joined(right)
        if left.dtype != jnp.float64:
            return _by_kernel(left, right)
    if not isinstance(left, tuple) and (
        method.smallest_block is None or left.shape[-2] < 2 * method.smallest_block
    ):
        return matmul(left, joined(right), method)
    top, bottom = _halves(left, -2)
    ahead, behind = _halves(right, -1)
    return (
        symmetric(top, ahead, method),
        matmul(bottom, ahead, method),
        symmetric(bottom, behind, method),
    )


def square_by_half(x: jax.Array, method: Method) -> jax.Array:
    """XXᵀ without the quarter above the diagonal, for 3/4 of the FLOPs: it mirrors that below.

    For GPUs, whose products read some of the rows where they lie, if a sum wrote them.
    """
    # [[A, Bᵀ], [B, C]], of A and [B, C]. XLA selects in one pass, where `joined` takes two.
    rows, half = x.shape[-2], x.shape[-2] // 2
    above = matmul(x[..., :half, :], x[..., :half, :].mT, method)
    below = matmul(x[..., half:, :], x.mT, method)
    missing = [(0, 0)] * (x.ndim - 1) + [(0, rows - half)]
    lower = concatenate([jnp.pad(above, missing), below], -2)
    is_above = jnp.arange(rows) < half
    return jnp.where(is_above[:, None] & ~is_above, lower.mT, lower)


def _halves(x: Symmetric, axis: int) -> Sequence[jax.Array]:
    """The upper half and the lower, or the left and the right."""
    if not isinstance(x, tuple):
        return jnp.split(x, [x.shape[axis] // 2], axis)
    a, b, c = x
    above, below = (b.mT, b) if axis == -2 else (b, b.mT)
    along = -3 - axis
    return concatenate([joined(a), above], along), concatenate([below, joined(c)], along)


@jax.custom_jvp
def _by_kernel(left: jax.Array, right: jax.Array) -> jax.Array:
    # Here, so that nobody who does not ask for it loads Pallas.
    from muonclip_jax._orthogonalize.symmetric_tpu import symmetric_product

    total = precision.accumulation_dtype(left.dtype)

    def on_tpu(left, right):
        with jax.enable_x64(False):  # the kernel counts in 32 bits
            return symmetric_product(left, right.mT, out_dtype=total)

    return lax.platform_dependent(
        left,
        right,
        tpu=on_tpu,
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
    return concatenate(_halves(x, -2), -2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def concatenate(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    """Concatenates; 16-bit floats go as integers, since XLA on CPU would convert them."""
    dtype = arrays[0].dtype
    if dtype.itemsize != 2:
        return jnp.concatenate(arrays, axis)
    bits = [lax.bitcast_convert_type(array, jnp.uint16) for array in arrays]
    return lax.bitcast_convert_type(jnp.concatenate(bits, axis), dtype)


@concatenate.defjvp
def _concatenate_jvp(axis, primals, tangents):
    (arrays,), (dots,) = primals, tangents
    return concatenate(arrays, axis), jnp.concatenate(dots, axis)


def each(fn: Callable[..., jax.Array], *matrices: _AsItCame) -> _AsItCame:
    """Applies `fn` entry by entry."""
    return jax.tree.map(fn, *matrices)


def weighted_sum(*terms: tuple[ArrayLike, _AsItCame]) -> _AsItCame:
    """The sum of numbers times matrices, in the accumulation dtype."""
    numbers, matrices = zip(*terms, strict=True)

    def of_blocks(*blocks: jax.Array) -> jax.Array:
        wide = (block.astype(precision.accumulation_dtype(block.dtype)) for block in blocks)
        return functools.reduce(operator.add, map(operator.mul, numbers, wide))

    return each(of_blocks, *matrices)


@overload
def with_identity(x: jax.Array, number: ArrayLike, group: OneDevice = ...) -> jax.Array: ...
@overload
def with_identity(x: Symmetric, number: ArrayLike, group: OneDevice = ...) -> Symmetric: ...
def with_identity(x: Symmetric, number: ArrayLike, group: OneDevice = ONE_DEVICE) -> Symmetric:
    """`number` I + x, in the accumulation dtype; a device group has some rows of x on each device.

    Cut as [[A, Bᵀ], [B, C]], only A and C have parts of the identity.
    """
    if isinstance(x, tuple):
        return with_identity(x[0], number), x[1], with_identity(x[2], number)
    identity = jnp.eye(x.shape[-1], dtype=precision.accumulation_dtype(x.dtype))
    identity = lax.expand_dims(identity, range(x.ndim - 2))
    return weighted_sum((number, group.own_rows(identity)), (1, x))


def diagonal(x: jax.Array) -> jax.Array:
    """The entries on the diagonal, `[..., n]`, in the accumulation dtype."""
    return jnp.diagonal(x, axis1=-2, axis2=-1).astype(precision.accumulation_dtype(x.dtype))


def with_diagonal(x: jax.Array, entries: jax.Array) -> jax.Array:
    """x with these entries `[..., n]` on its diagonal, rounded to its dtype.

    XLA writes them over those of x, where nothing else reads x any more.
    """
    places = jnp.arange(x.shape[-1])
    return x.at[..., places, places].set(
        entries.astype(x.dtype), unique_indices=True, indices_are_sorted=True
    )


def trace(x: Symmetric) -> jax.Array:
    """The trace, `[..., 1, 1]`."""
    if isinstance(x, tuple):
        return trace(x[0]) + trace(x[2])
    return jnp.trace(x, axis1=-2, axis2=-1)[..., None, None]


def sum_of_squares(x: Symmetric) -> jax.Array:
    """The sum of all entries' squares, `[..., 1, 1]`."""
    if isinstance(x, tuple):
        a, b, c = x
        return sum_of_squares(a) + 2 * sum_of_squares(b) + sum_of_squares(c)
    return jnp.sum(
        jnp.square(x.astype(precision.accumulation_dtype(x.dtype))), (-2, -1), keepdims=True
    )


def rounded(x: _AsItCame, dtype: jnp.dtype) -> _AsItCame:
    """Rounds all entries to `dtype`."""
    return each(lambda block: block.astype(dtype), x)
