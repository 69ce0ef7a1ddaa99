"""Hyperball: weights that keep the norm they started with, and turn by the same angle every step.

    any direction ─► a step of η R along it ─► back onto the sphere of radius R ─► updates

Source: Wen et al., "Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball
Optimization", arXiv 2606.16899 (MuonH, AdamH).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from muonclip_jax._core import paths
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.meshes import in_auto_axes, specs_of
from muonclip_jax._core.options import check_rate
from muonclip_jax._core.paths import Path
from muonclip_jax._core.shardings import Shardings, check_shardings, shardings_of
from muonclip_jax._core.states import check_same, without_parameters
from muonclip_jax._orthogonalize.normalization import nonzero
from muonclip_jax._parameters import routing
from muonclip_jax._parameters.matrices import MatrixSpec, by_path, take_matrices
from muonclip_jax._spread.stacks import MatrixArray
from muonclip_jax._transforms.arrivals import arrive_at, check_params
from muonclip_jax._transforms.normalize_rms import sides, unit_rms


class HyperballState(NamedTuple):
    """What `hyperball` keeps: `optax.tree.get(opt_state, "HyperballState")`.

    Attributes:
      radii: By the parameter's path, for each kind of matrix in it the norms ‖W₀‖_F of the
        parameters that `init` was given, `[batch...]`, float32 (float64 for float64 parameters).
        Never computed again: a restored checkpoint keeps them.
      step: int32, the steps so far, for a schedule.

    Example:
        >>> state = mc.hyperball(0.02).init({"up": jnp.full((4, 4), 0.5)})
        >>> state.radii["up"][0].item()
        2.0
    """

    radii: dict[str, tuple[jax.Array, ...]]
    step: jax.Array


def hyperball(
    learning_rate: ArrayLike | Callable[[Any], ArrayLike],
    *,
    dimension_numbers: routing.DimensionNumbers | None = None,
    shardings: Shardings | None = None,
) -> optax.GradientTransformation:
    """Steps along a direction on the sphere of the weights' first norm, in place of weight decay.

    With N(x) = x / ‖x‖_F and R = ‖W₀‖_F, both of one matrix, a step with the direction U is

        W ← R · N(W − η R N(U))

    so η is the length of a step in units of the weights, whatever their size and that of U. It
    stands last in a chain, where others have weight decay and the learning rate, behind any
    direction: `optax.chain(mc.scale_by_muon(), mc.hyperball(0.02))` is MuonH, with
    `optax.scale_by_adam()` in front it is AdamH. Links that scale a whole matrix, such as
    `scale_by_update_rms`, change nothing in front of it. As `optax.scale_by_learning_rate` does, it
    descends: U is added with a minus.

    Every leaf must be a matrix or a batch of them. Each layer of a stack and, where the routing
    says so, each head is on a sphere of its own. Embeddings, norms and biases go elsewhere, as in
    the paper:

        optax.partition({"matrices": MuonH, "others": optax.adam(3e-3)}, labels)

    Learning rate: weights of which a decay λ at a rate η₀ keeps the norm, and whose steps do not
    agree with one another, move by √(2 η₀ λ) of their norm a step, since (1 − η₀ λ)² ‖W‖² +
    η₀² ‖U‖² = ‖W‖² there. A tuned √(η₀ λ) is where to begin (the paper).

    Who has no norm to keep cannot move: a matrix that starts at zero raises. Start it small, not at
    zero, or send it to another optimizer. `jax.jit(tx.init)` cannot look at values: there the
    radius is NaN, and so is every update of the matrix.

    Numerics: float32, or float64 for float64 parameters or directions. The radius comes from the
    state, so that errors of rounding do not add up: in 300 steps of `[32, 32]` weights the norm is
    off by 1e-6 at most in float32, by 3e-4 in bfloat16, and by less for larger ones. An entry of
    bfloat16 weights stays as it is where it should move by less than 1/512 of itself: at a rate of
    0.001 three quarters of them do in a step, so keep masters in float32. A direction of zeros
    leaves its matrix on the sphere where it is; one with NaN makes its own matrix NaN, no other.

    Cost: weights are read twice, directions four times, and no matrices are multiplied. On a mesh
    three numbers a matrix are summed up, wherever its parts lie, and nothing else travels; but a
    parameter that is split across its matrices moves as for `scale_by_orthogonalization`. State:
    four bytes a matrix.

    Args:
      learning_rate: η, at least 0, or an Optax schedule of it: a function of the steps so far.
      dimension_numbers: Which axes are input and output of which parameter, as for
        `scale_by_orthogonalization`; give both the same. Flax kernels are `[in, out]`, and their
        norm is the same either way.
      shardings: On meshes with Auto axes, as for `scale_by_orthogonalization`. What nobody knows
        is left to the compiler; numbers do not depend on it.

    Returns:
      A transformation whose `update` needs `params`, and whose updates have the shapes and dtypes
      of those that it is given; its state is a `HyperballState`.

    Raises:
      TypeError: An option of the wrong type; at init, a parameter that is not floating point.
      ValueError: A negative rate; at init, a matrix that is zero or not finite, with its path; at
        init and update, as `scale_by_orthogonalization`; at update, a state of other parameters,
        no `params`.

    Example:
        >>> tx = optax.chain(optax.scale_by_adam(), mc.hyperball(0.02))
        >>> weights = {"up": jnp.full((4, 4), 0.5)}
        >>> update, _ = tx.update({"up": jnp.eye(4)}, tx.init(weights), weights)
        >>> norm = jnp.linalg.norm(optax.apply_updates(weights, update)["up"])
        >>> round(float(norm), 6)
        2.0
    """
    check_rate("learning_rate", learning_rate)
    routing.check_dimension_numbers(dimension_numbers)
    check_shardings(shardings)

    def init(params: optax.Params) -> HyperballState:
        if paths.holds_nothing(params):
            return without_parameters(HyperballState)
        paths.check_trainable("hyperball", params)
        specs = routing.resolve_matrices(dimension_numbers, params)
        known = shardings_of(params, shardings)

        def measure(params):
            arrays, _ = take_matrices(_wide(params), specs, known)
            return by_path(map(_norms, arrays), specs)

        radii = in_auto_axes(measure, PartitionSpec())(params)
        return HyperballState(_usable(radii, specs), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        check_params("hyperball", params)
        specs = routing.resolve_matrices(dimension_numbers, params)
        known = shardings_of(params, shardings)
        _check_radii(state.radii, specs)
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate

        def move(updates, params, radii, rate):
            weights, put_back = take_matrices(_wide(params, updates), specs, known)
            directions, _ = take_matrices(_wide(updates, params), specs, known)
            radii = [radius for path in specs for radius in radii[paths.show(path)]]
            goals = put_back(
                [
                    _step(w, u.values, radius, rate)
                    for w, u, radius in zip(weights, directions, radii, strict=True)
                ]
            )
            arrive = lambda path, u, w: arrive_at(goals[path], u, w)  # noqa: E731
            return paths.map_with_path(arrive, updates, params)

        new = in_auto_axes(move, specs_of(updates))(updates, params, state.radii, rate)
        return new, HyperballState(state.radii, jnp.asarray(optax.safe_increment(state.step)))

    return optax.GradientTransformation(init, update)


def _step(weights: MatrixArray, direction: jax.Array, radius: jax.Array, rate: Any) -> jax.Array:
    """Where the weights `[batch..., rows..., cols...]` go, with radii `[batch...]`."""
    # W [4 heads, 64, 16] and radii [4]: all in units of the RMS that a matrix on its sphere has,
    # in which W and N(U) have an RMS of 1, and a step has one of `rate`: squares are in range.
    w, (rows, cols) = weights.values, sides(weights)
    rms = jnp.expand_dims(radius.astype(w.dtype), rows + cols) / _root_of_size(weights)
    moved = w / rms - jnp.asarray(rate, w.dtype) * unit_rms(direction, rows + cols)[0]
    size = jnp.sqrt(nonzero(jnp.mean(jnp.square(moved), rows + cols, keepdims=True)))
    return rms * (moved / size)


def _norms(array: MatrixArray) -> jax.Array:
    """‖W‖_F of each matrix, `[batch...]`."""
    rows, cols = sides(array)
    _, rms = unit_rms(array.values, rows + cols)
    return _root_of_size(array) * jnp.squeeze(rms, rows + cols)


def _root_of_size(array: MatrixArray) -> float:
    """Frobenius norm over RMS: the root of a matrix's entries."""
    _, ins, outs = array.shape
    return math.sqrt(ins * outs)


def _wide(tree: Any, *others: Any) -> dict[Path, jax.Array]:
    """The leaves in float32, or wider where this tree or another has wider ones."""
    beside = [dict(paths.leaves(other)) for other in others]
    return {
        path: x.astype(accumulation_dtype(x.dtype, *(other[path].dtype for other in beside)))
        for path, x in paths.leaves(tree)
    }


def _usable(
    radii: dict[str, tuple[jax.Array, ...]], specs: Mapping[Path, MatrixSpec]
) -> dict[str, tuple[jax.Array, ...]]:
    """Raises ValueError for a norm that is zero or not finite; NaN under tracing."""

    def check(path: Path, radius: jax.Array) -> jax.Array:
        usable = (radius > 0) & (radius < jnp.inf)
        if not isinstance(usable, Tracer) and not usable.all():
            first = np.argwhere(~np.asarray(usable))[0]
            raise ValueError(
                f"{paths.show(path)} of shape {specs[path].shape} starts with a norm of "
                f"{float(radius[tuple(first)])} in {int((~usable).sum())} of its {radius.size} "
                "matrices, and hyperball keeps the norm that a matrix starts with. Initialise it "
                "to something finite other than zero, or send it to another optimizer, with None "
                "for it in dimension_numbers or by optax.partition."
            )
        return jnp.where(usable, radius, jnp.nan)

    return {
        paths.show(path): tuple(check(path, radius) for radius in radii[paths.show(path)])
        for path in specs
    }


def _check_radii(radii: Any, specs: Mapping[Path, MatrixSpec]) -> None:
    """Raises ValueError for the state of other parameters, or of other matrices of them."""
    now = {
        paths.show(path): tuple(
            jax.ShapeDtypeStruct(view.batch_shape, jnp.float32) for view in spec.views
        )
        for path, spec in specs.items()
    }
    check_same("radii", radii, now, "the parameters or their routing")
