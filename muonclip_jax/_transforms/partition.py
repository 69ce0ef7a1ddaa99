"""Which links get the matrices, and which transformation all other parameters."""

from collections.abc import Callable, Hashable
from typing import Any

import jax.numpy as jnp
import optax

from muonclip_jax._core import paths
from muonclip_jax._core.masks import Frozen, check_frozen, read_frozen
from muonclip_jax._core.options import check_rate, check_transformation
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.blocks import Layouts
from muonclip_jax._parameters import routing
from muonclip_jax._parameters.granularity import PER_HEAD, Granularity


def partition_matrices(
    links: Callable[[routing.DimensionNumbers | None], optax.GradientTransformation],
    other: optax.GradientTransformation,
    *,
    layout: Layouts | None = None,
    granularity: Granularity = PER_HEAD,
    rules: routing.Rules | None = None,
    dimension_numbers: routing.DimensionNumbers | None = None,
    frozen: Frozen | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives matrices to a chain of your own, and every other parameter to another transformation.

        parameters ─► [ the routing's matrices: links(numbers) | others: other | frozen: nothing ]

    It is what `mc.muon` routes with. A chain such as NorMuon's differs from Muon's by its links
    alone, so it needs no recipe of its own:

        def normuon(numbers):
            return optax.chain(
                mc.scale_by_muon(0.95, dimension_numbers=numbers),
                mc.scale_by_neuron_rms(0.95, dimension_numbers=numbers),
                mc.normalize_rms(0.2, dimension_numbers=numbers),
            )

    The routing is worked out from all parameters before any of them is masked, since inside
    `optax.partition` the norms and biases that tell stacked kernels apart are out of sight.

    Args:
      links: A function from dimension numbers to the chain for the matrices; hand them to each
        link that asks which axes are input and output. It is called whenever the chain is used,
        so it must build the same chain each time. (Called with None when this is built, so that
        the links' own options are checked then.)
      other: What embeddings, unembeddings, norms, biases and scalars get. It may descend, with a
        learning rate of its own, if `links` do so too.
      layout: The model's attention, as in `mc.muon`, and so are all that follow.
      granularity: Which heads make one matrix.
      rules: What to do with parameters by path.
      dimension_numbers: Which parameters are matrices, in place of these three.
      frozen: What gets no updates, and has no state: a mask or globs, as in `qk_clip`.

    Returns:
      A transformation with the state of `optax.partition`: groups `"muon"`, `"other"` and, with
      `frozen`, `"frozen"`.

    Raises:
      TypeError: When built, `links` that is no function, or gives no transformation, or an `other`
        that is none; at init, a parameter that is neither floating point nor complex.
      ValueError: At init and update, as `muon_dimension_numbers`.

    Example:
        >>> def signs(numbers):
        ...     return mc.scale_by_orthogonalization(dimension_numbers=numbers)
        >>> tx = mc.partition_matrices(signs, optax.scale_by_adam(), layout=layout)
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> updates["mlp"]["kernel"].shape
        (8, 16)
    """
    if not callable(links):
        raise TypeError(
            "links must be a function from dimension numbers to a transformation, got "
            f"{links!r}: lambda numbers: mc.scale_by_muon(dimension_numbers=numbers)."
        )
    check_transformation("other", other)
    check_frozen(frozen)
    dimension_numbers = routing.choose(dimension_numbers, layout, granularity, rules)
    check_transformation("what links(None) gives", links(None))

    def build(tree: Any) -> optax.GradientTransformationExtraArgs:
        specs = routing.resolve(dimension_numbers, tree)
        still = read_frozen(frozen, tree)

        def label(path: Path, _: Any) -> str:
            return "frozen" if path in still else "other" if specs[path] is None else "muon"

        labels = paths.map_with_path(label, tree)
        groups: dict[Hashable, optax.GradientTransformation] = {
            "muon": links(routing.Resolved(specs)),
            "other": other,
        }
        if frozen is not None:
            groups["frozen"] = optax.set_to_zero()
        # As a function: Optax would call a tree of labels that can be called.
        return optax.partition(groups, lambda _: labels)

    def init(params):
        still = read_frozen(frozen, params)
        training = {path: leaf for path, leaf in paths.leaves(params) if path not in still}
        paths.check_trainable("muon", training, jnp.inexact)  # `other` may take complex numbers
        return build(params).init(params)

    def update(updates, state, params=None, **extra_args):
        if not hasattr(state, "inner_states"):
            raise TypeError(
                f"Not a state of [Muon | other], but {type(state).__name__}: it is another "
                "optimizer's. tx.init(params) gives this one's; mc.upgrade_state(old, "
                "like=tx.init(params)) reads those of earlier versions."
            )
        return build(updates).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def learning_rates(
    learning_rate: optax.ScalarOrSchedule,
    other_learning_rate: optax.ScalarOrSchedule | None,
    dimension_numbers: routing.DimensionNumbers | None,
) -> optax.GradientTransformation:
    """The learning rate, or that of matrices and that of all others; behind the decay, so that each
    group's decay follows its own."""
    check_rate("learning_rate", learning_rate)
    rate = optax.scale_by_learning_rate(learning_rate)
    if other_learning_rate is None or dimension_numbers is None:
        return rate
    check_rate("other_learning_rate", other_learning_rate)
    other = optax.scale_by_learning_rate(other_learning_rate)
    return partition_matrices(lambda _: rate, other, dimension_numbers=dimension_numbers)
