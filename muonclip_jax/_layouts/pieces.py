"""Pieces: which entries of which parameter are the query, key, ... of which head.

Axis names:  in        a projection's input features (Flax kernels are [in, out])
             out       the output features of the projection back from the heads
             features  one head's features
             others    head axes, whatever they are called: `heads`, `groups`, `part`

What an array has beyond these are stack axes (scanned or vmapped layers, experts): carried
through, never reduced.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax._core import paths
from muonclip_jax._core.meshes import mesh_axes
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.roles import GAIN_ROLES, Role

_STACK = "stack"
_IN_GAIN = "in of a gain"
_TOKEN = re.compile(r"\(([^()]*)\)|([^\s()]+)")

Axes = tuple[tuple[str, ...], ...]  # one tuple of names for each axis of the array


@dataclass(frozen=True)
class Piece:
    """The entries of one parameter that play one role in attention.

    `axes` names the parameter's axes as einops does: `(heads features)` is one axis that holds
    both. `select` cuts pieces out of it; what is left of all head axes, in order, are the heads.

    | kernel | `q` of it |
    | --- | --- |
    | `[in, heads, features]` | `Piece("q", "query", "in heads features")` |
    | `[in, heads*features]` | `Piece("q", "q_proj", "in (heads features)", sizes={"heads": 8})` |
    | `[heads, in, features]`, named `w` | `Piece("q", "q_einsum/w", "heads in features")` |
    | `[3, heads, in, features]` | `..., "part heads in features", select={"part": 0})` |
    | `[in, heads*(nope + rope)]` | `Piece("q_nope", ..., "in (heads features)", sizes={"features": 192}, select={"features": (0, 128)})` |
    | groups of 4 queries, a key and a value | `..., "in (groups slot features)", sizes={"groups": 8, "slot": 6}, select={"slot": (0, 4)})` |

    Attributes:
      role: `q`, `k`, `v` of plain attention and `o`, its projection back; `gate`, queries' outputs
        are multiplied by it. Of multi-head latent attention `q_nope`, `q_rope`, `k_nope`, `v`
        of each head; `q_down`, `kv_down` and `k_rope`, which all heads share; `q_gain` and
        `kv_gain`, the scales of norms on the latents.
      parameter: Its path inside the attention block: `q_einsum/w`, or a module, `query`, for
        the `kernel` in it.
      axes: Names of the parameter's axes, without stack axes. None: `in heads features` (of `o`,
        `heads features out`) when the features' axis is as long as `sizes["features"]`, else the
        same with `(heads features)`.
      sizes: Lengths of named axes: needed where one axis holds several, checked elsewhere.
      select: For a named axis, an index or `(start, stop)`, as in Python slices.
      bias: Path of its bias inside the block, with the parameter's axes without `in`, or these
        flattened. None: `bias` beside the parameter, where there is one.
    """  # noqa: E501

    role: Role
    parameter: str
    axes: str | None = "in heads features"
    sizes: Mapping[str, int] = ()
    select: Mapping[str, int | tuple[int | None, int | None]] = ()
    bias: str | None = None

    def __post_init__(self):
        if not isinstance(self.axes, str | None):
            raise TypeError(
                f'Piece({self.role!r}, {self.parameter!r}): axes must be text such as "in heads '
                f'features", got {self.axes!r}.'
            )
        # As tuples, so that layouts can be hashed.
        object.__setattr__(self, "sizes", tuple(sorted(dict(self.sizes).items())))
        object.__setattr__(self, "select", tuple(sorted(dict(self.select).items())))
        if self.role not in get_args(Role):
            raise ValueError(
                f"{self}: unknown role {self.role!r}; choose from {', '.join(get_args(Role))}."
            )
        for name, size in self.sizes:
            check_count(f"{self}: size of {name}", size)
        self._check_names(self._axes_of((1, 1)))

    def _check_names(self, axes: Axes) -> None:
        names = [name for axis in axes for name in axis]
        carried = {"o": "out", "q_gain": _IN_GAIN, "kv_gain": _IN_GAIN}.get(self.role, "in")
        problem = None
        if len(set(names)) < len(names):
            problem = "has a name twice"
        elif "features" not in names or {"in", "out", _IN_GAIN} & set(names) != {carried}:
            problem = f"must have {carried!r} and 'features', and not both 'in' and 'out'"
        elif (carried,) not in axes:
            problem = f"must have {carried!r} outside of parentheses"
        elif unknown := {name for name, _ in self.sizes + self.select} - set(names):
            problem = f"does not have {', '.join(sorted(unknown))}, which sizes or select name"
        elif any(not _is_cut(chosen) for _, chosen in self.select):
            problem = "has a select that is neither an index nor (start, stop)"
        elif carried in dict(self.select):
            problem = "can be cut along head axes and features only"
        if problem:
            raise ValueError(f"{self}: axes={self.axes!r} {problem}.")

    @property
    def leaves(self) -> tuple[Path, Path]:
        """The paths, inside the block, at which the parameter may be."""
        path = tuple(self.parameter.split("/"))
        return path, (*path, "kernel")

    def fit(
        self,
        path: Path,
        shape: tuple[int, ...],
        bias: Path | None = None,
        *,
        stack_axis: int = 0,
    ) -> "Part":
        """The piece of the parameter at `path`, of this shape, with stack axes at `stack_axis`.

        Raises:
          ValueError: The shape does not have the axes, the sizes or the slice of the piece.
        """
        axes = self._axes_of(shape)
        own = len([axis for axis in axes if axis != (_IN_GAIN,)])
        depth = len(shape) - own
        if depth < 0:
            raise self._misfit(
                path,
                shape,
                f"is not [stack..., {', '.join(map(_show, axes))}]; for flat kernels [stack..., "
                "in, heads*features] give the layout heads= (gqa: and kv_heads=)",
            )
        place = min(stack_axis, own)
        if self.role in GAIN_ROLES:  # read as a matrix of one row
            stack = shape[place : place + depth]
            shape, place = (*stack, 1, math.prod(shape) // math.prod(stack)), 0
        names = tuple((f"{_STACK} {i}",) for i in range(depth))
        axes = (*axes[:place], *names, *axes[place:])
        told, sizes = dict(self.sizes), {}
        for axis, length in zip(axes, shape, strict=True):
            sizes |= self._split(path, shape, axis, length, told)
        cuts = {name: self._cut(path, shape, name, sizes[name]) for name in sizes}
        return Part(self.role, path, bias, shape, axes, sizes, cuts, stack_axis)

    def _axes_of(self, shape: tuple[int, ...]) -> Axes:
        if self.axes is not None:
            return _parse(self, self.axes)
        told = dict(self.sizes)
        flat = (
            "heads" in told
            or len(shape) <= 2
            or (shape[-2 if self.role == "o" else -1] != told.get("features"))
        )
        heads = "(heads features)" if flat else "heads features"
        return _parse(self, f"{heads} out" if self.role == "o" else f"in {heads}")

    def _split(
        self,
        path: Path,
        shape: tuple[int, ...],
        axis: tuple[str, ...],
        length: int,
        told: Mapping[str, int],
    ) -> dict[str, int]:
        """The lengths of all names on one axis."""
        known = {name: told[name] for name in axis if name in told}
        unknown = [name for name in axis if name not in told]
        rest, remainder = divmod(length, math.prod(known.values()))
        if remainder or (not unknown and rest != 1):
            wanted = " times ".join(f"{known[name]} {name}" for name in axis if name in known)
            raise self._misfit(
                path,
                shape,
                f"has {length} on axis {_show(axis)}, "
                + (f"not {wanted}" if len(unknown) == 0 else f"which {wanted} do not divide")
                + "; check the layout's sizes (heads and kv_heads, which only flat kernels need; "
                "of mla nope, rope, v)",
            )
        if len(unknown) > 1:
            raise self._misfit(
                path,
                shape,
                f"does not tell {' and '.join(unknown)} apart: give one of them in sizes=",
            )
        return known | dict.fromkeys(unknown, rest)

    def _cut(self, path: Path, shape: tuple[int, ...], name: str, size: int) -> slice:
        told = chosen = dict(self.select).get(name, (None, None))
        if isinstance(chosen, Integral):
            chosen = (chosen, chosen + 1 if chosen != -1 else None)
        start, stop = (
            default if end is None else end + size * (end < 0)
            for end, default in zip(chosen, (0, size), strict=True)
        )
        if not 0 <= start < stop <= size:
            raise self._misfit(path, shape, f"has {size} {name}, of which {told} is no part")
        return slice(start, stop)

    def _misfit(self, path: Path, shape: tuple[int, ...], problem: str) -> ValueError:
        return ValueError(f"{paths.show(path)} of shape {shape} {problem} ({self}).")

    def __str__(self) -> str:
        told = [repr(self.role), repr(self.parameter), repr(self.axes)]
        told += [f"{name}={dict(getattr(self, name))}" for name in ("sizes", "select")
                 if getattr(self, name)]  # fmt: skip
        return f"Piece({', '.join(told)})"


@dataclass(frozen=True)
class Part:
    """A piece found in a parameter: takes its heads out of an array and puts them back.

    Attributes:
      role: As in `Piece`.
      kernel: The parameter's path.
      bias: The path of its bias, if it has one.
      shape: The parameter's shape (of a gain, with `in` of length 1).
      axes: The names on each of its axes; those of stack axes begin with `stack`.
      sizes: The length of every named axis.
      cuts: The slice of every named axis that belongs to the piece.
      stack_axis: Where the stack axes of its bias are.
    """

    role: Role
    kernel: Path
    bias: Path | None
    shape: tuple[int, ...]
    axes: Axes
    sizes: Mapping[str, int]
    cuts: Mapping[str, slice]
    stack_axis: int

    @property
    def stack(self) -> tuple[int, ...]:
        """Lengths of the stack axes."""
        return tuple(self.sizes[name] for name in self._stack_axes)

    @property
    def heads(self) -> int:
        """How many heads the piece has; 1 when all heads share it."""
        return math.prod(self._length(name) for name in self._head_axes)

    @property
    def features(self) -> int:
        """How many features of each head belong to the piece."""
        return self._length("features")

    @property
    def ins(self) -> int:
        """Input features of one head's matrix."""
        return self.features if self.role == "o" else self.sizes[self._carried]

    @property
    def matrix(self) -> tuple[int, int]:
        """[in, out] of one head's matrix."""
        return self.ins, self.sizes[self._carried] if self.role == "o" else self.features

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The parameter's shape with `in` of length 1, as values have that are equal along it."""
        return tuple(
            1 if axis == (self._carried,) else length
            for axis, length in zip(self.axes, self.shape, strict=True)
        )

    @property
    def bias_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes that a bias may have: the parameter's without `in`, or this flattened."""
        own = tuple(
            length
            for axis, length in zip(self.axes, self.shape, strict=True)
            if axis[0] not in (*self._stack_axes, self._carried)
        )
        return self._with_stack(own), self._with_stack((math.prod(own),))

    def _with_stack(self, own: tuple[int, ...]) -> tuple[int, ...]:
        return (*own[: self.stack_axis], *self.stack, *own[self.stack_axis :])

    def take(self, x: Any) -> Any:
        """The piece of an array shaped like the parameter or its bias, JAX's or NumPy's.

        Returns:
          `[stack..., heads, in, features]`; of `o`, `[stack..., heads, features, out]`. A bias
          counts as a kernel with one input.
        """
        heads = self._take(x)
        return heads.swapaxes(-1, -2) if self.role == "o" else heads

    def put(self, x: jax.Array, heads: jax.Array) -> jax.Array:
        """The array with the piece replaced: `put(x, take(x))` is `x`."""
        return self._put(x, heads.swapaxes(-1, -2) if self.role == "o" else heads)

    def split_of_heads(self, sharding: NamedSharding) -> PartitionSpec:
        """How `take` of a kernel with this sharding is split over the mesh.

        As the kernel is, where nothing has to move for it. Mesh axes that split what the piece is
        cut from, or of several names on one axis any but the leftmost, do not appear: the piece
        is to be gathered over these.
        """
        split = self._split_of_names(sharding)
        heads: tuple[str, ...] = ()
        for name in self._head_axes:
            heads += split[name]
            if math.prod(sharding.mesh.shape[axis] for axis in split[name]) < self._length(name):
                break
        own = ("features", self._carried) if self.role == "o" else (self._carried, "features")
        stack = (split[name] for name in self._stack_axes)
        return PartitionSpec(*stack, heads, *(split[name] for name in own))

    def _split_of_names(self, sharding: NamedSharding) -> dict[str, tuple[str, ...]]:
        """The mesh axes that split each named axis of the kernel evenly, its piece being all."""
        split = {name: () for axis in self.axes for name in axis}
        for names, entry in zip(self.axes, sharding.spec, strict=False):
            left = {name: self.sizes[name] for name in names}
            for mesh_axis in mesh_axes(entry):
                name = next((name for name in names if left[name] > 1), names[0])
                left[name], rest = divmod(left[name], sharding.mesh.shape[mesh_axis])
                if rest or self._length(name) < self.sizes[name]:
                    break
                split[name] += (mesh_axis,)
        return split

    # Of a sharded kernel `take` may have to bring pieces together from all devices, if its heads
    # share an axis with others. These sum first, where the kernel lies, and take then.

    def sums(self, x: jax.Array) -> jax.Array:
        """The sum of each head's entries, `[stack..., heads]`; x as for `take`.

        One read, nothing transposed; the sum over inputs is the same for all parts of a kernel.
        """
        if x.ndim == len(self.shape):  # no bias or gain
            x = x.sum(self._place(self._carried), keepdims=True)
        return self._take(x).sum((-2, -1))

    def times_features(self, x: jax.Array, vectors: jax.Array) -> jax.Array:
        """Each head's matrix times a vector: `[stack..., heads, features]` to
        `[stack..., heads, in]` (of `o`, `out`); x as for `take`."""
        part, x = self._apart(x)
        row = part._put(jnp.zeros(part.row_shape, x.dtype), vectors[..., None, :])
        products = (x * row).sum(part._place("features"), keepdims=True)
        return part._one_feature()._take(products)[..., 0]

    def times_inputs(self, x: jax.Array, vectors: jax.Array) -> jax.Array:
        """Each head's transposed matrix times a vector: `[stack..., heads, in]` (of `o`, `out`)
        to `[stack..., heads, features]`; x as for `take`."""
        part, x = self._apart(x)
        column = jnp.zeros_like(x, shape=_with_one(x.shape, part._place("features")))
        column = part._one_feature()._put(column, vectors[..., None])
        products = (x * column).sum(part._place(self._carried), keepdims=True)
        return part._take(products)[..., 0, :]

    def as_bias(self, row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Values `row_shape` in the shape of the bias or gain."""
        stack, place = self._stack_positions(len(shape))
        leading = _move(row.reshape(self.row_shape), stack, range(len(stack)))
        own = [length for i, length in enumerate(shape) if i not in place]
        return _move(leading.reshape(*self.stack, *own), range(len(place)), place)

    def _as_kernel(self, row: Any) -> Any:
        """A bias or gain in the shape of a kernel with one input."""
        stack, place = self._stack_positions(row.ndim)
        leading = _move(row, place, range(len(place)))
        own = [length for i, length in enumerate(self.row_shape) if i not in stack]
        return _move(leading.reshape(*self.stack, *own), range(len(stack)), stack)

    def _stack_positions(self, row_axes: int) -> tuple[range, range]:
        """Of the stack axes, in the kernel and in a bias or gain of so many axes."""
        depth = len(self._stack_axes)
        first = next((i for i, axis in enumerate(self.axes) if axis[0].startswith(_STACK)), 0)
        place = min(self.stack_axis, row_axes - depth)
        return range(first, first + depth), range(place, place + depth)

    def _take(self, x: Any) -> Any:
        """`[stack..., heads, in, features]`, of `o` `[stack..., heads, out, features]`."""
        cut = self._unfold(x)[(..., slice(None), *(self.cuts[name] for name in self._last_axes))]
        depth = len(self._stack_axes)
        heads = cut.reshape(*cut.shape[: depth + 1], self.heads, self.features)
        return heads.swapaxes(depth, depth + 1)

    def _put(self, x: jax.Array, heads: jax.Array) -> jax.Array:
        unfolded = self._unfold(x)
        depth = len(self._stack_axes)
        cut = heads.swapaxes(depth, depth + 1).reshape(
            *unfolded.shape[: depth + 1], *map(self._length, self._last_axes)
        )
        starts = [0] * (depth + 1) + [self.cuts[name].start for name in self._last_axes]
        replaced = jax.lax.dynamic_update_slice(unfolded, cut.astype(x.dtype), starts)
        order = self._order()
        folded = replaced.transpose(sorted(range(len(order)), key=order.__getitem__))
        if x.ndim < len(self.shape):
            return self.as_bias(folded, x.shape)
        return folded.reshape(x.shape)

    def _apart(self, x: jax.Array) -> tuple["Part", jax.Array]:
        """The part and a kernel or bias with `features` on an axis of their own."""
        x = self._as_kernel(x) if x.ndim < len(self.shape) else x
        place, names = next((i, a) for i, a in enumerate(self.axes) if "features" in a)
        at = names.index("features")
        axes = tuple(filter(None, (names[:at], ("features",), names[at + 1 :])))
        lengths = tuple(math.prod(self.sizes[name] for name in axis) for axis in axes)
        split = lambda old, new: (*old[:place], *new, *old[place + 1 :])  # noqa: E731
        part = replace(self, shape=split(self.shape, lengths), axes=split(self.axes, axes))
        return part, x.reshape(split(x.shape, lengths))

    def _one_feature(self) -> "Part":
        """The same heads of an array summed over the features, which have an axis to themselves."""
        return replace(
            self,
            shape=_with_one(self.shape, self._place("features")),
            sizes={**self.sizes, "features": 1},
            cuts={**self.cuts, "features": slice(0, 1)},
        )

    def _place(self, name: str) -> int:
        """Of an axis that holds one name."""
        return self.axes.index((name,))

    @property
    def _carried(self) -> str:
        return next(name for name in (_IN_GAIN, "in", "out") if (name,) in self.axes)

    @property
    def _stack_axes(self) -> tuple[str, ...]:
        return tuple(axis[0] for axis in self.axes if axis[0].startswith(_STACK))

    @property
    def _head_axes(self) -> tuple[str, ...]:
        others = (*self._stack_axes, self._carried, "features")
        return tuple(name for axis in self.axes for name in axis if name not in others)

    @property
    def _last_axes(self) -> tuple[str, ...]:
        return (*self._head_axes, "features")

    def _length(self, name: str) -> int:
        return self.cuts[name].stop - self.cuts[name].start

    def _unfold(self, x: Any) -> Any:
        """`[stack..., in, head axes..., features]`, every name an axis of its own."""
        if x.ndim < len(self.shape):
            x = self._as_kernel(x)
        lengths = []
        for axis, length in zip(self.axes, x.shape, strict=True):
            lengths += [length] if len(axis) == 1 else [self.sizes[name] for name in axis]
        return x.reshape(lengths).transpose(self._order())

    def _order(self) -> list[int]:
        """Where the axes of `_unfold` are among all names."""
        names = [name for axis in self.axes for name in axis]
        return list(map(names.index, (*self._stack_axes, self._carried, *self._last_axes)))


def _with_one(shape: tuple[int, ...], place: int) -> tuple[int, ...]:
    return (*shape[:place], 1, *shape[place + 1 :])


def check_count(what: str, value: Any) -> None:
    """Raises ValueError for what is no whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, got {value!r}.")


def _parse(piece: Piece, axes: str) -> Axes:
    """`"... in (heads features)"` → `(("...",), ("in",), ("heads", "features"))`."""
    if re.sub(_TOKEN, "", axes).strip():
        raise ValueError(f"{piece}: axes={axes!r} has unmatched or nested parentheses.")
    parsed = tuple(
        tuple(several.split()) if several else (single,) for several, single in _TOKEN.findall(axes)
    )
    # A gain has features only; it is read as the one row of a matrix.
    return (*parsed[:-1], (_IN_GAIN,), *parsed[-1:]) if piece.role in GAIN_ROLES else parsed


def _is_cut(chosen: Any) -> bool:
    if isinstance(chosen, tuple | list):
        return len(chosen) == 2 and all(end is None or isinstance(end, Integral) for end in chosen)
    return isinstance(chosen, Integral)


def _move(x: Any, source: range, destination: range) -> Any:
    """`moveaxis` for JAX's and NumPy's arrays alike."""
    order = [axis for axis in range(x.ndim) if axis not in source]
    order[destination.start : destination.start] = source
    return x.transpose(order)


def _show(axis: tuple[str, ...]) -> str:
    return "*".join(axis)


def _show_all(axes: Axes) -> str:
    stack = () if (_STACK,) in axes else ("stack...",)
    return ", ".join((*stack, *map(_show, axes)))
