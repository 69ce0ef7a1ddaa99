"""Layouts found rather than told: attention of known models, by names and shapes.

parameters ─► modules ─► the first family that reads each ─► layouts, with block= where ─► checked
                                │                            several share their names
                                └─ Ask ─► the heads told, or an error that asks for them
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

from muonclip_jax._core import paths
from muonclip_jax._core.options import check_count
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts import counts, suggest
from muonclip_jax._layouts.blocks import Layout, Layouts, find_blocks, module_path
from muonclip_jax._layouts.checks import matrices_of
from muonclip_jax._layouts.families import (
    FAMILIES,
    LINEAR,
    STORED,
    Ask,
    Family,
    Inside,
    fit,
    holds,
    parameter,
    read,
)
from muonclip_jax._layouts.kinds import ignore
from muonclip_jax._layouts.pieces import Part, Piece
from muonclip_jax._layouts.roles import GAIN_ROLES, KEY_ROLES
from muonclip_jax._layouts.surroundings import Shapes, looks_like_attention


def find_layout(params: Any, heads: int | None = None, kv_heads: int | None = None) -> Layouts:
    """The layout of a model whose attention is known by its names and shapes.

    | known models, in Flax (Linen, NNX), Equinox or plain trees | projections of a module |
    | --- | --- |
    | Flax's own attention; MaxText; T5X | `query`, `key`, `value`, `out` |
    | nanodo; ALBERT; V-JEPA 2 | the same, but `attn_out_proj`; `dense`; `proj` |
    | Llama, Mistral, Mixtral, Qwen, Gemma, gpt-oss, … in Tunix, Transformers, EasyDeL, bonsai, Levanter | `q_proj`, `k_proj`, `v_proj`, `o_proj` |
    | OPT, BART, Whisper, CLIP, GPT-J; LLaDA | the same, but `out_proj`; `attn_out` |
    | Llama, as Meta wrote it; T5 and umT5 | `wq`, `wk`, `wv`, `wo`; `q`, `k`, `v`, `o` |
    | BERT, RoBERTa; ViT; DistilBERT | `self/query`, … `output/dense`; `attention/query`, …; `q_lin`, … |
    | SigLIP in Tunix; Equinox's own attention | `query_proj`, … `out_proj`; `output_proj` |
    | Gemma 1 to 4 of DeepMind and in Tunix | `q_einsum`, `kv_einsum` (or `k_einsum`, `qkv_einsum`), `attn_vec_einsum` |
    | Qwen3-Next | `q_proj` or `query` that holds a gate beside each head's query |
    | GPT-2 | `c_attn`, `c_proj` |
    | GPT-NeoX, BLOOM, Falcon; InternLM 2 | `query_key_value`, `dense`; `wqkv`, `wo` |
    | MaxText's fused attention and GPT-3; Phi 3 | `qkv_proj`, `out`; `qkv_proj`, `o_proj` |
    | MPT, DBRX; vision of Qwen 3 VL | `Wqkv`, `out_proj`; `qkv`, `proj` |
    | linear attention of Kimi Linear (KDA); of Qwen3-Next, keys as long as values | `q_proj`, `k_proj`, `v_proj`, `g_b_proj`, `o_proj`; `in_proj_qkvz`, `out_proj` |
    | MLA of DeepSeek, Kimi, GLM 5 | `wq_a`, `wq_b`, `wkv_a`, `wkv_b`, `wo` or `out`; `q_a_proj`, … `kv_b_proj`, `o_proj`; queries of one kernel too |

    Layers may be stacked on the first axis or on the second (MaxText). A kernel
    `[in, heads, features]` tells its heads. Of a flat one `[in, heads*features]` they are read off
    norms on queries and keys as long as a head, sinks (one a head), T5's table of biases
    `[buckets, heads]`, the sizes of MLA. Where none of these is, the numbers must be told: they are
    never guessed.

    Linear attention (known by its `A_log`) has no softmax to clip; Muon takes its heads. Left out,
    by `layouts.ignore`: linear attention in other spellings; an indexer, which chooses what others
    attend to; queries alone, whose keys are another layer's. A QK-norm does not matter here: clips
    refuse it, `mc.muon` splits heads behind it.

    Args:
      params: The model's parameters (arrays or `jax.ShapeDtypeStruct`s).
      heads: Number of query heads, for flat kernels that do not tell.
      kv_heads: Number of key heads, likewise; one of the two numbers is enough.

    Returns:
      A layout, or a list of them where the model has several kinds of attention: each function that
      takes a layout takes a list.

    Raises:
      ValueError: Flat kernels of which nothing tells the heads: the message says what to give.
        Attention of no known model: the message has the line that fits what is there. Or what
        `find_blocks` raises.

    Example:
      >>> mc.find_layout(params).name  # of Flax's own attention
      'mha'
      >>> llama = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64)}
      >>> attn = {name: {"kernel": jnp.ones(shape)} for name, shape in llama.items()}
      >>> layout = mc.find_layout({"self_attn": attn}, heads=8)
      >>> mc.layouts.find_blocks(layout, {"self_attn": attn})[0].kv_heads
      4
    """  # noqa: E501
    for name, count in (("heads", heads), ("kv_heads", kv_heads)):
        if count is not None:
            check_count(f"find_layout: {name}", count)
    shapes = paths.shapes(params)
    modules = {path: own for path, own in _modules(shapes).items() if not _is_indexer(path)}
    found: dict[Path, Layout] = {}
    asked: dict[Path, tuple[Family, Ask]] = {}
    for path, inside in modules.items():
        if _is_linear(inside):
            if (layout := _read_linear(inside)) is not None:
                found[path] = layout
            continue
        family, answer = _read(inside, shapes)
        if isinstance(answer, Layout):
            found[path] = answer
        elif answer is not None:
            asked[path] = family, answer
    if asked:
        size = counts.told(asked, modules, heads, kv_heads)
        for path, (family, _) in asked.items():
            if isinstance(answer := read(family, modules[path], lambda _: size), Layout):
                found[path] = answer
    found = {path: _beside_indexer(layout, modules[path]) for path, layout in found.items()}
    layouts = _arranged(found, _left_out(found, modules, shapes), shapes)
    find_blocks(layouts, params)  # raises here rather than at the first step
    return layouts[0] if len(layouts) == 1 else layouts


def line_for(kernels: Iterable[Path], shapes: Shapes) -> dict[Path, str]:
    """For each kernel, which holds several projections of attention, the layout that splits it, as
    Python: `find_layout`'s where it is of a known model, with the numbers that have to be told."""
    modules = _modules(shapes)
    lines: dict[Path, str] = {}
    for kernel in kernels:
        around = (modules[kernel[:end]] for end in reversed(range(len(kernel))))
        known = (_call(inside, shapes) for inside in around)
        lines[kernel] = next(filter(None, known), suggest.fused_qkv(kernel[-2]))
    return lines


def _call(inside: Inside, shapes: Shapes) -> str:
    """The call of `find_layout` that reads a module; "" where it is of no known model."""
    answer = _read_linear(inside) if _is_linear(inside) else _read(inside, shapes)[1]
    if isinstance(answer, Ask):
        return f"mc.{counts.question(answer.queries, answer.keys)}"
    return "" if answer is None else "mc.find_layout(params)"


Storage = tuple[tuple[Piece, ...], int]
"""The pieces of a module's attention, and where its stack axes are."""


class Stack(NamedTuple):
    """Where the parameters of stacked layers have the layers' axes.

    Attributes:
      lengths: How long these are; `()` where nothing is stacked.
      axis: Where the first of them is.
    """

    lengths: tuple[int, ...] = ()
    axis: int = 0

    def without(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """One layer's shape; None of a parameter that does not have these axes."""
        end = self.axis + len(self.lengths)
        if shape[self.axis : end] != self.lengths:
            return None
        return (*shape[: self.axis], *shape[end:])


class Projection(NamedTuple):
    """How a kernel of attention is stored: each head that has an axis of its own is a matrix.

    Attributes:
      ins: The axis of a matrix's inputs.
      outs: The axis of its outputs.
      stack: The axes of stacked layers.
    """

    ins: int
    outs: int
    stack: Stack


def projections(shapes: Shapes) -> dict[Path, list[Projection]]:
    """Every kernel of attention that is known by its names, with all that its module can be.

    Flat kernels count as one head: their storage is told without the number. Queries without keys
    are another layer's, and stored like those that have some.
    """
    modules = _modules(shapes)
    keys = {path: tuple(inside.items()) for path, inside in modules.items()}
    alike = {keys[path]: inside for path, inside in modules.items()}  # layers are read once
    stored = {key: list(_storages(inside)) for key, inside in alike.items()}
    known = dict.fromkeys(itertools.chain.from_iterable(stored.values()))
    kernels = {
        key: [
            (part.kernel, _projection(part, stack_axis))
            for pieces, stack_axis in stored[key] or _queries_alone(inside, known)
            for part in (fit(pieces, inside, stack_axis) or {}).values()
            if part.role not in GAIN_ROLES
        ]
        for key, inside in alike.items()
    }
    found: dict[Path, list[Projection]] = {}
    for path, key in keys.items():
        for kernel, one in kernels[key]:
            readings = found.setdefault((*path, *kernel), [])
            if one not in readings:
                readings.append(one)
    return found


def _storages(inside: Inside) -> Iterator[Storage]:
    """All that a module can be, by the first family that can read it."""
    if _is_linear(inside) and (layout := _read_linear(inside)) is not None:
        yield layout.pieces, layout.stack_axis
        return
    for family in _candidates(inside):
        layouts = list(family.readings(inside, lambda ask: ask.keys))
        if layouts:
            yield from (
                (each.pieces, each.stack_axis) for each in layouts if isinstance(each, Layout)
            )
            return
    for pieces, axis in itertools.product(STORED, (0, 1)):
        if holds([piece.parameter for piece in pieces], inside):
            parts = fit(pieces, inside, axis)
            if parts and parts["q"].features == parts["k"].features:
                yield pieces, axis


def _queries_alone(inside: Inside, known: Iterable[Storage]) -> Iterator[Storage]:
    """What queries and outputs without keys can be, if they are as in attention that has keys."""
    for pieces, axis in known:
        own = tuple(piece for piece in pieces if piece.role in ("q", "gate", "o"))
        keys = [piece.parameter for piece in pieces if piece.role in KEY_ROLES]
        if len(own) < 2 or any(map(partial(holds, inside=inside), ([key] for key in keys))):
            continue
        if holds([piece.parameter for piece in own], inside):
            parts = fit(own, inside, axis)
            if parts and parts["q"].heads == parts["o"].heads:
                yield own, axis


def _projection(part: Part, stack_axis: int) -> Projection:
    """Which axes of a kernel are its matrices'."""
    rows, cols = (
        next(i for i, axis in enumerate(part.view.axes) if name in axis)
        for (name,) in (part.view.rows, part.view.cols)
    )
    return Projection(rows, cols, Stack(part.stack, stack_axis if part.stack else 0))


def _candidates(inside: Inside) -> Iterator[Family]:
    """The families whose names a module has."""
    first = {name.split("/")[0] for name in inside}
    for family in FAMILIES:
        if first.issuperset(family.beside) and holds(family.names, inside):
            yield family


def _modules(shapes: Shapes) -> dict[Path, Inside]:
    """What every module holds, at any depth, by the path inside of it."""
    modules: dict[Path, dict[str, tuple[int, ...]]] = {}
    for path, shape in shapes.items():
        for end in range(len(path)):
            modules.setdefault(path[:end], {})["/".join(path[end:])] = shape
    return {**modules}


def _is_linear(inside: Inside) -> bool:
    """Whether linear attention, whose queries and keys meet in no softmax: its state decays."""
    return "A_log" in inside


def _read_linear(inside: Inside) -> Layout | None:
    """Linear attention by the first family that can."""
    told = (one.read(inside) for one in LINEAR if holds(one.names, inside))
    return next(filter(None, told), None)


def _is_indexer(path: Path) -> bool:
    """Whether it chooses which keys others attend to: it has queries and keys, and no attention."""
    return any("indexer" in name.lower() for name in path)


def _read(inside: Inside, shapes: Shapes) -> tuple[Family, Layout | Ask | None]:
    """A module by the first family that can."""
    for family in _candidates(inside):
        answer = read(family, inside, partial(counts.seen, family, inside, shapes))
        if answer is not None:
            return family, answer
    return FAMILIES[0], None


def _beside_indexer(layout: Layout, inside: Inside) -> Layout:
    """Says of an indexer inside the block that it takes no part in the logits."""
    first = dict.fromkeys(name.split("/")[0] for name in inside)
    return replace(layout, harmless=tuple(name for name in first if _is_indexer((name,))))


def _left_out(
    found: Mapping[Path, Layout], modules: Mapping[Path, Inside], shapes: Shapes
) -> list[Path]:
    """Modules that hold names of attention and are to be ignored: queries without keys, which are
    another layer's or none, indexers, and linear attention of no known spelling.

    Raises:
      ValueError: Attention of no known model, or none at all.
    """
    kernels = [
        (*path, *parameter(piece.parameter, modules[path]).split("/"))
        for path, layout in found.items()
        for piece in layout.pieces
    ]
    covered = {kernel[:end] for kernel in kernels for end in range(len(kernel))}
    named = {path for path, _ in looks_like_attention(shapes)}
    others = named - covered
    linear = {path for path, inside in modules.items() if _is_linear(inside)}
    left = {path for path in others if _is_indexer(path) or path in linear}
    for layout in set(found.values()):
        for path in layout.places(shapes):
            if path not in found:
                others.add(path)
                has_keys = path in named or _has_keys(layout, path, shapes)
                if _is_indexer(path) or path in linear or not has_keys:
                    left.add(path)
    unknown = [path for path in modules if path in others - left]
    if not found and not unknown:
        like = [path for path, inside in modules.items() if suggest.spelling(inside)]
        unknown = [p for p in like if not any(p == other[: len(p)] != other for other in like)]
    if unknown:
        raise ValueError(suggest.unknown(unknown, modules))
    if not found:
        raise ValueError(
            "find_layout: no attention of a known model in these parameters. Matrices found: "
            f"{matrices_of(shapes)}. Write the layout: layouts.mha(query=..., key=...), "
            "layouts.gqa(...), layouts.fused_qkv(...), layouts.mla(nope, rope, v), or "
            "layouts.Layout(name, pieces=(layouts.Piece(...), ...))."
        )
    return sorted(left)


def _has_keys(layout: Layout, path: Path, shapes: Shapes) -> bool:
    keys = [piece for piece in layout.pieces if piece.role in KEY_ROLES]
    return any((*path, *leaf) in shapes for piece in keys for leaf in piece.leaves)


def _arranged(found: Mapping[Path, Layout], left: Sequence[Path], shapes: Shapes) -> list[Layout]:
    """One layout for all blocks that it reads, with a pattern where others have its names."""
    groups: dict[Layout, list[Path]] = {}
    for path, layout in found.items():
        # A block with as many key heads can be read as grouped.
        groups.setdefault(replace(layout, name="any", shared_keys=True), []).append(path)
    layouts: list[Layout] = []
    for members in groups.values():
        layout = max((found[path] for path in members), key=lambda each: each.shared_keys)
        others = [path for path in layout.places(shapes) if path not in {*members, *left}]
        patterns = _patterns(members, others) if others else [None]
        layouts += [replace(layout, block=pattern) for pattern in patterns]
    return layouts + [ignore(pattern) for pattern in _patterns(left, list(found))]


def _patterns(members: Sequence[Path], others: Sequence[Path]) -> list[str]:
    """Globs that together match each member once and none of the others: with `*` for numbers
    where that does, else the paths themselves."""
    by_glob: dict[str, list[str]] = {}
    for path in members:
        exact = re.sub(r"([*?[])", r"[\1]", paths.show(module_path(path)))
        by_glob.setdefault(re.sub(r"\d+", "*", exact), []).append(exact)
    taken = [paths.show(module_path(path)) for path in others]
    patterns: list[str] = []
    for glob, every in sorted(by_glob.items(), key=lambda item: len(item[0])):
        rest = [exact for exact in every if not any(fnmatchcase(exact, p) for p in patterns)]
        clear = len(rest) == len(every) and not any(fnmatchcase(other, glob) for other in taken)
        patterns += [glob] if clear and rest else rest
        taken += every
    return patterns
