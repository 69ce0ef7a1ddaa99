"""Max logits as a variable of an NNX model, which the forward pass writes and an optimizer reads.

Imports NNX: only who records waits for it.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from muonclip_jax._core.sowing import RECORDED

UNSEEN = jnp.inf
"""What stands there until something is recorded: a clip counts it as a fault, and clips nothing."""


class MaxLogits(nnx.Variable[jax.Array]):
    """The largest logits since the last update, `[stack..., heads]`, as `record_max_logits` adds
    them to an attention module; +inf where nothing was recorded.

    They are state as batch statistics are, and no parameters: `nnx.Param` does not select them.
    A checkpoint of the whole state has them; without, `nnx.state(model, nnx.Not(mc.MaxLogits))`.

    Example:
        >>> attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        >>> nnx.state(mc.record_max_logits(attention), mc.MaxLogits)["recorded_max_logits"][...]
        Array([inf, inf], dtype=float32)
    """


def record(module: nnx.Module, maxima: jax.Array, owner: nnx.Module | None = None) -> None:
    """Takes maxima into a module's variable, if this pass is differentiated.

    Evaluation and sampling change nothing: what is not differentiated trains nothing.

    Args:
      module: One that has the variable.
      maxima: `[..., heads]`; leading axes that the variable does not have are reduced.
      owner: The module that holds the parameters, where it is another one.

    Raises:
      ValueError: Other heads, or another stack, than the variable's.
    """
    owner = module if owner is None else owner
    variable = getattr(module, RECORDED)
    before = variable.get_value()
    extra = maxima.ndim - before.ndim
    if extra < 0 or maxima.shape[extra:] != before.shape:
        raise ValueError(
            f"{type(owner).__name__} gave max_logits of shape {maxima.shape}, and its variable "
            f"mc.MaxLogits has {before.shape}. Where layers are stacked, nnx.scan and nnx.vmap "
            "must split it as they split the kernels, over axis 0: "
            "nnx.StateAxes({mc.MaxLogits: 0, ...}). Else correct the layout of record_max_logits."
        )
    maxima = maxima.max(tuple(range(extra)))
    # One of these is differentiated if the step trains this module: a measured maximum is not.
    others = jax.tree.leaves(nnx.state(owner, nnx.Param))
    after = _recorded(before, maxima.astype(before.dtype), others)
    variable.set_value(jax.lax.stop_gradient(after))


@jax.custom_jvp
def _recorded(before: jax.Array, maxima: jax.Array, others: list[jax.Array]) -> jax.Array:
    """What stands there after this pass. JAX calls the rule below instead where any argument is
    differentiated, by `grad`, `vjp` or `jvp`, also inside of `scan` and `checkpoint`."""
    del maxima, others
    return before


@_recorded.defjvp
def _(primals, tangents):
    before, maxima, _ = primals
    del tangents
    after = jnp.where(before == UNSEEN, maxima, jnp.maximum(before, maxima))
    return after, jnp.zeros_like(after)
