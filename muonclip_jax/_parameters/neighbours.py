"""What the other parameters of a tree tell about one: stacks of layers, vocabularies, heads."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from muonclip_jax._core import paths
from muonclip_jax._core.axes import MatrixPattern
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.find import Projection, Stack, projections
from muonclip_jax._layouts.surroundings import bias_beside
from muonclip_jax._parameters import names

# Flax kernels are [in, out].
MATRIX = MatrixPattern("... in out")

Shape = tuple[int, ...]


class Reading(NamedTuple):
    """How a parameter is read.

    Attributes:
      matrices: The pattern of its matrices; None: it is not for Muon.
      why: What told that, in words; empty where its own name and shape do.
      fused: Whether a matrix holds several projections of attention, by its name.
    """

    matrices: MatrixPattern | None
    why: str = ""
    fused: bool = False


def pattern(axes: Sequence[str], stack: Stack, matrix: str = "in out") -> MatrixPattern:
    """The pattern of matrices in stacked layers, of which one layer has these axes."""
    layers = [f"layers{i}" for i in range(len(stack.lengths))]
    left = [*axes[: stack.axis], *layers, *axes[stack.axis :]]
    own = re.findall(r"\w+", matrix)
    batch = [name for name in left if name not in own]
    return MatrixPattern(f"{' '.join(left)} -> {' '.join((*batch, matrix))}")


class Neighbours:
    """A parameter tree as shapes by path, and what they tell of each other.

    Attributes:
      shapes: Of every parameter that is not masked.
      masked: The paths of masked parameters, or of modules that were masked as one.
      tables: The embeddings.
      heads: The unembeddings that are known by their names. Of a module that is called so and holds
        several matrices these are the ones whose outputs nothing in it takes in.
      perhaps_heads: What is in such a module, and of which that cannot be told.
    """

    def __init__(self, params: Any):
        self.shapes = paths.shapes(params)
        self.masked = paths.masked(params)
        every_path = [*self.shapes, *self.masked]
        self.tables = {path for path in self.shapes if names.is_table(path)}
        self.heads: set[Path] = set()
        self.perhaps_heads: set[Path] = set()
        self._find_heads()
        self._takers: dict[int, set[Path]] = {}  # length → what takes in so much
        self._gains: dict[Path, list[Path]] = {}  # module → norms' gains anywhere inside
        self._layers: dict[Path, list[Path]] = {}  # a stack of layers by its name → what is in it
        for path, shape in self.shapes.items():
            for length in self._taken_in(path, shape):
                self._takers.setdefault(length, set()).add(path)
        for path in every_path:
            for end in range(len(path) if self._may_be_gain(path) else 0):
                self._gains.setdefault(path[:end], []).append(path)
            for end, name in enumerate(path[:-1], 1):
                if names.is_layers(name):
                    self._layers.setdefault(path[:end], []).append(path)
        vocabularies = {path for path in self.tables if not names.is_of_positions(path)}
        self._rows = {path: self.shapes[path][:-1] for path in vocabularies}
        self._repeats = Counter(names.place(path) for path in every_path)

    def known(self, path: Path) -> list[Projection]:
        """What a kernel of attention of a known model can be; of others nothing.

        Where shapes leave several readings, as `[in, heads, features]` and `[in, layers, features]`
        of as many heads as features, it is those of which the norms around have the stack axes;
        without norms those with the fewest.
        """
        found = self._known.get(path, [])
        if len(found) < 2:
            return found
        gains = [self.shapes[p] for p in self._nearest_gains(path)[1] if p in self.shapes]
        depth = min(map(len, gains)) - 1 if gains else min(len(one.stack.lengths) for one in found)
        some = [one for one in found if len(one.stack.lengths) == depth]
        return [one for one in some if all(one.stack.without(gain) is not None for gain in gains)]

    def stack(self, path: Path) -> Stack:
        """Where the layers around a parameter are stacked: as attention of a known model in them
        shows, or else their norms."""
        around = (self._stacks.get(path[:end]) for end in reversed(range(len(path))))
        found = next(filter(None, around), None)
        return found or self._stack_of_gains(path)

    def bias(self, path: Path) -> Path | None:
        """The bias beside a kernel."""
        return bias_beside(path, self.shapes)

    def say_stack(self, path: Path, stack: Shape) -> bool:
        """Whether a kernel's first axes are a stack of layers, where no norm is around it.

        The bias beside it has these axes, and does not fit `[in, heads, features]` as well. Where
        there is none, a module around it is called as a stack of layers, everything in it has the
        axis, and every length that one of its kernels takes in one of them gives, as layers do that
        follow each other. Convolutions and projections to heads do not.
        """
        if self._nearest_gains(path)[1]:
            return False
        bias = self.bias(path)
        if bias is not None:
            return self.shapes[bias] != self.shapes[path][1:]
        beside = (*path[:-1], "bias")
        is_masked = any(beside[: len(masked)] == masked for masked in self.masked)
        return not is_masked and self._is_in_layers(path, stack)

    def widths(self, path: Path) -> dict[int, Path]:
        """How wide the model is around a parameter, by the nearest norms' gains."""
        found: dict[int, Path] = {}
        for gain in self._nearest_gains(path)[1]:
            own = self.stack(gain).without(self.shapes[gain]) if gain in self.shapes else None
            if own:
                found.setdefault(own[-1], gain)
        return found

    def routers(self, path: Path) -> list[Path]:
        """What may choose among experts in the nearest module around them, as `moe` is around
        `moe/experts/up/kernel` and `moe/router/kernel`."""
        for end in reversed(range(max(0, len(path) - 3), len(path))):
            found = [r for r in self._routers if r[:end] == path[:end] and len(r) <= end + 3]
            if found:
                return [] if path in found else found
        return []

    def shown(self, path: Path) -> str:
        """What `say_stack` looked at, in words."""
        bias = self.bias(path)
        looked_at = [bias] * (bias is not None) + self._nearest_gains(path)[1][:2]
        seen = self.show(path for path in looked_at if path in self.shapes)
        return f"beside {seen}" if seen else "no bias and no norm beside it"

    def show(self, some: Iterable[Path]) -> str:
        """Paths with their shapes."""
        return ", ".join(f"{paths.show(path)} {self.shapes[path]}" for path in some)

    def tables_of(self, length: int) -> list[Path]:
        """The embeddings with so many rows: of tokens, not of positions."""
        return [path for path, rows in self._rows.items() if length in rows]

    def may_hide_table(self) -> bool:
        """Whether a masked parameter may be the embedding of an unembedding that has no name."""
        if self.heads:
            return False
        wholes = (path for path in self.masked if self._is_whole(path))
        tables = (path for path in self.masked if names.is_table(path))
        return any(not names.is_norm(path[-1]) for path in wholes if path) or not all(
            map(names.is_of_positions, tables)
        )

    def takers(self, length: int, path: Path) -> list[Path]:
        """What takes in so many features: it is a length of activations. Of a kernel that gives as
        many, it may be itself."""
        found = self._takers.get(length, ())
        return [taker for taker in found if taker != path or self.shapes[path][-1] == length]

    def are_a_pair(self, path: Path) -> bool:
        """Whether another kernel in the module around takes in what this one gives, and gives what
        it takes in, as in an MLP `[in, hidden]`, `[hidden, in]`. Not of square matrices, nor where
        the module is the model: it has an embedding, or masked parameters."""
        module, (ins, outs) = path[:-2], self.shapes[path]
        within = lambda one: one[: len(module)] == module  # noqa: E731
        if not module or ins == outs or any(map(within, (*self.tables, *self.masked))):
            return False
        kernels = (p for p in self.shapes if within(p) and names.leaf(p) in names.KERNELS)
        return any(self.shapes[kernel] == (outs, ins) for kernel in kernels)

    def is_repeated(self, path: Path) -> bool:
        """Whether other layers have this parameter too."""
        return self._repeats[names.place(path)] > 1

    def has_head(self, length: int) -> bool:
        """Whether an unembedding with so many outputs is known by its name, or a masked one."""
        masked = any(names.head(path) for path in self.masked)
        return masked or any(length in self._given(path) for path in self.heads)

    def may_be_stacked(self, path: Path) -> bool:
        """Whether a module around is called as stacked layers are, and no norm tells."""
        return not self._nearest_gains(path)[1] and any(map(names.is_layers, path[:-1]))

    def is_between_norms(self, path: Path) -> bool:
        """Whether the nearest norms are those of single layers."""
        gains = self._nearest_gains(path)[1]
        return bool(gains) and all(len(self.shapes.get(gain, ())) == 1 for gain in gains)

    def is_recurrent(self, path: Path) -> bool:
        """Whether a kernel is in linear attention or a state-space model, whose states decay."""
        return any((*path[:-end], "A_log") in self.shapes for end in (2, 3))

    def is_given(self, length: int, path: Path) -> bool:
        """Whether another kernel in the module around gives so many features."""
        module = path[:-2]
        around = (p for p in self.shapes if p[: len(module)] == module and p != path)
        return any(names.leaf(p) in names.KERNELS and self.shapes[p][-1] == length for p in around)

    @cached_property
    def _known(self) -> dict[Path, list[Projection]]:
        return projections(self.shapes)

    @cached_property
    def _routers(self) -> list[Path]:
        every = [p for p, shape in self.shapes.items() if len(shape) > 1 and names.is_router(p)]
        # Beside what is called a router, a gate is a part of an MLP.
        called = [p for p in every if names.is_called_router(p)]
        gates = {p for p in every for r in called if p not in called and p[: len(r) - 2] == r[:-2]}
        return [path for path in every if path not in gates]

    @cached_property
    def _stacks(self) -> dict[Path, Stack]:
        """Modules in which all is stacked as the attention of a known model inside of them is."""
        found: dict[Path, Stack] = {}
        for kernel in self._known:
            several = self.known(kernel)
            if len(several) != 1 or not several[0].stack.lengths:
                continue
            stack = several[0].stack
            for end in reversed(range(len(kernel))):
                inside = (
                    shape for path, shape in self.shapes.items() if path[:end] == kernel[:end]
                )
                if kernel[:end] in found or any(stack.without(shape) is None for shape in inside):
                    break
                found[kernel[:end]] = stack
        return found

    def _stack_of_gains(self, path: Path) -> Stack:
        """The axes that the nearest norms have in front of their own one; behind it, if only so all
        kernels around have them at one place."""
        module, gains = self._nearest_gains(path)
        if len(self.shapes[path]) < 3 or not gains or any(p not in self.shapes for p in gains):
            return Stack()
        gain = min((self.shapes[gain] for gain in gains), key=len)
        first, second = Stack(gain[:-1]), Stack(gain[1:], 1)
        around = [p for p in self.shapes if p[: len(module)] == module]
        shapes = [self.shapes[p] for p in around if len(self.shapes[p]) > 2 or p in gains]
        fits = lambda stack: all(stack.without(shape) is not None for shape in shapes)  # noqa: E731
        if second.lengths and not fits(first) and fits(second):
            return second
        return first if first.without(self.shapes[path]) is not None else Stack()

    def _nearest_gains(self, path: Path) -> tuple[Path, list[Path]]:
        """The nearest module around that holds norms, with their gains."""
        around = (path[:depth] for depth in reversed(range(len(path) - 1)))
        return next(((one, self._gains[one]) for one in around if one in self._gains), ((), []))

    def _find_heads(self) -> None:
        inside: dict[Path, list[Path]] = {}
        for path in self.shapes:
            if (module := names.head(path)) is not None:
                inside.setdefault(module, []).append(path)
        for module, every in inside.items():
            direct = {path for path in every if module in (path, path[:-1])}
            matrices = [p for p in every if len(self.shapes[p]) == 2 and not names.is_vector(p)]
            last = {path for path in matrices if not self._is_taken_within(path, every)}
            rest = {path for path in matrices if not names.is_in_attention(path)} - direct
            unseen = any(masked[: len(module)] == module for masked in self.masked)
            circular = not last and len({self.shapes[path] for path in rest}) == 1
            if rest and (unseen or (circular and not direct)):
                self.perhaps_heads |= rest
            else:
                self.heads |= rest & last
            self.heads |= direct

    def _is_taken_within(self, path: Path, module: Iterable[Path]) -> bool:
        given = self.shapes[path][-1]
        others = (self.shapes[other] for other in module if other != path)
        return any(given in shape[:-1] for shape in others)

    def _taken_in(self, path: Path, shape: Shape) -> Shape:
        if path in self.tables:
            return shape[1:]
        if path in self.heads or names.leaf(path) in names.KERNELS:
            return shape[:-1] if names.leaf(path) in names.KERNELS else ()
        if names.is_gain(path):
            return shape[-1:]
        return () if names.is_vector(path) or len(shape) < 2 else shape

    def _given(self, path: Path) -> Shape:
        shape = self.shapes[path]
        return shape[-1:] if names.leaf(path) in names.KERNELS else shape

    def _is_in_layers(self, path: Path, stack: Shape) -> bool:
        around = (path[:end] for end in reversed(range(len(path))))
        module = next((one for one in around if one in self._layers), None)
        if module is None or len(stack) != 1 or any("conv" in name.lower() for name in path):
            return False
        inside = self._layers[module]
        if any(p not in self.shapes or p[len(module)].isdigit() for p in inside):
            return False
        kernels = [p for p in inside if names.leaf(p) in names.KERNELS]
        axes = {p: 3 if p in kernels else 2 for p in inside}
        if any(len(self.shapes[p]) < axes[p] or self.shapes[p][:1] != stack for p in inside):
            return False
        if any(kernel in self._known for kernel in kernels):
            return False  # unstacked, or it would tell
        return {self.shapes[p][-2] for p in kernels} <= {self.shapes[p][-1] for p in kernels}

    def _may_be_gain(self, path: Path) -> bool:
        if path in self.shapes:
            return names.is_gain(path) and len(self.shapes[path]) > 0
        return names.is_gain(path) or self._is_whole(path)

    def _is_whole(self, masked: Path) -> bool:
        """Whether it may be a module that was masked as one: its last name is none of a leaf."""
        name = names.leaf(masked)
        known = (*names.KERNELS, *names.WEIGHTS, "b", "embedding")
        return name not in known and not names.is_vector(masked)
