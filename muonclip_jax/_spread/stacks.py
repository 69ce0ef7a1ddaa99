"""Many parameters' matrices, orthogonalized together: one stack for each shape."""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from muonclip_jax._core.meshes import free_axes, mesh_axes, mesh_of
from muonclip_jax._orthogonalize.iteration import iterate_stack, orthogonalize
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._orthogonalize.products import concatenate
from muonclip_jax._spread.exchange import orthogonalize_spread
from muonclip_jax._spread.plan import DevicesPerMatrix, Place, Plan, Stack, choose

# Entries of a stack on one device. Beyond it matrices make no larger kernels, only more
# temporaries: parameters go to a new stack.
_LARGEST_STACK = 2**27


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values"],
    meta_fields=["rows", "cols", "spec"],
)
@dataclass(frozen=True)
class MatrixArray:
    """Equal matrices of one parameter, `[batch..., rows..., cols...]`.

    Attributes:
      values: The array, or its `jax.ShapeDtypeStruct`.
      rows: How many of its axes make up the rows; in a Flax kernel, the input.
      cols: How many make up the columns.
      spec: How it is split over the mesh; None: not at all, or nobody knows.
    """

    values: Any
    rows: int = 1
    cols: int = 1
    spec: PartitionSpec | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(count, in, out)."""
        return tuple(math.prod(self.values.shape[i] for i in axes) for axes in self._axes)

    @property
    def turned(self) -> bool:
        """Whether its columns are the shorter side."""
        _, rows, cols = self.shape
        return rows > cols

    def here(self, mesh: Mapping[str, int]) -> tuple[Place, ...]:
        """How each axis of the mesh splits them."""
        sides = ("cols", "rows") if self.turned else ("rows", "cols")
        places = dict.fromkeys(mesh, "copies")
        for place, which in zip(("stack", *sides), range(3), strict=True):
            places |= dict.fromkeys(self._split(which), place)
        return tuple(places[axis] for axis in mesh)

    def flat(self, values: jax.Array) -> jax.Array:
        """The values, or a device's share of them, as wide matrices `[count, n, m]`."""
        batch, rows, cols = (math.prod(values.shape[i] for i in axes) for axes in self._axes)
        matrices = values.reshape(batch, rows, cols)
        return matrices.mT if self.turned else matrices

    def unflat(self, matrices: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse of `flat`, in the shape and dtype of `like`."""
        return (matrices.mT if self.turned else matrices).reshape(like.shape).astype(like.dtype)

    @property
    def _axes(self) -> tuple[range, range, range]:
        """Which axes of the array are batch, rows and columns."""
        ends = (0, self.values.ndim - self.rows - self.cols, self.values.ndim - self.cols)
        return tuple(map(range, ends, (*ends[1:], self.values.ndim)))

    def _split(self, which: int) -> tuple[str, ...]:
        """The mesh axes that split batch, rows or columns."""
        spec = tuple(self.spec or ())
        entries = (spec[i] for i in self._axes[which] if i < len(spec))
        return tuple(axis for entry in entries for axis in mesh_axes(entry))


def plans(
    arrays: Sequence[MatrixArray],
    mesh: AbstractMesh | None,
    how: NewtonSchulz,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> Iterator[tuple[Plan, list[int]]]:
    """The stacks that `orthogonalize_all` makes: how each is spread, and which arrays are in it.

    Raises:
      TypeError, ValueError: As `orthogonalize`; as `choose`; a shape in `devices_per_matrix` that
        no batch has.
    """
    dtypes = [jnp.dtype(how.for_matrices(batch.values).dtype) for batch in arrays]
    if isinstance(devices_per_matrix, Mapping):
        _check_shapes(devices_per_matrix, arrays)
    steps = len(how.schedule.coefficients)
    free = () if mesh is None else free_axes(mesh)
    sizes = {axis: mesh.shape[axis] for axis in free if mesh.shape[axis] > 1}
    groups: dict[Any, list[int]] = {}
    for i, batch in enumerate(arrays):
        kind = (*sorted(batch.shape[1:]), batch.here(sizes), dtypes[i])
        # What nobody knows the place of stays by itself, where XLA has it.
        alone = i if sizes and batch.spec is None else None
        groups.setdefault((*kind, alone), []).append(i)
    for (n, m, here, item, alone), members in groups.items():
        if alone is not None:
            unknown = ("unknown",) * len(sizes)
            stack = Stack(arrays[alone].shape[0], n, m, tuple(sizes.items()), unknown)
            yield Plan(stack, (), steps), members
            continue
        for some in _limited(members, [arrays[i] for i in members], math.prod(sizes.values())):
            count = sum(arrays[i].shape[0] for i in some)
            stack = Stack(count, n, m, tuple(sizes.items()), here, item.itemsize)
            yield choose(stack, steps, devices_per_matrix), some


def orthogonalize_all(
    arrays: Sequence[MatrixArray],
    how: NewtonSchulz,
    *,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> list[jax.Array]:
    """`orthogonalize` for many parameters: those of one matrix shape make one stack.

    On a mesh every device orthogonalizes its share of each stack. Matrices go there and back in
    one all-to-all each, in `how.dtype`; see `plan`.

    Args:
      arrays: The matrices. On a mesh `spec` is how they are split over it; what is split
        otherwise costs copies.
      how: The polynomials, dtype and method. The method is that of the matrices that one device
        holds; teams have one method.
      devices_per_matrix: As in `choose`.

    Returns:
      Arrays with the shapes and dtypes of the values.

    Raises:
      TypeError, ValueError: As `orthogonalize` and `choose`.
    """
    results: dict[int, jax.Array] = {}
    mesh = mesh_of([batch.values for batch in arrays])
    for plan, members in plans(arrays, mesh, how, devices_per_matrix):
        some = [arrays[i] for i in members]
        this = how.for_matrices(some[0].values)
        run = functools.partial(_stack, arrays=some, plan=plan, how=this)
        if "unknown" in plan.stack.here:
            run = functools.partial(_by_xla, some[0], how=this)
        elif plan.factors:
            specs = tuple(batch.spec for batch in some)
            run = jax.shard_map(
                run,
                mesh=mesh,
                in_specs=specs,
                out_specs=specs,
                axis_names=set(free_axes(mesh)),
                check_vma=False,
            )
        results |= zip(members, run(*(batch.values for batch in some)), strict=True)
    return [results[i] for i in range(len(arrays))]


def _stack(
    *values: jax.Array,
    arrays: Sequence[MatrixArray],
    plan: Plan,
    how: NewtonSchulz,
) -> tuple[jax.Array, ...]:
    """One stack, or a device's share of it."""
    flat = [batch.flat(x) for batch, x in zip(arrays, values, strict=True)]
    if plan.factors:
        done = orthogonalize_spread(concatenate(flat, 0), plan, how)
    else:
        stack = concatenate([_compact(x, jnp.dtype(how.dtype)) for x in flat], 0)
        done = iterate_stack(stack, how)
    starts = list(map(jnp.uint32, [0, *itertools.accumulate(map(len, flat[:-1]))]))
    # On CPU every new kernel takes some 9 ms to compile. A slice at a constant place is one of its
    # own; at places that XLA cannot know, slices share one.
    starts = lax.platform_dependent(starts, cpu=_hidden, default=lambda starts: starts)
    sizes = map(len, flat)
    parts = [lax.dynamic_slice_in_dim(done, *part) for part in zip(starts, sizes, strict=True)]
    return tuple(b.unflat(p, x) for b, p, x in zip(arrays, parts, values, strict=True))


def _hidden(numbers: list[jax.Array]) -> list[jax.Array]:
    """The numbers, the first of which is 0, from a loop that ends before it begins."""
    return lax.while_loop(lambda x: x[0] > 0, lambda x: [*x[1:], x[0]], numbers)


def _compact(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounded before it is copied, if that cannot overflow."""
    return x.astype(dtype) if jnp.finfo(dtype).maxexp >= jnp.finfo(x.dtype).maxexp else x


def _by_xla(batch: MatrixArray, values: jax.Array, how: NewtonSchulz) -> tuple[jax.Array]:
    """A parameter whose batch axes stay apart, since they may be split over a mesh."""
    leading = values.shape[: values.ndim - batch.rows - batch.cols]
    matrices = values.reshape(*leading, *batch.shape[1:])
    done = orthogonalize(matrices, how.schedule, dtype=how.dtype, method=how.method)
    return (done.reshape(values.shape),)


def _limited(members: list[int], arrays: list[MatrixArray], devices: int) -> Iterator[list[int]]:
    """The members in groups of at most `_LARGEST_STACK` entries a device, or one alone."""
    some: list[int] = []
    entries = 0
    for member, batch in zip(members, arrays, strict=True):
        size = batch.values.size // devices
        if some and entries + size > _LARGEST_STACK:
            yield some
            some, entries = [], 0
        some, entries = [*some, member], entries + size
    yield some


def _check_shapes(wanted: Mapping[tuple[int, int], int], arrays: Sequence[MatrixArray]) -> None:
    shapes = sorted({tuple(sorted(batch.shape[1:])) for batch in arrays})
    for shape in wanted:
        if tuple(sorted(shape)) not in shapes:
            raise ValueError(
                f"devices_per_matrix names matrices {list(shape)}, and there are none; there are "
                f"{', '.join(map(str, map(list, shapes)))}."
            )
