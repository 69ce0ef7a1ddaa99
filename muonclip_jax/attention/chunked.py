"""Attention that reports every head's largest logit and never holds a [T, S] buffer.

The output is FlashAttention-2 in plain JAX (Dao, arXiv 2307.08691): an online softmax
over (query chunk, key chunk) tiles, whose running row maximum is already the number that
QK-Clip needs. The backward pass recomputes each tile's probabilities from the saved row
statistics. Tiles that the causal mask or the window hides as a whole are left out at
trace time.

Axes: T queries, S keys, N query heads = K key/value heads × G query heads each, H head
size of queries and keys, V head size of values. Inside, a sequence axis comes after the
heads, so that every tile is one batched matrix product.
"""

import dataclasses
import functools
import math
import numbers
import operator
from typing import Any, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax.attention.max_logits import largest, sow_max_logits

Module = linen.Module | nnx.Module


class _Options(TypedDict, total=False):
    is_causal: bool
    local_window_size: int | tuple[int, int] | None
    scale: float | None
    soft_cap: float | None
    chunk_size: int
    dropout_rng: jax.Array | None
    dropout_rate: float
    broadcast_dropout: bool
    dtype: DTypeLike | None
    precision: lax.PrecisionLike


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    deterministic: None = None,
    module: None = None,
    **options: Unpack[_Options],
) -> tuple[jax.Array, jax.Array]: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    deterministic: bool,
    module: Module | None = None,
    **options: Unpack[_Options],
) -> jax.Array: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    deterministic: bool | None = None,
    module: Module,
    **options: Unpack[_Options],
) -> jax.Array: ...


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    is_causal=False,
    local_window_size=None,
    scale=None,
    soft_cap=None,
    chunk_size=256,
    dropout_rng=None,
    dropout_rate=0.0,
    broadcast_dropout=True,
    deterministic=None,
    dtype=None,
    precision=None,
    module=None,
):
    """Attention and, per query head, the largest logit that entered its softmax.

    `softmax(soft_cap(scale · q kᵀ) + bias) v` over the visible keys. Rotary embeddings
    are applied before. Position j is visible to query i when the mask, `is_causal`
    (j ≤ i) and the window (i − left ≤ j ≤ i + right) all allow it; a query that sees
    nothing gives zeros.

    The maxima are of `scale · q kᵀ`, the only part that scaling the kernels of q and k
    scales: the soft cap and the bias come after. They are what QK-Clip compares with its
    threshold, and carry no gradient.

    It is an `attention_fn` for Flax's attention modules, Linen and NNX: called as they
    call it (with `deterministic`) or with `module`, it returns the output alone, and sows
    the maxima into `module`, which the modules pass when called with `sow_weights=True`.
    Attention weights are never formed, and so not sown; the `*_einsum_cls` hooks
    of the Linen module do not apply.

    Cost: T·S·N·(H + V) multiply-adds forward and 2.5 times that backward, less the tiles
    hidden by `is_causal` (half of them) or the window. Memory is linear in T + S, besides
    the caller's own mask and bias: one tile is `[..., N, chunk_size, chunk_size]`.
    Reverse-mode only: `jax.jvp` and `jax.hessian` raise. Inside `jax.shard_map`, query, key
    and value must vary over the same mesh axes (`jax.lax.pcast`).

    Args:
      query: `[..., T, N, H]`, any number of leading batch axes.
      key: `[..., S, K, H]`, N a multiple of K; query head n uses key head n // (N // K).
      value: `[..., S, K, V]`.
      bias: added to the logits, broadcastable to `[..., N, T, S]`. A number at or below
        half the lowest one of its dtype (−inf, `finfo.min`) hides the position, as a mask
        does; −1e9 does not, and the position counts in the maxima. The gradient with
        respect to a bias is accumulated in one float32 array of the bias's own shape.
      mask: boolean, broadcastable to `[..., N, T, S]`, True where a query attends. Called
        the Flax way, numbers are taken as Flax's mask helpers give them: non-zero attends.
      is_causal: query i sees keys 0 … i.
      local_window_size: `(left, right)` or one int for both, as `jax.nn.dot_product_attention`.
      scale: factor on `q kᵀ`, `1/sqrt(H)` by default.
      soft_cap: c in `c · tanh(logits / c)` (Gemma 2, arXiv 2408.00118).
      chunk_size: number of queries and of keys in a tile.
      dropout_rng: key for dropout on the probabilities. The pattern depends on
        `chunk_size`.
      dropout_rate: probability of dropping, in [0, 1).
      broadcast_dropout: one dropout pattern for all batch entries and heads.
      deterministic: True switches dropout off; see above for what giving it means.
      dtype: dtype of the matrix products and the output; by default the operands' common
        one, and the query's for the output. Products accumulate, and the softmax is
        taken, in float32 (float64 for float64).
      precision: of the matrix products, as in `jax.lax.dot_general`.
      module: a Linen or NNX module to sow the maxima into.

    Returns:
      `(out, max_logits)`: `[..., T, N, V]`, and `[N]` in float32 (float64 for float64).
      The maxima are over batch and all visible pairs: −inf for a head that sees nothing,
      NaN where a visible logit is NaN. Only `out` when called the Flax way or with
      `module`.

    Raises:
      ValueError: shapes that do not fit, or a number out of its range.
      TypeError: a dtype or type that does not fit.
    """
    flax_call = deterministic is not None
    query, key, value = map(_floating, ("query", "key", "value"), (query, key, value))
    _check_operands(query, key, value)
    compute_dtype = _compute_dtype(dtype, query, key, value)
    out_dtype = query.dtype if dtype is None else compute_dtype
    *batch, num_queries, num_heads, head_size = query.shape
    num_keys, num_kv_heads = key.shape[-3:-1]
    weights_shape = (*batch, num_heads, num_queries, num_keys)

    chunk_size = _integer("chunk_size", chunk_size, at_least=1)
    left, right = _window(local_window_size, is_causal)
    dropout_rate = _dropout_rate(dropout_rate, dropout_rng, deterministic)
    plan = _Plan(
        queries=_Chunks(num_queries, chunk_size),
        keys=_Chunks(num_keys, chunk_size),
        left=left,
        right=right,
        scale=1 / math.sqrt(head_size) if scale is None else _number("scale", scale),
        soft_cap=None if soft_cap is None else _number("soft_cap", soft_cap, above=0),
        dropout_rate=dropout_rate,
        broadcast_dropout=broadcast_dropout,
        precision=precision,
    )
    operands = _Operands(
        query=_heads_first(query.astype(compute_dtype), num_kv_heads),
        key=jnp.moveaxis(key.astype(compute_dtype), -3, -2),
        value=jnp.moveaxis(value.astype(compute_dtype), -3, -2),
        bias=_per_weight("bias", _floating("bias", bias), weights_shape, num_kv_heads),
        mask=_per_weight("mask", _boolean(mask, flax_call), weights_shape, num_kv_heads),
        dropout_rng=dropout_rng if dropout_rate else None,
    )
    out, max_logits = _attend_jit(plan, operands)
    out = jnp.moveaxis(out, -2, -4).reshape(*batch, num_queries, num_heads, value.shape[-1])
    out, max_logits = out.astype(out_dtype), max_logits.reshape(num_heads)
    if module is not None:
        sow_max_logits(module, max_logits)
    return out if flax_call or module is not None else (out, max_logits)


# ---- the arguments ----


def _floating(name: str, x: ArrayLike | None) -> jax.Array | None:
    if x is None and name == "bias":
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        hint = " (a boolean mask goes to `mask`)" if name == "bias" else ""
        raise TypeError(f"{name} must be floating point, found {x.dtype}{hint}.")
    return x


def _boolean(mask: ArrayLike | None, flax_call: bool) -> jax.Array | None:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype == bool:
        return mask
    if flax_call:
        return mask != 0
    raise TypeError(
        f"mask must be boolean, True where a query attends, found {mask.dtype}: "
        "pass mask.astype(bool) for ones and zeros, or an additive mask as `bias`."
    )


def _compute_dtype(dtype: DTypeLike | None, *operands: jax.Array) -> jnp.dtype:
    dtype = jnp.result_type(*operands) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating point, found {dtype}.")
    return dtype


def _check_operands(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if query.ndim < 3 or not query.ndim == key.ndim == value.ndim:
        raise ValueError(
            "query, key and value must be [..., T, N, H], [..., S, K, H] and [..., S, K, V] "
            f"with the same number of axes, found {shapes}."
        )
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(f"The batch axes of query, key and value differ: {shapes}.")
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise ValueError(
            f"key and value must have the same length and heads (axes -3 and -2), found {shapes}."
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"The head sizes (last axis) of query and key differ: {shapes}.")
    if 0 in (*query.shape[-3:], *key.shape[-3:]):
        raise ValueError(f"query and key need at least one position, head and feature: {shapes}.")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"{query.shape[-2]} query heads are not a multiple of {key.shape[-2]} key/value "
            f"heads (axis -2): {shapes}. Heads come after the length: [..., length, heads, size]."
        )


def _per_weight(
    name: str, x: jax.Array | None, weights_shape: tuple[int, ...], num_kv_heads: int
) -> jax.Array | None:
    """A mask or bias as `[..., K, G, T, S]` whose broadcast axes stay 1."""
    if x is None:
        return None
    full = x.reshape((1,) * (len(weights_shape) - x.ndim) + x.shape)
    if full.ndim != len(weights_shape) or any(
        n not in (1, wanted) for n, wanted in zip(full.shape, weights_shape, strict=True)
    ):
        raise ValueError(
            f"{name} {x.shape} does not broadcast to [..., N, T, S] = {weights_shape}. "
            f"One row of keys per batch entry, [batch, S], becomes {name}[:, None, None, :]; "
            f"[batch, T, S] becomes {name}[:, None]."
        )
    *batch, num_heads, rows, columns = full.shape
    heads = (1, 1) if num_heads == 1 else (num_kv_heads, num_heads // num_kv_heads)
    return full.reshape(*batch, *heads, rows, columns)


def _heads_first(query: jax.Array, num_kv_heads: int) -> jax.Array:
    """`[..., T, N, H]` as `[..., K, G, T, H]`."""
    *batch, length, num_heads, size = query.shape
    grouped = query.reshape(*batch, length, num_kv_heads, num_heads // num_kv_heads, size)
    return jnp.moveaxis(grouped, -4, -2)


def _integer(name: str, x: Any, at_least: int) -> int:
    try:
        x = operator.index(x)
    except TypeError:
        raise TypeError(f"{name} must be an int, found {x!r}.") from None
    if x < at_least:
        raise ValueError(f"{name} must be at least {at_least}, found {x}.")
    return x


def _number(name: str, x: Any, above: float = -math.inf) -> float:
    if not isinstance(x, numbers.Real):
        raise TypeError(f"{name} must be a Python number, known when traced, found {x!r}.")
    if not above < x < math.inf:
        raise ValueError(f"{name} must be finite and above {above}, found {x}.")
    return float(x)


def _window(local_window_size: Any, is_causal: bool) -> tuple[int | None, int | None]:
    """How many keys before and after its own position a query sees; None for all."""
    if local_window_size is None:
        return None, 0 if is_causal else None
    pair = local_window_size if isinstance(local_window_size, tuple) else (local_window_size,) * 2
    if len(pair) != 2:
        raise ValueError(f"local_window_size must be an int or (left, right), found {pair}.")
    left, right = (_integer("local_window_size", x, at_least=0) for x in pair)
    return left, 0 if is_causal else right


def _dropout_rate(rate: Any, rng: jax.Array | None, deterministic: bool | None) -> float:
    rate = _number("dropout_rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), found {rate}.")
    if deterministic or not rate:
        return 0.0
    if rng is None:
        raise ValueError(
            f"dropout_rate={rate} needs dropout_rng=jax.random.key(...), "
            "or deterministic=True to switch dropout off."
        )
    return rate


# ---- tiles ----


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """A sequence axis, the last but one, cut into chunks of one size.

    The last chunk of an uneven axis starts early and overlaps its neighbour, which saves
    padded copies; the positions they share belong to the neighbour.
    """

    length: int
    limit: int

    @property
    def size(self) -> int:
        return min(self.limit, self.length)

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    def start(self, index):
        return jnp.minimum(index * self.size, self.length - self.size)

    def positions(self, index) -> jax.Array:
        return self.start(index) + jnp.arange(self.size)

    def take(self, tree: Any, index) -> Any:
        start = self.start(index)
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, self.size, -2), tree)

    def put(self, tree: Any, chunk: Any, index) -> Any:
        start = self.start(index)
        return jax.tree.map(
            lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, -2), tree, chunk
        )

    def add(self, x: jax.Array, chunk: jax.Array, index) -> jax.Array:
        return self.put(x, self.take(x, index) + chunk, index)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is known when the attention is traced."""

    queries: _Chunks
    keys: _Chunks
    left: int | None
    right: int | None
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
            subscripts, a, b, precision=self.precision, preferred_element_type=_wide(a)
        )


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


class _Operands(NamedTuple):
    query: jax.Array  # [..., K, G, T, H]
    key: jax.Array  # [..., K, S, H]
    value: jax.Array  # [..., K, S, V]
    bias: jax.Array | None  # [..., K, G, T, S], any of them 1
    mask: jax.Array | None  # the same; None: all visible
    dropout_rng: jax.Array | None


def _tile(plan: _Plan, x: _Operands, i, j) -> _Operands:
    """The operands of query chunk i and key chunk j; the mask says all about visibility."""
    bias, mask = (
        None if v is None else lax.dynamic_slice(v, *_tile_bounds(plan, v, i, j))
        for v in (x.bias, x.mask)
    )
    rng = x.dropout_rng
    return _Operands(
        query=plan.queries.take(x.query, i),
        key=plan.keys.take(x.key, j),
        value=plan.keys.take(x.value, j),
        bias=None if bias is None else bias.astype(_wide(x.query)),
        mask=_visible(plan, bias, mask, i, j),
        dropout_rng=None if rng is None else jax.random.fold_in(rng, i * plan.keys.count + j),
    )


def _tile_bounds(plan: _Plan, x: jax.Array, i, j) -> tuple[list[Any], list[int]]:
    """Start and size of a tile in a mask or bias, whose axes may be broadcast."""
    zero = jnp.zeros_like(i)  # all starts must have the index's dtype
    starts, sizes = [zero] * (x.ndim - 2), list(x.shape[:-2])
    for chunks, index, length in ((plan.queries, i, x.shape[-2]), (plan.keys, j, x.shape[-1])):
        starts.append(zero if length == 1 else chunks.start(index))
        sizes.append(1 if length == 1 else chunks.size)
    return starts, sizes


def _visible(plan: _Plan, bias, mask, i, j) -> jax.Array | None:
    rows, columns = plan.queries.positions(i)[:, None], plan.keys.positions(j)
    conditions = []
    if plan.queries.length % plan.queries.size:
        conditions.append(rows >= i * plan.queries.size)
    if plan.keys.length % plan.keys.size:
        conditions.append(columns >= j * plan.keys.size)
    if plan.right is not None:
        conditions.append(columns <= rows + plan.right)
    if plan.left is not None:
        conditions.append(columns >= rows - plan.left)
    if mask is not None:
        conditions.append(mask)
    if bias is not None:  # written so that a NaN stays visible
        conditions.append(~(bias <= jnp.finfo(bias.dtype).min / 2))
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _raw_logits(plan: _Plan, tile: _Operands) -> jax.Array:
    return plan.scale * plan.matmul("...kgth,...ksh->...kgts", tile.query, tile.key)


def _softmax_logits(plan: _Plan, raw: jax.Array, bias: jax.Array | None, mask) -> jax.Array:
    logits = raw if plan.soft_cap is None else plan.soft_cap * jnp.tanh(raw / plan.soft_cap)
    return _hide(logits if bias is None else logits + bias, mask)


def _hide(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
    return logits if mask is None else jnp.where(mask, logits, -jnp.inf)


def _dropout(plan: _Plan, tile: _Operands, shape: tuple[int, ...]) -> jax.Array | float:
    """The factor on a tile's probabilities, the same in both passes."""
    if tile.dropout_rng is None:
        return 1.0
    keep = 1 - plan.dropout_rate
    pattern = shape[-2:] if plan.broadcast_dropout else shape
    return jnp.where(jax.random.bernoulli(tile.dropout_rng, keep, pattern), 1 / keep, 0.0)


# ---- the two passes ----


class _Rows(NamedTuple):
    """What the forward pass knows so far of every query: `[..., K, G, T, V or 1]`."""

    out: jax.Array  # not yet divided by `total`
    total: jax.Array  # sum of exp(logit - peak)
    peak: jax.Array  # largest logit of the softmax
    top: jax.Array  # largest logit before soft cap and bias


class _Residuals(NamedTuple):
    operands: _Operands
    out: jax.Array
    shift: jax.Array  # probability = exp(logit - shift) · inverse
    inverse: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, x: _Operands) -> tuple[jax.Array, jax.Array]:
    """Output `[..., K, G, T, V]` and maxima `[K, G]`."""
    return _forward(plan, x)[0]


def _forward(plan: _Plan, x: _Operands):
    def step(rows: _Rows, ij):
        tile, seen = _tile(plan, x, *ij), plan.queries.take(rows, ij[0])
        raw = _raw_logits(plan, tile)
        logits = _softmax_logits(plan, raw, tile.bias, tile.mask)
        peak = jnp.maximum(seen.peak, jnp.max(logits, -1, keepdims=True))
        decay = jnp.exp(seen.peak - _shift(peak))
        weights = jnp.exp(logits - _shift(peak))
        kept = (weights * _dropout(plan, tile, weights.shape)).astype(tile.value.dtype)
        new = _Rows(
            out=seen.out * decay + plan.matmul("...kgts,...ksv->...kgtv", kept, tile.value),
            total=seen.total * decay + jnp.sum(weights, -1, keepdims=True),
            peak=peak,
            top=jnp.maximum(seen.top, jnp.max(_hide(raw, tile.mask), -1, keepdims=True)),
        )
        return plan.queries.put(rows, new, ij[0]), None

    zero = jnp.zeros_like(x.query[..., :1], _wide(x.query))
    nothing = _Rows(jnp.repeat(zero, x.value.shape[-1], -1), zero, zero - jnp.inf, zero - jnp.inf)
    rows, _ = lax.scan(step, nothing, plan.tiles())
    inverse = jnp.where(rows.total == 0, 0, 1 / rows.total)
    out = (rows.out * inverse).astype(x.value.dtype)
    # The row maximum may drop a NaN (see `largest`); the sum of the same row keeps it.
    top = jnp.where(jnp.isnan(rows.total) & (rows.top < jnp.inf), jnp.nan, rows.top)
    max_logits = largest(top, (*range(top.ndim - 4), -2, -1))
    return (out, max_logits), _Residuals(x, out, _shift(rows.peak), inverse)


def _shift(peak: jax.Array) -> jax.Array:
    """The peak, but 0 for a row that has seen no key: −inf − (−inf) is NaN."""
    return jnp.where(peak == -jnp.inf, 0, peak)


def _backward(plan: _Plan, saved: _Residuals, cotangents) -> tuple[_Operands]:
    x, d_out = saved.operands, cotangents[0]  # the maxima carry no gradient
    wide = _wide(x.query)
    slope = jnp.sum(d_out.astype(wide) * saved.out.astype(wide), -1, keepdims=True)
    row_values = (d_out, saved.shift, saved.inverse, slope)

    def step(grads: _Operands, ij):
        tile = _tile(plan, x, *ij)
        d_rows, shift, inverse, slope = plan.queries.take(row_values, ij[0])
        logits, logits_vjp = jax.vjp(
            lambda raw, bias: _softmax_logits(plan, raw, bias, tile.mask),
            _raw_logits(plan, tile),
            tile.bias,
        )
        weights = jnp.exp(logits - shift) * inverse
        dropout = _dropout(plan, tile, weights.shape)
        kept = (weights * dropout).astype(tile.value.dtype)
        d_weights = plan.matmul("...kgtv,...ksv->...kgts", d_rows, tile.value) * dropout
        d_raw, d_bias = logits_vjp(weights * (d_weights - slope))
        d_raw = d_raw.astype(tile.query.dtype)
        d_query = plan.matmul("...kgts,...ksh->...kgth", d_raw, tile.key)
        d_key = plan.matmul("...kgts,...kgth->...ksh", d_raw, tile.query)
        d_value = plan.matmul("...kgts,...kgtv->...ksv", kept, d_rows)
        return grads._replace(
            query=plan.queries.add(grads.query, d_query, ij[0]),
            key=plan.keys.add(grads.key, d_key, ij[1]),
            value=plan.keys.add(grads.value, d_value, ij[1]),
            bias=_add_tile(plan, grads.bias, d_bias, *ij),
        ), None

    differentiable = x._replace(mask=None, dropout_rng=None)
    zeros = jax.tree.map(lambda v: jnp.zeros_like(v, wide), differentiable)
    grads, _ = lax.scan(step, zeros, plan.tiles())
    grads = grads._replace(query=plan.scale * grads.query, key=plan.scale * grads.key)
    return (jax.tree.map(lambda g, v: g.astype(v.dtype), grads, differentiable),)


def _add_tile(plan: _Plan, x: jax.Array | None, tile: jax.Array | None, i, j):
    if x is None:
        return None
    starts, sizes = _tile_bounds(plan, x, i, j)
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, starts, sizes) + tile, starts)


_attend.defvjp(_forward, _backward)
_attend_jit = jax.jit(_attend, static_argnums=0)  # one trace for equal layers, cheap eager calls
