"""The maxima alone, for attention kernels that tell nothing of them."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._attention import call as arguments
from muonclip_jax._attention.tiles import Operands, Tiling, cut, hide, raw_logits, tile_of
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.maxima import largest
from muonclip_jax._core.options import check_choice

Which = Literal["highest", "lowest", "size"]


def measure_max_logits(
    query: ArrayLike,
    key: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    scale: float | None = None,
    which: Which = "highest",
    examples: int | None = None,
    every: int = 1,
    step: ArrayLike | None = None,
    chunk_size: int | None = None,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Measures each query head's largest logit, beside any attention that computes the output.

    The maxima are what `dot_product_attention` would report: of `scale · q kᵀ` over the visible
    pairs, before a soft cap, a bias and sinks. Positions that your attention hides by a bias must
    be hidden by the mask here. No [T, S] buffer is formed and nothing is kept for a backward pass.

    Cost: T·S·N·H multiply-adds, less the hidden tiles, where attention with values of the same
    size takes 7 times as many, forward and backward. `examples` and `every` divide it, for a
    weaker guarantee:

    - `examples=m` measures the first m entries of the batch. The result is a **lower bound** of
      the batch's maxima: QK-Clip never clips a head more than the full maxima would, and misses
      larger logits of the other entries. If entries come in random order, the largest logit is
      among m of B with probability m/B.
    - `every=k` measures at the steps 0, k, 2k, …; the others give −inf, which means "nothing
      seen", and QK-Clip clips nothing. The steps that measure are exact. So a head stays above
      the threshold for at most k − 1 steps more than with `every=1`, and its logits may grow by
      what k updates add instead of one. With QuacK this has a bound, k times that of
      `scale_by_quack`. Without QuacK it has none: choose k small against the steps in which a
      logit doubles.

    Inside `jax.vmap` over `step` both branches run and nothing is saved.

    Args:
      query: `[..., T, N, H]`, as attention gets it: rotary embeddings and norms applied.
      key: `[..., S, K, H]`, N a multiple of K.
      mask: boolean, broadcastable to `[..., N, T, S]`, True where a query attends.
      is_causal: query i sees keys 0 … i.
      local_window_size: `(left, right)` or one int for both, as `dot_product_attention`.
      segment_ids: as `dot_product_attention`.
      query_seq_lengths: as `dot_product_attention`.
      key_value_seq_lengths: as `dot_product_attention`.
      scale: factor on `q kᵀ`, `1/sqrt(H)` by default.
      which: `"highest"` gives the largest logit; `"lowest"` minus the lowest, for logits that run
        away below, where a softmax shows nothing; `"size"` the larger of the two, `max |q kᵀ|`. A
        clip by γ scales all logits of a head, so QK-Clip takes any of them.
      examples: entries of the first axis to measure, all by default. On a mesh that splits this
        axis they are those of the first devices; inside `jax.shard_map`, each device takes its
        own.
      every: measure once in so many steps.
      step: the number of the step, an integer scalar that may be traced; needed by `every > 1`.
        Count optimizer steps. With `mc.accumulate` all micro-batches of a step have one number.
      chunk_size: as `dot_product_attention`.
      dtype: of the products' factors, the operands' common dtype by default; they accumulate in
        float32 (float64 for float64).
      precision: of the products, as in `jax.lax.dot_general`.

    Returns:
      `[N]` in float32 (float64 for float64), without gradient, to be sown with `sow_max_logits`:
      −inf for a head that sees nothing, NaN where a visible logit is NaN.

    Raises:
      ValueError: shapes that do not fit, a number out of its range, or `every` without `step`.
      TypeError: a dtype or type that does not fit.

    Example:
      >>> query, key = jnp.ones((5, 4, 8)), jnp.ones((5, 2, 8))
      >>> mc.measure_max_logits(query, key, is_causal=True, every=10, step=20).shape
      (4,)
    """
    query, key = arguments.floating("query", query), arguments.floating("key", key)
    arguments.check_operands(query, key)
    check_choice("which", which, get_args(Which))
    every = arguments.integer("every", every, at_least=1)
    step = _step(step, every)
    dtype = arguments.compute_dtype(dtype, query, key)
    query, key = (lax.stop_gradient(x.astype(dtype)) for x in (query, key))
    visible = arguments.visibility(
        query, key, mask, segment_ids, query_seq_lengths, key_value_seq_lengths
    )
    if examples is not None:
        examples = arguments.integer("examples", examples, at_least=1)
        query, key, visible = _first(examples, query, key, visible)
    tiling, operands = cut(
        arguments.Call(
            query=query,
            key=key,
            value=jnp.zeros((*key.shape[:-1], 0), dtype),
            visible=visible,
            is_causal=is_causal,
            window=arguments.window(local_window_size),
            scale=arguments.logit_scale(scale, query),
            chunk_size=arguments.checked_chunk_size(chunk_size),
            precision=precision,
        )
    )
    nothing = jnp.full_like(operands.query[..., 0, 0], -jnp.inf, accumulation_dtype(query.dtype))
    if every == 1:
        highest = _highest(tiling, which, operands, nothing)
    else:
        highest = lax.cond(
            step % every == 0,
            lambda x, nothing: _highest(tiling, which, x, nothing),
            lambda x, nothing: nothing,
            operands,
            nothing,
        )
    return largest(highest, tuple(range(highest.ndim - 2))).reshape(query.shape[-2])


def _step(step: ArrayLike | None, every: int) -> jax.Array:
    if step is None and every > 1:
        raise ValueError(f"every={every} needs step=, the number of the step.")
    step = 0 if step is None else step
    is_array = isinstance(step, np.generic | np.ndarray | jax.Array)
    is_whole = is_array and jnp.issubdtype(step.dtype, jnp.integer) and step.ndim == 0
    if not is_whole and not isinstance(step, int):
        found = f"{step.dtype} {step.shape}" if is_array else repr(step)
        raise TypeError(f"step must be an integer scalar, found {found}.")
    return jnp.asarray(step)


def _first(count: int, query: jax.Array, key: jax.Array, visible: arguments.Visibility):
    """The first entries of the first batch axis."""
    if query.ndim < 4 or count > query.shape[0]:
        raise ValueError(
            f"examples={count} must be at most the size of the first axis of query "
            f"[batch, ..., T, N, H], found {query.shape}."
        )
    visible = jax.tree.map(lambda x: x[:count], visible)  # 1 of 1 where it is broadcast
    return query[:count], key[:count], visible


def _highest(tiling: Tiling, which: Which, x: Operands, nothing: jax.Array) -> jax.Array:
    """`[..., K, G]`. The batch is kept to the end: spread over devices, it costs one reduction."""
    measured = {"highest": lambda x: x, "lowest": jnp.negative, "size": jnp.abs}[which]

    def step(highest: jax.Array, ij):
        tile = tile_of(tiling, x, *ij)
        logits = hide(measured(raw_logits(tiling, tile)), tile.mask)
        return jnp.maximum(highest, largest(logits, (-2, -1))), None

    return lax.scan(step, nothing, tiling.tiles())[0]
