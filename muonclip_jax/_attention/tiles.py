"""The [T, S] logits of an attention call as tiles that are made one at a time.

Axes as in `call`. Inside, a sequence axis comes after the heads, so that every tile is one
batched matrix product. Tiles that the causal mask or the window hides as a whole are left out at
trace time.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muonclip_jax._attention.call import Call, Visibility
from muonclip_jax._core.dtypes import accumulation_dtype

# Logits in a tile, unless the caller says: in float32 8 MB, which a CPU's cache holds; and how long
# its sides may be. Found by `python -m benchmarks.attention --chunk-sizes 128 256 512`.
_TILE_ENTRIES = 2**21
_TILE_SIDES = (128, 512)
# A bias at or below it is an additive mask: -1e9, -1e10, -1e30. Position biases (T5's, ALiBi's
# slope times distance) are smaller by far.
_OUTSIDE = -1e8


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A sequence axis cut into as few chunks as `limit` allows, all of one size.

    The last chunk of an uneven axis starts early and overlaps its neighbour, which saves
    padded copies; the positions they share belong to the neighbour.
    """

    length: int
    limit: int

    @property
    def count(self) -> int:
        return -(-self.length // self.limit)

    @property
    def size(self) -> int:
        return -(-self.length // self.count)

    def start(self, index):
        return jnp.minimum(index * self.size, self.length - self.size)

    def positions(self, index) -> jax.Array:
        return self.start(index) + jnp.arange(self.size)

    def take(self, tree: Any, index, axis: int = -2) -> Any:
        start = self.start(index)
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, self.size, axis), tree)

    def put(self, tree: Any, chunk: Any, index, axis: int = -2) -> Any:
        start = self.start(index)
        return jax.tree.map(
            lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, axis), tree, chunk
        )

    def add(self, x: jax.Array, chunk: jax.Array, index, axis: int = -2) -> jax.Array:
        return self.put(x, self.take(x, index, axis) + chunk, index, axis)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How an attention is cut into tiles: all that is known when it is traced."""

    queries: Chunks
    keys: Chunks
    left: int | None  # how many keys before its own position a query sees; None for all
    right: int | None  # and after it
    scale: float
    soft_cap: float | None
    dropout_rate: float
    broadcast_dropout: bool
    precision: lax.PrecisionLike

    def tiles(self) -> np.ndarray:
        """The (query chunk, key chunk) pairs in which some query sees some key: `[tiles, 2]`."""
        row, column = np.indices((self.queries.count, self.keys.count), np.int32)
        first_row, first_column = row * self.queries.size, column * self.keys.size
        seen = np.ones(row.shape, bool)
        if self.right is not None:
            last_row = np.minimum(first_row + self.queries.size, self.queries.length) - 1
            seen &= first_column <= last_row + self.right
        if self.left is not None:
            last_column = np.minimum(first_column + self.keys.size, self.keys.length) - 1
            seen &= last_column >= first_row - self.left
        return np.stack([row[seen], column[seen]], axis=-1)

    def matmul(self, subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(
            subscripts,
            a,
            b,
            precision=self.precision,
            preferred_element_type=accumulation_dtype(a.dtype),
        )


class Operands(NamedTuple):
    query: jax.Array  # [..., K, G, T, H]
    key: jax.Array  # [..., K, S, H]
    value: jax.Array  # [..., K, S, V]
    bias: jax.Array | None  # [..., K, G, T, S], any of them 1
    sinks: jax.Array | None  # [1..., K, G, 1, 1]
    visible: Visibility  # the two head axes in the place of one
    dropout_rng: jax.Array | None


class Tile(NamedTuple):
    """The operands of one query chunk and one key chunk."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None  # all that is known of visibility; None: all visible
    dropout_rng: jax.Array | None


def cut(call: Call) -> tuple[Tiling, Operands]:
    """A call's tiling, and its operands with the heads first.

    Example: query `[2, 512, 8, 64]` and key `[2, 512, 4, 64]` become `[2, 4, 2, 512, 64]` and
    `[2, 4, 512, 64]`; with chunks of 128 and `is_causal`, 10 of 16 tiles `[2, 4, 2, 128, 128]`.
    """
    left, right = call.window or (None, None)
    *batch, length, num_heads, _ = call.query.shape
    chunk_size = call.chunk_size or _chunk_size(math.prod(batch) * num_heads)
    tiling = Tiling(
        queries=Chunks(length, chunk_size),
        keys=Chunks(call.key.shape[-3], chunk_size),
        left=left,
        right=0 if call.is_causal else right,
        scale=call.scale,
        soft_cap=call.soft_cap,
        dropout_rate=call.dropout_rate,
        broadcast_dropout=call.broadcast_dropout,
        precision=call.precision,
    )
    query, key, value = (jnp.moveaxis(x, -3, -2) for x in (call.query, call.key, call.value))
    query, bias, sinks, visible = jax.tree.map(  # None stays None
        lambda x: _per_group(x, kv_heads=key.shape[-3]),
        (query, call.bias, call.sinks, call.visible),
    )
    return tiling, Operands(query, key, value, bias, sinks, visible, call.dropout_rng)


def _chunk_size(heads: int) -> int:
    """The largest power of two whose tile, for so many heads of batch entries, is small enough."""
    shortest, longest = _TILE_SIDES
    side = 2 ** (math.floor(math.log2(max(_TILE_ENTRIES / max(heads, 1), 1))) // 2)
    return min(max(side, shortest), longest)


def _per_group(x: jax.Array, kv_heads: int) -> jax.Array:
    """`[..., N, T, any]` as `[..., K, G, T, any]`; a broadcast axis of heads makes two."""
    *batch, num_heads, rows, columns = x.shape
    heads = (1, 1) if num_heads == 1 else (kv_heads, num_heads // kv_heads)
    return x.reshape(*batch, *heads, rows, columns)


def tile_of(tiling: Tiling, x: Operands, i, j) -> Tile:
    bias, visible = jax.tree.map(
        lambda v: lax.dynamic_slice(v, *tile_bounds(tiling, v, i, j)), (x.bias, x.visible)
    )
    rng = x.dropout_rng
    return Tile(
        query=tiling.queries.take(x.query, i),
        key=tiling.keys.take(x.key, j),
        value=tiling.keys.take(x.value, j),
        bias=None if bias is None else bias.astype(accumulation_dtype(x.query.dtype)),
        mask=_visible(tiling, x.query.ndim, bias, visible, i, j),
        dropout_rng=None if rng is None else jax.random.fold_in(rng, i * tiling.keys.count + j),
    )


def tile_bounds(tiling: Tiling, x: jax.Array, i, j) -> tuple[list[Any], list[int]]:
    """Start and size of a tile in a mask or bias, whose axes may be broadcast."""
    zero = jnp.zeros_like(i)  # all starts must have the index's dtype
    starts, sizes = [zero] * (x.ndim - 2), list(x.shape[:-2])
    for chunks, index, length in ((tiling.queries, i, x.shape[-2]), (tiling.keys, j, x.shape[-1])):
        starts.append(zero if length == 1 else chunks.start(index))
        sizes.append(1 if length == 1 else chunks.size)
    return starts, sizes


def _visible(tiling: Tiling, axes: int, bias, x: Visibility, i, j) -> jax.Array | None:
    # As many axes as the logits have: NumPy's rank promotion can be forbidden.
    rows = jnp.expand_dims(tiling.queries.positions(i), (*range(axes - 2), axes - 1))
    columns = jnp.expand_dims(tiling.keys.positions(j), tuple(range(axes - 1)))
    conditions = []
    if tiling.queries.length % tiling.queries.size:
        conditions.append(rows >= i * tiling.queries.size)
    if tiling.keys.length % tiling.keys.size:
        conditions.append(columns >= j * tiling.keys.size)
    if tiling.right is not None:
        conditions.append(columns <= rows + tiling.right)
    if tiling.left is not None:
        conditions.append(columns >= rows - tiling.left)
    if x.mask is not None:
        conditions.append(x.mask)
    if x.query_segments is not None and x.key_segments is not None:
        conditions.append(x.query_segments == x.key_segments)
    if x.query_lengths is not None:
        conditions.append(rows < x.query_lengths)
    if x.key_lengths is not None:
        conditions.append(columns < x.key_lengths)
    if bias is not None:  # written so that a NaN stays visible
        conditions.append(~(bias <= jnp.finfo(bias.dtype).min / 2))
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def counted(tile: Tile) -> jax.Array | None:
    """Which logits the maxima count: the visible ones that no bias pushes out of the softmax."""
    if tile.bias is None:
        return tile.mask
    inside = ~(tile.bias <= _OUTSIDE)  # written so that a NaN counts
    return inside if tile.mask is None else tile.mask & inside


def raw_logits(tiling: Tiling, tile: Tile) -> jax.Array:
    """`scale · q kᵀ`, hidden or not: `[..., K, G, T, S]` of the tile."""
    return tiling.scale * tiling.matmul("...kgth,...ksh->...kgts", tile.query, tile.key)


def hide(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
    return logits if mask is None else jnp.where(mask, logits, -jnp.inf)
