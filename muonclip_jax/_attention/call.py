"""What one attention call asks for, checked, whoever then computes it.

Axes: T queries, S keys, N query heads = K key/value heads × G query heads each, H head
size of queries and keys, V head size of values.
"""

import dataclasses
import math
import numbers
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._core.options import as_dtype, check_flag


class Visibility(NamedTuple):
    """What arrays say on which query sees which key, of full rank, their broadcast axes 1."""

    mask: jax.Array | None = None  # bool [..., N, T, S]; None: no objection, as of the others
    query_segments: jax.Array | None = None  # whole numbers [..., 1, T, 1]
    key_segments: jax.Array | None = None  # [..., 1, 1, S]
    query_lengths: jax.Array | None = None  # [..., 1, 1, 1]
    key_lengths: jax.Array | None = None  # the same


@dataclasses.dataclass(frozen=True)
class Call:
    """Operands of one floating dtype; `bias` and `sinks` of full rank, broadcast axes 1."""

    query: jax.Array  # [..., T, N, H]
    key: jax.Array  # [..., S, K, H]
    value: jax.Array  # [..., S, K, V]; V is 0 where only the maxima are wanted
    scale: float
    visible: Visibility = dataclasses.field(default_factory=Visibility)
    bias: jax.Array | None = None  # [..., N, T, S]
    sinks: jax.Array | None = None  # [1..., N, 1, 1]
    is_causal: bool = False
    window: tuple[int, int] | None = None  # (left, right)
    soft_cap: float | None = None
    chunk_size: int | None = None
    dropout_rng: jax.Array | None = None  # None: no dropout
    dropout_rate: float = 0.0
    broadcast_dropout: bool = True
    precision: lax.PrecisionLike = None

    def __post_init__(self):
        check_flag("is_causal", self.is_causal)
        check_flag("broadcast_dropout", self.broadcast_dropout)


class Unsupported(ValueError):
    """An implementation cannot serve a call."""

    def __init__(self, implementation: str, what: str):
        self.what = what
        super().__init__(
            f"{implementation} attention does not support {what}. "
            'implementation="chunked" supports everything, and "auto" falls back to it.'
        )


def check_operands(query: jax.Array, key: jax.Array, value: jax.Array | None = None) -> None:
    given = {"query": query, "key": key} | ({} if value is None else {"value": value})
    shapes = ", ".join(f"{name} {x.shape}" for name, x in given.items())
    names = " and ".join([", ".join([*given][:-1]), [*given][-1]])
    if any(x.ndim < 3 or x.ndim != query.ndim for x in given.values()):
        raise ValueError(
            f"{names} must be [..., length, heads, size], query [..., T, N, H] and key "
            f"[..., S, K, H], with the same number of axes, found {shapes}."
        )
    if any(x.shape[:-3] != query.shape[:-3] for x in given.values()):
        raise ValueError(f"The batch axes of {names} differ: {shapes}.")
    if value is not None and key.shape[-3:-1] != value.shape[-3:-1]:
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


def floating(name: str, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        hint = " (a boolean mask goes to `mask`)" if name == "bias" else ""
        raise TypeError(f"{name} must be floating point, found {x.dtype}{hint}.")
    return x


def boolean(mask: ArrayLike) -> jax.Array:
    mask = jnp.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(
            f"mask must be boolean, True where a query attends, found {mask.dtype}: "
            "pass mask.astype(bool) for ones and zeros, or an additive mask as `bias`."
        )
    return mask


def compute_dtype(dtype: DTypeLike | None, *operands: jax.Array) -> jnp.dtype:
    found = jnp.result_type(*operands) if dtype is None else as_dtype(dtype)
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"dtype must be floating point, found {dtype!r}.")
    return found


def per_weight(name: str, x: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """A mask or bias with as many axes as the weights, `[..., N, T, S]`."""
    *batch, length, heads, _ = query.shape
    weights_shape = (*batch, heads, length, key.shape[-3])
    return _full_rank(
        name,
        x,
        weights_shape,
        f"[..., N, T, S] = {weights_shape}. One row of keys per batch entry, [batch, S], becomes "
        f"{name}[:, None, None, :]; [batch, T, S] becomes {name}[:, None].",
    )


def visibility(
    query: jax.Array,
    key: jax.Array,
    mask: ArrayLike | None,
    segment_ids: Any,
    query_seq_lengths: ArrayLike | None,
    key_value_seq_lengths: ArrayLike | None,
) -> Visibility:
    query_segments, key_segments = _segments(segment_ids, query, key)
    return Visibility(
        None if mask is None else per_weight("mask", boolean(mask), query, key),
        query_segments,
        key_segments,
        _lengths("query_seq_lengths", query_seq_lengths, query),
        _lengths("key_value_seq_lengths", key_value_seq_lengths, query),
    )


def _segments(segment_ids: Any, query: jax.Array, key: jax.Array):
    if segment_ids is None:
        return None, None
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
    if len(pair) != 2:
        raise ValueError(
            "segment_ids must be one array for queries and keys or (the queries', the keys'), "
            f"found a tuple of {len(pair)}."
        )
    sides = ((pair[0], "queries", "T", query), (pair[1], "keys", "S", key))
    of_queries, of_keys = (
        _full_rank(
            f"segment_ids of the {whose}",
            _whole("segment_ids", ids),
            shape := (*operand.shape[:-3], operand.shape[-3]),
            f"[..., {axis}] = {shape}. Queries and keys of several lengths, or sequences, take "
            "segment_ids=(the queries', the keys').",
        )
        for ids, whose, axis, operand in sides
    )
    return of_queries[..., None, :, None], of_keys[..., None, None, :]


def _lengths(name: str, lengths: ArrayLike | None, query: jax.Array) -> jax.Array | None:
    if lengths is None:
        return None
    batch = query.shape[:-3]
    wanted = f"the batch axes {batch} of the query: one length for each entry."
    return _full_rank(name, _whole(name, lengths), batch, wanted)[..., None, None, None]


def _whole(name: str, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        hint = " (what is True where a query attends goes to `mask`)" if x.dtype == bool else ""
        raise TypeError(f"{name} must be whole numbers, such as int32, found {x.dtype}{hint}.")
    return x


def per_head(sinks: ArrayLike, query: jax.Array) -> jax.Array:
    """`[N]` with as many axes as the weights."""
    sinks, heads = floating("sinks", sinks), query.shape[-2]
    if sinks.shape != (heads,):
        raise ValueError(
            f"sinks must be [N] = ({heads},), one logit for each query head, found {sinks.shape}."
        )
    return sinks.reshape((1,) * (query.ndim - 3) + (heads, 1, 1))


def _full_rank(name: str, x: jax.Array, shape: tuple[int, ...], wanted: str) -> jax.Array:
    full = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    if full.ndim != len(shape) or any(
        n not in (1, size) for n, size in zip(full.shape, shape, strict=True)
    ):
        raise ValueError(f"{name} {x.shape} does not broadcast to {wanted}")
    return full


def integer(name: str, x: Any, at_least: int) -> int:
    wanted = f"{name} must be an int of at least {at_least}, found {x!r}."
    if isinstance(x, bool):
        raise TypeError(wanted)
    try:
        x = operator.index(x)
    except TypeError:
        raise TypeError(wanted) from None
    if x < at_least:
        raise ValueError(wanted)
    return x


def checked_chunk_size(chunk_size: Any) -> int | None:
    return None if chunk_size is None else integer("chunk_size", chunk_size, at_least=1)


def number(name: str, x: Any, above: float = -math.inf) -> float:
    wanted = f"{name} must be a finite number{'' if above < 0 else f' above {above}'}, "
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        raise TypeError(f"{wanted}a Python number that is known when traced, found {x!r}.")
    if not above < (x := float(x)) < math.inf:
        raise ValueError(f"{wanted}found {x}.")
    return x


def logit_scale(scale: Any, query: jax.Array) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else number("scale", scale)


def window(local_window_size: Any) -> tuple[int, int] | None:
    if local_window_size is None:
        return None
    pair = local_window_size if isinstance(local_window_size, tuple) else (local_window_size,) * 2
    name = "local_window_size, an int or (left, right) of them,"
    if len(pair) != 2:
        raise ValueError(f"{name} has {len(pair)}: {pair}.")
    left, right = (integer(name, x, at_least=0) for x in pair)
    return left, right


def checked_dropout_rate(rate: Any) -> float:
    rate = number("dropout_rate, in [0, 1),", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), found {rate}.")
    return rate
