"""Decoupled weight decay of what should decay, everywhere or only where the update agrees."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._core import paths
from muonclip_jax._core.masks import Frozen, Mask, check_frozen, check_mask, read_frozen
from muonclip_jax._core.options import check_flag, check_rate
from muonclip_jax._layouts.blocks import Layouts
from muonclip_jax._parameters import routing
from muonclip_jax._parameters.decay import decays
from muonclip_jax._parameters.granularity import PER_HEAD, Granularity


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule,
    *,
    weight_decay_mask: Mask | None = None,
    cautious: bool = False,
    layout: Layouts | None = None,
    granularity: Granularity = PER_HEAD,
    rules: routing.Rules | None = None,
    dimension_numbers: routing.DimensionNumbers | None = None,
    frozen: Frozen | None = None,
) -> optax.GradientTransformation:
    """Adds `λ W` to the updates, for the parameters that the table of `mc.muon` lets decay.

    It stands before the learning rate, as `optax.add_decayed_weights` does, which it is but for the
    mask: `U + λ W`. Behind it each group's learning rate takes its decay along:

        mc.partition_matrices(lambda _: optax.scale_by_learning_rate(0.02),
                              optax.scale_by_learning_rate(3e-4), layout=layout)

    `cautious` decays an entry only where update and weight agree in sign, that is where the step
    makes the weight smaller anyway (Chen et al., "Cautious Weight Decay", arXiv 2510.12402; the
    default of nanochat and modded-nanogpt):

        U + λ W · [U · W >= 0]

    Entries that the loss pushes outward are then left alone, so weights end up larger than with the
    same λ everywhere: of updates and weights that know nothing of each other half of the entries
    decay. With the sign read off `U`, put it behind whatever makes the direction.

    Cost: one pass over the weights, no matter which; XLA fuses it with the learning rate. No
    state, but for the count of a schedule.

    Args:
      weight_decay: λ >= 0, a number or an Optax schedule. With 0 the update needs no `params`. For
        a decay by the model's width see `mc.scaling`.
      weight_decay_mask: Tree of bools like the parameters, or a prefix of one, or a function to
        one, in place of the table of `mc.muon`. (Under `optax.inject_hyperparams` name it in
        `static_args`.)
      cautious: See above. Of a weight or an update that is 0, the decay is 0 or as without it.
      layout: The model's attention, as in `mc.muon`, for the table; so are all that follow.
      granularity: Which heads make one matrix.
      rules: What to do with parameters by path.
      dimension_numbers: Which parameters are matrices, in place of these three.
      frozen: What does not decay, a mask or globs, as in `qk_clip`.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError: An option of the wrong type, when built.
      ValueError: A negative λ, when built; at update, no `params`, or a mask of other parameters.

    Example:
        >>> tx = mc.add_decayed_weights(0.1, cautious=True)
        >>> kernel = {"kernel": jnp.array([[1.0, -1.0]])}
        >>> updates, _ = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(kernel), kernel)
        >>> updates["kernel"]
        Array([[1.1, 1. ]], dtype=float32)
    """
    numbers = routing.choose(dimension_numbers, layout, granularity, rules)
    return decayed_weights(weight_decay, weight_decay_mask, numbers, layout, frozen, cautious)


def decayed_weights(
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask | None,
    dimension_numbers: routing.DimensionNumbers | None,
    layout: Layouts | None,
    frozen: Frozen | None,
    cautious: bool = False,
) -> optax.GradientTransformation:
    """The same with a routing that is chosen already; None where nobody knows the matrices."""
    check_rate("weight_decay", weight_decay)
    check_mask("weight_decay_mask", mask)
    check_flag("cautious", cautious)
    check_frozen(frozen)

    def which(params: Any) -> Any:
        found = decays(mask, params, dimension_numbers, layout)
        still = read_frozen(frozen, params)
        return paths.map_with_path(lambda path, _: found[path] and path not in still, params)

    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.masked(optax.identity(), which)  # the same state, and needs no parameters
    decay = optax.masked(_decay(weight_decay, cautious), which)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                f"weight_decay={weight_decay} takes a share of the parameters: call "
                "tx.update(grads, state, params). In a trainer that gives no params (Brax): "
                "weight_decay=0.0."
            )
        return decay.update(updates, state, params)

    return optax.GradientTransformation(decay.init, update)


def _decay(weight_decay: optax.ScalarOrSchedule, cautious: bool) -> optax.GradientTransformation:
    plain = optax.add_decayed_weights(weight_decay)
    if not cautious:
        return plain

    def update(updates, state, params=None):
        agreeing = jax.tree.map(_agreeing, updates, params, is_leaf=lambda u: u is None)
        return plain.update(updates, state, agreeing)

    return optax.GradientTransformation(plain.init, update)


def _agreeing(update: jax.Array | None, param: jax.Array) -> jax.Array:
    """The entries of a parameter whose sign the update has too; by signs, since products of small
    numbers vanish."""
    if update is None:  # Optax leaves such a parameter alone
        return param
    return jnp.where(jnp.sign(update) * jnp.sign(param) >= 0, param, jnp.zeros([], param.dtype))
