"""The symmetric product as a Pallas kernel for TPUs.

The result is cut into square tiles. A program makes one on or below the diagonal: it sums over k,
writes the tile, and at one more step its mirror image, while the next one's factors are on their
way.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._core import dtypes as precision

TILE = 1024  # at most; v6e takes as long for a tile's products as to read the tile's factors
BLOCK = 256  # of a diagonal tile, which leaves out those above the diagonal: an MXU's edge on v6e
DEPTH_BYTES = 8192  # of a row of the factors in VMEM at a time
CHUNK_BYTES = 1024  # of it through the MXUs at a time, which hides the sums' way to VMEM and back


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

    Cost: of the full product's FLOPs all up to n = 256, 5/8 at 1024, nearly 1/2 for large n; n is
    rounded up to tiles of at most 1024 that are multiples of 128. Float32 takes six passes through
    the MXUs. VMEM: up to 60 MiB, which TPUs have since v5. No other temporaries, except for a copy
    of the factors on v5p where k is no multiple of 128.

    Args:
      left: Matrices `[..., n, k]` in bfloat16, float32, or float16, which costs as much as float32.
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
    factors = [_for_tpu(x.reshape(-1, n, k)) for x in (left, right)]
    adds = [] if add is None else [_for_tpu(add.reshape(-1, n, n))]
    tiling = _Tiles(len(factors[0]), n, k, factors[0].dtype.itemsize)
    out = jax.ShapeDtypeStruct((tiling.batch, n, n), _kernel_dtype(out_dtype))
    result = pl.pallas_call(
        functools.partial(_kernel, tiling=tiling),
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiling.batch * tiling.tiles, tiling.steps + 1),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec((1, tiling.tile, tiling.depth), tiling.left_index),
                pl.BlockSpec((1, tiling.tile, tiling.depth), tiling.right_index),
                *(pl.BlockSpec((1, tiling.tile, tiling.tile), tiling.add_index) for _ in adds),
            ],
            out_specs=pl.BlockSpec((1, tiling.tile, tiling.tile), tiling.out_index),
            scratch_shapes=[pltpu.VMEM((tiling.tile, tiling.tile), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tiling.vmem_bytes([*adds, out]),
        ),
        cost_estimate=tiling.cost([*adds, out]),
        interpret=interpret,
        name="symmetric_product",
    )(*tiling.table, jnp.stack([alpha, beta]).astype(jnp.float32), *factors, *adds)
    return result.reshape(*left.shape[:-1], n).astype(out_dtype)


@dataclass(frozen=True)
class _Tiles:
    """Which program, at which of its steps, works on what.

    Programs are (matrix, tile) in one axis, so that two cores share it evenly.
    """

    batch: int
    n: int
    k: int
    itemsize: int

    @property
    def count(self) -> int:
        """Tiles in a row."""
        return pl.cdiv(self.n, TILE)

    @property
    def tile(self) -> int:
        return _round_up(pl.cdiv(self.n, self.count), 128)

    @property
    def tiles(self) -> int:
        return self.count * (self.count + 1) // 2

    @property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """The tiles' rows and columns."""
        rows, cols = np.tril_indices(self.count)
        return rows.astype(np.int32), cols.astype(np.int32)

    @property
    def steps(self) -> int:
        return pl.cdiv(self.k * self.itemsize, DEPTH_BYTES)

    @property
    def depth(self) -> int:
        return self.k if self.steps == 1 else _round_up(pl.cdiv(self.k, self.steps), 128)

    @property
    def chunk(self) -> int:
        return CHUNK_BYTES // self.itemsize

    # Index maps: (program, step, rows, cols) to the block in VMEM.

    def left_index(self, program, step, rows, cols):
        matrix, tile, step = self._coming(program, step)
        return matrix, rows[tile], step

    def right_index(self, program, step, rows, cols):
        matrix, tile, step = self._coming(program, step)
        return matrix, cols[tile], step

    def add_index(self, program, step, rows, cols):
        tile = lax.rem(program, self.tiles)
        return lax.div(program, self.tiles), rows[tile], cols[tile]

    def out_index(self, program, step, rows, cols):
        matrix, row, col = self.add_index(program, step, rows, cols)
        mirror = step == self.steps
        return matrix, jnp.where(mirror, col, row), jnp.where(mirror, row, col)

    def _coming(self, program, step):
        """At the last step, which needs no factors, the first of the next program."""
        program = jnp.minimum(program + lax.div(step, self.steps), self.batch * self.tiles - 1)
        return lax.div(program, self.tiles), lax.rem(program, self.tiles), lax.rem(step, self.steps)

    # What it takes. `matrices` are those of n x n: what to add, the result.

    def vmem_bytes(self, matrices: list) -> int:
        """Of the blocks, two of each, of the sums, and of what the compiler spills."""
        entries = sum(2 * x.dtype.itemsize for x in matrices) + 4
        factors = 4 * self.depth * self.itemsize
        return self.tile * (self.tile * entries + factors) + 8 * 2**20

    def cost(self, matrices: list) -> pl.CostEstimate:
        below = (self.tiles - self.count) * self.tile**2
        diagonal = self.count * sum(len(rows) * rows.stop for rows in _block_rows(self.tile))
        reads = self.tiles + (self.count if self.steps == 1 else self.tiles)
        factors = reads * self.tile * self.k * self.itemsize
        return pl.CostEstimate(
            flops=2 * self.batch * self.k * (below + diagonal),
            bytes_accessed=self.batch * factors + sum(x.size * x.dtype.itemsize for x in matrices),
            transcendentals=0,
        )


def _kernel(rows, cols, scales, left, right, *refs, tiling: _Tiles):
    *add, out, sums = refs
    tile, step = lax.rem(pl.program_id(0), tiling.tiles), pl.program_id(1)
    diagonal = rows[tile] == cols[tile]
    coming = (
        tiling.k - step * tiling.depth
    )  # columns of the factors, perhaps fewer than are in VMEM

    @pl.when(step == 0)
    def _start():
        sums[...] = scales[1] * add[0][0].astype(jnp.float32) if add else jnp.zeros_like(sums)

    def columns(factor, start: int, stop: int, k: Any) -> jax.Array:
        x = factor[0, start:stop, k]
        if tiling.k % tiling.depth == 0:
            return x
        return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) < coming - k.start, x, 0)

    def accumulate(k: Any, block_rows: list[range]):
        for block in block_rows:
            product = _dot(
                columns(left, block.start, block.stop, k), columns(right, 0, block.stop, k)
            )
            sums[block.start : block.stop, : block.stop] += scales[0] * product

    @pl.when((step < tiling.steps) & ~diagonal)
    def _below():
        _for_chunks(tiling, lambda k: accumulate(k, [range(tiling.tile)]))

    @pl.when((step < tiling.steps) & diagonal)
    def _on_diagonal():
        _for_chunks(tiling, lambda k: accumulate(k, _block_rows(tiling.tile)))

    @pl.when(step == tiling.steps - 1)
    def _finish():
        @pl.when(diagonal)
        def _symmetric():
            x = sums[...]
            row, col = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
            sums[...] = jnp.where(row >= col, x, x.T)

        out[0] = sums[...].astype(out.dtype)

    @pl.when((step == tiling.steps) & ~diagonal)
    def _mirror():
        out[0] = sums[...].astype(out.dtype).T


def _block_rows(tile: int) -> list[range]:
    return [range(start, min(start + BLOCK, tile)) for start in range(0, tile, BLOCK)]


def _for_chunks(tiling: _Tiles, fn: Callable[[Any], None]) -> None:
    whole, rest = divmod(tiling.depth, tiling.chunk)

    def chunk(i, _):
        fn(pl.ds(pl.multiple_of(i * tiling.chunk, tiling.chunk), tiling.chunk))

    if whole:
        lax.fori_loop(0, whole, chunk, None)
    if rest:
        fn(pl.ds(whole * tiling.chunk, rest))


def _for_tpu(x: jax.Array) -> jax.Array:
    return x.astype(_kernel_dtype(x.dtype))


def _kernel_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Kernels for TPUs have no float16."""
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    return lax.dot_general(
        left,
        right,
        (((1,), (1,)), ((), ())),
        **precision.of_product(left.dtype),
    )


def _round_up(length: int, multiple: int) -> int:
    return pl.cdiv(length, multiple) * multiple
