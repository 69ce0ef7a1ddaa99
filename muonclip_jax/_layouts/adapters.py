"""Adapters of a projection: what LoRA and DoRA add around a kernel, and what of it scales with it.

    x W + x A B · scale        LoRA: B `[rank, out]` scales with W, as a second kernel would
    m ∘ (the same) / norms     DoRA: the magnitude m `[out]` scales as a bias would; its norms undo
                               what W and B take, so that these may scale as well
    x A                        goes into B only, and scales with nothing

Only names and shapes are seen: a pair called `…a` and `…b`, one of them `[in, rank]`.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from muonclip_jax._core import paths
from muonclip_jax._core.axes import View, is_stack
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.extras import ADAPTERS, words_in
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import ROLES

Shapes = Mapping[Path, tuple[int, ...]]

_WRAPPED = {"base", "basemodule", "baselayer", "inner", "wrapped", "module", "layer", "linear"}
_KERNELS = ("kernel", "w", "weight")
_OUT = re.compile(r"^(.*_)?b$", re.IGNORECASE)  # lora_b, lora_B, kernel_lora_b, b
_MAGNITUDES = {"magnitude", "m", "dora_m", "lora_magnitude", "dora_magnitude", "dora_scale"}


def with_adapters(block: Path, part: Part, parts: Sequence[Part], shapes: Shapes) -> Part:
    """The part with what scales with its kernel: LoRA's B, DoRA's magnitude.

    Args:
      block: The block's path.
      part: One of its parts.
      parts: All of them.
      shapes: The parameters of the module there.

    Raises:
      ValueError: Something else takes part in the projection.
    """
    foreign = list(_beside(block, part, parts, shapes))
    pairs = {path: other for path in foreign if (other := _partner(path, foreign)) is not None}
    scaled: list[tuple[Path, View]] = []
    known = {*pairs, *pairs.values()}
    for path, inner in pairs.items():
        if (view := _output(part.view, shapes[inner], shapes[path])) is None:
            known -= {path, inner}
        else:
            scaled.append((path, view))
    for path in foreign if scaled else ():
        views = (_like(part.view, shapes[path], inputs) for inputs in (None, 1))
        if path[-1] in _MAGNITUDES and (view := next(filter(None, views), None)):
            scaled.append((path, view))
            known.add(path)
    for path in foreign:
        if path not in known:
            raise ValueError(
                f"{paths.show(path)} {shapes[path]} also takes part in {paths.show(part.kernel)} "
                f"{shapes[part.kernel]}: scaling the kernel alone would not scale what the "
                "projection gives. (Known are LoRA's pairs lora_a [in, rank] and lora_b [rank, "
                "out], and with them DoRA's magnitude [out].) Merge adapters into the kernel "
                "first, or leave the block out with the layout's block= pattern."
            )
    return replace(part, adapters=tuple(scaled))


def inner(parts: Sequence[Part], shapes: Shapes) -> set[Path]:
    """The A of each LoRA among the parts' adapters."""
    found = (_partner(path, shapes) for part in parts for path, _ in part.adapters)
    return {path for path in found if path is not None}


def _beside(block: Path, part: Part, parts: Sequence[Part], shapes: Shapes) -> Iterator[Path]:
    """What else takes part in a projection to queries, keys or latents: anything but a bias in the
    module of the kernel, and what a wrapper around this module adds."""
    if ROLES[part.role].side == "value":
        return
    known = {path for one in parts for path, _ in one.leaves}
    kernels = {one.kernel for one in parts}
    for end in range(len(part.kernel) - 1, len(block), -1):
        module = part.kernel[:end]
        if any(path[:end] == module for path in kernels - {part.kernel}):
            break
        own = end == len(part.kernel) - 1
        wrapper = not own and "".join(paths.words(part.kernel[end])) in _WRAPPED
        for path in shapes:
            if path[:end] != module or path in known or path[-1] == "bias":
                continue
            if own or wrapper or ADAPTERS & words_in(path[end:]):
                known.add(path)
                yield path


def _partner(path: Path, among: Collection[Path]) -> Path | None:
    """Of LoRA's B, by its name, the A."""
    at = len(path) - (2 if path[-1] in _KERNELS and len(path) > 1 else 1)
    if not _OUT.match(path[at]) or not ADAPTERS & words_in(path):
        return None
    name = path[at][:-1] + ("a" if path[at][-1] == "b" else "A")
    other = (*path[:at], name, *path[at + 1 :])
    return other if other in among else None


def _output(view: View, inner: tuple[int, ...], outer: tuple[int, ...]) -> View | None:
    """The heads in B of this shape, whose A has the other; None if it is no such pair."""
    depth = math.prod(view.sizes[name] for name in view.batch if is_stack(name))
    rank, rest = divmod(math.prod(inner), depth * view.sizes["in"])
    return None if rest else _like(view, outer, rank)


def _like(view: View, shape: tuple[int, ...], inputs: int | None) -> View | None:
    """The same heads in an array of this shape, with so many inputs, or without that axis.

    Its inputs come first (last where the kernel has them last), then the outputs as the kernel has
    them, or all on one axis. Stack axes are where the kernel has them.
    """
    stack = [axis for axis in view.axes if is_stack(axis[0])]
    own = [axis for axis in view.axes if axis not in stack]
    at = view.axes.index(stack[0]) if stack else 0
    outputs = [axis for axis in own if axis != ("in",)]
    sizes = {name: size for name, size in view.sizes.items() if name != "in"}
    if inputs is not None:
        sizes["in"] = inputs
    for outs in (outputs, [tuple(name for axis in outputs for name in axis)]):
        if inputs is not None:
            outs = [*outs, ("in",)] if own[-1] == ("in",) else [("in",), *outs]
        rows = view.rows if inputs is not None else ()
        axes = (*outs[:at], *stack, *outs[at:])
        found = View(axes, sizes, view.cuts, view.batch, rows, view.cols)
        if found.shape == shape:
            return found
    return None
