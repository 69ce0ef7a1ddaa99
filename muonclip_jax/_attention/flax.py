"""What Flax's attention modules call."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._attention.attention import Implementation, dot_product_attention
from muonclip_jax._attention.call import checked_dropout_rate
from muonclip_jax._attention.max_logits import sow_max_logits

if TYPE_CHECKING:
    from flax import nnx


def attention_fn(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
    module: "linen.Module | nnx.Module | None" = None,
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
) -> jax.Array:
    """`dot_product_attention` as Flax's attention modules call it, in Linen and in NNX.

    The modules give the arguments up to `module`, which have Flax's own names, order and
    defaults; those of NNX also give `is_causal`. Set the other options with `functools.partial`.
    NNX's modules override `is_causal` of a partial: give it where you call the module.

    Attention weights are never formed; the maxima are sown in their place. The softmax is taken
    in float32 whatever `force_fp32_for_softmax` says, and the `*_einsum_cls` hooks of Linen's
    module do not apply.

    Args:
      query: As `dot_product_attention`, and so are all arguments that are not listed.
      mask: Broadcastable to `[..., N, T, S]`, boolean or numbers, as Flax's mask helpers give
        them: what is not zero attends.
      deterministic: True switches dropout off.
      module: The module to sow the maxima into, as `sow_max_logits` does. Flax's modules give
        themselves when called with `sow_weights=True`.

    Returns:
      The output `[..., T, N, V]` alone.

    Raises:
      ValueError, TypeError, ImportError: What `dot_product_attention` and `sow_max_logits` raise.

    Example:
      >>> from functools import partial
      >>> attention_fn = partial(mc.attention_fn, soft_cap=50.0)
      >>> model, x = nn.MultiHeadAttention(num_heads=4, attention_fn=attention_fn), jnp.ones((5, 8))
      >>> _, sown = model.init_with_output(jax.random.key(0), x, sow_weights=True, mutable=True)
      >>> mc.read_max_logits(sown)[()].shape
      (4,)
    """
    rate = checked_dropout_rate(dropout_rate)
    out, max_logits = dot_product_attention(
        query,
        key,
        value,
        bias,
        None if mask is None else jnp.asarray(mask) != 0,
        is_causal=is_causal,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        scale=scale,
        soft_cap=soft_cap,
        sinks=sinks,
        implementation=implementation,
        chunk_size=chunk_size,
        dropout_rng=dropout_rng,
        dropout_rate=0.0 if deterministic else rate,
        broadcast_dropout=broadcast_dropout,
        dtype=dtype,
        precision=precision,
    )
    if module is not None:
        sow_max_logits(module, max_logits)
    return out
