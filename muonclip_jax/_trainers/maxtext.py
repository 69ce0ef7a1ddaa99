"""MaxText's own training loop with a recipe of this library; none of its files changes.

Its step hands no maxima on, `apply_gradients(grads)`, and carries every variable of the model that
is no parameter. So its attention gets the variable that `record_max_logits` gives to others.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from muonclip_jax._core.recording import UNSEEN, MaxLogits, record
from muonclip_jax._core.sowing import RECORDED
from muonclip_jax._trainers.nnx import use_recorded_max_logits
from muonclip_jax.layouts import find_layout


def use_in_maxtext(recipe: Callable[..., optax.GradientTransformation]) -> None:
    """Makes MaxText train with a recipe, in place of what its `opt_type` says.

    Its attention, of every kind (grouped queries and MLA; scanned or not), then records its max
    logits, and its train state hands them to the optimizer. With `gradient_accumulation_steps`
    they are those of all micro-batches. Checkpoints are MaxText's own, and a run resumes from them
    by the same launcher. Its own `use_qk_clip` stays off.

    What records is MaxText's kernel: `attention=dot_product` and, on TPUs, `flash`; its kernels
    for GPUs say that they cannot. With a soft cap the maxima that come out of it are taken back
    through the cap.

    Call it before `train.main`, in a process that trains nothing else: it sets attributes of
    MaxText's modules.

    Args:
      recipe: `mc.muonclip`, `mc.kimi_muonclip`, `mc.quack`, `mc.muon`, or `functools.partial` of
        one: called with MaxText's learning rate schedule and `layout=`.

    Raises:
      ImportError: No MaxText (0.2.5, for Python ≥ 3.12).
      TypeError: A recipe that is no function.
      ValueError: When the run starts, what the recipe and `find_layout` raise.

    Example:
        >>> mc.use_in_maxtext(mc.muonclip)  # doctest: +SKIP
        >>> maxtext.trainers.pre_train.train.main(sys.argv)  # doctest: +SKIP
    """
    if not callable(recipe):
        raise TypeError(f"use_in_maxtext needs a recipe such as mc.muonclip, found {recipe!r}.")
    attention = importlib.import_module("maxtext.layers.attention_op").AttentionOp
    train_state = importlib.import_module("maxtext.common.train_state_nnx").TrainStateNNX
    optimizers = importlib.import_module("maxtext.optimizers.optimizers")

    def get_optimizer(config, learning_rate_schedule, model=None, mesh=None):
        del config, mesh
        layout = find_layout(nnx.state(model, nnx.Param))
        return recipe(learning_rate_schedule, layout=layout)

    vars(optimizers)["get_optimizer"] = get_optimizer
    if not hasattr(attention, RECORDED):
        setattr(attention, RECORDED, None)  # so that a second call changes the recipe alone
        _add_variable(attention)
        _read_variable(train_state)


def _add_variable(attention: Any) -> None:
    """Makes MaxText's `AttentionOp` record what it can be asked to leave behind."""
    init, call = attention.__init__, attention.__call__

    def with_variable(self, *args, **kwargs):
        init(self, *args, **kwargs)
        heads = jnp.full(self.num_query_heads, UNSEEN, jnp.float32)
        setattr(self, RECORDED, MaxLogits(heads))

    def recording(self, *args, **kwargs):
        out = call(self, *args, **kwargs | {"record_max_logits": True})
        record(self, _per_head(self.max_logits.get_value(), self))
        if not kwargs.get("record_max_logits"):
            del self.max_logits
        return out

    attention.__init__, attention.__call__ = with_variable, recording


def _per_head(maxima: jax.Array, attention: Any) -> jax.Array:
    """`[batch, heads]` of its plain attention, `[batch, heads, queries]` of its TPU kernel; before
    the soft cap, as far as float32 tells."""
    maxima = maxima.astype(jnp.float32).max((0, *range(2, maxima.ndim)))
    cap = attention.attn_logits_soft_cap
    if not cap:
        return maxima
    return cap * jnp.arctanh(jnp.minimum(maxima / cap, 1 - jnp.finfo(jnp.float32).epsneg))


def _read_variable(train_state: Any) -> None:
    init = train_state.__init__

    def with_reading_optimizer(self, model, optimizer):
        init(self, model, optimizer and use_recorded_max_logits(optimizer))

    train_state.__init__ = with_reading_optimizer
