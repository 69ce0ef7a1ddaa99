"""Muon: momentum, orthogonalized."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._core import paths
from muonclip_jax._core.meshes import in_auto_axes, mesh_of, specs_of
from muonclip_jax._core.paths import Path
from muonclip_jax._core.shardings import Shardings, placed, shardings_of
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._parameters import matrices, routing
from muonclip_jax._spread.plan import DevicesPerMatrix, check_devices_per_matrix
from muonclip_jax._spread.stacks import orthogonalize_all


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
      count: int32, steps taken.
      momentum: Like the parameters, in `mu_dtype`.
    """

    count: jax.Array
    momentum: Any


def scale_by_muon(
    momentum: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    newton_schulz: NewtonSchulz = NewtonSchulz(),  # noqa: B008 (frozen)
    *,
    dimension_numbers: routing.DimensionNumbers | None = None,
    bias_correction: bool = False,
    mu_dtype: jax.typing.DTypeLike | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformation:
    """Replaces each matrix gradient by its orthogonalized momentum.

    `M ← μM + G`, then `O = msign(G + μM)` with Nesterov, `msign(M)` without
    (K. Jordan et al. 2024; Moonlight, arXiv 2502.16982). The result has singular values near 1;
    follow it with `scale_by_update_rms` for a size that suits the matrix shape. Every leaf must
    be a matrix or a batch of matrices: `mc.muon` sends the others to another optimizer.

    Cost per matrix `[n, m]`, n <= m: at most `(4m/n + 2) n³` FLOPs for each of the schedule's
    steps; with the default schedule two thirds of them for m = 4n on accelerators, about half on
    CPU (`Method`).
    Matrices of one shape are orthogonalized together, as a stack. Memory: one momentum array per
    parameter, in the parameter's sharding.

    On a mesh every device orthogonalizes its share of each stack, which gets there and back with
    one all-to-all each, in the dtype of `newton_schulz`. Where there are fewer matrices than
    devices, teams of devices hold a matrix together, each some of its columns, and share all
    products evenly. `describe` prints the plan. On meshes with Explicit axes this needs nothing;
    with Auto axes it needs `shardings`, since inside `jax.jit` nothing else tells how parameters
    are split.
    Inside `jax.shard_map` and `jax.pmap` each device orthogonalizes what it has. Not for `jax.vmap`
    on a mesh: make the members a batch axis of the parameters instead.

    Args:
      momentum: μ in [0, 1).
      nesterov: Orthogonalize `G + μM` instead of `M`.
      newton_schulz: How to orthogonalize: the polynomials, the dtype and the method.
      dimension_numbers: Which axes are input and output of which parameter: a tree of
        `optax.contrib.MuonDimensionNumbers` (or a prefix of one), or a function from the
        parameters to one, such as `muon_dimension_numbers`, which can split attention's parameters
        into pieces and heads. All other axes are batch axes. None: two axes are `[in, out]`, more
        are read as in `muon_dimension_numbers`.
      bias_correction: Weigh Nesterov's two terms as `optax.contrib.muon` does, `β M/(1-β^{t+1})`
        and `G/(1-β^t)`. Without Nesterov it changes nothing, since `msign` ignores scale.
      mu_dtype: The dtype of the momentum; None keeps the parameter's.
      shardings: On meshes with Auto axes, how each parameter is split: a tree of `NamedSharding`
        (or, with `jax.set_mesh`, `PartitionSpec`) like the parameters, or a prefix of one, or a
        function from parameters to one; `jax.tree.map(lambda p: p.sharding, params)`. Momentum is
        kept there (over the Explicit axes alone where one axis of an array is split over an Auto
        and then an Explicit axis of a mesh that has both: its type says no more). Numbers do not
        depend on it: what is split otherwise costs copies. (Under `optax.inject_hyperparams` name
        it in `static_args`.)
      devices_per_matrix: How many devices make a team, or `{(n, m): devices}` for shapes that
        differ, the others being chosen. None chooses by a model of FLOPs, bytes sent and
        collectives (`orthogonalize/plan.py`). One device makes no teams.

    Returns:
      A transformation whose updates have the gradients' shapes and dtypes.

    Raises:
      ValueError: momentum outside [0, 1) when built; at init and update, a parameter that is no
        matrix or that `dimension_numbers` or `shardings` does not fit, with its path, and a
        `devices_per_matrix` that the mesh does not have.
    """
    if callable(momentum):
        raise TypeError(
            "momentum must be a number; for a schedule wrap the transformation in "
            "optax.inject_hyperparams."
        )
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1) (0.95 is usual), got {momentum}.")
    if not isinstance(newton_schulz, NewtonSchulz):
        raise TypeError(
            f"scale_by_muon: newton_schulz={newton_schulz!r} is not a NewtonSchulz; pass for "
            'example mc.NewtonSchulz(mc.schedules.polar_express(steps=5), dtype="bfloat16").'
        )
    if devices_per_matrix is not None:
        check_devices_per_matrix(devices_per_matrix)

    def init(params: optax.Params) -> MuonState:
        routing.resolve_matrices(dimension_numbers, params)
        zeros = optax.tree.zeros_like(params, dtype=mu_dtype)
        return MuonState(jnp.zeros([], jnp.int32), placed(zeros, shardings))

    def update(updates, state, params=None):
        del params
        specs = routing.resolve_matrices(dimension_numbers, updates)
        for gradient in jax.tree.leaves(updates):
            newton_schulz.for_matrices(gradient)
        known = shardings_of(updates, shardings)
        _warn_of_unknown(updates, known)
        accumulated = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, updates)
        look_ahead, gradient_weight = _nesterov_weights(momentum, state.count, bias_correction)

        def look(m, g):
            return look_ahead * m + gradient_weight * g if nesterov else m

        def orthogonalized(tree):
            leaves = dict(paths.leaves(tree))
            split = {
                path: matrices.split(x, specs[path], known[path]) for path, x in leaves.items()
            }
            together = orthogonalize_all(
                [batch for batches in split.values() for batch in batches],
                newton_schulz,
                devices_per_matrix=devices_per_matrix,
            )
            done = iter(together)
            return paths.map_with_path(
                lambda path, x: matrices.join(x, [next(done) for _ in split[path]], specs[path]),
                tree,
            )

        looked = jax.tree.map(look, accumulated, updates)
        directions = in_auto_axes(orthogonalized, specs_of(updates))(looked)
        directions = jax.tree.map(lambda d, g: d.astype(g.dtype), directions, updates)
        kept = jax.tree.map(lambda a, m: a.astype(m.dtype), accumulated, state.momentum)
        return directions, MuonState(optax.safe_increment(state.count), placed(kept, shardings))

    return optax.GradientTransformation(init, update)


def _warn_of_unknown(updates: Any, known: dict[Path, Any]) -> None:
    mesh = mesh_of(updates)
    if mesh is not None and any(sharding is None for sharding in known.values()):
        path = next(path for path, sharding in known.items() if sharding is None)
        warnings.warn(
            f"Muon cannot tell how {paths.show(path)} is split over the mesh {dict(mesh.shape)}: "
            "its type does not say so, as on Auto axes, or where it is not on the mesh. XLA will "
            "gather matrices, or orthogonalize them on every device. Pass "
            "shardings=jax.tree.map(lambda p: p.sharding, params).",
            stacklevel=3,
        )


def _nesterov_weights(momentum, count, bias_correction) -> tuple[Any, Any]:
    if not bias_correction:
        return momentum, 1.0
    step = count + 1
    return momentum / (1 - momentum ** (step + 1)), 1 / (1 - momentum**step)
