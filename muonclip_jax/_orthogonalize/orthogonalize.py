"""Newton–Schulz on one device: [..., n, m] → a nearly semi-orthogonal matrix of the same shape.

Leading axes are a batch and stay one: every product is a single batched matmul.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._core.meshes import in_auto_axes, specs_of
from muonclip_jax._orthogonalize.iterations import iterate
from muonclip_jax._orthogonalize.methods import (
    DENSE,
    Method,
    MethodName,
    on_each_backend,
    only_on,
)
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz, check_matrices
from muonclip_jax._orthogonalize.normalization import in_range
from muonclip_jax._orthogonalize.products import concatenate, matmul
from muonclip_jax._orthogonalize.row_major import row_major
from muonclip_jax._orthogonalize.schedules import Schedule, polar_express


def orthogonalize(
    x: ArrayLike,
    schedule: Schedule = polar_express(steps=5),  # noqa: B008 (immutable)
    *,
    method: MethodName | Method = "auto",
    dtype: DTypeLike | Literal["auto"] | None = "auto",
) -> jax.Array:
    """Replaces the singular values of each matrix by nearly 1: U S Vᵀ → nearly U Vᵀ.

    The result does not depend on the scale of `x`, except that entries below the smallest normal
    number may count as zero. Zero singular values stay zero, and so does a zero matrix. A NaN or
    Inf makes its own matrix all NaN and leaves the rest of the batch alone.

    The gradient is that of the polynomial, finite at zero too. It is the gradient of U Vᵀ only
    where the schedule converges: on random 5 × 5 matrices in float32 it is within 2e-6 of that one
    with `polar_express(12)`, and 9% to 61% away with the default, whose singular values are near 1
    while their derivatives are not near 0. `linalg.msign` has that gradient, exactly.

    Cost: at most 2n³ + 4n²m FLOPs for each step and matrix, n ≤ m being its sides (4n²m where c is
    0, as in `schedules.cubic()`); less where `method` is "gram" or computes symmetric products by
    half. `schedules.aol()` adds 2n²m.

    Args:
        x: Matrices [..., n, m] in bfloat16, float16, float32 or float64, real, not empty.
        schedule: The polynomial steps, from `schedules`.
        method: How they are computed: "standard", "gram" (`Method`), or "auto", which chooses by
            shape, dtype and the backend it is compiled for. In 16 bits "gram" needs margins: with
            the default schedule in bfloat16 the smallest singular values grow by a third less
            (`restarts.steps_between_restarts`). A `Method` also says by which products.
        dtype: What the factors of the matmuls are rounded to, one of the four dtypes; None for
            that of `x`. "auto" is bfloat16, but float32 on CPUs that multiply that faster
            (`NewtonSchulz`). Sums and the normalization are float32 at least, and float32 is full
            float32 on TPU and GPU as well.

    Returns:
        An array with the shape and dtype of `x`. How near 1 the singular values are is
        `schedule.worst_error()` plus rounding of `dtype`. The largest is at most 0.1 above
        `schedule.top`, as far as searches found (docs/explanation/schedules.md).

    Raises:
        TypeError: If `schedule` is not a `Schedule`, `method` none of the above, or a dtype is not
            one of the four or not enabled.
        ValueError: If `x` has fewer than two axes or one of length zero, or if `schedule` leaves
            no margin for rounding in `dtype` (`Schedule.escape`).

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (3, 8, 16))
        >>> o = mc.orthogonalize(x, mc.schedules.polar_express(8), dtype="float32")
        >>> bool((mc.orthogonality_error(o) < 1e-3).all())
        True

    Source: the iteration is Björck and Bowie's, as used by Jordan et al.,
    https://kellerjordan.github.io/posts/muon/; on Gram matrices, Dao-AILab's, see
    `iterations`.
    """
    return orthogonalize_as(jnp.asarray(x), NewtonSchulz(schedule, dtype, method))


def orthogonalize_as(x: jax.Array, how: NewtonSchulz) -> jax.Array:
    """The same, with how to do it as one value."""
    how = how.for_matrices(x).settled()
    return in_auto_axes(functools.partial(_orthogonalize, how=how), specs_of(x))(x)


def orthogonality_error(x: ArrayLike) -> jax.Array:
    """Measures how far each matrix is from semi-orthogonal: ‖OOᵀ − I‖_F / √n, n its smaller side.

    Zero for a semi-orthogonal matrix, 1 for zero. Costs one Gram product, 2n²m FLOPs.

    Args:
        x: Matrices [..., n, m], as for `orthogonalize`.

    Returns:
        Array [...], float32 (float64 if `x` is).

    Raises:
        TypeError, ValueError: As `orthogonalize` for `x`.

    Example:
        >>> float(mc.orthogonality_error(2 * jnp.eye(4, 6)))
        3.0
    """
    x = jnp.asarray(x)
    check_matrices("orthogonality_error", x)
    return in_auto_axes(_orthogonality_error, PartitionSpec(*specs_of(x)[:-2]))(x)


def _orthogonality_error(x: jax.Array) -> jax.Array:
    x = turned_wide(x)
    square = matmul(x, x.mT, DENSE)
    n = square.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(n, dtype=square.dtype), square.shape)
    return jnp.linalg.norm(square - identity, axis=(-2, -1)) / n**0.5


@functools.partial(jax.jit, static_argnames="how")
def _orthogonalize(x: jax.Array, how: NewtonSchulz) -> jax.Array:
    return on_each_dtype(_in_dtype, how, x)


def _in_dtype(x: jax.Array, how: NewtonSchulz) -> jax.Array:
    run = functools.partial(iterate, schedule=how.schedule)
    wide = in_range(turned_wide(x), jnp.dtype(how.dtype))
    result = on_each_backend(run, wide, x.shape[-2:], how.method, wide.dtype)
    return _turned_like(x, result).astype(x.dtype)


_Result = TypeVar("_Result")


def on_each_dtype(run: Callable[..., _Result], how: NewtonSchulz, *arrays: Any) -> _Result:
    """Calls `run(*arrays, how=)` with the dtype that `how` has on the backend that it will be
    compiled for. The result must not depend on it in shape or dtype."""
    cpu, other = how.on("cpu"), how.on("gpu")
    if cpu == other:
        return run(*arrays, how=cpu)
    cpu = dataclasses.replace(cpu, method=only_on(cpu.method, "cpu"))
    other = dataclasses.replace(other, method=only_on(other.method, "gpu", "tpu"))
    return lax.platform_dependent(
        *arrays, cpu=functools.partial(run, how=cpu), default=functools.partial(run, how=other)
    )


def turned_wide(x: jax.Array) -> jax.Array:
    """At most as many rows as columns, so that XXᵀ is the smaller Gram matrix. One transpose
    here is cheaper than contracting columns at every step, which CPUs do slowly in bfloat16."""
    return x.mT if x.shape[-2] > x.shape[-1] else x


def orthogonalize_stack(x: jax.Array, how: NewtonSchulz) -> jax.Array:
    """Orthogonalizes wide matrices `[k, n, m]`, some at a time, to a stack in `how.dtype`."""
    (done,) = orthogonalize_as_stack([x], how)
    return done


def orthogonalize_as_stack(arrays: Sequence[jax.Array], how: NewtonSchulz) -> list[jax.Array]:
    """Orthogonalizes the matrices of several arrays, some at a time, in `how.dtype`.

    Args:
      arrays: `[k, n, m]` or `[k, m, n]`, with n and m the same in all.
      how: The polynomials, the dtype and the method.
    """
    # Arrays [3, 16, 32] and [1, 32, 16]: a stack [4, 16, 32]; back from places 0 and 3 of it.
    dtype, lengths = jnp.dtype(how.dtype), [len(x) for x in arrays]

    def run(arrays, method):
        def chunk(x):
            return iterate(x if method.lean else in_range(x, dtype), how.schedule, method)

        join = _joining if method.lean else _wide
        wide = [join(x, dtype) for x in arrays]
        done = in_chunks(chunk, concatenate(wide, 0), method.chunk_entries)
        parts = zip(arrays, apart(done, lengths), strict=True)
        back = [_turned_like(x, part) for x, part in parts]
        return list(map(row_major, back)) if method.lean else back

    return on_each_backend(run, list(arrays), arrays[0].shape[-2:], how.method, dtype)


def _wide(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return turned_wide(_narrowed(x, dtype))


@functools.partial(jax.jit, static_argnames="dtype", inline=True)  # traced once for each shape
def _joining(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounded in the layout that they have: of what a transpose reads, XLA would transpose momentum
    and gradient, which are wider. In range one by one: for that a stack would be read and written
    once more."""
    still = row_major(lax.optimization_barrier(_narrowed(x, dtype)))
    return turned_wide(in_range(still, dtype))


def _narrowed(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounded before it is copied, if that cannot overflow."""
    return x.astype(dtype) if jnp.finfo(dtype).maxexp >= jnp.finfo(x.dtype).maxexp else x


def _turned_like(x: jax.Array, wide: jax.Array) -> jax.Array:
    """Undoes `turned_wide(x)`."""
    return wide.mT if x.shape[-2] > x.shape[-1] else wide


def apart(stack: jax.Array, lengths: Sequence[int]) -> list[jax.Array]:
    """The parts of these lengths."""
    starts = list(map(jnp.uint32, [0, *itertools.accumulate(lengths[:-1])]))
    # On CPU every new kernel takes some 9 ms to compile. A slice at a constant place is one of its
    # own; at places that XLA cannot know, slices share one.
    starts = lax.platform_dependent(starts, cpu=_hidden, default=lambda starts: starts)
    return [lax.dynamic_slice_in_dim(stack, *part) for part in zip(starts, lengths, strict=True)]


def _hidden(numbers: list[jax.Array]) -> list[jax.Array]:
    """The numbers, the first of which is 0, from a loop that ends before it begins."""
    return lax.while_loop(lambda x: x[0] > 0, lambda x: [*x[1:], x[0]], numbers)


def in_chunks(run: Callable[[jax.Array], jax.Array], x: jax.Array, entries: int) -> jax.Array:
    """Runs `run` on chunks of a stack `[k, n, m]`: as many matrices as have so many entries."""
    size = max(1, entries // (x.shape[1] * x.shape[2]))
    if len(x) <= size:
        return run(x)
    whole, rest = jnp.split(x, [len(x) // size * size])
    done = lax.map(run, whole.reshape(-1, size, *x.shape[1:])).reshape(whole.shape)
    return concatenate([done, run(rest)], 0) if len(rest) else done
