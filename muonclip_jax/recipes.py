"""The chains: Muon, Muon with QK-Clip, Muon or another optimizer with QuacK."""

from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._core import paths
from muonclip_jax._core.masks import Frozen, Mask, read_frozen
from muonclip_jax._core.maxima import AxisName
from muonclip_jax._core.options import check_ascent, check_flag, check_not_frozen
from muonclip_jax._core.shardings import Shardings
from muonclip_jax._layouts.blocks import Layouts
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._parameters import routing
from muonclip_jax._parameters.granularity import PER_HEAD, Granularity
from muonclip_jax._spread.plan import DevicesPerMatrix
from muonclip_jax._transforms.clip import Scope, Threshold
from muonclip_jax._transforms.decay import decayed_weights
from muonclip_jax._transforms.muon import scale_by_muon
from muonclip_jax._transforms.partition import learning_rates, partition_matrices
from muonclip_jax._transforms.qk_clip import SharedKeys, qk_clip
from muonclip_jax._transforms.quack import QuackRule, scale_by_quack
from muonclip_jax._transforms.update_rms import Rule, check_rule, scale_by_update_rms

ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    other: optax.GradientTransformation = ADAM,
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    newton_schulz: NewtonSchulz = NewtonSchulz(),  # noqa: B008 (frozen)
    update_rms: Rule | Callable[[int, int], float] = "match_adam",
    weight_decay: optax.ScalarOrSchedule = 0.1,
    weight_decay_mask: Mask | None = None,
    layout: Layouts | None = None,
    granularity: Granularity = PER_HEAD,
    rules: routing.Rules | None = None,
    dimension_numbers: routing.DimensionNumbers | None = None,
    frozen: Frozen | None = None,
    mu_dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for matrices, another optimizer for everything else.

        grads ─► [ Muon: momentum → orthogonalize → shape scale | other ]
              ─► decoupled weight decay ─► learning rate

    With the default `update_rms="match_adam"`, Muon's updates have Adam's size, so an AdamW
    learning rate and weight decay carry over (Moonlight, arXiv 2502.16982). That size is an RMS of
    0.2 where five steps bring all singular values to 1, and less for steep spectra
    (`scale_by_update_rms` has figures). Jordan's way is two rates, `mc.muon(0.02,
    other_learning_rate=3e-4, update_rms="jordan")`.

    What decays; the first line that holds decides, and `describe` shows it:

    | parameter | decays |
    | --- | --- |
    | a matrix of Muon's | yes |
    | a bias, gain or QK-norm that the layout knows | no |
    | last word bias, scale, gain, gamma, beta, offset or shift; first b or g, as in `b_Q` | no |
    | in a module called norm, ln, rms, bn or gn, but for `kernel`, `w` and `embedding` | no |
    | fewer than two axes, not counting those of the stack of layers that it is in | no |
    | anything else: embeddings, unembeddings, convolutions | yes |

    (The stack is what all parameters around it begin with, up to the nearest norm; where there is
    none, the nearest matrix of Muon's.)

    Args:
      learning_rate: η, a number of at least 0 or an Optax schedule.
      other_learning_rate: That of `other`, likewise, for its steps and its decay. None is
        `learning_rate`. (Its schedule's count is part of the state; with None nothing is.)
      other: What embeddings, unembeddings, norms, biases and scalars get; a transformation
        without learning rate or decay of its own, since both follow in the chain.
      momentum: μ of `scale_by_muon`.
      nesterov: As in `scale_by_muon`.
      newton_schulz: How to orthogonalize, as in `scale_by_muon`.
      update_rms: The rule of `scale_by_update_rms`.
      weight_decay: λ >= 0, a number or an Optax schedule: each step subtracts `η λ W`, η being the
        rate of the parameter's group. With 0 the update needs no `params` (but for
        `optax.inject_hyperparams`, under which it is not known to be 0).
      weight_decay_mask: Tree of bools like the parameters, or a prefix of one, or a function to
        one, in place of the table above. (Under `optax.inject_hyperparams`, which takes every
        function for a schedule, name it in `static_args`, and `dimension_numbers`, `shardings` and
        `update_rms` too if they are functions.)
      layout: The model's attention, which is then orthogonalized piece by piece and head by head,
        however it is stored; several layouts as a list.
      granularity: Which heads, and which pieces of a head, make one matrix. By default each by
        itself.
      rules: What to do with parameters by path, as in `muon_dimension_numbers`.
      dimension_numbers: In place of these three, which parameters are Muon's, as which matrices: a
        tree of `optax.contrib.MuonDimensionNumbers` (None inside it meaning `other`), a prefix of
        one, or a function from the parameters to one. None is `muon_dimension_numbers`. `describe`
        prints the outcome.
      frozen: What gets no updates and no decay, and has no state: a mask or globs, as in
        `qk_clip`. It may be quantized. (The routing reads it all the same.)
      mu_dtype: The dtype of Muon's momentum; "int8" is a quarter of float32, see `scale_by_muon`.
      shardings: How the parameters are split over a mesh with Auto axes, as in `scale_by_muon`.
      devices_per_matrix: How many devices make a group, which holds one matrix among them, as
        in `scale_by_muon`; None chooses. `describe` prints the outcome.

    Raises:
      TypeError: When built, an option of the wrong type; at init, a parameter that is neither
        floating point nor, where `other` takes it, complex.
      ValueError: When built, an option out of its range; an `other` that already descends
        (`optax.adamw(1e-3)`), or that gives no updates and would leave its parameters to decay
        (`optax.set_to_zero()`); at init, a parameter that the routing does not cover or that is
        empty, with its path, shape and fix; at update, a state of another routing. (What
        `optax.inject_hyperparams` makes arrays of is checked where it is concrete, as when `init`
        is called outside of `jax.jit`.)

    Example:
        >>> optimizer = mc.muon(1e-3, layout=layout)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
        >>> updates["mlp"]["kernel"].shape
        (8, 16)
    """
    direction = muon_direction(
        other=other,
        momentum=momentum,
        nesterov=nesterov,
        newton_schulz=newton_schulz,
        update_rms=update_rms,
        layout=layout,
        granularity=granularity,
        rules=rules,
        dimension_numbers=dimension_numbers,
        frozen=frozen,
        mu_dtype=mu_dtype,
        shardings=shardings,
        devices_per_matrix=devices_per_matrix,
    )
    numbers = routing.choose(dimension_numbers, layout, granularity, rules)
    decay = decayed_weights(weight_decay, weight_decay_mask, numbers, layout, frozen)
    check_decayed_other(other, weight_decay, weight_decay_mask)
    return optax.chain(
        direction, decay, learning_rates(learning_rate, other_learning_rate, numbers)
    )


def muonclip(
    learning_rate: optax.ScalarOrSchedule,
    *,
    layout: Layouts,
    threshold: Threshold = 100.0,
    alpha: ArrayLike = 0.5,
    shared_keys: SharedKeys = "untouched",
    scope: Scope = "head",
    axis_name: AxisName = None,
    heads_axis_name: AxisName = None,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    other: optax.GradientTransformation = ADAM,
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    newton_schulz: NewtonSchulz = NewtonSchulz(),  # noqa: B008 (frozen)
    update_rms: Rule | Callable[[int, int], float] = "match_adam",
    weight_decay: optax.ScalarOrSchedule = 0.1,
    weight_decay_mask: Mask | None = None,
    granularity: Granularity = PER_HEAD,
    rules: routing.Rules | None = None,
    dimension_numbers: routing.DimensionNumbers | None = None,
    frozen: Frozen | None = None,
    mu_dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon, then QK-Clip, with this library's defaults; `kimi_muonclip` has the published ones.

        grads ─► muon ─► qk_clip ─► optax.apply_updates
        forward pass ─► sow(max_logits) ──┘

    Where the defaults depart from MuonClip as published, and why:

    | here | published | the reason |
    | --- | --- | --- |
    | each head, and each piece of a kernel, is a matrix | each kernel is | a model trains alike however its kernels are stored: fused, flat, scanned; and each head's step has its size however large the other heads' gradients are |
    | Nesterov, `nesterov=True` | `M = μM + G` alone | as Jordan's Muon and Moonlight's code have it |
    | five Polar Express steps in bfloat16 | msign; the report says Newton–Schulz | of five steps they are the nearest to msign on the example's momentum (docs/explanation/schedules.md) |

    (With the same gradients a small MLA block ends, after 20 steps, 0.38 of its way beside where
    the published one does; 0.40 with per-head matrices alone, 0.13 with Nesterov alone. In the
    study `family`, a small decoder, per-head matrices end 0.028 [0.003, 0.053] nats ahead of whole
    kernels, each at its best rate; the other two are choices, not findings.)

    Each update needs the maxima: `tx.update(grads, state, params, max_logits=intermediates)`.
    `optax.inject_hyperparams(muonclip)(1e-3, layout=layout, threshold=100.0)` makes all numbers
    hyper-parameters: the learning rate, threshold, alpha, momentum and weight decay.

    Args:
      learning_rate: η, a number or an Optax schedule.
      layout: Where queries, keys, values and outputs are: `find_layout(params)` or one of
        `layouts`; several for a model with several kinds of attention, as a list. Muon reads it as
        well, unless `dimension_numbers` says what Muon is to do.
      threshold: τ of `qk_clip`, or a schedule of it.
      alpha: As in `qk_clip`, the queries' share of the clip.
      shared_keys: As in `qk_clip`, `"untouched"` or `"split"`: the keys of grouped queries.
      scope: As in `qk_clip`, `"head"` or `"layer"`.
      axis_name: As in `qk_clip`: inside `jax.shard_map` and `jax.pmap`, the axes of the data.
      heads_axis_name: As in `qk_clip`: inside `jax.shard_map`, the axes over which the heads are
        spread by hand. Muon then takes each device's heads, which are whole matrices unless
        `granularity` or `dimension_numbers` say otherwise.
      other_learning_rate: This and all that follow are as in `muon`.
      other: What parameters that are not Muon's get.
      momentum: μ.
      nesterov: Whether momentum looks ahead.
      newton_schulz: How to orthogonalize.
      update_rms: The size of an update.
      weight_decay: λ.
      weight_decay_mask: What decays.
      granularity: Which heads make one matrix.
      rules: What to do with parameters by path.
      dimension_numbers: Which parameters are Muon's, in place of `layout`, `granularity` and `rules`.
      frozen: What gets no updates, and is not clipped either, as in `qk_clip`.
      mu_dtype: The dtype of Muon's momentum; "int8" is a quarter of float32, see `scale_by_muon`.
      shardings: How the parameters are split over a mesh with Auto axes.
      devices_per_matrix: How many devices make a group, which holds one matrix among them.

    Raises:
      ValueError: As `muon` and `qk_clip`.

    Example:
        >>> optimizer = mc.muonclip(1e-3, layout=layout)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(grads, state, params, max_logits=sown)
        >>> params = optax.apply_updates(params, updates)
    """  # noqa: E501
    return optax.chain(
        muon(
            learning_rate,
            other_learning_rate=other_learning_rate,
            other=other,
            momentum=momentum,
            nesterov=nesterov,
            newton_schulz=newton_schulz,
            update_rms=update_rms,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            layout=layout,
            granularity=granularity,
            rules=rules,
            dimension_numbers=dimension_numbers,
            frozen=frozen,
            mu_dtype=mu_dtype,
            shardings=shardings,
            devices_per_matrix=devices_per_matrix,
        ),
        qk_clip(
            layout,
            threshold,
            alpha=alpha,
            shared_keys=shared_keys,
            scope=scope,
            frozen=frozen,
            axis_name=axis_name,
            heads_axis_name=heads_axis_name,
        ),
    )


def quack(
    learning_rate: optax.ScalarOrSchedule,
    *,
    layout: Layouts,
    relative_learning_rate: ArrayLike = 1.0,
    rule: QuackRule = "paper",
    floor: ArrayLike = 0.0,
    direction: optax.GradientTransformation | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    weight_decay_mask: Mask | None = None,
    scale_weight_decay: bool | None = None,
    frozen: Frozen | None = None,
) -> optax.GradientTransformationExtraArgs:
    """QuacK (arXiv 2511.21377): Muon, or another optimizer, with query and key steps that keep
    the change of the logits as it was at initialisation.

        grads ─► direction ─► QuacK ─► decoupled weight decay ─► learning rate

    With QK-Clip behind it: `optax.chain(quack(3e-4, layout=layout), qk_clip(layout))`. For two
    learning rates write the chain out: `optax.chain(direction, scale_by_quack(layout),
    optax.add_decayed_weights(0.1, mask), optax.partition({"muon":
    optax.scale_by_learning_rate(0.02), "other": optax.scale_by_learning_rate(3e-4)}, labels))`.

    Args:
      learning_rate: η, a number or an Optax schedule.
      layout: Where queries and keys are, as for `muonclip`.
      relative_learning_rate: τ of `scale_by_quack`.
      rule: As in `scale_by_quack`.
      floor: As in `scale_by_quack`.
      direction: What comes before QuacK, without learning rate or decay:
        `muon_direction(layout=layout, ...)`, which None stands for, or another such as
        `optax.scale_by_adam(b2=0.95)`.
      weight_decay: λ, as in `muon`: each step subtracts `η λ W`.
      weight_decay_mask: As in `muon`; None is its table, which of another direction does not know
        what it takes for matrices.
      scale_weight_decay: Whether QuacK's factors apply to the decay as well (it then comes before
        QuacK). The paper does not say. None: with `rule="fixed"` they do, since a lower learning
        rate multiplies the decay too; else they do not, and all weights decay alike.
      frozen: What gets no updates and no decay, a mask or globs, as in `qk_clip`.

    Raises:
      ValueError: As `muon` and `scale_by_quack`; a direction that already descends.

    Example:
        >>> direction = mc.muon_direction(layout=layout, momentum=0.9)
        >>> optimizer = mc.quack(1e-3, layout=layout, direction=direction)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
        >>> mc.quack_state(state).factors["attn"]["q"].shape
        (2,)
    """
    numbers = None  # what another direction does is not known
    if direction is None:
        direction = muon_direction(layout=layout, frozen=frozen)
        numbers = routing.choose(None, layout, PER_HEAD, None)
    elif frozen is not None:
        check_ascent("direction", direction)
        direction = optax.chain(direction, _without(frozen))
    check_ascent("direction", direction)
    if scale_weight_decay is None:
        scale_weight_decay = rule == "fixed"
    check_flag("scale_weight_decay", scale_weight_decay)
    factors = scale_by_quack(layout, relative_learning_rate, rule=rule, floor=floor, frozen=frozen)
    decay = decayed_weights(weight_decay, weight_decay_mask, numbers, layout, frozen)
    return optax.chain(
        direction,
        *((decay, factors) if scale_weight_decay else (factors, decay)),
        learning_rates(learning_rate, None, None),
    )


def muon_direction(
    *,
    other: optax.GradientTransformation = ADAM,
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    newton_schulz: NewtonSchulz = NewtonSchulz(),  # noqa: B008 (frozen)
    update_rms: Rule | Callable[[int, int], float] = "match_adam",
    layout: Layouts | None = None,
    granularity: Granularity = PER_HEAD,
    rules: routing.Rules | None = None,
    dimension_numbers: routing.DimensionNumbers | None = None,
    frozen: Frozen | None = None,
    mu_dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon's directions for matrices, those of another optimizer for everything else.

        grads ─► [ Muon: momentum → orthogonalize → shape scale | other ]

    `muon` without weight decay and learning rate, to build chains of.

    Args:
      other: As in `muon`, and so are all that follow.
      momentum: μ.
      nesterov: Whether momentum looks ahead.
      newton_schulz: How to orthogonalize.
      update_rms: The size of an update.
      layout: The model's attention.
      granularity: Which heads make one matrix.
      rules: What to do with parameters by path.
      dimension_numbers: Which parameters are Muon's, in place of these three.
      frozen: What gets no updates.
      mu_dtype: The dtype of Muon's momentum; "int8" is a quarter of float32, see `scale_by_muon`.
      shardings: How the parameters are split over a mesh with Auto axes.
      devices_per_matrix: How many devices make a group, which holds one matrix among them.

    Raises:
      ValueError: As `muon`.

    Example:
        >>> scaled = optax.chain(mc.muon_direction(layout=layout), optax.scale(-1e-4))
        >>> updates, _ = scaled.update(grads, scaled.init(params), params)
    """
    check_ascent("other", other)
    check_rule("update_rms", update_rms)

    def links(numbers: routing.DimensionNumbers | None) -> optax.GradientTransformation:
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

    return partition_matrices(
        links,
        other,
        layout=layout,
        granularity=granularity,
        rules=rules,
        dimension_numbers=dimension_numbers,
        frozen=frozen,
    )


def check_decayed_other(
    other: optax.GradientTransformation,
    weight_decay: optax.ScalarOrSchedule,
    weight_decay_mask: Mask | None,
) -> None:
    """Raises ValueError for an `other` without updates whose parameters would decay alone."""
    if weight_decay_mask is None:
        check_not_frozen("other", other, weight_decay)


def _without(frozen: Frozen) -> optax.GradientTransformation:
    """No updates for what is frozen."""

    def which(tree: Any) -> Any:
        still = read_frozen(frozen, tree)
        return paths.map_with_path(lambda path, _: path in still, tree)

    return optax.masked(optax.set_to_zero(), which)
