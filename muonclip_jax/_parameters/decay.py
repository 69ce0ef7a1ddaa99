"""Which parameters weight decay reaches: the table is in `mc.muon`."""

from collections.abc import Mapping, Sequence
from typing import Any

from muonclip_jax._core import paths
from muonclip_jax._core.masks import Mask, read_mask
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.blocks import Layouts, find_blocks
from muonclip_jax._parameters import names, routing
from muonclip_jax._parameters.matrices import MatrixSpec

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
        return read_mask("weight_decay_mask", mask, params)
    specs = {} if dimension_numbers is None else routing.resolve(dimension_numbers, params)
    vectors = _vectors(layout, params)
    shapes = paths.shapes(params)
    norms = {p: s[:-1] for p, s in shapes.items() if s and _is_gain(p)}
    matrices = {p: _batch_in_front(spec) for p, spec in specs.items() if spec is not None}

    def is_matrix(path: Path) -> bool:
        if specs.get(path) is not None:
            return True
        if path in vectors or _is_vector_by_name(path):
            return False
        own_axes = len(shapes[path]) - len(_stack_beside(path, shapes, (norms, matrices)))
        return own_axes >= 2

    return {path: is_matrix(path) for path in shapes}


def _vectors(layout: Layouts | None, params: Any) -> set[Path]:
    """What the layout knows by other names: biases, gains, norms behind queries and keys."""
    blocks = () if layout is None else find_blocks(layout, params)
    parts = [part for block in blocks for part in block.parts]
    biases = {part.bias for part in parts if part.bias is not None}
    gains = {part.kernel for part in parts if part.is_vector}
    return biases | gains | {path for block in blocks for path in block.qk_norms}


def _is_vector_by_name(path: Path) -> bool:
    brief = names.words(names.leaf(path))[:1] in (("b",), ("g",))  # `b`, `b_Q`
    return brief or names.is_vector(path) or _is_in_norm(path)


def _is_gain(path: Path) -> bool:
    return _is_in_norm(path) or names.leaf(path) == "scale"


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
