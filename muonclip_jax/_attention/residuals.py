"""Max logits from what other attention kernels leave behind of their softmax."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from muonclip_jax._attention.call import floating
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.maxima import largest


def max_logits_from_residuals(
    row_max: ArrayLike, row_sum: ArrayLike, *, heads_axis: int = -2
) -> jax.Array:
    """Reads each head's largest logit off the running maxima of a kernel's stable softmax.

    For attention that you call yourself:

    | kernel | `row_max`, `row_sum` |
    | --- | --- |
    | a tokamax attention op, `return_residuals=True` | `m`, `l` of `(out, (m, l))` |
    | tokamax's splash kernel, `save_residuals=True` | `stats["max_logits"]`, `stats["logsumexp"]` |

    They are the maxima that `dot_product_attention` reports if the kernel multiplied the logits by
    a positive `scale` and by nothing else, and if it had no soft cap, bias or sink, which come
    before its maximum. They must be in the natural base: splash kernels convert theirs, tokamax's
    Triton op with `use_base2=True` does not (divide by `log2(e)`). An op whose stable softmax is
    off has none, and a splash kernel that is told `max_logit_const` gives that.

    Args:
      row_max: each query's largest logit, `[..., N, T]`.
      row_sum: anything of the same row that is NaN where a visible logit is, such as its sum of
        exponentials or its logsumexp: the maximum of a kernel may lose a NaN. Same shape.
      heads_axis: the axis of the heads.

    Returns:
      `[N]` in float32 (float64 for float64), without gradient. −inf for a head whose every row is
      at or below half the lowest number of its dtype, which kernels write where nothing is
      visible; NaN where `row_sum` is.

    Raises:
      TypeError: not floating point.
      ValueError: shapes that differ, or without heads and rows.

    Example:
      >>> row_max = jnp.array([[1.0, 5.0, 2.0], [-3.0, -2.0, -4.0]])  # 2 heads, 3 queries
      >>> mc.max_logits_from_residuals(row_max, row_sum=jnp.ones((2, 3))).tolist()
      [5.0, -2.0]
    """
    row_max, row_sum = floating("row_max", row_max), floating("row_sum", row_sum)
    if row_max.shape != row_sum.shape or row_max.ndim < 2:
        raise ValueError(
            "row_max and row_sum must both be [..., heads, rows], "
            f"found {row_max.shape} and {row_sum.shape}."
        )
    rows = jnp.where(jnp.isnan(row_sum) & (row_max < jnp.inf), jnp.nan, row_max)
    return _per_head(rows, heads_axis)


def max_logits_bound(logsumexp: ArrayLike, *, heads_axis: int = -1) -> jax.Array:
    """Bounds each head's largest logit from above, by the logsumexp of its rows.

    For kernels that tell no maximum: `jax.nn.dot_product_attention(..., return_residual=True)`,
    with cuDNN on a GPU as with XLA, and any other flash attention. Of n visible logits

        max ≤ logsumexp ≤ max + log n

    so QK-Clip with the bound clips all that it would clip with the maximum, and at most log n
    early: 6.2 for rows of 512 logits, 7.6 for 2048, 11.8 for 131072, against thresholds of 100.
    The gap is largest where a row's logits are all alike, and 0 where one of them dominates, as in
    heads above the threshold. The bound is on what the softmax saw: with a bias, a soft cap or a
    sink it says nothing of `scale · q kᵀ`.

    Args:
      logsumexp: `[..., T, N]`, in the natural base, as `jax.nn` gives it.
      heads_axis: the axis of the heads; −2 for kernels that return `[..., N, T]`.

    Returns:
      `[N]` in float32 (float64 for float64), without gradient; −inf and NaN as
      `max_logits_from_residuals`. `jax.nn` rounds the logsumexp to the operands' dtype, perhaps
      down: one epsilon of that dtype is added, 0.8% of the logit in bfloat16.

    Raises:
      TypeError: not floating point.
      ValueError: no axes of heads and rows.

    Example:
      >>> x = jnp.ones((1, 5, 4, 8))
      >>> out, logsumexp = jax.nn.dot_product_attention(x, x, x, return_residual=True)
      >>> mc.max_logits_bound(logsumexp).shape
      (4,)
    """
    logsumexp = floating("logsumexp", logsumexp)
    if logsumexp.ndim < 2:
        raise ValueError(f"logsumexp must be [..., rows, heads], found {logsumexp.shape}.")
    rows = logsumexp.astype(accumulation_dtype(logsumexp.dtype))
    rounding = float(jnp.finfo(logsumexp.dtype).eps) * jnp.abs(rows)
    return _per_head(jnp.where(sees(logsumexp), rows + rounding, -jnp.inf), heads_axis)


def sees(rows: jax.Array) -> jax.Array:
    """False where a kernel's row statistic, some huge negative number, means an empty row."""
    return ~(rows <= jnp.finfo(rows.dtype).min / 2)


def _per_head(rows: jax.Array, heads_axis: int) -> jax.Array:
    if not isinstance(heads_axis, int) or not -rows.ndim <= heads_axis < rows.ndim:
        raise ValueError(
            f"heads_axis must be an axis of {rows.shape}, in [{-rows.ndim}, {rows.ndim - 1}], got "
            f"{heads_axis!r}."
        )
    rows = jax.lax.stop_gradient(rows.astype(accumulation_dtype(rows.dtype)))
    heads_last = jnp.moveaxis(jnp.where(sees(rows), rows, -jnp.inf), heads_axis, -1)
    return largest(heads_last, tuple(range(heads_last.ndim - 1)))
