"""The Newton–Schulz iteration: [..., n, m] → a nearly semi-orthogonal matrix of the same shape.

Leading axes are a batch and stay one: every product is a single batched matmul.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax.orthogonalize.schedules import Schedule, polar_express
from muonclip_jax.orthogonalize.team import ALONE, Team

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
    x = jnp.asarray(x)
    return _orthogonalize(x, schedule, check(x, schedule, dtype))


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
    x = jnp.asarray(x)
    _check_matrices("orthogonality_error", x)
    gram = _gram(wide(x))
    n = gram.shape[-1]
    return jnp.linalg.norm(gram - jnp.eye(n, dtype=gram.dtype), axis=(-2, -1)) / n**0.5


@functools.partial(jax.jit, static_argnames=("schedule", "dtype"))
def _orthogonalize(x: jax.Array, schedule: Schedule, dtype: jnp.dtype) -> jax.Array:
    result = iterate(normalize(wide(x), schedule, dtype), schedule)
    return (result if result.shape == x.shape else result.mT).astype(x.dtype)


def wide(x: jax.Array) -> jax.Array:
    """At most as many rows as columns, so that XXᵀ is the smaller Gram matrix. One transpose
    here is cheaper than contracting columns at every step, which CPUs do slowly in bfloat16."""
    return x.mT if x.shape[-2] > x.shape[-1] else x


def normalize(x: jax.Array, schedule: Schedule, dtype: jnp.dtype, team: Team = ALONE) -> jax.Array:
    """The matrices in `dtype`, scaled for `iterate`: to a norm of 1 / norm_factor, or for AOL,
    which takes its norm from the Gram matrix, to a largest entry of 1.

    Args:
      x: Matrices `[..., n, m]`, or a team's parts of them.
      schedule: Which norm.
      dtype: Of the iteration.
      team: Those with the other parts.
    """
    x = x.astype(jnp.promote_types(_accumulator(x.dtype), dtype))
    # After division by the largest entry squares neither overflow nor vanish. The result is
    # scale-invariant, so holding that divisor constant leaves the gradient exact. XLA divides by
    # multiplying with the reciprocal, hence the bound: a subnormal one would count as zero.
    largest = team.largest(lax.stop_gradient(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)))
    x = x / _nonzero(jnp.minimum(largest, 1 / jnp.finfo(x.dtype).tiny))
    if schedule.normalization == "frobenius":
        squares = team.sum(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
        x = x / (jnp.sqrt(_nonzero(squares)) * schedule.norm_factor)
    return x.astype(dtype)


def iterate_in_slices(x: jax.Array, schedule: Schedule, team: Team = ALONE) -> jax.Array:
    """`iterate` on as many matrices of a stack `[k, n, m]` at a time as fill the device, for which
    CPUs need few; more at a time cost only memory, and on CPUs time."""

    run = functools.partial(iterate, schedule=schedule, team=team)

    def slices(entries: int):
        size = max(1, entries // (x.shape[1] * x.shape[2]))
        return lambda x: _in_slices(run, x, size)

    return lax.platform_dependent(x, cpu=slices(2**21), default=slices(2**24))


def _in_slices(fn, x: jax.Array, size: int) -> jax.Array:
    if len(x) <= size:
        return fn(x)
    whole, rest = jnp.split(x, [len(x) // size * size])
    done = lax.map(fn, whole.reshape(-1, size, *x.shape[1:])).reshape(whole.shape)
    return jnp.concatenate([done, fn(rest)]) if len(rest) else done


def iterate(x: jax.Array, schedule: Schedule, team: Team = ALONE) -> jax.Array:
    """The schedule's steps on what `normalize` gives.

    Args:
      x: Matrices `[..., n, m]`, n <= m, or a team's columns of them; n is a multiple of the
        team's size.
      schedule: The steps.
      team: Those with the other columns. They share all work evenly.
    """
    if schedule.normalization == "aol":
        sums = jnp.sum(jnp.abs(team.sum_rows(_gram(x))), axis=-1, keepdims=True)
        scale = jnp.sqrt(_nonzero(team.all_rows(sums))) * schedule.norm_factor
        x = (x / scale).astype(x.dtype)
    # A scan costs as much as an unrolled loop at run time and compiles once for all steps.
    coefficients = jnp.asarray(schedule.coefficients, _accumulator(x.dtype))
    return lax.scan(functools.partial(_step, team=team), x, coefficients)[0]


def _step(x: jax.Array, coefficients: jax.Array, team: Team) -> tuple[jax.Array, None]:
    """aX + (bA + cA²)X with A = XXᵀ; sums in the accumulator's dtype, factors in that of x."""
    a, b, c = coefficients
    gram = team.sum_rows(_gram(x))
    rows = gram.astype(x.dtype)
    polynomial = (b * gram + c * _matmul(rows, team.all_rows(rows))).astype(x.dtype)
    return (a * x + _matmul(team.all_rows(polynomial), x)).astype(x.dtype), None


def pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """With zeros at the end of an axis, up to a multiple of a length."""
    missing = -x.shape[axis] % multiple
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if missing else x


def _nonzero(scale: jax.Array) -> jax.Array:
    """1 for 0, so that zeros stay zeros; NaN stays NaN."""
    return jnp.where(scale == 0, 1, scale)


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


def check(x: Any, schedule: Schedule, dtype: DTypeLike | None) -> jnp.dtype:
    """Raises what `orthogonalize` raises; returns the iteration's dtype. Looks at the shape and
    dtype of `x` only."""
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"orthogonalize: schedule={schedule!r} is not a Schedule; pass for example "
            'schedules.polar_express(steps=5), or Schedule("mine", ((a, b, c), ...))'
        )
    _check_matrices("orthogonalize", x)
    dtype = _supported("orthogonalize", "dtype", x.dtype if dtype is None else dtype)
    if escape := schedule.escape(rounding=float(jnp.finfo(dtype).eps)):
        raise ValueError(
            f"orthogonalize: schedule {schedule.name!r} has no margin for rounding in {dtype}, "
            f"with which some matrices blow up: {escape}. Give it a larger safety factor "
            "(1.01 suits bfloat16), or run it in a dtype that rounds less"
        )
    return dtype


def _check_matrices(owner: str, x: Any) -> None:
    _supported(owner, "x", x.dtype)
    if x.ndim < 2:
        raise ValueError(
            f"{owner}: x has shape {x.shape}, but matrices [..., n, m] are needed; reshape it, "
            "or leave vectors and scalars to another optimizer"
        )
    if 0 in x.shape:
        raise ValueError(f"{owner}: x has shape {x.shape}, with an axis of length zero")


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
