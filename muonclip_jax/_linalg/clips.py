"""Singular values clipped to an interval, by matrix signs."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.meshes import in_auto_axes, specs_of
from muonclip_jax._core.options import check_choice, check_number
from muonclip_jax._linalg.factors import identity, product, svd, symmetrized
from muonclip_jax._linalg.options import Accuracy, By, accuracy
from muonclip_jax._linalg.polar import polar
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz, check_matrices
from muonclip_jax._orthogonalize.orthogonalize import turned_wide

Form = Literal["polar", "nested", "squared"]


def mclip(
    x: ArrayLike,
    low: float | jax.Array = 0.0,
    high: float | jax.Array = 1.0,
    *,
    form: Form = "polar",
    by: By | NewtonSchulz = "newton_schulz",
    lower: float | None = None,
) -> jax.Array:
    """Clips singular values to [low, high]: U Σ Vᵀ → U clip(Σ) Vᵀ, by matrix signs.

    Derivatives are exact, to any order, by x and by `low` and `high`, except where a singular value
    is at a bound: there the derivative is finite, and anything between those of both sides. A
    singular value of zero has no direction, so it stays zero although `low` is above it; it counts
    as zero below `lower` of `msign` (which is said of the largest singular value of x, and of the
    largest distance of one from a bound).

    The error in float32 is a few roundings of the largest singular value. Against a float64 SVD of
    the same matrix, n = 128, in the spectral norm (a sixth of it in single entries):

    | largest singular value | 1 | 10 | 100 | 1000 |
    | --- | --- | --- | --- | --- |
    | "polar" | 3e-6 | 2e-5 | 2e-4 | 2e-3 |
    | "nested" | 3e-6 | 3e-5 | 3e-4 | 3e-3 |
    | "squared" | 6e-6 | 2e-5 | 3e-4 | 2e-2 |
    | by="svd" | 2e-6 | 3e-6 | 7e-6 | 5e-5 |

    16 bits go in and come out, and everything inside is float32: it costs the products of float32
    (on TPU six passes of bfloat16 each), and is what keeps the spectral norm. bfloat16 matrices of
    a largest singular value of 1000 come out with a spectral norm of at most 1.01, at n = 128 and
    512.

    Cost with low = 0, n ≤ m: that of `msign(x)`, and of a second sign, n × n ("polar", "squared")
    or n × m ("nested"), and two or three products. With low > 0 of a third one. By "svd": one SVD.
    The derivative: one eigendecomposition n × n for each sign.

    Args:
      x: Matrices `[..., n, m]` in bfloat16, float16, float32 or float64, not empty.
      low: The least singular value, finite and at least 0: a number, or a scalar array.
      high: The largest, finite and at least `low`, alike.
      form: Which signs are taken. With O = msign(x) and H = x Oᵀ, whose eigenvalues are the
        singular values: "polar" takes sign(H − high I). "nested" takes msign(high O − x), the same
        sign times O, but multiplies longer matrices, and is wrong by up to `high`/2 where a
        singular value is so near to zero that O does not have it. "squared" takes
        sign(x xᵀ − high² I): squares lose what float32 tells apart, at 1000 all below 0.3.
      by: As in `msign`. With "svd", `form` makes no difference.
      lower: As in `msign`; None for 1e-6 (float64: 1e-12).

    Returns:
      An array with the shape and dtype of `x`.

    Raises:
      TypeError: `x` is not of the four dtypes, or `low`, `high` or `lower` is no number.
      ValueError: As `msign`; or a bound is negative, not finite or not in order, or `form` is none
        of the three.

    Example:
      >>> x = jnp.diag(jnp.array([3.0, 0.5]))
      >>> jnp.round(mc.linalg.mclip(x), 3).tolist()
      [[1.0, 0.0], [0.0, 0.5]]

    Source: Su Jianlin, "Singular value clipping by msign", first part ("nested") and second
    ("squared"), kexue.fm, June 2025; after F. Cesista, "Numerically stable spectral clipping via
    Newton–Schulz". "polar" is this package's.
    """
    x = jnp.asarray(x)
    check_matrices("mclip", x)
    check_choice("mclip: form", form, get_args(Form))
    finite = "a finite number of at least 0"
    check_number("mclip: low", low, lambda y: 0 <= y < float("inf"), finite)
    check_number("mclip: high", high, lambda y: 0 <= y < float("inf"), finite)
    if all(isinstance(bound, int | float) for bound in (low, high)) and low > high:
        raise ValueError(f"mclip: low={low} is above high={high}; the interval is [low, high].")
    total = accumulation_dtype(x.dtype)
    # What is rounded to 16 bits still has singular values that float32 tells apart.
    how = accuracy("mclip", jax.ShapeDtypeStruct(x.shape, total), by, lower, "svd")
    floor = None if isinstance(low, int | float) and low == 0 else jnp.asarray(low, total)
    run = functools.partial(_mclip, form=form, how=how)
    return in_auto_axes(run, specs_of(x))(x, floor, jnp.asarray(high, total))


@functools.partial(jax.jit, static_argnames=("form", "how"))
def _mclip(
    x: jax.Array, low: jax.Array | None, high: jax.Array, form: Form, how: Accuracy
) -> jax.Array:
    run = FORMS[form] if how.newton_schulz else by_svd
    result = run(turned_wide(x).astype(high.dtype), low, high, how)
    return (result if result.shape == x.shape else result.mT).astype(x.dtype)


# All go by clip(σ) = ½(α + β + |σ − α| − |σ − β|) and |t| = t sign(t). For α = 0, |σ − α| is σ.


def by_polar(x: jax.Array, low: jax.Array | None, high: jax.Array, how: Accuracy) -> jax.Array:
    """½[(α + β)I + |H − αI| − |H − βI|]O with H = M Oᵀ, whose eigenvalues are σ."""
    o = polar(x, how)
    h = symmetrized(product(x, o.mT))

    def absolute(bound):
        shifted = h - bound * identity(h)
        return product(shifted, polar(shifted, how))

    if low is None:
        return (high * o + x - product(absolute(high), o)) / 2
    return ((low + high) * o + product(absolute(low) - absolute(high), o)) / 2


def by_nested(x: jax.Array, low: jax.Array | None, high: jax.Array, how: Accuracy) -> jax.Array:
    """½[(α + β)O + (αI − M Oᵀ)msign(αO − M) − (βI − M Oᵀ)msign(βO − M)]."""
    o = polar(x, how)
    h = product(x, o.mT)

    def absolute(bound):
        return product(bound * identity(h) - h, polar(bound * o - x, how))

    return _between(x, o, low, high, absolute)


def by_square(x: jax.Array, low: jax.Array | None, high: jax.Array, how: Accuracy) -> jax.Array:
    """½[(α + β)O + S(α)(M − αO) − S(β)(M − βO)] with S(t) = msign(M Mᵀ − t²I)."""
    o = polar(x, how)
    square = product(x, x.mT)

    def absolute(bound):
        return product(polar(square - bound**2 * identity(square), how), x - bound * o)

    return _between(x, o, low, high, absolute)


def _between(
    x: jax.Array,
    o: jax.Array,
    low: jax.Array | None,
    high: jax.Array,
    absolute: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """½[(α + β)O + |Σ − α| − |Σ − β|], given `absolute`, U|Σ − t|Vᵀ as a function of t."""
    if low is None:
        return (high * o + x - absolute(high)) / 2
    return ((low + high) * o + absolute(low) - absolute(high)) / 2


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def by_svd(x: jax.Array, low: jax.Array | None, high: jax.Array, how: Accuracy) -> jax.Array:
    """U clip(Σ) Vᵀ."""
    u, values, vt = svd(x)
    kept = values > how.lower * values[..., :1]
    clipped = jnp.where(kept, jnp.clip(values, 0 if low is None else low, high), values)
    return product(u * clipped[..., None, :], vt)


@by_svd.defjvp
def _by_svd_jvp(how, primals, tangents):
    """The derivative of `by_polar`, which survives equal singular values."""
    x, low, high = primals
    dx, dlow, dhigh = tangents

    def run(x, high, *low):  # no floor has no derivative
        return by_polar(x, low[0] if low else None, high, how)

    floor = () if low is None else ((low, dlow),)
    given, moved = zip((x, dx), (high, dhigh), *floor, strict=True)
    return by_svd(x, low, high, how), jax.jvp(run, given, moved)[1]


FORMS = {"polar": by_polar, "nested": by_nested, "squared": by_square}
