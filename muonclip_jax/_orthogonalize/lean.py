"""The iterations for GPUs, whose products wait for memory: the same steps, and fewer bytes.

- A product's result is rounded as it is written.
- W = aI + bR + R² is (R + b/2 I)² + (a - b²/4) I, which is a product and two diagonals: XLA would
  read R and R² once more to add them up. So it is at the last step before each restart but the
  first, where R is large. `_monic` makes c = 1.
- Large matrices are written over once, and their XXᵀ is computed by half while that is free.

Steps are written out, since a loop copies X. That takes longer to compile.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from muonclip_jax._orthogonalize.methods import Method
from muonclip_jax._orthogonalize.normalization import scale_at
from muonclip_jax._orthogonalize.products import (
    ONE_DEVICE,
    diagonal,
    matmul,
    rounded,
    square_by_half,
    weighted_sum,
    with_diagonal,
    with_identity,
)
from muonclip_jax._orthogonalize.schedules import Schedule, Step

# Entries of a matrix X. Below, what is saved is not worth one more pass over X.
_LARGE = 2**24
# Entries of a stack of R. Below, one pass over it takes no longer than to start the four kernels
# that read and write diagonals (some microseconds each: not measured here).
_MANY = 2**22


def iterate(
    x: jax.Array, restarts: Sequence[Sequence[Step]], schedule: Schedule, method: Method
) -> jax.Array:
    """Normalizes matrices and takes the steps, as `iterations.iterate` does on one device."""
    # The default schedule restarts at every two steps of X [4096, 16384] in bfloat16:
    #   R = XXᵀ [4096, 4096] by half, of which the norm is read off
    #   W₁ of R and R²;  R ← W₁RW₁;  W₂ as W₁;  X ← X + (W₂W₁ - I)X
    #   R = XXᵀ by half, since a sum wrote X;  W₁ as before;  R ← W₁RW₁
    #   W₂ = (R + b/2 I)² + (a - b²/4) I;  X ← (W₂W₁)X
    #   R = XXᵀ;  W = (R + b/2 I)² + (a - b²/4) I;  X ← WX
    n, m = x.shape[-2:]
    large = n * m >= _LARGE
    for number, steps in enumerate(_monic(restarts)):
        # Half of the rows that a sum wrote are read where they lie; a product's would be copied.
        by_half = large and m >= 2 * n and number < 2
        # Before X is normalized, float16 has no room for sums over more than 65,504 columns.
        how = dataclasses.replace(method, lean=bool(number) or x.dtype != jnp.float16)
        r = square_by_half(x, how) if by_half else matmul(x, x.mT, how)
        scale = None if number else scale_at(True, x, r, schedule, ONE_DEVICE)
        w = _until_restart(r, scale, steps, x.dtype, method)
        x = _written_over(x, w, method) if large and not number else matmul(w, x, method)
    return x


def _until_restart(
    r: jax.Array,
    scale: jax.Array | None,
    steps: Sequence[Step],
    dtype: jnp.dtype,
    method: Method,
) -> jax.Array:
    """W₂W₁ in `dtype`, or as many as there are steps, from R = XXᵀ.

    With a `scale`, X is still to be multiplied by that: R is r times its square, and the result
    contains it.
    """
    size = 1 if scale is None else scale**2  # R is r times that, and is not written again
    if scale is not None and dtype == jnp.float16:
        r, size = rounded(weighted_sum((size, r)), dtype), 1
    *before, last = steps
    product = None
    for a, b, c in before:
        z = rounded(_polynomial(r, size, b, c, method), dtype)
        w = rounded(with_identity(z, a), dtype)
        product = w if product is None else matmul(w, product, method)
        # RW as aR + RZ, summed in float32: the identity is not rounded there (`iterations`).
        rw = rounded(weighted_sum((a * size, r), (size, matmul(r, z, method))), dtype)
        r, size = matmul(rw, w, method), 1
    a, b, c = last
    # b²/4 is what the diagonals add and take away again: its rounding must not exceed that of W.
    if scale is None and r.size >= _MANY and c == 1 and b**2 / 4 <= 2 * a:
        w = _by_square(r, a, b, method)
    else:
        w = with_identity(_polynomial(r, size, b, c, method), a)
        w = rounded(w if scale is None else weighted_sum((scale, w)), dtype)
    return w if product is None else matmul(w, product, method)


def _polynomial(r: jax.Array, size: ArrayLike, b: float, c: float, method: Method) -> jax.Array:
    """Z = bR + cR², in the accumulation dtype, R being r times `size`."""
    if not c:
        return weighted_sum((b * size, r))
    return weighted_sum((b * size, r), (c * size**2, matmul(r, r.mT, method)))


def _by_square(r: jax.Array, a: float, b: float, method: Method) -> jax.Array:
    """W = aI + bR + R² as (R + b/2 I)² + (a - b²/4) I.

    What rounding the diagonal of R + b/2 I does to that of its square is made good: without it,
    `polar_express(6)` in bfloat16 ended at 10¹⁶ on three rows.
    """
    old = diagonal(r)
    shifted = (old + b / 2).astype(r.dtype)
    t = with_diagonal(r, shifted)
    square = matmul(t, t.mT, method)
    others = diagonal(square) - jnp.square(shifted.astype(old.dtype))
    return with_diagonal(square, a + b * old + jnp.square(old) + others)


def _written_over(x: jax.Array, w: jax.Array, method: Method) -> jax.Array:
    """WX as X + (W - I)X: XLA can write a sum over X, and a product not. So there are two X at a
    time, with the next product's result, and not three."""
    rest = rounded(with_identity(w, -1), x.dtype)
    return rounded(weighted_sum((1, x), (1, matmul(rest, x, method))), x.dtype)


def _monic(restarts: Sequence[Sequence[Step]]) -> list[list[Step]]:
    """The steps of multiples of X, such that c = 1 in all but the first where c > 0.

    Where X is multiplied by α before a step, and by α' after it, the step's coefficients are
    aα'/α, bα'/α³ and cα'/α⁵. Before the first step α is 1, after the last α' is.
    """
    found, after = [], 1.0
    for number, (a, b, c) in reversed(list(enumerate(itertools.chain(*restarts)))):
        before = after if number else 1.0
        c_of_multiples = c * after / before**5
        if number and c > 0:
            before, c_of_multiples = (after * c) ** 0.2, 1.0
        found.append((a * after / before, b * after / before**3, c_of_multiples))
        after = before
    steps = reversed(found)
    return [list(itertools.islice(steps, len(some))) for some in restarts]
