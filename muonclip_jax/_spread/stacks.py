"""Many parameters' matrices as stacks: all of one shape are orthogonalized as one array."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from muonclip_jax._core.meshes import free_axes, mesh_axes, mesh_of
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._orthogonalize.orthogonalize import (
    on_each_dtype,
    orthogonalize_as,
    orthogonalize_stack,
)
from muonclip_jax._orthogonalize.products import concatenate
from muonclip_jax._orthogonalize.schedules import is_cubic
from muonclip_jax._spread.exchange import orthogonalize_spread
from muonclip_jax._spread.plan import DevicesPerMatrix, MatrixStack, Plan, Split, choose

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

    def flat(self, values: jax.Array) -> jax.Array:
        """The values, or a device's share of them, as wide matrices `[count, n, m]`."""
        batch, rows, cols = (math.prod(values.shape[i] for i in axes) for axes in self._axes)
        matrices = values.reshape(batch, rows, cols)
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
                Plan(MatrixStack(arrays[alone].shape[0], n, m, on_mesh, unknown), (), steps, cubic),
                members,
            )
            continue
        devices = math.prod(size for _, size in on_mesh)
        for some in _limited(members, [arrays[i].values.size // devices for i in members]):
            count = sum(arrays[i].shape[0] for i in some)
            sent = sum(arrays[i].sent for i in some)
            stack = MatrixStack(count, n, m, on_mesh, stored, dtype.itemsize, sent)
            yield choose(stack, steps, devices_per_matrix, cubic), some


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
    for plan, members in plans(arrays, mesh, how, devices_per_matrix):
        some = [arrays[i] for i in members]
        this = how.for_matrices(some[0].values)
        run: Callable[..., tuple[jax.Array, ...]]
        run = functools.partial(_stack, arrays=some, plan=plan, how=this)
        if "unknown" in plan.stack.stored:
            run = functools.partial(_by_xla, some[0], this)
        elif plan.factors and mesh is not None:
            specs = tuple(array.spec for array in some)
            run = jax.shard_map(
                run,
                mesh=mesh,
                in_specs=specs,
                out_specs=specs,
                axis_names=set(free_axes(mesh)),
                check_vma=False,
            )
        values = [array.values for array in some]
        results |= zip(members, run(*values), strict=True)
    return [results[i] for i in range(len(arrays))]


def _stack(
    *values: jax.Array, arrays: Sequence[MatrixArray], plan: Plan, how: NewtonSchulz
) -> tuple[jax.Array, ...]:
    """Orthogonalizes the arrays of one stack, or a device's share of them."""
    # Arrays [3, 16, 32] and [32, 16]: flat [3, 16, 32] and [1, 16, 32], a stack [4, 16, 32]; back
    # from places 0 and 3 of it.
    flat = [array.flat(x) for array, x in zip(arrays, values, strict=True)]
    if plan.factors:
        done = orthogonalize_spread(concatenate(flat, 0), plan, how)
    else:
        dtype = jnp.dtype(how.dtype)
        # Rounded before they are copied, if that cannot overflow.
        narrow = [
            x.astype(dtype) if jnp.finfo(dtype).maxexp >= jnp.finfo(x.dtype).maxexp else x
            for x in flat
        ]
        done = orthogonalize_stack(concatenate(narrow, 0), how)
    starts = list(map(jnp.uint32, [0, *itertools.accumulate(map(len, flat[:-1]))]))
    # On CPU every new kernel takes some 9 ms to compile. A slice at a constant place is one of its
    # own; at places that XLA cannot know, slices share one.
    starts = lax.platform_dependent(starts, cpu=_hidden, default=lambda starts: starts)
    sizes = map(len, flat)
    parts = [lax.dynamic_slice_in_dim(done, *part) for part in zip(starts, sizes, strict=True)]
    return tuple(a.unflat(p, x) for a, p, x in zip(arrays, parts, values, strict=True))


def _hidden(numbers: list[jax.Array]) -> list[jax.Array]:
    """The numbers, the first of which is 0, from a loop that ends before it begins."""
    return lax.while_loop(lambda x: x[0] > 0, lambda x: [*x[1:], x[0]], numbers)


def _by_xla(array: MatrixArray, how: NewtonSchulz, values: jax.Array) -> tuple[jax.Array]:
    """A parameter whose batch axes stay apart, since they may be split over a mesh."""
    return (orthogonalize_as(array.apart(values), how).reshape(values.shape),)


def _limited(members: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """The members in groups of at most `_LARGEST_STACK` entries a device, or one alone."""
    some: list[int] = []
    entries = 0
    for member, size in zip(members, sizes, strict=True):
        if some and entries + size > _LARGEST_STACK:
            yield some
            some, entries = [], 0
        some, entries = [*some, member], entries + size
    yield some


def _check_shapes(wanted: Mapping[tuple[int, int], int], arrays: Sequence[MatrixArray]) -> None:
    shapes = sorted({tuple(sorted(array.shape[1:])) for array in arrays})
    for shape in wanted:
        if tuple(sorted(shape)) not in shapes:
            raise ValueError(
                f"devices_per_matrix names matrices {list(shape)}, and there are none; there are "
                f"{', '.join(map(str, map(list, shapes)))}."
            )
