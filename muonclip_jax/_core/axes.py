"""Named axes in einops notation: which entries of an array are which matrices.

    "experts in out"                                    a stack of matrices [in, out]
    "height width channels out -> (height width channels) out"      a convolution as one matrix
    "in (part out) -> part in out"                      a fused kernel as one matrix a part
    "... in out"                                        whatever stands in front is a stack

The last two axes of the result are the rows and the columns of the matrices, all others a batch.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import einops
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax._core import paths
from muonclip_jax._core.meshes import mesh_axes
from muonclip_jax._core.options import check_count
from muonclip_jax._core.paths import Path

Names = tuple[str, ...]
Axes = tuple[Names, ...]  # the names on each axis of an array
Cut = int | tuple[int | None, int | None]

_STACK = "stack"  # stack0, stack1, … are the axes that "..." stands for
GROUPS, MEMBERS = "groups_of_members", "members_of_a_group"  # what `View.divided` becomes
_TOKEN = re.compile(r"\(([^()]*)\)|([^\s()]+)")
_ELLIPSIS = ("...",)


@dataclass(frozen=True)
class View:
    """Some entries of an array as a batch of matrices.

    Here are the keys of a fused kernel [64, 96], which holds, for each of 2 groups, 4 queries, a
    key and a value of 8 features:

        axes   in (groups slots features)       sizes  in 64, groups 2, slots 6, features 8
        cuts   slots 4:5                        batch  groups slots, rows in, cols features
        take   [64, 96] → [64, 2, 6, 8] → [64, 2, 1, 8] → [2, 1, 64, 8]

    Its queries, two heads a matrix, are `divided`: groups and slots (0:4) are 8 heads together, 4
    `GROUPS` of 2 `MEMBERS`; batch `GROUPS`, rows in, cols `MEMBERS` features: [4, 64, 2, 8].

    Attributes:
      axes: The names on each axis of the array.
      sizes: The length of every named axis.
      cuts: For names of which not all belongs to the view, the slice that does.
      batch: The names that tell the matrices apart, in order.
      rows: Those of a matrix's rows; in a Flax kernel `[in, out]`, the input. Empty: one row.
      cols: Those of its columns.
      divided: Names that, after the cut, count through as one axis, which is then divided into
        `GROUPS` and `MEMBERS`; these stand for them in `batch`, `rows` and `cols`.
    """

    axes: Axes
    sizes: Mapping[str, int]
    cuts: Mapping[str, slice]
    batch: Names
    rows: Names
    cols: Names
    divided: Names = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""
        return tuple(math.prod(self.sizes[name] for name in axis) for axis in self.axes)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(count, rows, columns)."""
        count, rows, cols = map(self.length, (self.batch, self.rows, self.cols))
        return count, rows, cols

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Of one number for each matrix, as `take` has them."""
        return tuple(self.length((name,)) for name in self.batch)

    def length(self, names: Names) -> int:
        """How many entries of these axes together belong to the view."""
        return math.prod(len(range(self.sizes[name])[self._cut(name)]) for name in names)

    def take(self, x: Any) -> Any:
        """`[batch..., rows..., cols...]`, every name an axis, of JAX's or NumPy's array."""
        unfolded = _rearrange(x, self.axes, self._unfolded, self.sizes)
        if self.cuts:
            unfolded = unfolded[tuple(self._cut(name) for name in self._names)]
        if not self.divided:
            return _rearrange(unfolded, self._unfolded, self._taken)
        members = {MEMBERS: self.sizes[MEMBERS]}
        counted = _rearrange(unfolded, self._unfolded, self._counted(self.divided))
        return _rearrange(counted, self._counted((GROUPS, MEMBERS)), self._taken, members)

    def put(self, x: jax.Array, values: jax.Array) -> jax.Array:
        """`x` with the view replaced, in its dtype: `put(x, take(x))` is `x`."""
        values = values.astype(x.dtype)
        if self.divided:
            lengths = {name: self.length((name,)) for name in self.divided}
            counted = _rearrange(values, self._taken, self._counted((GROUPS, MEMBERS)))
            values = _rearrange(counted, self._counted(self.divided), self._unfolded, lengths)
        else:
            values = _rearrange(values, self._taken, self._unfolded)
        if self.cuts:
            unfolded = _rearrange(x, self.axes, self._unfolded, self.sizes)
            starts = [self._cut(name).start or 0 for name in self._names]
            values = jax.lax.dynamic_update_slice(unfolded, values, starts)
        return _rearrange(values, self._unfolded, self.axes)

    def entries(self) -> np.ndarray:
        """1 for each entry of the array that belongs to the view, else 0. Axes of which nothing is
        cut have length 1: it broadcasts against the array."""
        whole = {name for axis in self.axes if not self.cuts.keys() & set(axis) for name in axis}
        some = self.shrunk(whole)
        claimed = np.zeros([some.sizes[name] for name in some._names], int)
        claimed[tuple(map(some._cut, some._names))] = 1
        return _rearrange(claimed, some._unfolded, some.axes)

    def shrunk(self, names: set[str]) -> "View":
        """The same view of an array in which these axes, of which nothing is cut, have length 1."""
        return replace(self, sizes={**self.sizes, **dict.fromkeys(names, 1)})

    def split(self, sharding: NamedSharding) -> dict[str, tuple[str, ...]]:
        """The mesh axes that split each name evenly.

        Mesh axes that split what the view is cut from, or of several names on one axis any but the
        leftmost, do not appear: the view is to be gathered over these.
        """
        split: dict[str, tuple[str, ...]] = dict.fromkeys(self._names, ())
        for names, entry in zip(self.axes, sharding.spec, strict=False):
            left = {name: self.sizes[name] for name in names}
            for mesh_axis in mesh_axes(entry):
                name = next((name for name in names if left[name] > 1), names[0])
                left[name], rest = divmod(left[name], sharding.mesh.shape[mesh_axis])
                if rest or name in self.cuts:
                    break
                split[name] += (mesh_axis,)
        return self._split_of_groups(split, sharding.mesh.shape) if self.divided else split

    def _split_of_groups(
        self, split: Mapping[str, tuple[str, ...]], devices: Mapping[str, int]
    ) -> dict[str, tuple[str, ...]]:
        """The same, where mesh axes that would split a group do not appear."""
        followed = {**split, **dict.fromkeys((*self.divided, GROUPS, MEMBERS), ())}
        groups = self.sizes[GROUPS]
        for name in self.divided:
            for mesh_axis in split[name]:
                groups, rest = divmod(groups, devices[mesh_axis])
                if rest:
                    return followed
                followed[name] += (mesh_axis,)
                followed[GROUPS] += (mesh_axis,)
            if math.prod(devices[axis] for axis in split[name]) < self.length((name,)):
                break
        return followed

    def spec(self, sharding: NamedSharding | None) -> PartitionSpec | None:
        """How `take` of an array with this sharding is split over the mesh: as the array is, where
        nothing has to move for it."""
        if sharding is None:
            return None
        split = self.split(sharding)
        return PartitionSpec(*(split[name] or None for (name,) in self._taken))

    def _cut(self, name: str) -> slice:
        return self.cuts.get(name, slice(None))

    @property
    def _names(self) -> Names:
        return tuple(name for axis in self.axes for name in axis)

    @property
    def _unfolded(self) -> Axes:
        return tuple((name,) for name in self._names)

    def _counted(self, names: Names) -> Axes:
        """These as one axis in front, in place of those that are divided."""
        return names, *((name,) for name in self._names if name not in self.divided)

    @property
    def _taken(self) -> Axes:
        return tuple((name,) for name in (*self.batch, *self.rows, *self.cols))


@dataclass(frozen=True)
class MatrixPattern:
    """How to read the matrices in one parameter, in einops notation.

    The last two axes on the right (without an arrow: of the pattern) are a matrix's rows and
    columns, all others tell the matrices apart. Flax kernels are `[in, out]`: inputs first.

    | parameter | pattern |
    | --- | --- |
    | a stack of experts `[E, in, out]` | `"experts in out"` |
    | the same in scanned layers `[L, E, in, out]` | `"... in out"` |
    | a convolution `[h, w, in, out]`, as one matrix | `"h w in out -> (h w in) out"` |
    | gate and up in one kernel `[in, 2*out]` | `MatrixPattern("in (part out) -> part in out", {"part": 2})` |
    | heads in a flat kernel `[in, heads*features]` | `MatrixPattern("in (heads features) -> heads in features", {"heads": 8})` |

    Cost: none; a pattern is read when a step is traced.

    Attributes:
      pattern: Names of the parameter's axes, and of the result's. A pattern without `sizes` and
        `select` may be written as text wherever a `MatrixPattern` is asked for.
      sizes: Lengths of named axes: needed where one axis holds several, checked elsewhere.
      select: For a named axis, an index or `(start, stop)`, as in Python slices: only these
        entries. Several patterns, as a list, may share a parameter; together they must be all of
        it.

    Raises:
      ValueError: A pattern that is none, or sizes and selects that do not go with it.

    Example:
      >>> rule = mc.MatrixPattern("in (part out) -> part in out", {"part": 2})
      >>> params = {"mlp": {"gate_up": {"kernel": jnp.ones((64, 512))}}}
      >>> row, = mc.describe(params, rules={"*/gate_up/kernel": rule})
      >>> print(row.matrices[0])
      2 × [64, 256]
    """  # noqa: E501

    pattern: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    select: Mapping[str, Cut] = field(default_factory=dict)

    def __post_init__(self):
        freeze(self, "sizes", "select")
        if not isinstance(self.pattern, str):
            raise TypeError(
                f'MatrixPattern: pattern={self.pattern!r} must be text such as "experts in out".'
            )
        check_sizes_and_select(repr(self), names_of(self._left), self.sizes, self.select)
        left, right = names_of(self._left), names_of(self._right)
        problem = None
        if sorted(left) != sorted(right):
            problem = "must have the same names on both sides of its arrow"
        elif len(self._right) - (_ELLIPSIS in self._right) < 2:
            problem = "must end in the two axes of a matrix"
        elif _ELLIPSIS in self._left[1:] or _ELLIPSIS in self._right[1:]:
            problem = "can have ... in front only"
        if problem:
            raise ValueError(f"{self!r} {problem}.")

    @property
    def _left(self) -> Axes:
        return parse(repr(self), self.pattern.partition("->")[0])

    @property
    def _right(self) -> Axes:
        return parse(repr(self), self.pattern.partition("->")[2] or self.pattern)

    def fit(self, path: Path, shape: tuple[int, ...]) -> View:
        """The matrices of the parameter at this path, of this shape.

        Raises:
          ValueError: The shape does not have the axes, the sizes or the slice of the pattern.
        """
        left, right = self._left, self._right
        stack: Axes = ()
        if _ELLIPSIS in left:
            stack = stack_names(len(shape) - len(left) + 1)
            left, right = stack + left[1:], stack + right[1:]
        if len(shape) != len(left):
            raise misfit(path, shape, f"does not have the axes of {self}", "Correct the pattern.")
        sizes, cuts = measure(
            path, shape, left, dict(self.sizes), dict(self.select), f"Give it in sizes= of {self}."
        )
        *batch, rows, cols = right
        return View(left, sizes, cuts, names_of(tuple(batch)), rows, cols)

    def __repr__(self) -> str:
        told = [
            repr(self.pattern),
            *(f"{dict(more)}" for more in (self.sizes, self.select) if more),
        ]
        return f"MatrixPattern({', '.join(told)})"


def parse(owner: str, text: str) -> Axes:
    """`"... in (heads features)"` → `(("...",), ("in",), ("heads", "features"))`.

    Raises:
      ValueError: Text that does not name axes, with its owner.
    """
    if re.sub(_TOKEN, "", text).strip():
        raise ValueError(f"{owner}: axes={text!r} has unmatched or nested parentheses.")
    axes = tuple(
        tuple(several.split()) if several else (single,) for several, single in _TOKEN.findall(text)
    )
    for name in names_of(axes):
        if not name.isidentifier():
            raise ValueError(f"{owner}: axes={text!r} has {name!r}, which is no name for an axis.")
    return axes


def names_of(axes: Axes) -> Names:
    """All names, in order."""
    return tuple(name for axis in axes for name in axis if axis != _ELLIPSIS)


def stack_names(depth: int) -> Axes:
    """Those of so many stack axes."""
    return tuple((f"{_STACK}{i}",) for i in range(depth))


def is_stack(name: str) -> bool:
    """Whether it is one of `stack_names`."""
    return name.removeprefix(_STACK).isdigit() and name.startswith(_STACK)


def freeze(declaration: Any, *mappings: str) -> None:
    """Mappings of a frozen dataclass as sorted tuples, so that it can be hashed."""
    for name in mappings:
        if not isinstance(given := getattr(declaration, name), Mapping | tuple):
            meaning = "whole number of at least 1" if name == "sizes" else "index or (start, stop)"
            raise TypeError(f"{name} must be a mapping, {{axis: {meaning}}}, got {given!r}.")
        frozen = tuple(sorted(dict(getattr(declaration, name)).items()))
        object.__setattr__(declaration, name, frozen)


def check_sizes_and_select(owner: str, names: Names, sizes: Any, select: Any) -> None:
    """Raises ValueError for a name that is there twice, or that sizes or select invent, for a size
    that is no count and a select that is no cut."""
    for name, size in sizes:
        check_count(f"{owner}: sizes[{name!r}]", size)
    if len(set(names)) < len(names):
        raise ValueError(f"{owner} has a name twice.")
    if taken := [name for name in names if is_stack(name)]:
        raise ValueError(f"{owner} has {taken[0]!r}, the name of a stack axis: take another.")
    if unknown := {name for name, _ in (*sizes, *select)} - set(names):
        raise ValueError(
            f"{owner} does not have {', '.join(sorted(unknown))}, which sizes or select name."
        )
    if not all(_is_cut(chosen) for _, chosen in select):
        raise ValueError(f"{owner} has a select that is neither an index nor (start, stop).")


def measure(
    path: Path,
    shape: tuple[int, ...],
    axes: Axes,
    told: Mapping[str, int],
    select: Mapping[str, Cut],
    hint: str,
) -> tuple[dict[str, int], dict[str, slice]]:
    """The length of every name on the axes of an array, and the slices of those that are cut.

    Args:
      path: The array's.
      shape: The array's.
      axes: The names on each of its axes.
      told: Lengths that are known.
      select: What is cut.
      hint: The fix, for messages.

    Raises:
      ValueError: Lengths that do not go together, or that nobody tells.
    """
    sizes: dict[str, int] = {}
    for axis, length in zip(axes, shape, strict=True):
        known = {name: told[name] for name in axis if name in told}
        unknown = [name for name in axis if name not in told]
        rest, remainder = divmod(length, math.prod(known.values()))
        if remainder or (not unknown and rest != 1):
            wanted = " times ".join(f"{size} {name}" for name, size in known.items())
            finding = f"which {wanted} do not divide" if unknown else f"not {wanted}"
            raise misfit(path, shape, f"has {length} on axis {show((axis,))}, {finding}", hint)
        if len(unknown) > 1:
            finding = f"does not tell {' and '.join(unknown)} apart"
            raise misfit(path, shape, finding, f"Give one of them in sizes=. {hint}")
        sizes |= known | dict.fromkeys(unknown, rest)
    cuts = {name: _slice(path, shape, name, sizes[name], cut) for name, cut in select.items()}
    return sizes, {name: cut for name, cut in cuts.items() if cut != slice(0, sizes[name])}


def misfit(path: Path, shape: tuple[int, ...], finding: str, fix: str) -> ValueError:
    """The error of an array that is not as somebody said."""
    return ValueError(f"{paths.show(path)} of shape {shape} {finding}. {fix}")


def show(axes: Axes) -> str:
    """`in, heads*features`, for messages."""
    return ", ".join("*".join(axis) for axis in axes)


def _slice(path: Path, shape: tuple[int, ...], name: str, size: int, chosen: Cut) -> slice:
    ends = chosen if isinstance(chosen, tuple | list) else (chosen, chosen + 1 or None)
    start, stop = (
        default if end is None else end + size * (end < 0)
        for end, default in zip(ends, (0, size), strict=True)
    )
    if not 0 <= start < stop <= size:
        raise misfit(path, shape, f"has {size} {name}, of which {chosen} is no part", "Correct it.")
    return slice(start, stop)


def _is_cut(chosen: Any) -> bool:
    if isinstance(chosen, tuple | list):
        return len(chosen) == 2 and all(end is None or isinstance(end, Integral) for end in chosen)
    return isinstance(chosen, Integral)


def _rearrange(x: Any, source: Axes, target: Axes, sizes: Mapping[str, int] | None = None) -> Any:
    if source == target:
        return x
    # einops warns of names that are Python's keywords, as `in` is: each gets a digit.
    spell = lambda axes: " ".join(f"({' '.join(f'{n}0' for n in axis)})" for axis in axes)  # noqa: E731
    lengths = {f"{name}0": sizes[name] for name in names_of(source) if sizes and name in sizes}
    return einops.rearrange(x, f"{spell(source)} -> {spell(target)}", **lengths)
