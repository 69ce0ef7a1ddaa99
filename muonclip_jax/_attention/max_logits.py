"""The way of the max logits out of a Flax model: sown by the attention block, read by path."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen

from muonclip_jax._core import paths, sowing

if TYPE_CHECKING:
    from flax import nnx

MAX_LOGITS = "max_logits"
"""The name under which an attention block sows its max logits."""


def sow_max_logits(module: "linen.Module | nnx.Module", max_logits: jax.Array) -> bool:
    """Sows a block's max logits, as `max_logits`, for `read_max_logits`.

    Called in the forward pass of the block that holds the q and k kernels: QK-Clip finds
    the kernels by the path of the block that sowed. Linen's collection is `intermediates`,
    NNX's variable type `nnx.Intermediate`. A module called twice keeps the maximum.

    Args:
      module: the attention block, `self` in its own method.
      max_logits: `[..., heads]`, floating point. Stored as float32, without gradient;
        leading axes are kept.

    Returns:
      Whether the value was stored, as Flax's own `sow`. It is not where nothing collects:
      in Linen when `intermediates` is not mutable, in NNX outside of `nnx.capture`.

    Raises:
      TypeError: `module` is not a Flax module, or `max_logits` is not floating point.
      ValueError: `max_logits` has no head axis.

    Example:
      >>> class Attention(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         q, k, v = (nn.DenseGeneral((4, 2), name=name)(x) for name in "qkv")
      ...         out, max_logits = mc.dot_product_attention(q, k, v)
      ...         mc.sow_max_logits(self, max_logits)
      ...         return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="o")(out)
    """
    _check(max_logits, "max_logits")
    value = jax.lax.stop_gradient(jnp.asarray(max_logits, jnp.float32))
    reduction = {"init_fn": lambda: -jnp.inf, "reduce_fn": jnp.maximum}
    return sowing.sow(module, MAX_LOGITS, value, **reduction)


def read_max_logits(intermediates: Mapping[Any, Any]) -> dict[paths.Path, jax.Array]:
    """Reads the sown max logits of every attention block, by the block's path.

    Args:
      intermediates: what the forward pass gave: Linen's `intermediates` collection or the
        variables that hold it, the NNX State from `nnx.capture` or `nnx.pop`, or a plain
        nested dict of the same module paths. Values sown under other names are ignored.
        The result of this function is taken as well.

    Returns:
      `{path: max_logits}`, such as `{("layers", "0", "attn"): [heads]}`. Scanned layers keep
      their leading axis: `[layers, heads]`. Where plain `sow` made a tuple of several calls,
      their maximum.

    Raises:
      ValueError: no max logits in it, or one without a head axis, or calls that differ in shape.
      TypeError: not a mapping, or values that are not floating point.

    Example:
      >>> _, sown = model.apply({"params": params}, tokens, mutable=["intermediates"])
      >>> {path: maxima.shape for path, maxima in mc.read_max_logits(sown).items()}
      {('attn',): (2,)}
    """
    if (
        isinstance(intermediates, Mapping)
        and intermediates
        and all(isinstance(key, tuple) for key in intermediates)
    ):
        return {path: _maximum(path, value) for path, value in intermediates.items()}
    sown = list(sowing.sown(intermediates))
    blocks = {
        path[:-1]: _maximum(path, value) for path, value in sown if path[-1:] == (MAX_LOGITS,)
    }
    if not blocks:
        raise ValueError(_nothing_sown([path for path, _ in sown]))
    return blocks


def _maximum(path: paths.Path, sown: Any) -> jax.Array:
    """One array of what a Variable, a box, or the tuple of several calls holds."""
    values = jax.tree.leaves(sown)
    for value in values:
        _check(value, f"The max logits sown at {paths.show(path)}")
    shapes = [jnp.shape(value) for value in values]
    if len(set(shapes)) != 1:
        raise ValueError(
            f"The max logits sown at {paths.show(path)} must be one array, or one of the same "
            f"shape for every call of the block, found {shapes}."
        )
    return functools.reduce(jnp.maximum, map(jnp.asarray, values))


def _check(max_logits: Any, what: str) -> None:
    dtype = getattr(max_logits, "dtype", type(max_logits))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{what} must be floating point, found {jnp.dtype(dtype)}.")
    if jnp.ndim(max_logits) == 0:
        raise ValueError(
            f"{what} must be [..., heads], found a scalar: "
            "reduce over batch, queries and keys, not over heads."
        )


def _nothing_sown(found: list[paths.Path]) -> str:
    return (
        f"No value named {MAX_LOGITS!r} in the intermediates; found {sowing.names(found)}. "
        "Did the blocks sow? Call sow_max_logits(self, max_logits) in each, or give Flax's "
        "attention modules attention_fn=mc.attention_fn and call them with "
        "sow_weights=True. " + sowing.WAS_IT_COLLECTED
    )
