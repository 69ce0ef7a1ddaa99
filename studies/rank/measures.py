"""The ranks of queries, and how large the optimizer's updates are before the learning rate."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

import muonclip_jax as mc
from examples.mla import data
from studies.common.model import ModelConfig, queries_and_keys
from studies.common.optimizers import Optimizer
from studies.common.training import Setting, State, loss_and_sown

BATCHES = 4  # held-out ones


def measure(
    setting: Setting, state: State, batch: jax.Array, text: data.TokenizedText
) -> dict[str, Any]:
    """The participation ratio of the queries, `[layers, heads]`, and kernel by kernel the RMS of
    the next update, `[layers]`."""
    count, size = batch.shape
    held_out = data.validation_batches(text, context=size - 1, batch=count, count=BATCHES)
    ratios = [query_ratio(state.params, setting.model, each) for each in held_out]
    return {
        "query_ratio": jnp.stack(ratios).mean(axis=0),
        "update_rms": update_rms(*setting, state.params, state.opt_state, batch),
    }


@partial(jax.jit, static_argnames="config")
def query_ratio(params: Any, config: ModelConfig, batch: jax.Array) -> jax.Array:
    """Over a batch's tokens, by singular values, as `training.evaluate` has it for keys."""
    _, queries, _ = queries_and_keys(params, config, batch[:, :-1])
    queries = rearrange(queries, "l b t h f -> l h (b t) f").astype(jnp.float32)
    return mc.participation_ratio(queries)


@partial(jax.jit, static_argnames="config")
def update_rms(
    config: ModelConfig, optimizer: Optimizer, params: Any, opt_state: Any, batch: jax.Array
) -> dict[str, jax.Array]:
    """Kernel → the RMS of each layer's next update before learning rate, decay and clip. Muon's is
    that of `update_rms="match_adam"`, whatever the run's own: 0.2, were all singular values 1."""
    grads, sown = jax.grad(loss_and_sown, has_aux=True)(params, config, batch)
    no_clip = None if optimizer.threshold is None else jnp.finfo(jnp.float32).max
    direction = replace(
        optimizer,
        learning_rate=1.0,
        weight_decay=0.0,
        threshold=no_clip,
        warmup=0,
        update_rms="match_adam",
    )
    updates, _ = direction.chain(config).update(grads, opt_state, params, max_logits=sown)
    kernels = {
        f"{block}/{kernel}": each["kernel"]
        for block in ("attn", "mlp")
        for kernel, each in updates["layers"][block].items()
        if "kernel" in each
    }
    return {name: jnp.sqrt(jnp.square(each).mean(axis=(-2, -1))) for name, each in kernels.items()}
