"""Pieces: which entries of which parameter are the query, key, ... of which head.

Axis names:  in        a projection's input features (Flax kernels are [in, out])
             out       the output features of the projection back from the heads
             features  one head's features
             others    head axes, whatever they are called: `heads`, `groups`, `part`

What an array has beyond these are stack axes (scanned or vmapped layers, experts): carried
through, never reduced.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax._core import axes as notation
from muonclip_jax._core.axes import Axes, Cut, Names, View, is_stack
from muonclip_jax._core.options import check_text
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.roles import EVERY_ROLE, ROLES, Role

_SIZES = (
    "Check the layout's sizes (heads and kv_heads, which only flat kernels need; of mla nope, "
    "rope, v)"
)


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
    | `[heads, features]`, added to the queries of every head | `Piece("q", "r_w_bias", "heads features")` |
    | groups of 4 queries, a key and a value | `..., "in (groups slot features)", sizes={"groups": 8, "slot": 6}, select={"slot": (0, 4)})` |

    Attributes:
      role: `q`, `k`, `v` of plain attention and `o`, its projection back; `gate`, queries' outputs
        are multiplied by it. Of multi-head latent attention `q_nope`, `q_rope`, `k_nope`, `v`
        of each head; `q_down`, `kv_down` and `k_rope`, which all heads share; `q_gain` and
        `kv_gain`, the scales of norms on the latents.
      parameter: Its path inside the attention block: `q_einsum/w`, or a module, `query`, for
        the `kernel` in it.
      axes: Names of the parameter's axes, without stack axes. A query or key without `in` is a bias
        of its own, beside a projection with the same role. None: `in heads features` (of `o`,
        `heads features out`) when the features' axis is as long as `sizes["features"]`, else the
        same with `(heads features)`.
      sizes: Lengths of named axes: needed where one axis holds several, checked elsewhere.
      select: For a named axis, an index or `(start, stop)`, as in Python slices.
      bias: Path of its bias inside the block, with the parameter's axes without `in`, or these
        flattened. None: `bias` beside the parameter, where there is one.

    Raises:
      TypeError: Axes that are no text.
      ValueError: An unknown role, or axes that do not fit it.

    Example:
      >>> queries = mc.layouts.Piece("q", "q_proj", "in (heads features)", sizes={"heads": 8})
      >>> queries.role, queries.parameter
      ('q', 'q_proj')
    """  # noqa: E501

    role: Role
    parameter: str
    axes: str | None = "in heads features"
    sizes: Mapping[str, int] = field(default_factory=dict)
    select: Mapping[str, Cut] = field(default_factory=dict)
    bias: str | None = None

    def __post_init__(self):
        owner = f"Piece({self.role!r}, {self.parameter!r})"
        check_text(f"{owner}: parameter", self.parameter)
        check_text(f"{owner}: bias", self.bias, optional=True)
        check_text(f'{owner}: axes, such as "in heads features",', self.axes, optional=True)
        notation.freeze(self, "sizes", "select")
        if self.role not in EVERY_ROLE:
            raise ValueError(
                f"{self}: unknown role {self.role!r}; choose from {', '.join(EVERY_ROLE)}."
            )
        axes = self._axes_of((1, 1))
        names = notation.names_of(axes)
        owner = f"{self}: axes={self.axes!r}"
        notation.check_sizes_and_select(owner, names, self.sizes, self.select)
        carried = {self._carried} if self._carried else set()
        problem = None
        if "features" not in names or {"in", "out"} & set(names) != carried:
            wanted = " and ".join(map(repr, [*carried, "features"]))
            problem = f"must have {wanted}, and not both 'in' and 'out'"
        elif carried and (self._carried,) not in axes:
            problem = f"must have {self._carried!r} outside of parentheses"
        elif self._carried in dict(self.select):
            problem = "can be cut along head axes and features only"
        if problem:
            raise ValueError(f"{owner} {problem}.")

    @property
    def leaves(self) -> tuple[Path, Path]:
        """The paths, inside the block, at which the parameter may be."""
        path = tuple(self.parameter.split("/"))
        return path, (*path, "kernel")

    @property
    def _carried(self) -> str | None:
        """The axis that is carried through: the other side of a head's matrix."""
        return "out" if self.role == "o" else None if self.is_vector else "in"

    @property
    def is_vector(self) -> bool:
        """Whether it has no matrix: the gain of a norm, a bias that stands by itself."""
        side = ROLES[self.role].side
        told = self.axes and notation.names_of(notation.parse(str(self), self.axes))
        return side == "gain" or bool(told and side in ("query", "key") and "in" not in told)

    def fit(
        self,
        path: Path,
        shape: tuple[int, ...],
        bias: tuple[Path, tuple[int, ...]] | None = None,
        *,
        stack_axis: int = 0,
    ) -> "Part":
        """The piece of the parameter at `path`, of this shape.

        Args:
          path: The parameter's path.
          shape: Its shape, with stack axes at `stack_axis`.
          bias: The path and shape of its bias, if it has one.
          stack_axis: Where the stack axes are.

        Raises:
          ValueError: The shape does not have the axes, the sizes or the slice of the piece, or the
            bias none that the piece can have.
        """
        own = self._axes_of(shape)
        depth = len(shape) - len(own)
        if depth < 0:
            raise notation.misfit(
                path,
                shape,
                f"is not [stack..., {notation.show(own)}]",
                "For flat kernels [stack..., in, heads*features] give the layout heads= (gqa: and "
                f"kv_heads=). ({self})",
            )
        stack = notation.stack_names(depth)
        axes = _insert(own, stack, stack_axis)
        sizes, cuts = notation.measure(
            path, shape, axes, dict(self.sizes), dict(self.select), f"{_SIZES}. ({self})"
        )
        head_axes = tuple(
            name for name in notation.names_of(own) if name not in (self._carried, "features")
        )
        batch = (*notation.names_of(stack), *head_axes)
        rows: Names = (self._carried,) if self._carried else ()
        cols: Names = ("features",)
        if self.role == "o":
            rows, cols = cols, rows
        view = View(axes, sizes, cuts, batch, rows, cols)
        bias_view = None
        if bias is not None:
            bias_axes = tuple(axis for axis in own if axis != (self._carried,))
            bias_view = _bias_view(view, bias_axes, stack, stack_axis, path, *bias)
        return Part(self.role, path, bias[0] if bias else None, view, bias_view)

    def _axes_of(self, shape: tuple[int, ...]) -> Axes:
        text = self.axes
        if text is None:
            told = dict(self.sizes)
            features_at = -2 if self.role == "o" else -1
            flat = "heads" in told or len(shape) <= 2 or shape[features_at] != told.get("features")
            heads = "(heads features)" if flat else "heads features"
            text = f"{heads} out" if self.role == "o" else f"in {heads}"
        return notation.parse(str(self), text)

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
      view: The heads in the parameter.
      bias_view: The heads in the bias, as matrices of one row.
      adapters: What else scales with the kernel, and the heads in it: LoRA's B, DoRA's magnitude.

    Example:
      >>> query = mc.layouts.find_blocks(layout, params)[0].part("q")
      >>> query.take(params["attn"]["query"]["kernel"]).shape  # [heads, in, features]
      (2, 8, 4)
    """

    role: Role
    kernel: Path
    bias: Path | None
    view: View
    bias_view: View | None
    adapters: tuple[tuple[Path, View], ...] = ()

    @property
    def leaves(self) -> tuple[tuple[Path, View], ...]:
        """The kernel and, where there are any, the bias and the adapters."""
        bias = [(self.bias, self.bias_view)] if self.bias and self.bias_view else []
        return ((self.kernel, self.view), *bias, *self.adapters)

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's."""
        return self.view.shape

    @property
    def is_vector(self) -> bool:
        """Whether it has no matrix: the gain of a norm, a bias that stands by itself."""
        return not self.view.rows

    @property
    def stack(self) -> tuple[int, ...]:
        """Lengths of the stack axes."""
        return tuple(self.view.sizes[name] for name in self.view.batch if is_stack(name))

    @property
    def heads(self) -> int:
        """How many heads the piece has; 1 when all heads share it."""
        return self.view.length(self.head_axes)

    @property
    def features(self) -> int:
        """How many features of each head belong to the piece."""
        return self.view.length(("features",))

    @property
    def ins(self) -> int:
        """Input features of one head's matrix."""
        return self.matrix[0]

    @property
    def matrix(self) -> tuple[int, int]:
        """[in, out] of one head's matrix."""
        return self.view.matrices[1:]

    @property
    def head_axes(self) -> Names:
        """The names that tell heads apart."""
        return tuple(name for name in self.view.batch if not is_stack(name))

    def take(self, x: Any) -> Any:
        """The piece of an array shaped like the parameter or its bias, JAX's or NumPy's.

        Returns:
          `[stack..., heads, in, features]`; of `o`, `[stack..., heads, features, out]`. A bias
          counts as a kernel with one input.
        """
        view = self._view_of(x)
        return view.take(x).reshape(*self.stack, self.heads, *view.matrices[1:])

    def put(self, x: jax.Array, heads: jax.Array) -> jax.Array:
        """The array with the piece replaced: `put(x, take(x))` is `x`."""
        view = self._view_of(x)
        lengths = [view.length((name,)) for name in (*view.batch, *view.rows, *view.cols)]
        return view.put(x, heads.reshape(lengths))

    def sums(self, x: jax.Array) -> jax.Array:
        """The sum of each head's entries, `[stack..., heads]`; x as for `take`.

        One read, nothing transposed. Of a sharded kernel `take` may have to bring pieces together
        from all devices, if its heads share an axis with others; this sums over the inputs first,
        where the kernel lies, and for all parts of a kernel alike.
        """
        view = self._view_of(x)
        carried = [i for i, axis in enumerate(view.axes) if axis in (("in",), ("out",))]
        summed = x.sum(carried, keepdims=True) if carried else x
        heads = shared_along_inputs(view).take(summed)
        return heads.reshape(*self.stack, self.heads, -1).sum(-1)

    def split_of_heads(self, sharding: NamedSharding) -> PartitionSpec:
        """How `take` of a kernel with this sharding is split over the mesh.

        As the kernel is, where nothing has to move for it; see `View.split`. Several head axes are
        one in the result: those behind one that is not split to the end are gathered.
        """
        split = self.view.split(sharding)
        heads: tuple[str, ...] = ()
        for name in self.head_axes:
            heads += split[name]
            if math.prod(sharding.mesh.shape[axis] for axis in split[name]) < self.view.length(
                (name,)
            ):
                break
        stack = (split[name] for name in self.view.batch if is_stack(name))
        own = (split[name] for name in (*self.view.rows, *self.view.cols))
        return PartitionSpec(*stack, heads, *own)

    def _view_of(self, x: Any) -> View:
        if self.bias_view is not None and x.ndim < len(self.view.axes):
            return self.bias_view
        return self.view


def shared_along_inputs(view: View) -> View:
    """The view of values that are equal along the inputs (of `o` the outputs), whose axis has
    length 1: `[1, heads, features]` for a kernel `[in, heads, features]`."""
    return view.shrunk({"in", "out"} & set(view.sizes))


def _insert(own: Axes, stack: Axes, stack_axis: int) -> Axes:
    return (*own[:stack_axis], *stack, *own[stack_axis:])


def _bias_view(
    view: View,
    own: Axes,
    stack: Axes,
    stack_axis: int,
    kernel: Path,
    path: Path,
    shape: tuple[int, ...],
) -> View:
    """The heads in a bias: the parameter's axes without `in`, or these flattened."""
    flat = (notation.names_of(own),)
    names = {*notation.names_of(own), *notation.names_of(stack)}
    sizes = {name: size for name, size in view.sizes.items() if name in names}
    views = [
        View(_insert(axes, stack, stack_axis), sizes, view.cuts, view.batch, (), ("features",))
        for axes in (own, flat)
    ]
    for each in views:
        if each.shape == shape:
            return each
    expected = " or ".join(map(str, dict.fromkeys(each.shape for each in views)))
    raise notation.misfit(
        path,
        shape,
        f"is no bias of {'/'.join(kernel)} {view.shape}: expected {expected}",
        "Name the right one in its piece: Piece(..., bias=...).",
    )
