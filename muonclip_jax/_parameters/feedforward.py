"""Experts and MLPs whose names and shapes leave one reading.

    router/kernel [64, 8] beside up [8, 64, 256], down [8, 256, 64]     8 experts [in, out]
    the same, gate_up [8, 64, 2, 256]                                   8 × 2 matrices [64, 256]
    norm/weight [64] beside up_proj/weight [256, 64]                    [out, in]
    per_layer_projection/w [64, 12, 8] beside a table [99, 12, 8]       a matrix [64, 8] a layer

A name says whether a matrix takes in what the model is wide or gives it; the router, or else the
norms, say how wide that is.
"""

from collections.abc import Iterator, Set
from typing import NamedTuple

from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.find import Stack
from muonclip_jax._parameters import names
from muonclip_jax._parameters.neighbours import Neighbours, Reading, Shape, pattern


class Mixture(NamedTuple):
    """How experts lie.

    Attributes:
      router: What chooses among them.
      number: How many there are.
      stack: The axes of stacked layers.
      axes: Those of one expert.
    """

    router: Path
    number: int
    stack: Stack
    axes: tuple[str, ...]


def experts(path: Path, near: Neighbours) -> Reading | None:
    """`[experts, in, out]`, also of gate and up together, `[experts, in, 2, out]`, beside a router
    with as many outputs; None where that is not so, or in and out cannot be told."""
    found = set(_mixtures(path, near))
    if len(found) != 1:
        return None
    router, count, stack, axes = found.pop()
    matrices = pattern(["experts", *axes], stack)
    return Reading(matrices, f"{count} experts, beside {near.show([router])}")


def router(path: Path, near: Neighbours) -> Reading | None:
    """What chooses among experts, `[in, experts]` or turned round: they tell where its name and
    rank do not."""
    module = path[: -3 if names.leaf(path) in (*names.KERNELS, *names.WEIGHTS) else -2]
    around = [p for p in near.shapes if p[: len(module)] == module and path in near.routers(p)]
    mixtures = (mixture for p in around for mixture in _mixtures(p, near))
    found = {(one.number, one.stack) for one in mixtures if one.router == path}
    if len(found) != 1:
        return None
    count, stack = found.pop()
    turned = near.shapes[path][-1] != count
    axes = ["out", "in"] if turned else ["in", "out"]
    return Reading(pattern(axes, stack), f"chooses among {count} experts")


def mlp(path: Path, near: Neighbours) -> Reading | None:
    """A matrix that is no Flax kernel, or gate and up in one parameter, `[2, in, out]`; None where
    in and out cannot be told."""
    stack, widths = near.stack(path), near.widths(path)
    own = stack.without(near.shapes[path]) or ()
    if len(own) != 2 and not (len(own) == 3 and names.is_of_two(path)):
        return None
    axes = _axes(path, near, own, set(widths))
    if axes is None:
        return None
    turned = axes.index("out") < axes.index("in")
    seen = near.show(gain for length, gain in widths.items() if length in own)
    witness = f"beside {seen}" if seen else "called as T5 and MaxText call it"
    return Reading(pattern(axes, stack), f"{'[out, in]' if turned else '[in, out]'}: {witness}")


def for_layers(path: Path, near: Neighbours) -> Reading | None:
    """What gives each layer an input of its own, `[in, layers, out]`, beside a table that gives
    them as much for each token."""
    shape = near.shapes[path]
    if len(shape) != 3 or not names.is_for_layers(path):
        return None
    module = path[:-2]
    table = next(
        (p for p in near.tables if p[:-1] == module and near.shapes[p][1:] == shape[1:]), None
    )
    if table is None:
        return None
    matrices = pattern(["in", "layers", "out"], Stack())
    return Reading(matrices, f"of {shape[1]} layers, beside {near.show([table])}")


def _mixtures(path: Path, near: Neighbours) -> Iterator[Mixture]:
    """All ways to read a parameter as experts."""
    for router in near.routers(path):
        for stack in _stacks(path, router, near):
            own, scores = stack.without(near.shapes[path]), stack.without(near.shapes[router])
            if own and scores and len(scores) == 2 and own[0] in scores:
                width = scores[scores[0] == own[0]]
                if axes := _axes(path, near, own[1:], {width}):
                    yield Mixture(router, own[0], stack, tuple(axes))


def _stacks(path: Path, router: Path, near: Neighbours) -> list[Stack]:
    """Where the layers' axes may be in experts and their router."""
    known, scores = near.stack(path), near.shapes[router]
    if known.lengths or len(scores) == 2:
        return [known]
    return [Stack(scores[axis : len(scores) - 2 + axis], axis) for axis in (0, 1)]


def _axes(path: Path, near: Neighbours, lengths: Shape, widths: Set[int]) -> list[str] | None:
    """The names of a matrix's axes, and of a third of length 2; None where they cannot be told."""
    rest = list(range(len(lengths)))
    if len(rest) == 3 and lengths.count(2) == 1:
        rest.remove(lengths.index(2))
    if len(rest) != 2:
        return None
    wide = [axis for axis in rest if lengths[axis] in widths]
    side = _side(path, near)
    in_order = names.is_in_order(path)
    if side is not None and len(wide) == 1:
        if (wide[0] == rest[0]) != (side == "up"):
            rest.reverse()
            if in_order:
                return None
    elif not in_order:
        return None
    called = dict(zip(rest, ("in", "out"), strict=True))
    return [called.get(axis, "part") for axis in range(len(lengths))]


def _side(path: Path, near: Neighbours) -> str | None:
    if names.is_router(path):
        return "up"
    gemma = (*path[:-1], "gating_einsum")
    return "down" if path[-1:] == ("linear",) and gemma in near.shapes else names.side(path)
