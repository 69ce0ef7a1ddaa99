"""One parameter as the matrices that Muon orthogonalizes.

There are three ways to say how a parameter is read: a pattern in einops notation, Optax's
`MuonDimensionNumbers`, and the pieces of an attention layout. All become one thing, a `MatrixSpec`.

    q_proj [64, 32], 4 heads, per head   one view   in (heads features) -> heads in features
    the same, whole                      one view   in (heads features) -> in (heads features)
    kv_up [16, 96], 4 heads              two views  k_nope: features 0:16, v: features 16:24
    the same as it is stored             one view   in (heads features) -> in (heads features)
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._core import paths
from muonclip_jax._core.axes import (
    MatrixPattern,
    Names,
    View,
    is_stack,
    names_of,
    stack_names,
)
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import Role, family
from muonclip_jax._spread.moves import Way
from muonclip_jax._spread.stacks import MatrixArray


@dataclass(frozen=True)
class MatrixSpec:
    """How one parameter is read as matrices.

    Attributes:
      path: The parameter.
      shape: Its shape.
      views: Its kinds of matrices, which together are all of it.
      roles: What each of them is to attention, `"q"` or `"k_nope"`; `""` outside of it.
    """

    path: Path
    shape: tuple[int, ...]
    views: tuple[View, ...]
    roles: tuple[str, ...]

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(count, in, out) of each kind of matrix."""
        return tuple(view.matrices for view in self.views)

    def __repr__(self) -> str:
        kinds = (
            f"{role} {count} × [{ins}, {outs}]".lstrip()
            for role, (count, ins, outs) in zip(self.roles, self.shapes, strict=True)
        )
        return f"MatrixSpec({paths.show(self.path)} {self.shape}: {', '.join(kinds)})"


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
    spec = MatrixSpec(path, shape, views, ("",) * len(views))
    _check_covered(spec, "its patterns", "Add a pattern, or correct their select=.")
    return spec


def spec_of_parts(parts: Sequence[Part], per_head: Collection[Role]) -> MatrixSpec:
    """How a parameter is read that a layout describes.

    Args:
      parts: The pieces of it.
      per_head: Roles whose heads are matrices of their own, `[in, features]` (of `o`,
        `[features, out]`); `q` and `k` are also MLA's parts of them. The heads of the others stand
        side by side in one matrix, `[in, heads*features]`.

    Raises:
      ValueError: The pieces are not all of it.
    """
    views = tuple(
        part.view if family(part.role) & set(per_head) else _heads_together(part) for part in parts
    )
    kernel = parts[0]
    spec = MatrixSpec(kernel.kernel, kernel.shape, views, tuple(part.role for part in parts))
    _check_covered(
        spec,
        f"the layout's pieces ({', '.join(spec.roles)})",
        'Add the missing piece (role "v", "gate", ...), or give this parameter a routing rule.',
    )
    return spec


def spec_of_kernel(parts: Sequence[Part]) -> MatrixSpec:
    """How a parameter is read that a layout describes, when it is one matrix as it is stored.

    Args:
      parts: The pieces of it.

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
    return MatrixSpec(kernel, shape, (views[0],), ("",))


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


def _heads_together(part: Part) -> View:
    """All heads as one matrix: their axes are columns, or of `o` rows."""
    view, heads = part.view, part.head_axes
    batch = tuple(name for name in view.batch if name not in heads)
    if part.role == "o":
        return replace(view, batch=batch, rows=(*heads, *view.rows))
    return replace(view, batch=batch, cols=(*heads, *view.cols))


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
