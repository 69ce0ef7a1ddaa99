"""Which parameters weight decay reaches: the table is in `mc.muon`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from muonclip_jax._core import paths
from muonclip_jax._core.options import is_function
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.blocks import Layouts, find_blocks
from muonclip_jax._layouts.checks import some
from muonclip_jax._layouts.roles import GAIN_ROLES
from muonclip_jax._parameters import names, routing
from muonclip_jax._parameters.matrices import MatrixSpec

# A tree of bools like the parameters, or a prefix of one, or a function to one.
Mask = Any | Callable[[Any], Any]

_Shape = tuple[int, ...]


def decays(
    mask: Mask | None,
    params: Any,
    dimension_numbers: routing.DimensionNumbers | None,
    layout: Layouts | None = None,
) -> dict[Path, bool]:
    """Whether each parameter decays, by its path.

    Args:
      mask: The user's; None is the table in `mc.muon`.
      params: Arrays, or anything with shapes.
      dimension_numbers: The routing, as for `routing.resolve`; None where it is not known.
      layout: The model's attention.

    Raises:
      TypeError: An entry of the mask that is no bool.
      ValueError: A mask that fits other parameters, or what the routing raises.
    """
    if mask is not None:
        return _given(mask, params)
    specs = {} if dimension_numbers is None else routing.resolve(dimension_numbers, params)
    vectors = _vectors(layout, params)
    shapes = paths.shapes(params)
    norms = {p: s[:-1] for p, s in shapes.items() if s and (_is_in_norm(p) or p[-1:] == ("scale",))}
    matrices = {p: _batch_in_front(spec) for p, spec in specs.items() if spec is not None}

    def is_matrix(path: Path) -> bool:
        if specs.get(path) is not None:
            return True
        if path in vectors or _is_vector_by_name(path):
            return False
        own_axes = len(shapes[path]) - len(_stack_beside(path, shapes, (norms, matrices)))
        return own_axes >= 2

    return {path: is_matrix(path) for path in shapes}


def check_mask(mask: Mask | None) -> None:
    """Raises TypeError or ValueError, when a recipe is built, for a mask that can be none."""
    if isinstance(mask, bool | np.bool_ | jax.Array):
        raise ValueError(
            f"weight_decay_mask must be a tree of bools or a function to one, got {mask}. "
            "optax.inject_hyperparams takes every function for a schedule: name it there, "
            'static_args="weight_decay_mask".'
        )
    if mask is not None and not is_function(mask):
        _entries(mask)


def _vectors(layout: Layouts | None, params: Any) -> set[Path]:
    """What the layout knows by other names: biases, gains, norms behind queries and keys."""
    blocks = () if layout is None else find_blocks(layout, params)
    parts = [part for block in blocks for part in block.parts]
    biases = {part.bias for part in parts if part.bias is not None}
    gains = {part.kernel for part in parts if part.role in GAIN_ROLES}
    return biases | gains | {path for block in blocks for path in block.qk_norms}


def _is_vector_by_name(path: Path) -> bool:
    brief = names.words(names.leaf(path))[:1] in (("b",), ("g",))  # `b`, `b_Q`
    return brief or names.is_vector(path) or _is_in_norm(path)


def _is_in_norm(path: Path) -> bool:
    named = names.leaf(path) in (*names.KERNELS, "embedding")  # `adaln_norm/kernel`
    return not named and names.is_norm(names.holder(path))


def _stack_beside(
    path: Path, shapes: Mapping[Path, _Shape], kinds: Sequence[Mapping[Path, _Shape]]
) -> _Shape:
    """The axes of the stack of layers that a parameter of the other optimizer is in, by the nearest
    witnesses of the first kind that has any: for each kind, the stacks that they are in."""
    for witnesses in kinds:
        for depth in reversed(range(len(path))):
            module = path[:depth]
            near = [s for p, s in witnesses.items() if p != path and p[:depth] == module]
            if near:
                stack = min(near, key=len)
                inside = (shape for p, shape in shapes.items() if p[:depth] == module)
                return stack if all(shape[: len(stack)] == stack for shape in inside) else ()
    return ()


def _batch_in_front(spec: MatrixSpec) -> _Shape:
    """The leading axes of a parameter that are a batch in all its matrices."""
    depths = (
        next(
            (i for i, names in enumerate(view.axes) if not set(names) <= set(view.batch)),
            len(view.axes),
        )
        for view in spec.views
    )
    return spec.shape[: min(depths)]


def _given(mask: Mask, params: Any) -> dict[Path, bool]:
    """A user's mask by path."""
    entries = _entries(mask(params) if is_function(mask) else mask)
    found: dict[Path, bool] = {}
    shapes = paths.shapes(params)
    for path, shape in shapes.items():
        entry = paths.entry_for(path, entries)
        if entry is None:
            raise ValueError(
                f"weight_decay_mask says nothing about {paths.show(path)} {shape}; it "
                f"has {some(list(entries))}. Give it True or False: "
                "jax.tree.map(lambda p: p.ndim > 1, params)."
            )
        found[path] = entries[entry]
    every_path = [*shapes, *paths.absent(params)]
    if (stray := paths.first_stray(entries, every_path)) is not None:
        raise ValueError(
            f"weight_decay_mask has an entry for {paths.show(stray)}, which is no parameter; "
            f"remove it or correct it. There are: {some(every_path)}."
        )
    return found


def _entries(mask: Any) -> dict[Path, bool]:
    entries = dict(paths.leaves(mask))
    for path, entry in entries.items():
        if not isinstance(entry, bool | np.bool_):
            raise TypeError(
                f"weight_decay_mask has {entry!r} for {paths.show(path)}; it must be True or "
                "False: jax.tree.map(lambda p: p.ndim > 1, params)."
            )
    return {path: bool(entry) for path, entry in entries.items()}
