"""The chains: Muon, Muon followed by QK-Clip, and Muon or another optimizer with QuacK."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._core import paths
from muonclip_jax._core.maxima import AxisName
from muonclip_jax._core.shardings import Shardings
from muonclip_jax._layouts.blocks import Layouts
from muonclip_jax._layouts.roles import Role
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._parameters import routing
from muonclip_jax._spread.plan import DevicesPerMatrix
from muonclip_jax._transforms.muon import scale_by_muon
from muonclip_jax._transforms.qk_clip import Scope, qk_clip
from muonclip_jax._transforms.quack import Norm, QuackRule, scale_by_quack
from muonclip_jax._transforms.update_rms import Rule, scale_by_update_rms

_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    other: optax.GradientTransformation = _ADAM,
    momentum: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    newton_schulz: NewtonSchulz = NewtonSchulz(),  # noqa: B008
    update_rms: Rule | Callable[[int, int], float] = "match_adam",
    weight_decay: jax.typing.ArrayLike = 0.1,
    weight_decay_mask: Any | None = None,
    layout: Layouts | None = None,
    per_head: Collection[Role] = routing.EVERY_ROLE,
    rules: routing.Rules | None = None,
    dimension_numbers: routing.DimensionNumbers | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for matrices, another optimizer for everything else, one learning rate for both.

        grads ─► [ Muon: momentum → orthogonalize → shape scale | other ]
              ─► decoupled weight decay ─► learning rate

    With the default `update_rms="match_adam"`, Muon's updates have Adam's size (RMS 0.2), so an
    AdamW learning rate and weight decay carry over (Moonlight, arXiv 2502.16982). For another
    learning rate in the other group, make it part of `other`:
    `optax.chain(optax.scale_by_adam(), optax.scale(0.3))`.

    Args:
      learning_rate: η, a number or an Optax schedule.
      other: What embeddings, unembeddings, norms, biases and scalars get; a transformation
        without learning rate or decay of its own, since both follow in the chain.
      momentum: μ of `scale_by_muon`.
      nesterov: As in `scale_by_muon`.
      newton_schulz: How to orthogonalize, as in `scale_by_muon`.
      update_rms: The rule of `scale_by_update_rms`.
      weight_decay: λ: each step subtracts `η λ W`.
      weight_decay_mask: Tree of bools or function to one; None decays all but biases, norm
        scales and scalars.
      layout: The model's attention, which is then orthogonalized piece by piece and head by head,
        however it is stored; several layouts as a list.
      per_head: The roles of which each head is a matrix, as in `muon_dimension_numbers`.
      rules: What to do with parameters by path, as in `muon_dimension_numbers`.
      dimension_numbers: In place of these three, which parameters are Muon's, as which matrices: a
        tree of `optax.contrib.MuonDimensionNumbers` (None inside it meaning `other`), a prefix of
        one, or a function from the parameters to one. None is `muon_dimension_numbers`. `describe`
        prints the outcome. Under `optax.inject_hyperparams`, which takes every function for a
        schedule, name it in `static_args`.
      mu_dtype: The dtype of Muon's momentum.
      shardings: How the parameters are split over a mesh with Auto axes, as in `scale_by_muon`.
      devices_per_matrix: How many devices hold one matrix together while it is orthogonalized, as
        in `scale_by_muon`; None chooses. `describe` prints the outcome.

    Raises:
      ValueError: When built, an `other` that already descends (`optax.adamw(1e-3)`); at init, a
        parameter that the routing does not cover, with its path, shape and fix.
    """
    return optax.chain(
        _muon_or_other(
            other=other,
            momentum=momentum,
            nesterov=nesterov,
            newton_schulz=newton_schulz,
            update_rms=update_rms,
            layout=layout,
            per_head=per_head,
            rules=rules,
            dimension_numbers=dimension_numbers,
            mu_dtype=mu_dtype,
            shardings=shardings,
            devices_per_matrix=devices_per_matrix,
        ),
        _decayed_weights(weight_decay, weight_decay_mask, layout),
        optax.scale_by_learning_rate(learning_rate),
    )


def muonclip(
    learning_rate: optax.ScalarOrSchedule,
    *,
    layout: Layouts,
    threshold: jax.typing.ArrayLike = 100.0,
    alpha: jax.typing.ArrayLike = 0.5,
    scope: Scope = "head",
    axis_name: AxisName = None,
    heads_axis_name: AxisName = None,
    **muon_options: Any,
) -> optax.GradientTransformationExtraArgs:
    """MuonClip, the optimizer of Kimi K2 (arXiv 2507.20534): Muon, then QK-Clip.

        grads ─► muon ─► qk_clip ─► optax.apply_updates
        forward pass ─► sow(max_logits) ──┘

    Each update needs the maxima: `tx.update(grads, state, params, max_logits=intermediates)`.

    Args:
      learning_rate: η, a number or an Optax schedule.
      layout: Where queries, keys, values and outputs are: `find_layout(params)` or one of
        `layouts`; several for a model with several kinds of attention, as a list. Muon reads it as
        well, unless `dimension_numbers` says what Muon is to do.
      threshold: τ of `qk_clip`.
      alpha: As in `qk_clip`, the queries' share of the clip.
      scope: As in `qk_clip`, `"head"` or `"layer"`.
      axis_name: As in `qk_clip`: inside `jax.shard_map` and `jax.pmap`, the axes of the data.
      heads_axis_name: As in `qk_clip`: inside `jax.shard_map`, the axes over which the heads are
        spread by hand. Muon then takes each device's heads, which are whole matrices unless
        `per_head` or `dimension_numbers` say otherwise.
      **muon_options: Everything else that `muon` takes. (`optax.inject_hyperparams` cannot see
        through these: inject `muon` and `qk_clip`, and chain them.)

    Raises:
      ValueError: As `muon` and `qk_clip`.
    """
    return optax.chain(
        muon(learning_rate, layout=layout, **muon_options),
        qk_clip(
            layout,
            threshold,
            alpha=alpha,
            scope=scope,
            axis_name=axis_name,
            heads_axis_name=heads_axis_name,
        ),
    )


def quack(
    learning_rate: optax.ScalarOrSchedule,
    *,
    layout: Layouts,
    relative_learning_rate: jax.typing.ArrayLike = 1.0,
    norm: Norm = "frobenius",
    rule: QuackRule = "paper",
    floor: jax.typing.ArrayLike = 0.0,
    direction: optax.GradientTransformation | None = None,
    weight_decay: jax.typing.ArrayLike = 0.1,
    weight_decay_mask: Any | None = None,
    scale_weight_decay: bool = False,
    **muon_options: Any,
) -> optax.GradientTransformationExtraArgs:
    """QuacK (arXiv 2511.21377): Muon, or another optimizer, with query and key steps that keep
    the change of the logits as it was at initialisation.

        grads ─► [ Muon | other ] ─► QuacK ─► decoupled weight decay ─► learning rate

    With QK-Clip behind it: `optax.chain(quack(3e-4, layout=layout), qk_clip(layout))`.

    Args:
      learning_rate: η, a number or an Optax schedule.
      layout: Where queries and keys are, as for `muonclip`.
      relative_learning_rate: τ of `scale_by_quack`.
      norm: As in `scale_by_quack`.
      rule: As in `scale_by_quack`.
      floor: As in `scale_by_quack`.
      direction: What comes before QuacK, without learning rate or decay, such as
        `optax.scale_by_adam(b2=0.95)`. None is Muon, as in `muon`, with its options.
      weight_decay: λ: each step subtracts `η λ W`.
      weight_decay_mask: As in `muon`.
      scale_weight_decay: Whether QuacK's factors apply to the decay as well (it then comes before
        QuacK). The paper does not say; by default all weights decay alike.
      **muon_options: `other`, `momentum`, `nesterov`, `newton_schulz`, `update_rms`, `per_head`,
        `rules`, `dimension_numbers`, `mu_dtype`, `shardings` and `devices_per_matrix` of `muon`.
        (`optax.inject_hyperparams` cannot see through these: inject
        `scale_by_quack`, and chain it.)

    Raises:
      TypeError: Options for Muon together with another direction.
      ValueError: As `muon` and `scale_by_quack`.
    """
    if direction is None:
        direction = _muon_or_other(layout=layout, **muon_options)
    elif muon_options:
        raise TypeError(
            f"{', '.join(muon_options)} would go to Muon, but direction= replaces it; give the one "
            "or the other."
        )
    else:
        _check_ascent(direction, "direction")
    rates = scale_by_quack(layout, relative_learning_rate, norm, rule=rule, floor=floor)
    decay = _decayed_weights(weight_decay, weight_decay_mask, layout)
    return optax.chain(
        direction,
        *((decay, rates) if scale_weight_decay else (rates, decay)),
        optax.scale_by_learning_rate(learning_rate),
    )


def _muon_or_other(
    *,
    other: optax.GradientTransformation = _ADAM,
    momentum: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    newton_schulz: NewtonSchulz = NewtonSchulz(),  # noqa: B008
    update_rms: Rule | Callable[[int, int], float] = "match_adam",
    layout: Layouts | None = None,
    per_head: Collection[Role] = routing.EVERY_ROLE,
    rules: routing.Rules | None = None,
    dimension_numbers: routing.DimensionNumbers | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon's directions for matrices, those of `other` for the rest."""
    _check_ascent(other, "other")
    dimension_numbers = routing.choose(dimension_numbers, layout, per_head, rules)

    def for_matrices(numbers: Any) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_muon(
                momentum,
                nesterov,
                newton_schulz,
                dimension_numbers=numbers,
                mu_dtype=mu_dtype,
                shardings=shardings,
                devices_per_matrix=devices_per_matrix,
            ),
            scale_by_update_rms(update_rms, dimension_numbers=numbers),
        )

    return _partition(for_matrices, other, dimension_numbers)


def _decayed_weights(
    weight_decay: Any, mask: Any | None, layout: Layouts | None
) -> optax.GradientTransformation:
    mask = partial(routing.decay_mask, layout=layout) if mask is None else mask
    return optax.add_decayed_weights(weight_decay, mask)


def _check_ascent(other: optax.GradientTransformation, name: str) -> None:
    """A direction must not have turned its updates around yet: the learning rate, which follows,
    does. It is asked once, with a gradient of 1 for a parameter called `probe`."""
    probe = {"probe": jnp.ones(())}
    with jax.ensure_compile_time_eval():
        try:
            updates, _ = other.update(probe, other.init(probe), probe)
        except Exception:  # one that knows its parameters by name or needs extra arguments
            return
    update = jax.tree.leaves(updates)[0]
    if not isinstance(update, jax.core.Tracer) and update < 0:
        raise ValueError(
            f"{name} must come without a learning rate and its sign, since both follow for all "
            "parameters; this one turns a gradient of 1 into an update of "
            f"{float(update):.3g}. Use optax.scale_by_adam() in place of optax.adam or adamw."
        )


def _partition(
    for_matrices: Callable[[Any], optax.GradientTransformation],
    other: optax.GradientTransformation,
    dimension_numbers: routing.DimensionNumbers,
) -> optax.GradientTransformationExtraArgs:
    """`optax.partition` by dimension numbers, which are worked out before anything is masked:
    inside a partition the norms and biases that tell stacked kernels apart are out of sight."""

    def build(tree: Any) -> optax.GradientTransformationExtraArgs:
        specs = routing.resolve(dimension_numbers, tree)
        numbers = paths.map_with_path(lambda path, _: specs[path], tree)
        labels = paths.map_with_path(
            lambda path, _: "other" if specs[path] is None else "muon", tree
        )
        return optax.partition({"muon": for_matrices(numbers), "other": other}, labels)

    def init(params):
        return build(params).init(params)

    def update(updates, state, params=None, **extra_args):
        return build(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
