"""Flax's TrainState for Linen, which hands max logits on."""

from typing import Any

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose `apply_gradients` takes `max_logits=`.

    The same fields, so checkpoints of one are those of the other, and without `max_logits=` the
    same behaviour. A trainer that has a TrainState of its own takes this class in place of Flax's
    as its base.

    Example:
        >>> state = mc.TrainState.create(
        ...     apply_fn=model.apply, params=params, tx=mc.muonclip(1e-3, layout=layout)
        ... )
        >>> state = state.apply_gradients(grads=grads, max_logits=sown)
        >>> int(state.step), mc.qk_clip_state(state.opt_state).max_logits["attn"].shape
        (1, (2,))
    """

    def apply_gradients(self, *, grads: Any, max_logits: Any = None, **fields: Any):
        """The state after a step.

        Args:
          grads: Gradients, in the tree of the parameters.
          max_logits: What the forward pass sowed, as for `read_max_logits`; None is for optimizers
            without a clip.
          fields: Fields of the state to be replaced, as in Flax's method.

        Raises:
          ValueError: What the optimizer raises, such as QK-Clip without `max_logits`.
        """
        if max_logits is None:
            return super().apply_gradients(grads=grads, **fields)
        tx = optax.with_extra_args_support(self.tx)

        def update(updates, state, params=None):
            return tx.update(updates, state, params, max_logits=max_logits)

        # Flax's method knows what else is in a state; it calls this optimizer for one step.
        handing_on = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped = train_state.TrainState.apply_gradients(handing_on, grads=grads, **fields)
        return stepped.replace(tx=fields.get("tx", self.tx))
