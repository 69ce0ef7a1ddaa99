"""Orthogonalization: what comes in as matrices goes out with singular values near 1."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import optax

from muonclip_jax._core import paths
from muonclip_jax._core.meshes import in_auto_axes, mesh_of, specs_of
from muonclip_jax._core.paths import Path
from muonclip_jax._core.shardings import Shardings, check_shardings, shardings_of
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz, check_newton_schulz
from muonclip_jax._parameters import matrices, routing
from muonclip_jax._spread.plan import DevicesPerMatrix, check_devices_per_matrix
from muonclip_jax._spread.stacks import orthogonalize_all


def scale_by_orthogonalization(
    newton_schulz: NewtonSchulz = NewtonSchulz(),  # noqa: B008 (frozen)
    *,
    dimension_numbers: routing.DimensionNumbers | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformation:
    """Replaces each matrix update by its orthogonal factor, `msign(U)`. Keeps no state.

    This is Muon's second link. Put the momentum of your choice before it:
    `optax.chain(optax.ema(0.95), scale_by_orthogonalization())`; `scale_by_muon` is Muon's own
    momentum and this. Follow it with `scale_by_update_rms` for a size that suits the matrix shape.
    Every leaf must be a matrix or a batch of matrices; `optax.partition` sends the others
    elsewhere, as `mc.muon` does.

    Cost per matrix `[n, m]`, n <= m: at most `(4m/n + 2) n³` FLOPs for each of the schedule's
    steps; with the default schedule three quarters of them for m = 4n on accelerators, 59% on CPU
    (`Method`). Matrices of one shape are orthogonalized together, as a stack.

    On a mesh every device orthogonalizes its share of each stack, which travels with one
    all-to-all each way, in the dtype of `newton_schulz`. Where there are fewer matrices than
    devices, a device group holds a matrix, each device some of its columns, and shares all
    products evenly. `describe` prints the plan. On meshes with Explicit axes this needs nothing;
    with Auto axes it needs `shardings`, since inside `jax.jit` nothing else tells how parameters
    are split. Inside `jax.shard_map` and `jax.pmap` each device orthogonalizes what it has. Not
    for `jax.vmap` on a mesh: make the members a batch axis of the parameters instead.

    Args:
      newton_schulz: How to orthogonalize: the polynomials, the dtype and the method.
      dimension_numbers: Which axes are input and output of which parameter: a tree of
        `optax.contrib.MuonDimensionNumbers` (or a prefix of one), or a function from the
        parameters to one, such as `muon_dimension_numbers`, which can split attention's parameters
        into pieces and heads. All other axes are batch axes. None: two axes are `[in, out]`, more
        are read as in `muon_dimension_numbers`.
      shardings: On meshes with Auto axes, how each parameter is split: a tree of `NamedSharding`
        (or, with `jax.set_mesh`, `PartitionSpec`) like the parameters, or a prefix of one, or a
        function from parameters to one; `jax.tree.map(lambda p: p.sharding, params)`. Numbers do
        not depend on it: what is split otherwise costs copies.
      devices_per_matrix: How many devices make a group, or `{(n, m): devices}` for shapes that
        differ, the others being chosen. None chooses by a model of FLOPs, bytes sent and
        collectives. One device makes no groups.

    Returns:
      A transformation whose updates have the shapes and dtypes of those that it is given.

    Raises:
      TypeError: `newton_schulz` is none; at init and update, a parameter that is not floating
        point.
      ValueError: At init and update, a parameter that is no matrix or that `dimension_numbers` or
        `shardings` does not fit, with its path, and a `devices_per_matrix` that the mesh does not
        have.

    Example:
        >>> tx = mc.scale_by_orthogonalization()
        >>> updates, _ = tx.update({"w": jnp.eye(4, 8)}, tx.init({"w": jnp.ones((4, 8))}))
        >>> bool(jnp.allclose(jnp.linalg.svd(updates["w"])[1], 1, atol=0.2))
        True
    """
    check_newton_schulz(newton_schulz)
    check_devices_per_matrix(devices_per_matrix)
    routing.check_dimension_numbers(dimension_numbers)
    check_shardings(shardings)

    def init(params: optax.Params) -> optax.EmptyState:
        routing.resolve_matrices(dimension_numbers, params)
        check_leaves(newton_schulz, params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params
        specs = routing.resolve_matrices(dimension_numbers, updates)
        check_leaves(newton_schulz, updates)
        known = shardings_of(updates, shardings)
        warn_of_unknown(updates, known)

        def orthogonalized(tree):
            run = functools.partial(
                orthogonalize_all, how=newton_schulz, devices_per_matrix=devices_per_matrix
            )
            return matrices.change_matrices(run, tree, specs, known)

        return in_auto_axes(orthogonalized, specs_of(updates))(updates), state

    return optax.GradientTransformation(init, update)


def check_leaves(newton_schulz: NewtonSchulz, tree: Any) -> None:
    """Raises TypeError or ValueError for a leaf that cannot be orthogonalized, with its path."""
    for path, leaf in paths.leaves(tree):
        newton_schulz.for_matrices(leaf, f"Muon's {paths.show(path)}")


def warn_of_unknown(updates: Any, known: Mapping[Path, Any], owner: str = "Muon") -> None:
    """Warns where arrays are on a mesh and nobody knows how they are split."""
    mesh = mesh_of(updates)
    if mesh is not None and any(sharding is None for sharding in known.values()):
        path = next(path for path, sharding in known.items() if sharding is None)
        warnings.warn(
            f"{owner} cannot tell how {paths.show(path)} is split over the mesh "
            f"{dict(mesh.shape)}: its type does not say so, as on Auto axes, or where it is not on "
            "the mesh. XLA will gather matrices, or orthogonalize them on every device. Pass "
            "shardings=jax.tree.map(lambda p: p.sharding, params).",
            stacklevel=3,
        )
