"""One parameter as the matrices that Muon orthogonalizes.

There are three ways to say how a parameter is read: a pattern in einops notation, Optax's
`MuonDimensionNumbers`, and the pieces of an attention layout. All become one thing, a `MatrixSpec`.

    q_proj [64, 32], 4 heads, per head   one view   in (heads features) -> heads in features
    the same, two heads a matrix         one view   the heads divided: groups in (members features)
    the same, whole                      one view   in (heads features) -> in (heads features)
    kv_up [16, 96], 4 heads              two views  k_nope: features 0:16, v: features 16:24
    the same as it is stored             one view   in (heads features) -> in (heads features)
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._core import paths
from muonclip_jax._core.axes import (
    GROUPS,
    MEMBERS,
    MatrixPattern,
    Names,
    View,
    is_stack,
    names_of,
    stack_names,
)
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import Role
from muonclip_jax._parameters.granularity import Granularity, Heads, groups_of, heads_of
from muonclip_jax._spread.moves import Way, way_to_matrices
from muonclip_jax._spread.stacks import MatrixArray


@dataclass(frozen=True)
class MatrixKind:
    """Matrices of one shape in a parameter."""

    role: str  # the piece or pieces that they are, "" for a parameter that is not split into any
    count: int
    ins: int
    outs: int
    heads: int  # that share a matrix; 0 where there are none, or not as many of all its pieces

    def __str__(self) -> str:
        heads = f" of {self.heads} heads" * (self.heads > 1)
        return f"{self.role} {self.count} × [{self.ins}, {self.outs}]{heads}".lstrip()


@dataclass(frozen=True)
class MatrixSpec:
    """How one parameter is read as matrices.

    Attributes:
      path: The parameter.
      shape: Its shape.
      views: Its kinds of matrices, which together are all of it.
      roles: What each of them is to attention, `"q"` or `"q_nope + q_rope"`; `""` outside of it.
      heads: How many heads share each; 0 where there are none, or not as many of all its roles.
    """

    path: Path
    shape: tuple[int, ...]
    views: tuple[View, ...]
    roles: tuple[str, ...]
    heads: tuple[int, ...]

    @property
    def kinds(self) -> tuple[MatrixKind, ...]:
        """For people and programs, each kind of matrix."""
        return tuple(map(MatrixKind, self.roles, *zip(*self.shapes, strict=True), self.heads))

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(count, in, out) of each kind of matrix."""
        return tuple(view.matrices for view in self.views)

    def __repr__(self) -> str:
        kinds = ", ".join(map(str, self.kinds))
        return f"MatrixSpec({paths.show(self.path)} {self.shape}: {kinds})"


Pattern = str | MatrixPattern | MuonDimensionNumbers | MatrixSpec
"""One way of reading a parameter."""


def spec_of(
    path: Path, shape: tuple[int, ...], how: Pattern | Sequence[Pattern] | None
) -> MatrixSpec | None:
    """How a parameter is read, whichever way somebody said it; None: not by Muon.

    Raises:
      TypeError: It is none of these.
      ValueError: It does not fit the parameter, with path, shape and fix.
    """
    if how is None:
        return None
    if isinstance(how, MatrixSpec):
        if (how.path, how.shape) != (path, shape):
            raise ValueError(
                f"{paths.show(path)} of shape {shape} cannot be read with {how!r}, which was made "
                "for another parameter."
            )
        return how
    patterns: Any = how
    if not isinstance(how, list | tuple) or isinstance(how, MuonDimensionNumbers):  # a tuple, too
        patterns = [how]
    views = tuple(_view(path, shape, pattern) for pattern in patterns)
    spec = MatrixSpec(path, shape, views, ("",) * len(views), (0,) * len(views))
    _check_covered(spec, "its patterns", "Add a pattern, or correct their select=.")
    return spec


def spec_of_parts(parts: Sequence[Part], granularity: Granularity) -> MatrixSpec:
    """How a parameter is read that a layout describes.

    Args:
      parts: The pieces of it.
      granularity: Which of its heads and pieces make one matrix. One head of one piece is
        `[in, features]` (of `o`, `[features, out]`); several stand side by side.

    Raises:
      ValueError: The pieces are not all of it, or the granularity does not fit them.
    """
    if granularity.together == "kernel":
        return _spec_of_kernel(parts)
    groups = _groups(parts, granularity)
    numbers: list[Heads] = [_heads_of(few, granularity) for few in groups]
    joined = (_side_by_side(few, granularity) for few in groups)
    spec = MatrixSpec(
        parts[0].kernel,
        parts[0].shape,
        tuple(map(_in_groups, joined, numbers)),
        tuple(map(_label, groups)),
        tuple(map(_heads_told, groups, numbers)),
    )
    _check_covered(
        spec,
        f"the layout's pieces ({', '.join(part.role for part in parts)})",
        'Add the missing piece (role "v", "gate", ...), or give this parameter a routing rule.',
    )
    return spec


def split(x: jax.Array, spec: MatrixSpec, way: Way = Way()) -> list[MatrixArray]:  # noqa: B008
    """The matrices in a parameter, those of each kind together, with where they are on the mesh.

    Args:
      x: The array, on a mesh in the sharding `way.sharding`.
      spec: How to read it.
      way: How the parameter comes to this sharding, from `way_to_matrices`.
    """

    def of_view(view: View) -> MatrixArray:
        values, split = view.take(x), view.spec(way.sharding)
        sent = way.bytes_sent(values, split)
        return MatrixArray(values, len(view.rows), len(view.cols), split, sent)

    return list(map(of_view, spec.views))


def join(x: jax.Array, values: Sequence[jax.Array], spec: MatrixSpec) -> jax.Array:
    """The inverse of `split`: `x` with the values in place of its matrices."""
    for view, matrices in zip(spec.views, values, strict=True):
        x = view.put(x, matrices)
    return x


def take_matrices(
    leaves: Mapping[Path, jax.Array],
    specs: Mapping[Path, MatrixSpec],
    shardings: Mapping[Path, NamedSharding | None],
) -> tuple[list[MatrixArray], Callable[[Sequence[jax.Array]], dict[Path, jax.Array]]]:
    """The matrices of all parameters, and the way back.

        q [64, 4·8] stored as its inputs' halves ─► [4 heads, 64, 8] with where they are
        ─► back into [64, 4·8], stored as before

    Call it inside `in_auto_axes`: on Explicit axes matrices cannot be taken out.

    Args:
      leaves: Arrays like the parameters.
      specs: How each of them is read.
      shardings: How each is split; None: nobody knows, or there is one device.

    Returns:
      The matrices, those of each kind together; and a function from as many arrays of the same
      shapes to the parameters that have them in their place.
    """
    ways = {path: way_to_matrices(specs[path].views, shardings[path]) for path in leaves}
    moved = {path: ways[path].there(x) for path, x in leaves.items()}
    of_each = {path: split(x, specs[path], ways[path]) for path, x in moved.items()}

    def put_back(values: Sequence[jax.Array]) -> dict[Path, jax.Array]:
        rest = iter(values)
        return {
            path: ways[path].back(join(x, [next(rest) for _ in of_each[path]], specs[path]))
            for path, x in moved.items()
        }

    return [array for arrays in of_each.values() for array in arrays], put_back


def change_matrices(
    change: Callable[[list[MatrixArray]], Sequence[jax.Array]],
    tree: Any,
    specs: Mapping[Path, MatrixSpec],
    shardings: Mapping[Path, NamedSharding | None],
) -> Any:
    """The tree with what `change` makes of all its matrices in their place; see `take_matrices`."""
    arrays, put_back = take_matrices(dict(paths.leaves(tree)), specs, shardings)
    done = put_back(change(arrays))
    return paths.map_with_path(lambda path, _: done[path], tree)


def by_path(
    values: Iterable[jax.Array], specs: Mapping[Path, MatrixSpec], dtype: DTypeLike | None = None
) -> dict[str, tuple[jax.Array, ...]]:
    """What each kind of matrices has, in the order of `take_matrices`, by its parameter's path."""
    rest = iter(values)
    return {
        paths.show(path): tuple(jnp.asarray(next(rest), dtype) for _ in spec.views)
        for path, spec in specs.items()
    }


def is_pattern(node: Any) -> bool:
    """Whether a node of a tree of dimension numbers is an entry: a pattern, or None."""
    return node is None or isinstance(node, Pattern)


def _view(path: Path, shape: tuple[int, ...], pattern: Any) -> View:
    if isinstance(pattern, MuonDimensionNumbers):
        return _view_of_axes(path, shape, pattern)
    if isinstance(pattern, str):
        pattern = MatrixPattern(pattern)
    if not isinstance(pattern, MatrixPattern):
        raise TypeError(
            f"{paths.show(path)} of shape {shape} cannot be read with {pattern!r}: give a pattern "
            'such as "experts in out", a muonclip_jax.MatrixPattern, an '
            "optax.contrib.MuonDimensionNumbers, or None for the other optimizer."
        )
    return pattern.fit(path, shape)


def _view_of_axes(path: Path, shape: tuple[int, ...], numbers: MuonDimensionNumbers) -> View:
    """Of Optax's dimension numbers: reduction axes are the rows, output axes the columns."""
    as_tuple = lambda axis: (axis,) if isinstance(axis, int) else tuple(axis)  # noqa: E731
    sides = as_tuple(numbers.reduction_axis), as_tuple(numbers.output_axis)
    both = sides[0] + sides[1]
    in_range = all(-len(shape) <= axis < len(shape) for axis in both)
    if not in_range or len({axis % len(shape) for axis in both}) < len(both) or len(both) < 2:
        raise ValueError(
            f"{paths.show(path)} of shape {shape} cannot be read with {numbers}: reduction and "
            f"output axes must be different axes in [-{len(shape)}, {len(shape) - 1}]."
        )
    axes = stack_names(len(shape))
    names = [name for (name,) in axes]
    rows, cols = (tuple(names[axis] for axis in side) for side in sides)
    batch = tuple(name for name in names if name not in rows + cols)
    return View(axes, dict(zip(names, shape, strict=True)), {}, batch, rows, cols)


def _label(parts: Sequence[Part]) -> str:
    return " + ".join(part.role for part in parts)


def _groups(parts: Sequence[Part], granularity: Granularity) -> list[list[Part]]:
    """The parts that share a matrix, in the order of the first of each group."""
    groups: dict[tuple[Role, ...], list[Part]] = {}
    for part in parts:
        group = next((few for few in groups_of(granularity) if part.role in few), (part.role,))
        groups.setdefault(group, []).append(part)
    return list(groups.values())


def _heads_of(parts: Sequence[Part], granularity: Granularity) -> Heads:
    """How many heads share a matrix.

    Raises:
      ValueError: Not as many of one role as of another, or a number that does not divide them.
    """
    numbers: dict[Heads, Part] = {
        heads_of(granularity, part.role): part for part in parts if part.head_axes
    }
    kernel = f"{paths.show(parts[0].kernel)} of shape {parts[0].shape}: {granularity}"
    if len(numbers) > 1:
        raise ValueError(
            f"{kernel} gives {_label(parts)}, which are to share a matrix, different numbers of "
            "heads. Give heads= the same for all of them."
        )
    for number, part in numbers.items():
        if isinstance(number, int) and part.heads % number:
            raise ValueError(
                f"{kernel} wants matrices of {number} heads, and {part.role} has {part.heads}, "
                "which they do not divide. Say it for each role, "
                f"heads={{'{part.role}': 'all', ...}}; what is not named has 1."
            )
    return next(iter(numbers)) if numbers else "all"


def _heads_told(parts: Sequence[Part], number: Heads) -> int:
    """The same for people: 0 where there are none, or not as many of all roles."""
    counts = {part.heads for part in parts if part.head_axes}
    if len(counts) != 1:
        return 0
    return counts.pop() if number == "all" else number


def _side_by_side(parts: Sequence[Part], granularity: Granularity) -> Part:
    """Several parts of one kernel as one: of each head, or of all, their features in a row.

    Raises:
      ValueError: They are cut from the kernel otherwise.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    views = [part.view for part in parts]
    whole = {name: slice(0, size) for name, size in first.view.sizes.items()}
    cuts = [{**whole, **view.cuts} for view in views]
    names = [name for name in whole if any(cut[name] != cuts[0][name] for cut in cuts)]
    alike = len(names) == 1 and all(
        replace(view, cuts=first.view.cuts) == first.view for view in views
    )
    row = sorted((cut[names[0]] for cut in cuts), key=lambda cut: cut.start) if alike else []
    of_heads = {*names} & {*first.head_axes} and heads_of(granularity, first.role) != "all"
    if (
        not alike
        or any(a.stop != b.start for a, b in itertools.pairwise(row))
        or (of_heads and any(cut.stop - cut.start > 1 for cut in row))
    ):
        raise ValueError(
            f"{paths.show(first.kernel)} of shape {first.shape}: {_label(parts)} are to share a "
            f"matrix ({granularity}), and do not lie side by side in each head. Take them out of "
            "together=, or give this parameter a routing rule."
        )
    (name,) = names
    joined = {**first.view.cuts, name: slice(row[0].start, row[-1].stop)}
    joined = {name: cut for name, cut in joined.items() if cut != whole[name]}
    view = replace(first.view, cuts=joined)
    if name in first.head_axes:
        view = _beside(view, (name,), (name,), first.role)
    return replace(first, view=view)


def _in_groups(part: Part, number: Heads) -> View:
    """So many heads side by side in each matrix."""
    view, names = part.view, part.head_axes
    if number == 1:
        return view
    if number in ("all", part.heads):
        return _beside(view, names, names, part.role)
    sizes = {**view.sizes, GROUPS: part.heads // number, MEMBERS: number}
    grouped = _beside(view, names, (MEMBERS,), part.role)
    return replace(grouped, sizes=sizes, batch=(*grouped.batch, GROUPS), divided=names)


def _beside(view: View, names: Names, side: Names, role: Role) -> View:
    """The view with these names no longer a batch; the columns, or of `o` rows, begin with
    `side`."""
    batch = tuple(name for name in view.batch if name not in names)
    if role == "o":
        return replace(view, batch=batch, rows=(*side, *view.rows))
    return replace(view, batch=batch, cols=(*side, *view.cols))


def _spec_of_kernel(parts: Sequence[Part]) -> MatrixSpec:
    """How a parameter is read that is one matrix as it is stored.

    Raises:
      ValueError: Pieces whose inputs (of `o`, outputs) lie along different axes.
    """
    kernel, shape = parts[0].kernel, parts[0].shape
    views = [_kernel_of(part) for part in parts]
    if len({(_axes_of(view, view.rows), _axes_of(view, view.cols)) for view in views}) > 1:
        roles = ", ".join(part.role for part in parts)
        raise ValueError(
            f"{paths.show(kernel)} of shape {shape} is no one matrix: the inputs of its pieces "
            f"({roles}) lie along different axes. Give this parameter a routing rule."
        )
    heads = _heads_told(parts, "all")
    return MatrixSpec(kernel, shape, (views[0],), (_label(parts),), (heads,))


def _kernel_of(part: Part) -> View:
    """All that the parameter holds as one matrix: what is no input is a column, or of `o` what is
    no output is a row."""
    view = part.view
    batch = tuple(name for name in view.batch if is_stack(name))
    fixed = view.cols if part.role == "o" else view.rows
    others = tuple(name for name in names_of(view.axes) if name not in (*batch, *fixed))
    rows, cols = (others, fixed) if part.role == "o" else (fixed, others)
    return replace(view, cuts={}, batch=batch, rows=rows, cols=cols)


def _axes_of(view: View, names: Names) -> tuple[int, ...]:
    """The axes of the array on which these names are."""
    return tuple(i for i, axis in enumerate(view.axes) if set(axis) & set(names))


def _check_covered(spec: MatrixSpec, readers: str, fix: str) -> None:
    """Raises ValueError unless every entry of the parameter is in exactly one view."""
    covered = functools.reduce(np.add, (view.entries() for view in spec.views))
    if covered.max() > 1:
        raise ValueError(f"{paths.show(spec.path)} of shape {spec.shape}: {readers} overlap. {fix}")
    if not covered.all():
        raise ValueError(
            f"{paths.show(spec.path)} of shape {spec.shape}: {np.sum(covered == 0)} of its "
            f"{covered.size} features belong to none of {readers}, so Muon cannot tell their "
            f"matrix. {fix}"
        )
