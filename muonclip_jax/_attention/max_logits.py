"""The way of the max logits out of a Flax model: sown by the attention block, read by path."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import linen

from muonclip_jax._core import paths
from muonclip_jax._core.sowing import MAX_LOGITS, read_signal, sow_signal

if TYPE_CHECKING:
    from flax import nnx


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
    return sow_signal(module, MAX_LOGITS, max_logits)


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
    return read_signal(intermediates, MAX_LOGITS)
