"""Queries and keys of a forward pass, head by head."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen
from jax.sharding import PartitionSpec

from muonclip_jax._core import paths, sowing
from muonclip_jax._core.meshes import in_auto_axes, mesh_axes

if TYPE_CHECKING:
    from flax import nnx

KEYS = "keys"
"""The name under which `attention_report` reads keys."""


def sow_activations(module: "linen.Module | nnx.Module", **activations: jax.Array) -> bool:
    """Sows queries, keys or whatever has heads, for `read_activations`.

    `mc.sow_activations(self, keys=k)` in the attention block, where `k` is what the question is
    about: before or after rotary embeddings and QK-norm. Several go by names of your own,
    `keys_before_rope=k, keys=apply_rope(k)`, which no submodule may have; `attention_report` reads
    `keys`. A module called twice keeps both calls' tokens.

    Args:
      module: The attention block, `self` in its own method.
      activations: By name, `[batch, length, heads, features]`, floating point. Stored as they are,
        without gradient: all of them, so collect them in an evaluation pass, or sow part of the
        batch, `keys=k[:1]`.

    Returns:
      Whether they were stored, as Flax's own `sow`. They are not where nothing collects:
      in Linen when `intermediates` is not mutable, in NNX outside of `nnx.capture`.

    Raises:
      TypeError: `module` is not a Flax module, or activations are not floating point, or none.
      ValueError: Activations of other than four axes.

    Example:
      >>> class Attention(nnx.Module):
      ...     def __call__(self, k):
      ...         mc.sow_activations(self, keys=k)
      >>> _, sown = nnx.capture(Attention(), nnx.Intermediate)(jnp.ones((2, 5, 4, 8)))
      >>> mc.read_activations(sown)[()].shape
      (4, 10, 8)
    """
    if not activations:
        raise TypeError("sow_activations: name what to sow, sow_activations(self, keys=k).")
    for name, value in activations.items():
        _check(f"sow_activations: {name}", value)
        if value.ndim != 4:
            raise ValueError(
                f"sow_activations: {name} must be [batch, length, heads, features], found shape "
                f"{value.shape}. Split flat projections into heads first, and give what has no "
                "batch axis one, x[None]."
            )
    stored = [
        sowing.sow(module, name, jax.lax.stop_gradient(value))
        for name, value in activations.items()
    ]
    return all(stored)


def read_activations(intermediates: Any, name: str = KEYS) -> dict[paths.Path, jax.Array]:
    """Reads what attention blocks sowed under a name, head by head.

    `jax.tree.map(mc.participation_ratio, mc.read_activations(intermediates))` is the participation
    ratio of every head's keys. What plain Flax collects is read as well: `self.sow`, and in Linen
    the outputs of projections or norms without any change of the model:
    `model.apply(..., capture_intermediates=lambda module, _: module.name == "key")`, under the
    name `"__call__"`.

    Args:
      intermediates: What the forward pass gave: Linen's `intermediates` collection or the
        variables that hold it, the NNX State from `nnx.capture`, or a nested dict.
      name: The name they were sown under.

    Returns:
      By the module's path, as from `read_max_logits`, `[stack..., heads, tokens, features]` with
      all tokens of the batch and of all calls. What is in front of `[batch, length, heads,
      features]`, such as scanned layers, stays in front.

    Raises:
      TypeError: `intermediates` is not a mapping, or values are not floating point.
      ValueError: Nothing of this name in it, or values of fewer than four axes, or calls that
        differ in more than tokens.

    Example:
      >>> is_key = lambda module, _: module.name == "key"
      >>> _, found = model.apply({"params": params}, tokens, capture_intermediates=is_key)
      >>> mc.read_activations(found, "__call__")[("attn", "key")].shape
      (2, 10, 4)
    """
    found = dict(sowing.sown(intermediates))
    blocks = {
        path[:-1]: _heads_first(paths.show(path), value)
        for path, value in found.items()
        if path[-1:] == (name,)
    }
    if not blocks:
        raise ValueError(
            f"No value named {name!r} in the intermediates; found "
            f"{paths.some(found, none='nothing')}. Did the blocks sow? Call "
            f"sow_activations(self, {name}=...) in each. " + sowing.WAS_IT_COLLECTED
        )
    return blocks


def _heads_first(path: str, sown: Any) -> jax.Array:
    """One array of what a Variable, a box, or the tuple of several calls holds."""
    calls = jax.tree.leaves(sown)
    for value in calls:
        _check(path, value)
        if value.ndim < 4:
            raise ValueError(
                f"{path}: expected [batch, length, heads, features], found shape {value.shape}."
            )
    if len({(*value.shape[:-4], *value.shape[-2:]) for value in calls}) != 1:
        raise ValueError(
            f"{path}: calls must differ in tokens only, found shapes {[v.shape for v in calls]}."
        )
    *stack, batch, length, heads, features = jax.typeof(calls[0]).sharding.spec
    spec = PartitionSpec(*stack, heads, mesh_axes(batch) + mesh_axes(length), features)
    return in_auto_axes(_tokens_of_heads, spec)(*calls)


def _tokens_of_heads(*calls: jax.Array) -> jax.Array:
    heads_first = (jnp.moveaxis(value, -2, -4) for value in calls)
    merged = [x.reshape(*x.shape[:-3], -1, x.shape[-1]) for x in heads_first]
    return jnp.concatenate(merged, axis=-2)


def _check(what: str, value: Any) -> None:
    dtype = getattr(value, "dtype", type(value))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{what} must be floating point, found {jnp.dtype(dtype)}.")
