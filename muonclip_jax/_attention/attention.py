"""One attention call, whichever kernel computes it."""

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._attention import call as arguments
from muonclip_jax._attention import chunked, logsumexp, tokamax

Implementation = Literal["auto", "chunked", "tokamax", "logsumexp"] | Callable[..., Any]


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    implementation: Implementation = "auto",
    chunk_size: int | None = None,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention, and for each query head the largest logit that entered its softmax.

    The output is `softmax(soft_cap(scale · q kᵀ) + bias) v` over the visible keys. Apply rotary
    embeddings before. Position j is visible to query i when all of these allow it: the mask,
    `is_causal` (j ≤ i), the window (i − left ≤ j ≤ i + right), the segments (equal numbers) and the
    lengths. A query that sees nothing gives zeros. `sinks` add a logit to each row of the softmax.

    The maxima are of `scale · q kᵀ`, the only part that scaling the kernels of q and k
    scales: the soft cap, the bias and the sinks come after. They are what QK-Clip compares with
    its threshold, and carry no gradient. What is hidden from the softmax, by whatever option, does
    not count (for a bias see there).

    Flax's attention modules call `attention_fn` instead, which is made of this function.

    `implementation` says which code computes it:

    | | maxima | |
    | --- | --- | --- |
    | `"auto"` | exact | tokamax where it can, else chunked |
    | `"chunked"` | exact | plain JAX; every option, device and sharding |
    | `"tokamax"` | exact | the TPU and GPU kernels of the package tokamax; fewer options |
    | an op of tokamax | exact | `tokamax.ops.tpu.FlashAttention(config=...)`, for your own tiles |
    | `"logsumexp"` | upper bounds | `jax.nn.dot_product_attention`; see `max_logits_bound` |

    `"auto"` takes tokamax on a TPU or GPU where it is installed and supports the call (on TPU:
    without a mask, lengths in multiples of 128) and there is one device: XLA cannot split a kernel
    over several, for which call this in `jax.shard_map(..., check_vma=False)` with `"tokamax"`. It
    never takes the bounds. Numbers differ by rounding: the TPU kernel scales the queries in their
    own dtype, which moves a bfloat16 logit by up to 0.8%. That kernel's backward pass holds one
    float32 gradient of all queries for each 1024 keys.

    Cost of `"chunked"`: T·S·N·(H + V) multiply-adds forward and 2.5 times that backward, less the
    tiles hidden by `is_causal` (half of them) or the window; the maxima are a by-product. Memory
    is linear in T + S, besides the caller's own mask and bias: one tile is
    `[..., N, chunk_size, chunk_size]`. Segments and lengths are compared within a tile; no [T, S]
    mask is made of them, and no tile is left out for them. Reverse-mode only: `jax.jvp` and
    `jax.hessian` raise. Inside `jax.shard_map`, query, key, value and sinks must vary over the same
    mesh axes (`jax.lax.pcast`).

    Args:
      query: `[..., T, N, H]`, any number of leading batch axes.
      key: `[..., S, K, H]`, N a multiple of K; query head n uses key head n // (N // K).
      value: `[..., S, K, V]`.
      bias: added to the logits, broadcastable to `[..., N, T, S]`. A number at or below
        half the lowest one of its dtype (−inf, `finfo.min`, −65504 in float16) hides the
        position, as a mask does. One at or below −1e8 (−1e9, −1e10, −1e30) is added as it is,
        so that a row of nothing else has the weights that `jax.nn` gives it, but the position
        does not count in the maxima. All others count, and so does −1e4: position biases
        (ALiBi) get there; hide by a mask instead. The gradient with respect to a bias is
        accumulated in one float32 array of the bias's own shape.
      mask: boolean, broadcastable to `[..., N, T, S]`, True where a query attends.
      is_causal: query i sees keys 0 … i.
      local_window_size: `(left, right)` or one int for both, as `jax.nn.dot_product_attention`.
      segment_ids: whole numbers that say to which of several packed sequences a position belongs,
        broadcastable to `[..., T]`, or `(the queries' [..., T], the keys' [..., S])` (splash's
        `SegmentIds` is such a tuple). A query sees the keys of its own number, whatever the number:
        padding that has one, MaxText's 0, sees itself and counts. To leave it out, add
        `mask=(segment_ids > 0)[:, None, None, :]`.
      query_seq_lengths: whole numbers, one for each batch entry; queries from there on are padding
        and see nothing. Above T: all see.
      key_value_seq_lengths: the same for the keys, which nobody sees from there on.
      scale: factor on `q kᵀ`, `1/sqrt(H)` by default.
      soft_cap: c in `c · tanh(logits / c)` (Gemma 2, arXiv 2408.00118).
      sinks: a logit for each query head, `[N]`, that is in every row of the softmax, takes weight
        and has no value, or the value 0 (gpt-oss, arXiv 2508.10925; where it is learned). It is
        neither scaled nor capped nor dropped out, and never counts in the maxima: it does not
        depend on q and k, so scaling their kernels could not lower it.
      implementation: see above.
      chunk_size: the largest number of queries and of keys in a tile of the chunked form, which
        it asks for; by default 128 to 512, the fewer the more batch entries and heads there are.
      dropout_rng: key for dropout on the probabilities, needed by a rate above 0. The
        pattern depends on `chunk_size`.
      dropout_rate: probability of dropping, in [0, 1); 0 for no dropout.
      broadcast_dropout: one dropout pattern for all batch entries and heads.
      dtype: dtype of the matrix products and the output; by default the operands' common
        one, and the query's for the output. Products accumulate, and the softmax is
        taken, in float32 (float64 for float64).
      precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
      `(out, max_logits)`: `[..., T, N, V]`, and `[N]` in float32 (float64 for float64).
      The maxima are over batch and all visible pairs that the bias leaves in the softmax: −inf
      for a head that sees nothing, NaN where a visible logit is NaN.

    Raises:
      ValueError: shapes that do not fit, a number out of its range, or an option that the
        implementation does not support.
      TypeError: a dtype or type that does not fit.
      ImportError: `implementation="tokamax"` without the package.

    Example:
      >>> query, key, value = jnp.ones((5, 4, 8)), jnp.ones((5, 2, 8)), jnp.ones((5, 2, 8))
      >>> out, max_logits = mc.dot_product_attention(query, key, value, is_causal=True)
      >>> out.shape, max_logits.shape
      ((5, 4, 8), (4,))
    """
    given = {"query": query, "key": key, "value": value}
    query, key, value = (arguments.floating(name, x) for name, x in given.items())
    arguments.check_operands(query, key, value)
    compute_dtype = arguments.compute_dtype(dtype, query, key, value)
    out_dtype = query.dtype if dtype is None else compute_dtype
    if bias is not None:
        bias = arguments.per_weight("bias", arguments.floating("bias", bias), query, key)
    dropout_rate = arguments.checked_dropout_rate(dropout_rate)
    if dropout_rate and dropout_rng is None:
        raise ValueError(
            f"dropout_rate={dropout_rate} needs dropout_rng=jax.random.key(...); give 0, or "
            "attention_fn deterministic=True, to switch dropout off."
        )
    call = arguments.Call(
        query=query.astype(compute_dtype),
        key=key.astype(compute_dtype),
        value=value.astype(compute_dtype),
        visible=arguments.visibility(
            query, key, mask, segment_ids, query_seq_lengths, key_value_seq_lengths
        ),
        bias=bias,
        sinks=None if sinks is None else arguments.per_head(sinks, query),
        is_causal=is_causal,
        window=arguments.window(local_window_size),
        scale=arguments.logit_scale(scale, query),
        soft_cap=None if soft_cap is None else arguments.number("soft_cap", soft_cap, above=0),
        chunk_size=arguments.checked_chunk_size(chunk_size),
        dropout_rng=dropout_rng if dropout_rate else None,
        dropout_rate=dropout_rate,
        broadcast_dropout=broadcast_dropout,
        precision=precision,
    )
    out, max_logits = _attend(call, implementation)
    return out.astype(out_dtype), max_logits


def _attend(call: arguments.Call, implementation: Implementation) -> tuple[jax.Array, jax.Array]:
    if callable(implementation):
        return tokamax.attend_with(implementation, call)
    match implementation:
        case "auto":
            return _attend_fastest(call)
        case "chunked":
            return chunked.attend(call)
        case "tokamax":
            return tokamax.attend(call)
        case "logsumexp":
            return logsumexp.attend(call)
    raise ValueError(
        'implementation must be "auto", "chunked", "tokamax", "logsumexp" or an attention op of '
        f"tokamax, found {implementation!r}."
    )


def _attend_fastest(call: arguments.Call) -> tuple[jax.Array, jax.Array]:
    if jax.device_count() == 1:  # XLA cannot split a kernel over devices
        with contextlib.suppress(arguments.Unsupported, ImportError):
            return tokamax.attend(call)
    return chunked.attend(call)
