"""tokamax's attention ops (splash on TPU, Mosaic and Triton on GPUs) and the maxima they keep."""

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from muonclip_jax._attention.call import Call, Unsupported
from muonclip_jax._attention.residuals import max_logits_from_residuals, sees

Op = Callable[..., Any]

_OPS = {
    "tpu": ("FlashAttention",),
    "gpu": ("PallasMosaicFlashAttention", "PallasTritonFlashAttention"),
}
_TPU_BLOCKS = (1024, 512, 256, 128)  # of queries and keys


def attend(call: Call) -> tuple[jax.Array, jax.Array]:
    """Output `[..., T, N, V]` and maxima `[N]`, by the first of the backend's ops that can.

    Raises:
      Unsupported: None can.
      ImportError: tokamax is missing.
    """
    _check_backend(call)
    _check(call)
    refused = []
    for op in _ops(call):
        try:
            return attend_with(op, call)
        except Unsupported as error:
            refused.append(error.what)
    raise Unsupported("tokamax", "; ".join(refused))


def attend_with(op: Op, call: Call) -> tuple[jax.Array, jax.Array]:
    """The same by one op."""
    _check(call)
    try:
        out, (row_max, row_sum) = op(
            call.query,
            call.key,
            call.value,
            mask=call.visible.mask,
            is_causal=call.is_causal,
            logits_scale=call.scale,
            logits_dtype=jnp.float32,
            precision=call.precision,
            return_residuals=True,
        )
    except NotImplementedError as error:
        name = getattr(op, "__name__", type(op).__name__)
        raise Unsupported("tokamax", f"this call with {name} ({error})") from error
    if call.visible.mask is not None:
        # tokamax gives a query that sees nothing the mean of all values.
        out = jnp.where(sees(jnp.moveaxis(row_max, -2, -1))[..., None], out, 0)
    return out, max_logits_from_residuals(row_max, row_sum)


def _ops(call: Call) -> list[Op]:
    backend = jax.default_backend()
    try:
        kernels = importlib.import_module(f"tokamax.ops.{backend}")
    except ImportError as error:
        raise ImportError(
            f'implementation="tokamax" cannot import tokamax.ops.{backend} ({error}). '
            "pip install 'tokamax>=0.0.17' (Python >= 3.12), on GPUs 'tokamax[cuda]>=0.0.17'."
        ) from error
    ops = [getattr(kernels, name)() for name in _OPS[backend]]
    return [tpu_blocks(op, call) for op in ops] if backend == "tpu" else ops


def tpu_blocks(op: Any, call: Call) -> Op:
    """tokamax's TPU op with blocks as long as the sequences allow.

    Without autotuning it has blocks of 128, and its backward pass holds a float32 gradient of all
    queries for each block of keys: with 128, as much as the logits themselves.
    """
    length = math.gcd(call.query.shape[-3], call.key.shape[-3])
    block = next(block for block in _TPU_BLOCKS if length % block == 0)
    heuristics = op.bind(call.query, call.key, call.value).heuristics_config
    forward = {"block_q": block, "block_kv": block, "block_kv_compute": block}
    backward = {"block_q_dkv": block, "block_kv_dkv": block, "block_kv_dkv_compute": block}
    return dataclasses.replace(
        op,
        config=dataclasses.replace(heuristics, **forward),
        vjp=dataclasses.replace(op.vjp, config=op.vjp.config_cls(**backward)),
    )


def _check(call: Call) -> None:
    objections = {
        "a bias: its maxima come after it (to hide positions, use a mask)": call.bias is not None,
        "soft_cap: its maxima come after it": call.soft_cap is not None,
        "local_window_size (a mask [T, S] says the same)": call.window is not None,
        "segment_ids (a mask [batch, 1, T, S] says the same)": call.visible.query_segments
        is not None,
        "query_seq_lengths": call.visible.query_lengths is not None,
        "key_value_seq_lengths (a mask [batch, 1, 1, S] says the same)": call.visible.key_lengths
        is not None,
        "sinks: its maxima come after them": call.sinks is not None,
        "dropout": call.dropout_rng is not None,
        "chunk_size (give it an op with a config)": call.chunk_size is not None,
        f"scale={call.scale}: it takes the maximum before the scale": call.scale <= 0,
        "float64": call.query.dtype == jnp.float64,
    }
    if applying := [what for what, applies in objections.items() if applies]:
        raise Unsupported("tokamax", applying[0])


def _check_backend(call: Call) -> None:
    backend = jax.default_backend()
    if backend not in _OPS:
        raise Unsupported("tokamax", f"the backend {backend!r}: it has TPU and GPU kernels")
    lengths = call.query.shape[-3], call.key.shape[-3]
    smallest = min(_TPU_BLOCKS)
    if backend == "tpu" and any(length % smallest for length in lengths):
        raise Unsupported("tokamax", f"lengths {lengths} on TPU: multiples of {smallest} only")
    if backend == "tpu" and call.visible.mask is not None:
        raise Unsupported("tokamax", "a mask on TPU: it would hold it as [T, S]")
