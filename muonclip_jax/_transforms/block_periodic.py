"""Orthogonalization of whole matrices every few steps, and of their blocks at the steps between.

Source: Khaled et al., "MuonBP: Faster Muon via Block-Periodic Orthogonalization", arXiv 2510.16981.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec
from jax.typing import ArrayLike

from muonclip_jax._core import paths
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.meshes import in_auto_axes, mesh_axes, mesh_of, on_each_device, specs_of
from muonclip_jax._core.options import check_count, check_number
from muonclip_jax._core.paths import Path
from muonclip_jax._core.shardings import Shardings, check_shardings, shardings_of
from muonclip_jax._core.states import without_parameters
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz, check_newton_schulz
from muonclip_jax._parameters import routing
from muonclip_jax._parameters.matrices import MatrixSpec, change_matrices
from muonclip_jax._spread.plan import DevicesPerMatrix, check_devices_per_matrix
from muonclip_jax._spread.stacks import MatrixArray, orthogonalize_all
from muonclip_jax._transforms.orthogonalization import check_leaves, warn_of_unknown

Grid = tuple[int, int]  # blocks along the input, and along the output


class PeriodicOrthogonalizationState(NamedTuple):
    """State of `scale_by_periodic_orthogonalization`.

    Attributes:
      step: int32, the steps so far. Where `period` divides it, the next one is of whole matrices.

    Example:
        >>> state = mc.scale_by_periodic_orthogonalization(5).init({"up": jnp.ones((4, 8))})
        >>> optax.tree.get(state, "PeriodicOrthogonalizationState").step.item()
        0
    """

    step: jax.Array


def scale_by_periodic_orthogonalization(
    period: int,
    newton_schulz: NewtonSchulz = NewtonSchulz(),  # noqa: B008 (frozen)
    *,
    blocks: Grid | None = None,
    block_scale: ArrayLike = 1.0,
    dimension_numbers: routing.DimensionNumbers | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformation:
    """Orthogonalizes whole matrices every `period` steps, and each block by itself at the others.

    MuonBP: `scale_by_orthogonalization` whose matrices travel between devices once in `period`
    steps. At the first step, and at every one that `period` divides, it is that link. At the steps
    between, each block B of a matrix `[in, out]` becomes

        block_scale · √(max(B) / max(whole)) · msign(B)

    where max is the longer side. `msign(B)` has an RMS of `1/√max(B)`, so the root gives each block
    the RMS that the whole matrix's factor has; behind `scale_by_update_rms("match_adam")` it is the
    paper's rule, `0.2 √max(B) msign(B)`: one learning rate, of which the blocks' steps are a part.

    Blocks are, by default, what each device holds of a matrix: `[64, 32]` that two axes of a mesh
    `{"fsdp": 4, "tp": 2}` split are eight blocks `[16, 16]`. Then nothing travels at all, but for
    parameters that are split across their matrices (half a head on a device), which move as they do
    in full steps. Such updates depend on the mesh, unlike everything else here, and a device that
    holds whole matrices, or is alone, orthogonalizes whole ones at every step. `blocks=(2, 4)` cuts
    each matrix in two along its input and four along its output, on every mesh alike: then results
    do not depend on it, and blocks travel where a device does not hold whole ones.

    Cost: a full step's is `scale_by_orthogonalization`'s, whose plan `describe` prints. One of
    blocks `[b, c]`, b <= c, takes at most `(4c/b + 2) b³` FLOPs a block and step of the schedule:
    all blocks of a square matrix that is cut into k columns `(4k + 2)/(6k²)` of the whole one's,
    those of a k × k grid `1/k`. Bytes sent: on average a full step's divided by `period`. Both
    kinds of step are in the compiled program, as branches of a condition, at which GPUs wait for
    their host. State: four bytes.

    Args:
      period: Full steps are so many steps apart, at least 1; 5 in public code of the
        paper's. For `optax.inject_hyperparams` it is one of the `static_args`.
      newton_schulz: How to orthogonalize: the polynomials, the dtype and the method.
      blocks: None for what each device holds, or how many blocks along (in, out).
      block_scale: The blocks' step in units of the full step's, beyond equal RMS, above 0. The
        paper's theory has two step sizes; where the RMS ties them, as in its practical rule, it is
        1.
      dimension_numbers: Which axes are input and output of which parameter, as for
        `scale_by_orthogonalization`. Per head, the blocks are of each head's matrix.
      shardings: On meshes with Auto axes, how each parameter is split, as for
        `scale_by_orthogonalization`. What nobody knows is orthogonalized whole.
      devices_per_matrix: For full steps, as for `scale_by_orthogonalization`.

    Returns:
      A transformation whose updates have the shapes and dtypes of those that it is given; its state
      is a `PeriodicOrthogonalizationState`.

    Raises:
      TypeError: An option of the wrong type; as `scale_by_orthogonalization`.
      ValueError: A period or a number of blocks below 1, a `block_scale` that is not above 0; at
        init and update, blocks that do not divide a matrix, with its path, and as
        `scale_by_orthogonalization`.

    Example:
        >>> tx = mc.scale_by_periodic_orthogonalization(5, blocks=(1, 2))
        >>> updates = {"up": jnp.ones((4, 8))}
        >>> whole, state = tx.update(updates, tx.init(updates))
        >>> halves, state = tx.update(updates, state)
        >>> [round(float(jnp.linalg.norm(x["up"])), 1) for x in (whole, halves)]  # ranks 1 and 2
        [1.0, 1.0]
    """
    check_count("period", period)
    check_newton_schulz(newton_schulz)
    _check_grid(blocks)
    owner = "scale_by_periodic_orthogonalization"
    check_number(
        "block_scale", block_scale, lambda x: 0 < x < math.inf, "above 0 and finite", owner
    )
    check_devices_per_matrix(devices_per_matrix)
    routing.check_dimension_numbers(dimension_numbers)
    check_shardings(shardings)

    def resolved(tree: Any) -> Mapping[Path, MatrixSpec]:
        specs = routing.resolve_matrices(dimension_numbers, tree)
        check_leaves(newton_schulz, tree)
        _check_divided(blocks, specs)
        return specs

    def init(params: optax.Params) -> PeriodicOrthogonalizationState:
        if paths.holds_nothing(params):
            return without_parameters(PeriodicOrthogonalizationState)
        resolved(params)
        return PeriodicOrthogonalizationState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        del params
        specs = resolved(updates)
        known = shardings_of(updates, shardings)
        warn_of_unknown(updates, known, owner)

        def whole(tree, scale):
            del scale
            run = functools.partial(
                orthogonalize_all, how=newton_schulz, devices_per_matrix=devices_per_matrix
            )
            return change_matrices(run, tree, specs, known)

        def in_blocks(tree, scale):
            run = functools.partial(_in_blocks, grid=blocks, how=newton_schulz, scale=scale)
            return change_matrices(run, tree, specs, known)

        def act(tree, step, scale):
            return lax.cond(step % period == 0, whole, in_blocks, tree, scale)

        new = in_auto_axes(act, specs_of(updates))(updates, state.step, block_scale)
        step = jnp.asarray(optax.safe_increment(state.step))
        return new, PeriodicOrthogonalizationState(step)

    return optax.GradientTransformation(init, update)


def _in_blocks(
    arrays: Sequence[MatrixArray], grid: Grid | None, how: NewtonSchulz, scale: ArrayLike
) -> list[jax.Array]:
    """Each block by itself, of the RMS that the whole matrix's factor has, times the scale."""
    if grid is None:
        return _on_each_device(arrays, how, scale)
    mesh = mesh_of([array.values for array in arrays])
    cut = [_cut(array, grid, mesh) for array in arrays]
    return [
        jnp.swapaxes(_sized(x, block, array, scale), -3, -2).reshape(array.values.shape)
        for x, block, array in zip(orthogonalize_all(cut, how), cut, arrays, strict=True)
    ]


def _on_each_device(
    arrays: Sequence[MatrixArray], how: NewtonSchulz, scale: ArrayLike
) -> list[jax.Array]:
    """The same, blocks being what a device holds; what nobody knows is a block of its own."""
    mesh = mesh_of([array.values for array in arrays])
    known = [i for i, array in enumerate(arrays) if mesh is not None and array.spec is not None]
    others = [i for i in range(len(arrays)) if i not in known]

    def local(*values: jax.Array, of: list[int]) -> tuple[jax.Array, ...]:
        some = [arrays[i] for i in of]
        held = [replace(a, values=x, spec=None) for a, x in zip(some, values, strict=True)]
        done = orthogonalize_all(held, how)
        return tuple(_sized(x, b, a, scale) for x, b, a in zip(done, held, some, strict=True))

    results = dict(zip(others, local(*(arrays[i].values for i in others), of=others), strict=True))
    if mesh is not None and known:
        specs = tuple(arrays[i].spec for i in known)
        run = on_each_device(functools.partial(local, of=known), mesh, specs, specs)
        results |= zip(known, run(*(arrays[i].values for i in known)), strict=True)
    return [results[i] for i in range(len(arrays))]


def _cut(array: MatrixArray, grid: Grid, mesh: AbstractMesh | None) -> MatrixArray:
    """The blocks `[batch..., rows, cols, in/rows, out/cols]`, split over the mesh as they lie."""
    # [in=64, out=32] as P("fsdp", "tp") on {"fsdp": 4, "tp": 2}, cut by (8, 1): [8, 1, 8, 32]
    # as P("fsdp", None, None, "tp"): a device has two blocks' halves.
    rows, cols = grid
    whole = array.apart(array.values)
    *batch, ins, outs = whole.shape
    values = whole.reshape(*batch, rows, ins // rows, cols, outs // cols)
    spec = None
    if mesh is not None and array.spec is not None:
        stored = (*array.spec, *[None] * (array.values.ndim - len(array.spec)))
        # Of a side of several axes the first alone is followed.
        down, along = stored[len(batch)], stored[len(batch) + array.rows]
        (down, within_rows), (along, within_cols) = (
            _between(entry, count, mesh.shape) for entry, count in ((down, rows), (along, cols))
        )
        spec = PartitionSpec(*stored[: len(batch)], down, along, within_rows, within_cols)
    return MatrixArray(jnp.swapaxes(values, -3, -2), spec=spec)


def _between(entry: Any, blocks: int, sizes: Mapping[str, int]) -> tuple[Any, Any]:
    """Of the mesh axes that split a side, those that split its blocks and those within a block."""
    axes, outer = mesh_axes(entry), 0
    while outer < len(axes) and blocks % sizes[axes[outer]] == 0:
        blocks //= sizes[axes[outer]]
        outer += 1
    return axes[:outer] or None, (axes[outer:] if blocks == 1 else ()) or None


def _sized(x: jax.Array, block: MatrixArray, whole: MatrixArray, scale: ArrayLike) -> jax.Array:
    """A block's factor with the RMS of the whole matrix's, times the scale."""
    dtype = accumulation_dtype(x.dtype)
    ratio = math.sqrt(max(block.shape[1:]) / max(whole.shape[1:]))
    return (x.astype(dtype) * (jnp.asarray(scale, dtype) * ratio)).astype(x.dtype)


def _check_grid(blocks: Any) -> None:
    """Raises for what is neither None nor two whole numbers."""
    if blocks is None:
        return
    if not isinstance(blocks, tuple) or len(blocks) != 2:
        raise TypeError(
            "blocks must be None, for what each device holds, or two whole numbers of at least 1, "
            f"how many along (in, out), got {blocks!r}."
        )
    for count in blocks:
        check_count("blocks", count)


def _check_divided(blocks: Grid | None, specs: Mapping[Path, MatrixSpec]) -> None:
    """Raises ValueError for a matrix that cannot be cut into equal blocks."""
    if blocks is None:
        return
    for path, spec in specs.items():
        for _, ins, outs in spec.shapes:
            if np.any(np.remainder((ins, outs), blocks)):
                raise ValueError(
                    f"blocks={blocks} does not divide the matrices [in={ins}, out={outs}] of "
                    f"{paths.show(path)} {spec.shape}. Give numbers that divide all matrices, or "
                    "None for what each device holds; or give this parameter a link of its own, "
                    "by optax.partition."
                )
