"""Many parameters' matrices as stacks: all of one shape are orthogonalized as one array."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from muonclip_jax._core.meshes import free_axes, mesh_axes, mesh_of, on_each_device
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._orthogonalize.orthogonalize import (
    apart,
    on_each_dtype,
    orthogonalize_as,
    orthogonalize_as_stack,
)
from muonclip_jax._orthogonalize.products import concatenate
from muonclip_jax._orthogonalize.schedules import is_cubic
from muonclip_jax._spread.exchange import Share, exchange_group, orthogonalize_spread
from muonclip_jax._spread.machine import machine_of
from muonclip_jax._spread.plan import DevicesPerMatrix, MatrixStack, Plan, Split, choose

T = TypeVar("T")

# Entries of a stack on one device. Beyond it matrices make no larger kernels, only more
# temporaries: parameters go to a new stack.
_LARGEST_STACK = 2**27


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values"],
    meta_fields=["rows", "cols", "spec", "sent"],
)
@dataclass(frozen=True)
class MatrixArray:
    """Equal matrices of one parameter, `[array..., rows..., cols...]`.

    Attributes:
      values: The array, or its `jax.ShapeDtypeStruct`.
      rows: How many of its axes make up the rows; in a Flax kernel, the input.
      cols: How many make up the columns.
      spec: How it is split over the mesh; None: not at all, or nobody knows.
      sent: Bytes that a device sends so that it is split so, and for its result to go back.
    """

    values: jax.Array
    rows: int = 1
    cols: int = 1
    spec: PartitionSpec | None = None
    sent: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(count, in, out)."""
        count, rows, cols = (math.prod(self.values.shape[i] for i in a) for a in self._axes)
        return count, rows, cols

    @property
    def turned(self) -> bool:
        """Whether its columns are the shorter side."""
        _, rows, cols = self.shape
        return rows > cols

    def stored(self, mesh: Mapping[str, int]) -> tuple[Split, ...]:
        """The stored sharding: how each axis of the mesh splits the matrices."""
        # [in=64, out=32] as P("tp", "fsdp") on {"fsdp": 4, "tp": 2}: its columns are the shorter
        # side, so fsdp, which splits them, splits "rows", and tp "cols": ("rows", "cols").
        sides: tuple[Split, ...] = ("cols", "rows") if self.turned else ("rows", "cols")
        spec = dict(enumerate(self.spec or ()))
        splits = dict[str, Split]()
        for split, axes in zip(("stack", *sides), self._axes, strict=True):
            for i in axes:
                splits |= dict.fromkeys(mesh_axes(spec.get(i)), split)
        return tuple(splits.get(axis, "replicated") for axis in mesh)

    def matrices(self, values: jax.Array) -> jax.Array:
        """The values, or a device's share of them, as `[count, in, out]`."""
        return values.reshape(*(math.prod(values.shape[i] for i in axes) for axes in self._axes))

    def flat(self, values: jax.Array) -> jax.Array:
        """The same as wide matrices `[count, n, m]`."""
        matrices = self.matrices(values)
        return matrices.mT if self.turned else matrices

    def apart(self, values: jax.Array) -> jax.Array:
        """The values as matrices `[batch..., in, out]`: batch axes that a mesh may split stay as
        they are. `reshape(values.shape)` undoes it."""
        leading = values.shape[: values.ndim - self.rows - self.cols]
        return values.reshape(*leading, *self.shape[1:])

    def unflat(self, matrices: jax.Array, like: jax.Array) -> jax.Array:
        """Undoes `flat`, in the shape and dtype of `like`."""
        return (matrices.mT if self.turned else matrices).reshape(like.shape).astype(like.dtype)

    @property
    def _axes(self) -> tuple[range, range, range]:
        """Which axes of the array are batch, rows and columns."""
        end = self.values.ndim
        rows, cols = end - self.rows - self.cols, end - self.cols
        return range(rows), range(rows, cols), range(cols, end)


def plans(
    arrays: Sequence[MatrixArray],
    mesh: AbstractMesh | None,
    how: NewtonSchulz,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> Iterator[tuple[Plan, list[int]]]:
    """The stacks that `orthogonalize_all` makes: the plan of each, and which arrays are in it.

    Raises:
      TypeError, ValueError: As `orthogonalize`; as `choose`; a shape in `devices_per_matrix` that
        no array has.
    """
    # Kernels query [256, 4·64] and out [4·64, 256], a scanned mlp [12, 256, 1024], 2 devices,
    # fsdp on axis 0, 0 and 1: one stack of 2 [256, 256], since both are split along a side, and
    # one of 12 [256, 1024], "rows" of which are split. A [256, 256] that is replicated would be a
    # stack of its own.
    dtypes = [jnp.dtype(how.for_matrices(array.values).dtype) for array in arrays]
    if isinstance(devices_per_matrix, Mapping):
        _check_shapes(devices_per_matrix, arrays)
    steps = len(how.schedule.coefficients)
    cubic = sum(map(is_cubic, how.schedule.coefficients))
    sizes = {} if mesh is None else {axis: mesh.shape[axis] for axis in free_axes(mesh)}
    on_mesh = tuple((axis, size) for axis, size in sizes.items() if size > 1)
    machine = machine_of(mesh)
    groups: dict[Any, list[int]] = {}
    for i, array in enumerate(arrays):
        kind = (*sorted(array.shape[1:]), array.stored(dict(on_mesh)), dtypes[i])
        # An array of unknown sharding stays by itself, where XLA has it.
        alone = i if on_mesh and array.spec is None else None
        groups.setdefault((*kind, alone), []).append(i)
    for (n, m, stored, dtype, alone), members in groups.items():
        if alone is not None:
            unknown: tuple[Split, ...] = ("unknown",) * len(on_mesh)
            yield (
                Plan(
                    MatrixStack(arrays[alone].shape[0], n, m, on_mesh, unknown),
                    (),
                    steps,
                    cubic,
                    machine,
                ),
                members,
            )
            continue
        # On a mesh the plan is that of all; see `_spread`.
        for some in [members] if on_mesh else _limited(members, [arrays[i] for i in members]):
            count = sum(arrays[i].shape[0] for i in some)
            sent = sum(arrays[i].sent for i in some)
            stack = MatrixStack(count, n, m, on_mesh, stored, dtype.itemsize, sent)
            yield choose(stack, steps, devices_per_matrix, cubic, machine), some


def orthogonalize_all(
    arrays: Sequence[MatrixArray],
    how: NewtonSchulz,
    *,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> list[jax.Array]:
    """Orthogonalizes many parameters: those of one matrix shape make one stack.

    On a mesh every device orthogonalizes its share of each stack. Matrices go to the working
    sharding and back in one all-to-all each, in `how.dtype`; see `plan`.

    Args:
      arrays: The matrices. On a mesh `spec` is how they are split over it; what is split
        otherwise costs copies.
      how: The polynomials, dtype and method. The method is that of the matrices that one device
        holds; device groups have one method.
      devices_per_matrix: As in `choose`.

    Returns:
      Arrays with the shapes and dtypes of the values.

    Raises:
      TypeError, ValueError: As `orthogonalize` and `choose`.
    """
    mesh = mesh_of([array.values for array in arrays])

    def run(values: list[jax.Array], how: NewtonSchulz) -> list[jax.Array]:
        given = [replace(array, values=x) for array, x in zip(arrays, values, strict=True)]
        return _in_stacks(given, mesh, how, devices_per_matrix)

    return on_each_dtype(run, how.settled(), [array.values for array in arrays])


def _in_stacks(
    arrays: Sequence[MatrixArray],
    mesh: AbstractMesh | None,
    how: NewtonSchulz,
    devices_per_matrix: DevicesPerMatrix | None,
) -> list[jax.Array]:
    results: dict[int, jax.Array] = {}
    spread: list[tuple[Plan, list[int]]] = []
    for plan, members in plans(arrays, mesh, how, devices_per_matrix):
        if plan.factors:
            spread.append((plan, members))
            continue
        some = [arrays[i] for i in members]
        this = how.for_matrices(some[0].values)
        run = _by_xla if "unknown" in plan.stack.stored else _on_one_device
        results |= zip(members, run(some, this), strict=True)
    if not spread:
        return [results[i] for i in range(len(arrays))]
    # Between the same devices what comes and what goes can travel together.
    spread.sort(key=lambda each: _exchange_groups(each[0]))
    order = [i for _, members in spread for i in members]
    specs = tuple(arrays[i].spec for i in order)
    stacks = [(plan, [arrays[i] for i in members]) for plan, members in spread]
    assert mesh is not None, "without a mesh no plan has factors"
    run = on_each_device(functools.partial(_spread, stacks=stacks, how=how), mesh, specs, specs)
    results |= zip(order, run(*(arrays[i].values for i in order)), strict=True)
    return [results[i] for i in range(len(arrays))]


def _spread(
    *values: jax.Array, stacks: Sequence[tuple[Plan, Sequence[MatrixArray]]], how: NewtonSchulz
) -> tuple[jax.Array, ...]:
    """Orthogonalizes a device's share of the stacks' arrays, inside `jax.shard_map`."""
    rest = iter(values)
    shares: list[Share] = []
    lengths: list[list[int]] = []
    for plan, arrays in stacks:
        flat = [array.flat(next(rest)) for array in arrays]
        this = how.for_matrices(arrays[0].values)
        for some in _limited(flat, flat, plan.matrices_to_share):
            shares.append(Share.of(concatenate(some, 0), plan, this))
            lengths.append([len(x) for x in some])
    done = orthogonalize_spread(shares)
    parts = (part for each in zip(done, lengths, strict=True) for part in apart(*each))
    arrays = (array for _, arrays in stacks for array in arrays)
    return tuple(a.unflat(*each) for a, *each in zip(arrays, parts, values, strict=True))


def _exchange_groups(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """The devices between which matrices are exchanged; none first."""
    group = exchange_group(plan)
    return group.groups if group else ()


def _on_one_device(arrays: Sequence[MatrixArray], how: NewtonSchulz) -> list[jax.Array]:
    """Orthogonalizes the arrays of one stack."""
    done = orthogonalize_as_stack([array.matrices(array.values) for array in arrays], how)
    return [
        x.reshape(array.values.shape).astype(array.values.dtype)
        for array, x in zip(arrays, done, strict=True)
    ]


def _by_xla(arrays: Sequence[MatrixArray], how: NewtonSchulz) -> list[jax.Array]:
    """A parameter whose batch axes stay apart, since they may be split over a mesh."""
    (array,) = arrays
    return [orthogonalize_as(array.apart(array.values), how).reshape(array.values.shape)]


def _limited(members: Sequence[T], sizes: Sequence[Any], least: int = 1) -> Iterator[list[T]]:
    """The members in groups of at most `_LARGEST_STACK` entries a device, or one alone; those of
    each group, but for the last, are a multiple of `least` matrices.

    Args:
      sizes: For each member what has its `shape`, `[matrices, n, m]`.
    """
    some: list[T] = []
    entries = count = 0
    for member, sized in zip(members, sizes, strict=True):
        size = math.prod(sized.shape)
        if some and entries + size > _LARGEST_STACK and count % least == 0:
            yield some
            some, entries, count = [], 0, 0
        some, entries, count = [*some, member], entries + size, count + sized.shape[0]
    yield some


def _check_shapes(wanted: Mapping[tuple[int, int], int], arrays: Sequence[MatrixArray]) -> None:
    shapes = sorted({tuple(sorted(array.shape[1:])) for array in arrays})
    for shape in wanted:
        if tuple(sorted(shape)) not in shapes:
            raise ValueError(
                f"devices_per_matrix names matrices {list(shape)}, and there are none; there are "
                f"{', '.join(map(str, map(list, shapes)))}."
            )
