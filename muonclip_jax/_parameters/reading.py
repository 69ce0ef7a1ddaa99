"""How a parameter is read that neither a rule nor the layout decides: by names and shapes."""

import math
from collections.abc import Mapping
from typing import Any

from muonclip_jax._core import paths
from muonclip_jax._core.axes import MatrixPattern
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.find import Projection, Stack
from muonclip_jax._parameters import names
from muonclip_jax._parameters.convolutions import Unsure, convolution
from muonclip_jax._parameters.feedforward import experts, for_layers, mlp, router
from muonclip_jax._parameters.neighbours import MATRIX, Neighbours, Reading, pattern


class Unclear(ValueError):
    """A parameter that could be several things, or none that is known.

    Attributes:
      finding: What was found, as a sentence without its subject.
      pattern: How it would be read as one of these things.
      beside: What it was compared with, in words with shapes.
    """

    def __init__(self, finding: str, pattern: str, beside: str = ""):
        super().__init__(finding)
        self.finding, self.pattern, self.beside = finding, pattern, beside


def read(path: Path, near: Neighbours) -> Reading:
    """What a parameter is.

    Raises:
      Unclear: It could be several things, or none.
    """
    shape = near.shapes[path]
    if len(shape) < 2 or names.is_vector(path) or path in near.tables or path in near.heads:
        return Reading(None)
    if known := near.known(path):
        return _projection(path, known, near)
    own = near.stack(path).without(shape)
    if own is not None and len(own) < 2:
        return Reading(None, "one number, or a vector, in each layer")
    if names.leaf(path) == "b" and shape == _without_inputs(near.shapes.get((*path[:-1], "w"), ())):
        return Reading(None)
    kernel = names.leaf(path) in names.KERNELS
    if not kernel and names.leaf(path) not in names.WEIGHTS and sum(n > 1 for n in shape) < 2:
        return Reading(None)
    if found := _read_by_neighbours(path, near):
        return found
    if not kernel:
        raise _unnamed(path, shape)
    if len(shape) > 2:
        return Reading(_stack_of_kernels(path, near), fused=names.is_fused(path))
    if names.is_norm(names.holder(path)) and near.bias(path) is None:
        raise Unclear(
            "is a matrix ('in out'), or the gain of a norm in stacked layers (None)", "in out"
        )
    return Reading(_one_kernel(path, near), fused=names.is_fused(path))


def _read_by_neighbours(path: Path, near: Neighbours) -> Reading | None:
    """A convolution, experts, or an MLP that is no plain kernel."""
    try:
        found = convolution(path, near)
    except Unsure:
        window = " ".join(f"window{i}" for i in range(len(near.shapes[path]) - 2))
        fits = f"{window} in out -> ({window} in) out"
        raise Unclear(
            f"is a convolution of one input ({fits!r}), or of each feature by itself (None)", fits
        ) from None
    plain = names.leaf(path) in names.KERNELS and len(near.shapes[path]) == 2
    if found or plain:
        return found
    if names.is_router(path) and (found := router(path, near)):
        return found
    return for_layers(path, near) or experts(path, near) or mlp(path, near)


def _projection(path: Path, known: list[Projection], near: Neighbours) -> Reading:
    """A kernel of attention whose names are known."""
    shape = near.shapes[path]
    ins, outs, stack = known[0]
    if len({(one.ins, one.outs) for one in known}) > 1:
        raise Unclear(
            "is attention of a known model whose shapes fit several of its storages: they do not "
            "tell which axes are in and out, and which are layers",
            "... in out",
            near.shown(path),
        )
    bias = near.bias(path)
    outputs = math.prod(stack.lengths) * shape[outs], math.prod(shape) // shape[ins]
    if bias is not None and math.prod(near.shapes[bias]) not in outputs:
        raise Unclear(
            "is no projection of attention to the bias beside it",
            "in out" if len(shape) == 2 else "... in out",
            f"beside {near.show([bias])}",
        )
    axes = ["in" if i == ins else "out" if i == outs else f"axis{i}" for i in range(len(shape))]
    headed = len(shape) > 2 + len(stack.lengths)
    told = ["attention's heads"] * headed + ["[out, in]"] * (outs < ins)
    fused = names.is_fused(path) and not headed
    return Reading(pattern(axes, Stack()), ", ".join(told), fused)


def check_all_clear(unclear: Mapping[Path, Unclear], near: Neighbours) -> None:
    """Raises ValueError for everything that is unclear, at once: parameters of which the same is to
    be said share a line, and layers that are alike an entry of it."""
    alike: dict[tuple[str, Any, str, str], list[Path]] = {}
    for path, why in unclear.items():
        key = (names.place(path), near.shapes[path], why.finding, names.unnumbered(why.beside))
        alike.setdefault(key, []).append(path)
    lines: dict[str, list[str]] = {}
    rules: dict[str, str] = {}
    for (place, shape, finding, _), some_paths in alike.items():
        why, many = unclear[some_paths[0]], len(some_paths) > 1
        shown = place if many else paths.show(some_paths[0])
        beside = f" ({why.beside})" * bool(why.beside)
        entry = f"{shown}{f', {len(some_paths)}' * many} of shape {shape}{beside}"
        lines.setdefault(finding, []).append(entry)
        rules.setdefault(shown, why.pattern)
    if lines:
        raise ValueError(_in_words(lines, rules, near))


def _in_words(lines: Mapping[str, list[str]], rules: Mapping[str, str], near: Neighbours) -> str:
    several = len(rules) > 1
    told = [f"{', '.join(e)}{': each' * (len(e) > 1)} {finding}." for finding, e in lines.items()]
    if near.masked:
        told.append(
            f"Some parameters are masked ({paths.some(near.masked)}), and what tells may be among "
            "them: work out the routing from the whole tree "
            "(dimension_numbers=mc.muon_dimension_numbers(params)), or give rules=."
        )
    told.append(
        f"Say how to treat {'each' if several else 'it'}: rules={rules} (names of its axes as in "
        "einops, inputs and outputs last; or a muonclip_jax.MatrixPattern, or an "
        "optax.contrib.MuonDimensionNumbers), or None for the other optimizer. (A link without "
        "rules= takes them as dimension_numbers=.)"
    )
    return f"The routing of {len(rules)} parameters is unclear.\n" * several + (
        "\n" if several else " "
    ).join(told)


def _without_inputs(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return (*kernel[:-2], *kernel[-1:])


def _unnamed(path: Path, shape: tuple[int, ...]) -> Unclear:
    several = len(shape) > 2
    if names.leaf(path) not in names.WEIGHTS:
        return Unclear(
            "is neither a kernel nor an embedding, bias or scale by its name; if it belongs to "
            "attention, describe it with layout=",
            "experts in out" if several else "in out",
        )
    return Unclear(
        "may be [out, in], as in Equinox and PyTorch ('out in -> in out'), [in, out] "
        "('in out'), or an embedding (None)",
        "... out in -> ... in out" if several else "out in -> in out",
    )


def _stack_of_kernels(path: Path, near: Neighbours) -> MatrixPattern:
    shape, stack, bias = near.shapes[path], near.stack(path), near.bias(path)
    own = stack.without(shape)
    fits = bias is None or stack.without(near.shapes[bias]) == own[1:] if own else False
    if own is not None and len(own) == 2 and fits:
        return pattern(["in", "out"], stack)
    fits = bias is None or near.shapes[bias] == (*shape[:-2], shape[-1])
    if fits and near.say_stack(path, shape[:-2]):
        return MATRIX
    raise Unclear(
        "does not look like a stack of kernels [stack..., in, out] to what stands around it: "
        "it may be a convolution ('h w in out -> (h w in) out'), a stack of experts ('experts in "
        "out'), a projection to heads (one matrix per head: 'in heads features -> heads in "
        "features'), or have a scan axis other than 0",
        "experts in out" if len(shape) == 3 else "... in out",
        near.shown(path),
    )


def _one_kernel(path: Path, near: Neighbours) -> MatrixPattern | None:
    ins, outs = near.shapes[path]
    bias = near.bias(path)
    if bias is not None and near.shapes[bias] == (ins,) != (outs,):
        return MatrixPattern("out in -> in out")
    if bias is not None and near.shapes[bias] != (outs,):
        raise Unclear(
            "is no kernel [in, out] to the bias beside it", "in out", f"beside {near.show([bias])}"
        )
    if path in near.perhaps_heads:
        raise Unclear(
            "is the unembedding (None), or a matrix before it ('in out'): it is in "
            f"{paths.show(names.head(path) or ())}, whose matrices tell not which is the last",
            "in out",
        )
    ends = _ends(path, near, outs)
    if not ends and names.is_like_embedding(names.holder(path)):
        ends = _ends(path, near, ins)
    return None if ends else MATRIX


def _ends(path: Path, near: Neighbours, length: int) -> bool:
    """Whether a matrix is an unembedding, by one of its lengths: the table is in
    `mc.muon_dimension_numbers`."""
    if names.is_in_attention(path) or near.has_head(length):
        return False
    taken, repeated = near.takers(length, path), near.is_repeated(path)
    called = names.is_perhaps_head(path)
    tables = near.tables_of(length)
    alone = not taken and not repeated
    if near.masked and not taken and (called or (alone and (tables or near.may_hide_table()))):
        raise Unclear(
            "is an unembedding (None), or not ('in out'), as what is masked says", "in out"
        )
    if not tables or (taken and repeated) or near.are_a_pair(path):
        return called and not taken
    if called or alone:
        return True
    raise Unclear(
        "is as long as an embedding has rows, as an unembedding is (None), but "
        f"{'something takes in as much' if taken else 'other layers have one too'}, as is usual "
        "of hidden matrices ('in out')",
        "in out",
        f"beside {near.show(dict.fromkeys(tables[:1] + taken[:1]))}",
    )
