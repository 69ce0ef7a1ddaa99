"""Attention that reports every head's largest logit and never holds a [T, S] buffer.

The output is FlashAttention-2 in plain JAX (Dao, arXiv 2307.08691): an online softmax
over (query chunk, key chunk) tiles, whose running row maximum is already the number that
QK-Clip needs. The backward pass recomputes each tile's probabilities from the saved row
statistics.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from muonclip_jax._attention.call import Call, Visibility
from muonclip_jax._attention.tiles import (
    Operands,
    Tile,
    Tiling,
    counted,
    cut,
    hide,
    raw_logits,
    tile_bounds,
    tile_of,
)
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.maxima import largest


def attend(call: Call) -> tuple[jax.Array, jax.Array]:
    """Output `[..., T, N, V]` and maxima `[N]`."""
    out, max_logits = _attend_jit(*cut(call))
    *leading, num_heads, _ = call.query.shape
    out = jnp.moveaxis(out, -2, -4).reshape(*leading, num_heads, call.value.shape[-1])
    return out, max_logits.reshape(num_heads)


def _softmax_logits(tiling: Tiling, raw: jax.Array, bias: jax.Array | None, mask) -> jax.Array:
    logits = raw if tiling.soft_cap is None else tiling.soft_cap * jnp.tanh(raw / tiling.soft_cap)
    return hide(logits if bias is None else logits + bias, mask)


def _dropout(tiling: Tiling, tile: Tile, shape: tuple[int, ...]) -> jax.Array | float:
    """The factor on a tile's probabilities, the same in both passes."""
    if tile.dropout_rng is None:
        return 1.0
    keep = 1 - tiling.dropout_rate
    pattern = (1,) * (len(shape) - 2) + shape[-2:] if tiling.broadcast_dropout else shape
    return jnp.where(jax.random.bernoulli(tile.dropout_rng, keep, pattern), 1 / keep, 0.0)


class _Rows(NamedTuple):
    """What the forward pass knows so far of every query: `[..., K, G, T, V or 1]`."""

    out: jax.Array  # not yet divided by `total`
    total: jax.Array  # sum of exp(logit - peak)
    peak: jax.Array  # largest logit of the softmax
    top: jax.Array | None  # largest logit before soft cap and bias; None: there is neither


class _Residuals(NamedTuple):
    operands: Operands
    out: jax.Array
    shift: jax.Array  # probability = exp(logit - shift) · inverse
    inverse: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiling: Tiling, x: Operands) -> tuple[jax.Array, jax.Array]:
    """Output `[..., K, G, T, V]` and maxima `[K, G]`."""
    return _forward(tiling, x)[0]


def _forward(tiling: Tiling, x: Operands):
    def step(rows: _Rows, ij):
        tile, seen = tile_of(tiling, x, *ij), tiling.queries.take(rows, ij[0])
        raw = raw_logits(tiling, tile)
        logits = _softmax_logits(tiling, raw, tile.bias, tile.mask)
        peak = _highest(seen.peak, logits)
        decay = jnp.exp(seen.peak - _shift(peak))
        weights = _exp(logits, _shift(peak))
        kept = (weights * _dropout(tiling, tile, weights.shape)).astype(tile.value.dtype)
        new = _Rows(
            out=seen.out * decay + tiling.matmul("...kgts,...ksv->...kgtv", kept, tile.value),
            total=seen.total * decay + jnp.sum(weights, -1, keepdims=True),
            peak=peak,
            top=None if seen.top is None else _highest(seen.top, hide(raw, counted(tile))),
        )
        return tiling.queries.put(rows, new, ij[0]), None

    zero = jnp.zeros_like(x.query[..., :1], accumulation_dtype(x.query.dtype))
    nothing = _Rows(
        out=jnp.repeat(zero, x.value.shape[-1], -1),
        total=zero,
        peak=zero - jnp.inf,
        top=None if tiling.soft_cap is None and x.bias is None else zero - jnp.inf,
    )
    rows, _ = lax.scan(step, nothing, tiling.tiles())
    top = rows.peak if rows.top is None else rows.top
    # The row maximum may drop a NaN (see `largest`); the sum of the same row keeps it.
    top = jnp.where(jnp.isnan(rows.total) & (top < jnp.inf), jnp.nan, top)
    rows = _with_sinks(rows, x.sinks)
    inverse = jnp.where(rows.total == 0, 0, 1 / rows.total)
    out = (rows.out * inverse).astype(x.value.dtype)
    max_logits = largest(top, (*range(top.ndim - 4), -2, -1))
    return (out, max_logits), _Residuals(x, out, _shift(rows.peak), inverse)


def _with_sinks(rows: _Rows, sinks: jax.Array | None) -> _Rows:
    """One more logit in each row, whose value is 0. After the maxima: it is not of q and k."""
    if sinks is None:
        return rows
    sinks = sinks.astype(rows.peak.dtype)
    peak = jnp.maximum(rows.peak, sinks)
    decay = jnp.exp(rows.peak - _shift(peak))
    total = rows.total * decay + _exp(sinks, _shift(peak))
    return rows._replace(out=rows.out * decay, total=total, peak=peak)


def _highest(seen: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.maximum(seen, jnp.max(logits, -1, keepdims=True))


def _shift(peak: jax.Array) -> jax.Array:
    """The peak, but 0 for a row that has seen no key: −inf − (−inf) is NaN."""
    return jnp.where(peak == -jnp.inf, 0, peak)


def _exp(logits: jax.Array, shift: jax.Array) -> jax.Array:
    """exp(logits - shift), at most 1.

    The minimum changes no number. It keeps compilers from making one operation (fma) of the product
    in the logits and the difference: that rounds the product no more, and of logits above 1e9 the
    difference is then as large as an ulp, ±100, where it should be 0.
    """
    return jnp.exp(jnp.minimum(logits, shift) - shift)


def _backward(tiling: Tiling, saved: _Residuals, cotangents) -> tuple[Operands]:
    x, d_out = saved.operands, cotangents[0]  # the maxima carry no gradient
    accumulated = accumulation_dtype(x.query.dtype)
    slope = jnp.sum(d_out.astype(accumulated) * saved.out.astype(accumulated), -1, keepdims=True)
    row_values = (d_out, saved.shift, saved.inverse, slope)
    # [..., K, H or V, G, T]: the gradients of keys and values are made transposed, because XLA on
    # CPU is two to ten times slower at a product that sums over the rows of a tile on its left.
    columns = jax.tree.map(lambda v: jnp.moveaxis(v, -1, -3), (x.query, d_out))

    def step(grads: Operands, ij):
        tile = tile_of(tiling, x, *ij)
        d_rows, shift, inverse, slope = tiling.queries.take(row_values, ij[0])
        query_columns, d_columns = tiling.queries.take(columns, ij[0], -1)
        logits, logits_vjp = jax.vjp(
            lambda raw, bias: _softmax_logits(tiling, raw, bias, tile.mask),
            raw_logits(tiling, tile),
            tile.bias,
        )
        weights = _exp(logits, shift) * inverse
        dropout = _dropout(tiling, tile, weights.shape)
        kept = (weights * dropout).astype(tile.value.dtype)
        d_weights = tiling.matmul("...kgtv,...ksv->...kgts", d_rows, tile.value) * dropout
        d_raw, d_bias = logits_vjp(weights * (d_weights - slope))
        # Scaled here, where other factors are, and not in passes over the gradients.
        d_product = (tiling.scale * d_raw).astype(tile.query.dtype)
        d_query = tiling.matmul("...kgts,...ksh->...kgth", d_product, tile.key)
        d_key = tiling.matmul("...khgt,...kgts->...khs", query_columns, d_product)
        d_value = tiling.matmul("...kvgt,...kgts->...kvs", d_columns, kept)
        return grads._replace(
            query=tiling.queries.add(grads.query, d_query, ij[0]),
            key=tiling.keys.add(grads.key, d_key, ij[1], -1),
            value=tiling.keys.add(grads.value, d_value, ij[1], -1),
            bias=_add_tile(tiling, grads.bias, d_bias, *ij),
        ), None

    differentiable = x._replace(visible=Visibility(), dropout_rng=None)
    zeros = jax.tree.map(
        lambda v: jnp.zeros_like(v, accumulated), differentiable._replace(sinks=None)
    )
    zeros = zeros._replace(key=zeros.key.mT, value=zeros.value.mT)
    grads, _ = lax.scan(step, zeros, tiling.tiles())
    grads = grads._replace(
        key=grads.key.mT,
        value=grads.value.mT,
        sinks=_sinks_gradient(saved, slope),
    )
    return (jax.tree.map(lambda g, v: g.astype(v.dtype), grads, differentiable),)


def _sinks_gradient(saved: _Residuals, slope: jax.Array) -> jax.Array | None:
    """That of a logit whose value is 0: its probability times what the row gains without it."""
    if (sinks := saved.operands.sinks) is None:
        return None
    weights = _exp(sinks.astype(saved.shift.dtype), saved.shift) * saved.inverse
    batch, rows = range(sinks.ndim - 4), -2
    return -jnp.sum(weights * slope, (*batch, rows), keepdims=True)


def _add_tile(tiling: Tiling, x: jax.Array | None, tile: jax.Array | None, i, j):
    if x is None or tile is None:
        return None
    starts, sizes = tile_bounds(tiling, x, i, j)
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, starts, sizes) + tile, starts)


_attend.defvjp(_forward, _backward)
_attend_jit = jax.jit(_attend, static_argnums=0)  # one trace for equal layers, cheap eager calls
