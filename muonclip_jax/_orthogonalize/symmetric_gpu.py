"""The symmetric product as a Pallas kernel for GPUs, compiled by Triton.

The result is cut into square tiles. A program makes one on or below the diagonal, and writes it
and its mirror image.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._core import dtypes as precision

TILE = 128  # at most, in 16 bits. Half in float32, which takes twice the shared memory
DEPTH = 64  # of k in shared memory; three such stages are 96 KiB, which all since A100 have


def symmetric_product(
    left: jax.Array,
    right: jax.Array,
    *,
    add: jax.Array | None = None,
    alpha: ArrayLike = 1.0,
    beta: ArrayLike = 1.0,
    out_dtype: DTypeLike,
    interpret: Any = False,
) -> jax.Array:
    """`alpha * left @ right.mT + beta * add`, which must be symmetric; the result is so exactly.

    Only the triangles below the diagonals of the product and of `add` count.

    Cost: (t + 1) / 2t of the full product's FLOPs with t = n/128 tiles in a row, for float32 n/64,
    rounded up; float32 does not use the tensor cores. No temporaries. JAX 0.12 gives a
    DeprecationWarning: Pallas will lose this way to Triton.

    Args:
      left: Matrices `[..., n, k]` in bfloat16, float16 or float32.
      right: Of the same shape and dtype.
      add: `[..., n, n]` or None.
      alpha: A scalar.
      beta: A scalar.
      out_dtype: Of the result. Sums are in float32.
      interpret: As in `pl.pallas_call`: True runs it on any device, slowly.

    Returns:
      Array `[..., n, n]`.
    """
    n, k = left.shape[-2:]
    factors = [x.reshape(-1, n, k) for x in (left, right)]
    adds = [] if add is None else [add.reshape(-1, n, n)]
    wide = 1 if left.dtype.itemsize == 2 else 2
    tile, depth = _at_most(TILE // wide, n), _at_most(DEPTH // wide, k)
    rows, cols = np.tril_indices(pl.cdiv(n, tile))
    result = pl.pallas_call(
        functools.partial(_kernel, tile=tile, depth=depth),
        out_shape=jax.ShapeDtypeStruct((len(factors[0]), n, n), out_dtype),
        grid=len(factors[0]) * len(rows),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="symmetric_product",
    )(
        rows.astype(np.int32),
        cols.astype(np.int32),
        jnp.stack([alpha, beta]).astype(jnp.float32),
        *factors,
        *adds,
    )
    return result.reshape(*left.shape[:-1], n)


def _kernel(rows, cols, scales, left, right, *refs, tile: int, depth: int):
    *add, out = refs
    program, tiles = pl.program_id(0), rows.shape[0]
    matrix, which = lax.div(program, tiles), lax.rem(program, tiles)
    row, col = rows[which] * tile, cols[which] * tile

    def accumulate(step, sums):
        left_block = _load(left, (matrix, row, step * depth), (tile, depth))
        right_block = _load(right, (matrix, col, step * depth), (tile, depth))
        return sums + _dot(left_block, right_block)

    steps = pl.cdiv(left.shape[2], depth)
    sums = lax.fori_loop(0, steps, accumulate, jnp.zeros((tile, tile), jnp.float32))
    result = scales[0] * sums
    if add:
        result += scales[1] * _load(add[0], (matrix, row, col), (tile, tile)).astype(jnp.float32)
    result = result.astype(out.dtype)
    i, j = (lax.broadcasted_iota(jnp.int32, result.shape, axis) for axis in (0, 1))
    result = jnp.where((row == col) & (i < j), result.T, result)
    _store(out, (matrix, row, col), result)
    _store(out, (matrix, col, row), result.T)


def _load(matrices, start: tuple, shape: tuple[int, int]) -> jax.Array:
    """A block, with zeros where it reaches beyond the matrix."""
    inside = _inside(matrices, start, shape)
    return plgpu.load(
        _block(matrices, start, shape), mask=inside, other=None if inside is None else 0.0
    )


def _store(matrices, start: tuple, block: jax.Array) -> None:
    mask = _inside(matrices, start, block.shape)
    plgpu.store(_block(matrices, start, block.shape), block, mask=mask)


def _block(matrices, start: tuple, shape: tuple[int, int]):
    matrix, row, col = start
    return matrices.at[matrix, pl.ds(row, shape[0]), pl.ds(col, shape[1])]


def _inside(matrices, start: tuple, shape: tuple[int, int]) -> jax.Array | None:
    """Which of a block's entries are in the matrix; None: all."""
    sides = [
        begin + lax.broadcasted_iota(jnp.int32, shape, axis) < length
        for axis, (begin, length) in enumerate(zip(start[1:], matrices.shape[1:], strict=True))
        if length % shape[axis]
    ]
    return functools.reduce(jnp.logical_and, sides) if sides else None


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    return lax.dot_general(
        left,
        right,
        (((1,), (1,)), ((), ())),
        **precision.of_product(left.dtype),
    )


def _at_most(size: int, length: int) -> int:
    """Triton's blocks are powers of two, 16 at least."""
    return min(size, max(16, pl.next_power_of_2(length)))
