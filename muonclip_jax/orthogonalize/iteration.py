"""The Newton–Schulz iteration: [..., n, m] → a nearly semi-orthogonal matrix of the same shape.

Leading axes are a batch and stay one: every product is a single batched matmul.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax.orthogonalize.schedules import Schedule, polar_express

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def orthogonalize(
    x: ArrayLike,
    schedule: Schedule = polar_express(steps=5),  # noqa: B008 (immutable)
    *,
    dtype: DTypeLike | None = jnp.bfloat16,
) -> jax.Array:
    """Replaces the singular values of each matrix by nearly 1: U S Vᵀ → nearly U Vᵀ.

    The result does not depend on the scale of `x`, except that entries below the smallest normal
    number may count as zero. Zero singular values stay zero, and so does a zero matrix. A NaN or
    Inf makes its own matrix all NaN and leaves the rest of the batch alone. Differentiable; the
    gradient is finite at zero too.

    Cost: 2n³ + 4n²m FLOPs for each step and matrix, n ≤ m being its sides; `schedules.aol()`
    adds 2n²m.

    Args:
        x: Matrices [..., n, m] in bfloat16, float16, float32 or float64, real, not empty.
        schedule: The polynomial steps, from `schedules`.
        dtype: What the factors of the matmuls are rounded to, one of the four dtypes; None for
            that of `x`. Sums and the normalization are float32 at least, and float32 is full
            float32 on TPU and GPU as well.

    Returns:
        An array with the shape and dtype of `x`. How near 1 the singular values are is
        `schedule.worst_error()` plus rounding of `dtype`.

    Raises:
        TypeError: If `schedule` is not a `Schedule`, or a dtype is not one of the four or not
            enabled.
        ValueError: If `x` has fewer than two axes or one of length zero, or if `schedule` leaves
            no margin for rounding in `dtype` (`Schedule.escape`).

    Source: the iteration is Björck and Bowie's, as used by Jordan et al.,
    https://kellerjordan.github.io/posts/muon/.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"orthogonalize: schedule={schedule!r} is not a Schedule; pass for example "
            'schedules.polar_express(steps=5), or Schedule("mine", ((a, b, c), ...))'
        )
    x = _matrices("orthogonalize", x)
    dtype = _supported("orthogonalize", "dtype", x.dtype if dtype is None else dtype)
    if escape := schedule.escape(rounding=float(jnp.finfo(dtype).eps)):
        raise ValueError(
            f"orthogonalize: schedule {schedule.name!r} has no margin for rounding in {dtype}, "
            f"with which some matrices blow up: {escape}. Give it a larger safety factor "
            "(1.01 suits bfloat16), or run it in a dtype that rounds less"
        )
    return _orthogonalize(x, schedule, dtype)


def orthogonality_error(x: ArrayLike) -> jax.Array:
    """How far each matrix is from semi-orthogonal: ‖OOᵀ − I‖_F / √n, n its smaller side.

    Zero for a semi-orthogonal matrix, 1 for zero. Costs one Gram product, 2n²m FLOPs.

    Args:
        x: Matrices [..., n, m], as for `orthogonalize`.

    Returns:
        Array [...], float32 (float64 if `x` is).

    Raises:
        TypeError, ValueError: As `orthogonalize` for `x`.
    """
    gram = _gram(_wide(_matrices("orthogonality_error", x)))
    n = gram.shape[-1]
    return jnp.linalg.norm(gram - jnp.eye(n, dtype=gram.dtype), axis=(-2, -1)) / n**0.5


@functools.partial(jax.jit, static_argnames=("schedule", "dtype"))
def _orthogonalize(x: jax.Array, schedule: Schedule, dtype: jnp.dtype) -> jax.Array:
    wide = _normalize(_wide(x), schedule, dtype)
    # A scan costs as much as an unrolled loop at run time and compiles once for all steps.
    wide, _ = lax.scan(_step, wide, jnp.asarray(schedule.coefficients, _accumulator(dtype)))
    return (wide if wide.shape == x.shape else wide.mT).astype(x.dtype)


def _step(x: jax.Array, coefficients: jax.Array) -> tuple[jax.Array, None]:
    """aX + (bA + cA²)X with A = XXᵀ; sums in the accumulator's dtype, factors in that of x."""
    a, b, c = coefficients
    gram = _gram(x)
    factor = gram.astype(x.dtype)
    polynomial = (b * gram + c * _matmul(factor, factor)).astype(x.dtype)
    return (a * x + _matmul(polynomial, x)).astype(x.dtype), None


def _normalize(x: jax.Array, schedule: Schedule, dtype: jnp.dtype) -> jax.Array:
    """Wide matrices with singular values at most 1 / norm_factor, in `dtype`."""
    x = x.astype(jnp.promote_types(_accumulator(x.dtype), dtype))
    # After division by the largest entry squares neither overflow nor vanish. The result is
    # scale-invariant, so holding that divisor constant leaves the gradient exact. XLA divides by
    # multiplying with the reciprocal, hence the bound: a subnormal one would count as zero.
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / _nonzero(lax.stop_gradient(jnp.minimum(largest, 1 / jnp.finfo(x.dtype).tiny)))
    match schedule.normalization:
        case "frobenius":
            squared_scale = jnp.sum(x * x, axis=(-2, -1), keepdims=True)
        case "aol":
            squared_scale = jnp.sum(jnp.abs(_gram(x.astype(dtype))), axis=-1, keepdims=True)
    return (x / (jnp.sqrt(_nonzero(squared_scale)) * schedule.norm_factor)).astype(dtype)


def _nonzero(scale: jax.Array) -> jax.Array:
    """1 for 0, so that zeros stay zeros; NaN stays NaN."""
    return jnp.where(scale == 0, 1, scale)


def _wide(x: jax.Array) -> jax.Array:
    """At most as many rows as columns, so that XXᵀ is the smaller Gram matrix. One transpose
    here is cheaper than contracting columns at every step, which CPUs do slowly in bfloat16."""
    return x.mT if x.shape[-2] > x.shape[-1] else x


def _gram(x: jax.Array) -> jax.Array:
    return _matmul(x, x.mT)


def _matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    """A product in the accumulator's dtype. XLA's default precision rounds float32 factors to
    bfloat16 on TPU and to TF32 on GPU; 16-bit factors lose nothing by it."""
    accumulator = _accumulator(left.dtype)
    return jnp.matmul(
        left,
        right,
        precision=lax.Precision.HIGHEST if left.dtype == accumulator else lax.Precision.DEFAULT,
        preferred_element_type=accumulator,
    )


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _matrices(owner: str, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    _supported(owner, "x", x.dtype)
    if x.ndim < 2:
        raise ValueError(
            f"{owner}: x has shape {x.shape}, but matrices [..., n, m] are needed; reshape it, "
            "or leave vectors and scalars to another optimizer"
        )
    if 0 in x.shape:
        raise ValueError(f"{owner}: x has shape {x.shape}, with an axis of length zero")
    return x


def _supported(owner: str, argument: str, dtype: DTypeLike) -> jnp.dtype:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in _DTYPES:
        raise TypeError(f"{owner}: {argument} is {name}; cast it to one of {', '.join(_DTYPES)}")
    if jax.dtypes.canonicalize_dtype(name) != name:
        raise TypeError(
            f"{owner}: {argument} is {name}, which JAX would silently run as float32; call "
            'jax.config.update("jax_enable_x64", True) first'
        )
    return jnp.dtype(name)
