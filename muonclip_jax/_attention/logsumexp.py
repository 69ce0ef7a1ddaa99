"""`jax.nn.dot_product_attention`, whose logsumexp bounds the max logits."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from muonclip_jax._attention.call import Call, Unsupported, Visibility
from muonclip_jax._attention.residuals import max_logits_bound, sees


def attend(call: Call) -> tuple[jax.Array, jax.Array]:
    """Output `[..., T, N, V]` and upper bounds of the maxima `[N]`.

    cuDNN computes it on a GPU in half precision; XLA, with weights [T, S], anywhere else.

    Raises:
      Unsupported: The bound would not hold, or `jax.nn` has no such option.
    """
    _check(call)
    *batch, _, _, _ = call.query.shape
    flat = _one_batch_axis(call)
    mask = flat.visible.mask
    half = jnp.finfo(call.query.dtype).bits == 16
    kernel: Literal["cudnn", "xla"] = "xla"
    if half and jax.default_backend() == "gpu":
        kernel = "cudnn"
    out, logsumexp = jax.nn.dot_product_attention(
        flat.query,
        flat.key,
        flat.value,
        # JAX 0.8 ignores a window that comes without a mask.
        mask=jnp.ones((1, 1, 1, 1), bool) if mask is None and flat.window else mask,
        scale=flat.scale,
        is_causal=flat.is_causal,
        query_seq_lengths=flat.visible.query_lengths,
        key_value_seq_lengths=flat.visible.key_lengths,
        local_window_size=flat.window,
        implementation=kernel,
        return_residual=True,
    )
    out = jnp.where(sees(logsumexp)[..., None], out, 0)
    return out.reshape(*batch, *out.shape[1:]), max_logits_bound(logsumexp)


def _one_batch_axis(call: Call) -> Call:
    def flatten(x):
        return x.reshape(-1, *x.shape[-3:])

    def broadcast(x):
        return flatten(jnp.broadcast_to(x, (*call.query.shape[:-3], *x.shape[-3:])))

    mask = call.visible.mask
    if mask is not None:
        mask = (flatten if all(n == 1 for n in mask.shape[:-3]) else broadcast)(mask)
    lengths = (call.visible.query_lengths, call.visible.key_lengths)
    lengths = jax.tree.map(lambda x: broadcast(x).astype(jnp.int32).reshape(-1), lengths)
    query, key, value = map(flatten, (call.query, call.key, call.value))
    return dataclasses.replace(
        call, query=query, key=key, value=value, visible=Visibility(mask, None, None, *lengths)
    )


def _check(call: Call) -> None:
    query_size, value_size = call.query.shape[-1], call.value.shape[-1]
    objections = {
        "a bias: its logsumexp comes after it (to hide positions, use a mask)": call.bias
        is not None,
        "soft_cap": call.soft_cap is not None,
        "sinks": call.sinks is not None,
        "segment_ids (a mask [batch, 1, T, S] says the same)": call.visible.query_segments
        is not None,
        "dropout": call.dropout_rng is not None,
        "chunk_size": call.chunk_size is not None,
        "precision (set jax.default_matmul_precision)": call.precision is not None,
        f"values of size {value_size} with keys of size {query_size}": query_size != value_size,
        "float64: its logsumexp is float32": call.query.dtype == jnp.float64,
    }
    if applying := [what for what, applies in objections.items() if applies]:
        raise Unsupported("logsumexp", applying[0])
