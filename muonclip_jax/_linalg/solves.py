"""Linear equations between matrices, which the derivatives of matrix functions are made of.

Each is one `jax.lax.custom_linear_solve`: JAX differentiates the equation, not the way in which it
is solved, to every order and in both directions. So equal eigenvalues, at which eigenvectors have
no derivative, do no harm.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._linalg.factors import eigh, identity, inverse, product
from muonclip_jax._orthogonalize.normalization import nonzero


class Eigenbasis(NamedTuple):
    """Of symmetric matrices A ≥ 0 `[..., n, n]`. Eigenvalues that count as zero are zero."""

    values: jax.Array
    vectors: jax.Array


def eigenbasis(a: jax.Array, cutoff: float) -> Eigenbasis:
    """The eigenbasis of A ≥ 0, symmetric. Eigenvalues up to `cutoff` times the largest are zero."""
    values, vectors = eigh(a)
    largest = values[..., -1:]
    return Eigenbasis(jnp.where(values <= cutoff * largest, 0, values), vectors)


def solve_left(a: jax.Array, b: jax.Array, basis: Eigenbasis) -> jax.Array:
    """Solves A Y = B in the directions in which A is not zero; Y is zero in the others."""

    def solve(_, b):
        inner = divided(product(basis.vectors.mT, b), basis.values[..., :, None])
        return product(basis.vectors, inner)

    return lax.custom_linear_solve(lambda y: product(a, y), b, solve, symmetric=True)


def solve_powers(a: jax.Array, b: jax.Array, p: int, basis: Eigenbasis) -> jax.Array:
    """Solves Σ AᵏYAᵖ⁻¹⁻ᵏ = B over k < p, which for p = 2 is AY + YA = B.

    It is the derivative of Aᵖ, and in A's eigenbasis it is diagonal. Where both eigenvalues are
    zero it has no solution, and Y is zero.
    """

    def matvec(y):
        total, power = y, identity(a)
        for _ in range(p - 1):
            power = product(power, a)
            total = product(a, total) + product(y, power)
        return total

    rows, columns = basis.values[..., :, None], basis.values[..., None, :]
    terms = [rows**k * columns ** (p - 1 - k) for k in range(p)]
    denominators = functools.reduce(jnp.add, terms)

    def solve(_, b):
        inner = divided(product(basis.vectors.mT, b, basis.vectors), denominators)
        return product(basis.vectors, inner, basis.vectors.mT)

    return lax.custom_linear_solve(matvec, b, solve, symmetric=True)


def solve_symmetric_sylvester(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Solves AX + XB = C for symmetric A and B by their eigenbases."""
    (rows, left), (columns, right) = eigh(a), eigh(b)

    def solve(_, c):
        inner = product(left.mT, c, right) / (rows[..., :, None] + columns[..., None, :])
        return product(left, inner, right.mT)

    return lax.custom_linear_solve(
        lambda x: product(a, x) + product(x, b), c, solve, symmetric=True
    )


def solve_sylvester_by_sign(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Solves AX + XB = C for A and B whose eigenvalues all lie on one side of the imaginary axis.
    NaN where they do not."""
    return lax.custom_linear_solve(
        lambda x: product(a, x) + product(x, b),
        c,
        lambda _, c: _by_sign(a, b, c),
        lambda _, y: _by_sign(a.mT, b.mT, y),
    )


def _by_sign(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """The sign of [[A, C], [0, −B]], which is ±[[I, 2X], [0, −I]]."""

    def inverted(a, b, c):
        a, b = inverse(a), inverse(b)
        return a, b, product(a, c, b)

    a, b, c = newton_sign(inverted, a, b, c)
    side = jnp.sign(jnp.trace(a, axis1=-2, axis2=-1))[..., None, None]
    apart = [jnp.abs(x - side * identity(x)).max(axis=(-2, -1), keepdims=True) for x in (a, b)]
    # A sign that is not ±I is another matrix by far, so any number between 0 and 1 tells them.
    return jnp.where(jnp.maximum(*apart) < 0.1, c * side / 2, jnp.nan)


# Scaled, it gets from a condition of 1e16 to rounding in about 12 steps; what has not settled after
# so many has eigenvalues that no rounding can tell from the imaginary axis.
_STEPS = 40


def newton_sign(
    inverted: Callable[..., tuple[jax.Array, ...]], *blocks: jax.Array
) -> tuple[jax.Array, ...]:
    """Newton's iteration X ← (μX + X⁻¹/μ)/2 to the sign of a block triangular matrix.

    Args:
      inverted: Takes the blocks of X to those of X⁻¹.
      *blocks: The blocks of X, those on the diagonal before the other.

    Returns:
      The blocks of the sign. Cost: 6 to 14 times `inverted`.
    """

    def norm(*blocks):
        return jnp.sqrt(sum((x * x).sum(axis=(-2, -1), keepdims=True) for x in blocks))

    def step(state):
        count, blocks, _ = state
        over = inverted(*blocks)
        # The scale that brings the eigenvalues nearer to ±1; near there none is needed.
        scale = jnp.sqrt(norm(*over[:2]) / nonzero(norm(*blocks[:2])))
        scale = jnp.where(jnp.abs(scale - 1) < 0.1, 1, scale)
        following = tuple((scale * x + y / scale) / 2 for x, y in zip(blocks, over, strict=True))
        moved = norm(*(new - x for new, x in zip(following, blocks, strict=True)))
        return count + 1, following, (moved > settled * norm(*following)).any()

    # The next step's change is the square of this one's, far below rounding.
    settled = 10 * jnp.finfo(blocks[0].dtype).eps * blocks[0].shape[-1]
    start = (jnp.zeros((), jnp.int32), blocks, jnp.ones((), bool))
    return lax.while_loop(lambda state: state[2] & (state[0] < _STEPS), step, start)[1]


def divided(x: jax.Array, by: jax.Array) -> jax.Array:
    """`x / by`, zero where `by` is zero."""
    return jnp.where(by == 0, 0, x / nonzero(by))
