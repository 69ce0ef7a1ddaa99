"""Layouts and the attention blocks that they find in a parameter tree."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import MaskedNode

from muonclip_jax._core import paths
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.pieces import Part, Piece
from muonclip_jax._layouts.roles import (
    EQUAL_LENGTHS,
    GAIN_ROLES,
    KEY_ROLES,
    QUERY_ROLES,
    Role,
)
from muonclip_jax._layouts.surroundings import (
    Shapes,
    looks_like_attention,
    norm_lengths,
    other_parameters,
    qk_norms,
    unnamed_biases,
)


@dataclass(frozen=True)
class Layout:
    """Where the queries, keys, values and outputs of one kind of attention block are.

    Make one with `mha`, `gqa`, `mla`, `fused_qkv` or `ignore`, or write down its pieces.

    Attributes:
      name: For messages and tables.
      pieces: The parts of the block's parameters. All of them must be there.
      shared_keys: Whether several query heads may read one key head; head `h` then reads key head
        `h // (heads // kv_heads)`.
      harmless_norms: Modules inside the block, with a `scale` as long as one head, that do not
        normalise queries or keys after their projection (or such parameters of the block itself).
        Any other such norm is taken for a QK-norm, behind which QK-Clip and QuacK would do
        nothing, so they refuse it. (A QK-norm without a learned scale leaves no trace in the
        parameters and cannot be seen.)
      block: Glob over block paths (`layers/*/self_attn`) restricting where to look; None
        takes every module that has the query and key parameters.
      stack_axis: Where the axes of scanned or vmapped layers are in every parameter; MaxText and
        `nn.scan(variable_axes={"params": 1})` put them at 1.
    """

    name: str
    pieces: tuple[Piece, ...]
    shared_keys: bool = False
    harmless_norms: tuple[str, ...] = ()
    block: str | None = None
    stack_axis: int = 0

    def __post_init__(self):
        object.__setattr__(self, "pieces", tuple(self.pieces))
        roles = [piece.role for piece in self.pieces]
        ignoring = not roles and self.block is not None
        if not ignoring and not (set(roles) & set(QUERY_ROLES) and set(roles) & set(KEY_ROLES)):
            raise ValueError(
                f"{self}: pieces have the roles {roles}; there must be one of {QUERY_ROLES} and "
                f"one of {KEY_ROLES}."
            )
        if twice := [role for role in roles if roles.count(role) > 1]:
            raise ValueError(f"{self}: two pieces have the role {twice[0]!r}; each has one.")

    def blocks(self, params: Any) -> tuple["Block", ...]:
        """Every attention block of `params` that this layout describes; see `find_blocks`."""
        return find_blocks(self, params)

    def takes(self, block: Path) -> bool:
        """Whether the `block` pattern admits the module at this path."""
        return self.block is None or fnmatchcase(paths.show(module_path(block)), self.block)

    def places(self, shapes: Shapes) -> list[Path]:
        """The modules that hold a query or key parameter."""
        leaves = [
            leaf for p in self.pieces if p.role in QUERY_ROLES + KEY_ROLES for leaf in p.leaves
        ]
        found = (
            path[: -len(leaf)] for path in shapes for leaf in leaves if path[-len(leaf) :] == leaf
        )
        return [block for block in dict.fromkeys(found) if self.takes(block)]

    def read(self, block: Path, inside: Shapes, around: Shapes) -> "Block":
        """The block at this path, with every piece fitted to its parameter.

        Args:
          block: The path.
          inside: The parameters of the module there.
          around: Those of the model.
        """
        parts = tuple(self._part(block, piece, inside) for piece in self.pieces)
        for part in parts:
            if part.stack != parts[0].stack:
                raise ValueError(
                    f"{paths.show(block)}: {paths.show(parts[0].kernel)} "
                    f"{inside[parts[0].kernel]} has stack axes {parts[0].stack} but "
                    f"{paths.show(part.kernel)} {inside[part.kernel]} has {part.stack}; the "
                    "kernels of one attention block must be stacked alike. (Kernels with a head "
                    "axis need no heads=.)"
                )
        for bias in unnamed_biases(block, parts, inside):
            raise ValueError(
                f"{paths.show(bias)} {inside[bias]} looks like a bias of queries or keys, and no "
                f'piece names it: Piece(..., bias="{"/".join(bias[len(block) :])}").'
            )
        norms = tuple(self._norms(block, parts, inside))
        own = [path for part in parts for path in (part.kernel, part.bias) if path]
        found = Block(block, self, parts, {path: inside[path] for path in (*own, *norms)}, norms)
        self._check_heads(found)
        _check_input(found, around)
        _check_lengths(found)
        _check_overlap(found)
        return found

    def _part(self, block: Path, piece: Piece, shapes: Shapes) -> Part:
        kernel = next((p for leaf in piece.leaves if (p := (*block, *leaf)) in shapes), None)
        if kernel is None:
            raise ValueError(
                f"{paths.show(block)}: layouts.{self.name} expects {piece.parameter}, or "
                f"{piece.parameter}/kernel, here (role {piece.role!r}) and there is none; the "
                f"block has {_children(block, shapes)}. Correct its name in the layout (query=, "
                "key=, value=, out=, kernel=; of mla key_value= and norms; value=None and out=None "
                "leave those to Muon's general routing), or leave this block out with the "
                "layout's block= pattern."
            )
        bias = self._bias(block, piece, kernel, shapes)
        named = {(*block, *leaf) for other in self.pieces for leaf in other.leaves} | {bias}
        others = [path for path in other_parameters(block, kernel, shapes) if path not in named]
        if others:
            raise ValueError(
                f"{paths.show(others[0])} {shapes[others[0]]} also takes part in "
                f"{piece.parameter}: scaling the kernel alone would not scale what the projection "
                "gives. Merge adapters (LoRA) into the kernel first, or leave the block out with "
                "the layout's block= pattern."
            )
        part = piece.fit(kernel, shapes[kernel], bias, stack_axis=self.stack_axis)
        if bias and shapes[bias] not in part.bias_shapes:
            expected = " or ".join(map(str, dict.fromkeys(part.bias_shapes)))
            raise ValueError(
                f"{paths.show(bias)} of shape {shapes[bias]} is no bias of {paths.show(kernel)} "
                f"{shapes[kernel]}: expected {expected}."
            )
        return part

    def _bias(self, block: Path, piece: Piece, kernel: Path, shapes: Shapes) -> Path | None:
        if piece.role == "o":  # its bias belongs to no head
            return None
        if piece.bias is None:
            beside = (*kernel[:-1], "bias")
            return beside if beside in shapes and beside != kernel else None
        told = (*block, *piece.bias.split("/"))
        if told not in shapes:
            raise ValueError(
                f"{paths.show(block)}: the bias {piece.bias} that {piece} names is not there; the "
                f"block has {_children(block, shapes)}."
            )
        return told

    def _norms(self, block: Path, parts: tuple[Part, ...], shapes: Shapes) -> Iterator[Path]:
        for path in qk_norms(block, parts, shapes, self.stack_axis):
            if _norm_name(block, path) not in self.harmless_norms:
                yield path

    def _check_heads(self, block: "Block") -> None:
        query, key = block.part("q_nope") or block.queries[0], block.keys[0]
        shown = [f"{paths.show(p.kernel)} {p.shape}" for p in (query, key)]
        if query.heads % key.heads or (query.heads != key.heads and not self.shared_keys):
            raise ValueError(
                f"{block.name}: {query.heads} query heads ({shown[0]}) and {key.heads} key heads "
                f"({shown[1]}) do not fit layouts.{self.name}. Use layouts.gqa() when several "
                "query heads share a key head."
            )
        if query.features != key.features:
            raise ValueError(
                f"{block.name}: {shown[0]} has {query.features} features per head and {shown[1]} "
                f"has {key.features}; they must agree. If query heads share key heads, use "
                "layouts.gqa(kv_heads, heads=...)."
            )

    def __str__(self) -> str:
        told = {}
        for piece in self.pieces:
            told |= {f"{name} of {piece.parameter}": size for name, size in piece.sizes}
        told |= {"block": self.block} if self.block else {}
        return f"layouts.{self.name}({', '.join(f'{k}={v}' for k, v in told.items())})"


# What every function that asks for a layout takes: one, or several for a model with several kinds.
Layouts = Layout | Sequence[Layout]


@dataclass(frozen=True)
class Block:
    """One attention block found in a parameter tree (several layers of it when stacked).

    Attributes:
      path: The module's path.
      layout: The layout that it was read with.
      parts: Its pieces, fitted to their parameters.
      shapes: The shape of every parameter of a part, of the biases and of `qk_norms`.
      qk_norms: Scales of norms that stand behind its projections.
    """

    path: Path
    layout: Layout
    parts: tuple[Part, ...]
    shapes: Shapes
    qk_norms: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """The module path that `sow` uses, `layers/0/attn`."""
        return paths.show(module_path(self.path))

    @property
    def stack(self) -> tuple[int, ...]:
        return self.parts[0].stack

    @property
    def queries(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.role in QUERY_ROLES)

    @property
    def keys(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.role in KEY_ROLES)

    @property
    def heads(self) -> int:
        return self.queries[0].heads

    @property
    def kv_heads(self) -> int:
        return self.keys[0].heads

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one number per query head: `[stack..., heads]`."""
        return (*self.stack, self.heads)

    @property
    def latent(self) -> bool:
        """Whether this is multi-head latent attention."""
        return self.part("k_nope") is not None

    def part(self, role: Role) -> Part | None:
        """The part with this role, if the layout has one."""
        return next((part for part in self.parts if part.role == role), None)

    def multipliers(self, factors: Mapping[Role, jax.Array]) -> dict[Path, jax.Array]:
        """Per-head factors as arrays that broadcast against the kernels and their biases.

        Args:
          factors: For some roles, `[stack..., heads of that part]`. Everything else gets 1.
        """
        multipliers: dict[Path, jax.Array] = {}
        for part in self.parts:
            if part.role not in factors:
                continue
            factor = factors[part.role][..., None, None]
            row = multipliers.get(part.kernel, jnp.ones(part.row_shape, factor.dtype))
            multipliers[part.kernel] = part.put(row, part.take(row) * factor)
        for part in self.parts:
            if part.kernel in multipliers and part.bias:
                row = multipliers[part.kernel]
                multipliers[part.bias] = part.as_bias(row, self.shapes[part.bias])
            elif part.kernel in multipliers and part.role in GAIN_ROLES:
                row = multipliers[part.kernel]
                multipliers[part.kernel] = part.as_bias(row, self.shapes[part.kernel])
        return multipliers


def multipliers(
    blocks: Sequence[Block], factors: Mapping[str, Mapping[Role, jax.Array]]
) -> dict[Path, jax.Array]:
    """`Block.multipliers` of all blocks together; the factors are by the block's name."""
    return {
        path: array
        for block in blocks
        for path, array in block.multipliers(factors[block.name]).items()
    }


def find_blocks(layout: Layouts, params: Any) -> tuple[Block, ...]:
    """Every attention block of `params` that the layout, or one of several, describes.

    Works on shapes alone, so it costs nothing under `jax.jit`.

    Args:
      layout: A layout, or several for a model with several kinds of attention. Layers without
        attention are passed over.
      params: A parameter tree: Linen dict (with or without the outer `params`), NNX State,
        or any tree of arrays with the same module paths.

    Raises:
      TypeError: `layout` is none.
      ValueError: A layout without a block, a block without one of its parameters, a shape that
        does not fit, a block that two layouts describe, or a module that looks like attention
        and that none describes (unless the only layout has a `block` pattern); each with path,
        shape and fix.
    """
    layouts = as_layouts(layout)
    shapes = paths.shapes(params)
    try:
        return _find(layouts, shapes)
    except ValueError as error:
        nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, MaskedNode))
        if not any(isinstance(node, MaskedNode) for node in nodes):
            raise
        raise ValueError(
            "Some parameters are masked: this transformation stands inside optax.partition or "
            f"optax.masked; move it outside, to the end of the chain. As it stands: {error}"
        ) from None


def _find(layouts: Sequence[Layout], shapes: Shapes) -> tuple[Block, ...]:
    blocks: dict[Path, Block] = {}
    owners: dict[Path, Path] = {}  # parameter → its block
    inside = _by_module(shapes)
    for one in layouts:
        if not one.pieces and not any(one.takes(path[:end]) for path in shapes
                                      for end in range(len(path))):  # fmt: skip
            raise ValueError(
                f"{one}: no module matches {one.block!r}; correct the pattern, or leave the layout "
                f"out. There are {some_kernels(shapes)}."
            )
        found = [path for path in one.places(shapes) if not _ignored(layouts, path)]
        if one.pieces and not found:
            raise ValueError(_nothing_found(one, shapes))
        for path in found:
            if path in blocks:
                raise ValueError(
                    f"{paths.show(path)} is described twice, by {blocks[path].layout} and by "
                    f"{one}. Give them block= patterns that do not meet; if both are in one "
                    "module, name the projections relative to the attention module itself: "
                    'query="query", block="*/self_attn".'
                )
            blocks[path] = one.read(path, inside[path], shapes)
            for kernel in dict.fromkeys(part.kernel for part in blocks[path].parts):
                other = owners.setdefault(kernel, path)
                if other != path:
                    raise ValueError(
                        f"{paths.show(kernel)} is described twice: in {paths.show(other)} "
                        f"({blocks[other].layout}) and in {paths.show(path)} ({one}). Narrow "
                        "their names or block= patterns."
                    )
    if len(layouts) > 1 or layouts[0].block is None:
        _check_all_covered(layouts, list(owners), shapes)
    return tuple(blocks.values())


def _by_module(shapes: Shapes) -> dict[Path, Shapes]:
    """For every module, at any depth, the parameters inside it."""
    modules: dict[Path, Shapes] = {}
    for path, shape in shapes.items():
        for end in range(len(path)):
            modules.setdefault(path[:end], {})[path] = shape
    return modules


def as_layouts(layout: Layouts) -> tuple[Layout, ...]:
    """One layout or several as a tuple."""
    layouts = (layout,) if isinstance(layout, Layout) else layout
    if not isinstance(layouts, Sequence) or not layouts or isinstance(layouts, str):
        layouts = (layouts,)
    for one in layouts:
        if not isinstance(one, Layout):
            raise TypeError(
                "layout must be a layout such as layouts.mha() or find_layout(params), or a list "
                f"of them, got {one!r}."
            )
    return tuple(layouts)


def left_out(layout: Layouts, params: Any) -> tuple[Path, ...]:
    """The modules that are attention, or named by `ignore`, and that the layouts leave out."""
    layouts = as_layouts(layout)
    shapes = paths.shapes(params)
    modules = {path[:end] for path in shapes for end in range(len(path))}
    ignored = [path for path in modules if _ignored(layouts, path)]
    everywhere = [replace(one, block=None) for one in layouts if one.pieces]
    attention = [path for one in everywhere for path in one.places(shapes)]
    return (*ignored, *(p for p in attention if not any(one.takes(p) for one in layouts)))


def outside_patterns(layout: Layouts, path: Path) -> bool:
    """Whether no layout's `block` pattern admits the module at this path."""
    return not any(one.takes(path) for one in as_layouts(layout) if one.pieces)


def refuse_qk_norm(blocks: Sequence[Block]) -> None:
    """Raises ValueError when a norm behind a projection undoes what scaling its kernel does."""
    for block in blocks:
        for path in block.qk_norms:
            raise ValueError(
                f"{paths.show(path)} {block.shapes[path]} normalises queries or keys after their "
                f"projection: scaling the kernels of {paths.show(block.path)} would change "
                "nothing. QK-norm already bounds the logits: drop it, use mc.muon, which splits "
                "heads behind a norm too, or leave the block out with the layout's block= pattern. "
                "If this norm does something else, say so with "
                "dataclasses.replace(layout, "
                f"harmless_norms=({_norm_name(block.path, path)!r},))."
            )


def _norm_name(block: Path, scale: Path) -> str:
    """A norm's module inside the block, or its scale where this is a parameter of the block."""
    inside = scale[len(block) :]
    return "/".join(inside[:-1] or inside)


def module_path(block: Path) -> Path:
    """A block's path as `sow` knows it: without the `params` collection of a Linen tree."""
    return block[1:] if block[:1] == ("params",) else block


def some_kernels(shapes: Shapes) -> str:
    """The first matrices of a tree, for messages."""
    matrices = [paths.show(p) for p, s in shapes.items() if len(s) >= 2 and p[-1] != "bias"]
    more = f" and {len(matrices) - 8} more" if len(matrices) > 8 else ""
    return (", ".join(matrices[:8]) or "none") + more


def _ignored(layouts: Sequence[Layout], path: Path) -> bool:
    return any(one.takes(path) for one in layouts if not one.pieces)


def _nothing_found(layout: Layout, shapes: Shapes) -> str:
    wanted = [piece.parameter for piece in layout.pieces if piece.role in QUERY_ROLES + KEY_ROLES]
    message = (
        f"{layout}: no attention block found. Looked for modules holding "
        + " and ".join(dict.fromkeys(wanted))
        + " (a parameter, or a module with a kernel)"
        + (f" at paths like {layout.block!r}" if layout.block else "")
        + "."
    )
    elsewhere = replace(layout, block=None).places(shapes)
    if elsewhere:
        return (
            f"{message} Modules that hold them: {', '.join(map(paths.show, elsewhere[:8]))}; "
            "correct block=."
        )
    return (
        f"{message} Matrices in this tree: {some_kernels(shapes)}. Name the projections "
        'in the layout: mha(query="q_proj", key="k_proj", value="v_proj", out="o_proj"), '
        "gqa(kv_heads, heads=..., query=...) for flat kernels, mla(..., query=...), "
        "fused_qkv(...), or Layout(name, pieces=(Piece(...), ...)) for any other."
    )


def _check_input(block: Block, shapes: Shapes) -> None:
    """Raises ValueError when no norm before the block is as long as its input. Without an output
    projection nothing else would show that a stack of flat kernels was read as one with heads."""
    if block.part("o") or block.latent:
        return
    lengths = norm_lengths(block.path, shapes, block.layout.stack_axis)
    query = block.queries[0]
    if lengths and query.ins not in lengths:
        raise ValueError(
            f"{paths.show(query.kernel)} of shape {query.shape} was read as {query.heads} heads of "
            f"[in, features] = {list(query.matrix)} in stacked layers {query.stack}, but the norms "
            f"around it are {' or '.join(map(str, sorted(lengths)))} long, not {query.ins}. Give "
            "heads= for flat kernels, and only for those; or name out=, which settles it."
        )


_IN_WORDS = {"heads": "heads", "features": "features", "ins": "input features"}


def _check_lengths(block: Block) -> None:
    """Raises ValueError when two pieces do not go together."""
    for one_role, one_length, other_role, other_length in EQUAL_LENGTHS:
        one, other = block.part(one_role), block.part(other_role)
        if one is None or other is None:
            continue
        lengths = getattr(one, one_length), getattr(other, other_length)
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"{block.name}: {one.role} has {lengths[0]} {_IN_WORDS[one_length]} "
                f"({paths.show(one.kernel)} {one.shape}) and {other.role} {lengths[1]} "
                f"{_IN_WORDS[other_length]} ({paths.show(other.kernel)} {other.shape}); they must "
                "agree. Check the layout's sizes (heads, kv_heads; of mla nope, rope, v)."
            )


def _check_overlap(block: Block) -> None:
    """Raises ValueError when two pieces share entries of a parameter."""
    for kernel in dict.fromkeys(part.kernel for part in block.parts):
        parts = [part for part in block.parts if part.kernel == kernel]
        claimed = reduce(np.add, (entries(part) for part in parts))
        if claimed.max() > 1:
            raise ValueError(
                f"{paths.show(kernel)} of shape {parts[0].shape}: the pieces "
                f"{', '.join(part.role for part in parts)} overlap; correct their select=."
            )


def entries(part: Part) -> np.ndarray:
    """1 for each entry of the parameter that belongs to the part, else 0. The axes of `in` and of
    the stack have length 1: it broadcasts against the parameter."""
    shape = tuple(
        1 if axis[0].startswith("stack") else n
        for axis, n in zip(part.axes, part.row_shape, strict=True)
    )
    numbers = np.arange(math.prod(shape)).reshape(shape)
    claimed = np.zeros(numbers.size, int)
    claimed[part.take(numbers).ravel()] = 1
    return claimed.reshape(shape)


def _check_all_covered(layouts: Sequence[Layout], kernels: Sequence[Path], shapes: Shapes) -> None:
    """Raises ValueError for a module that looks like attention and has no part of any block."""
    covered = {kernel[:end] for kernel in kernels for end in range(len(kernel))}
    for module, names in looks_like_attention(shapes):
        if module not in covered and not _ignored(layouts, module):
            raise ValueError(
                f"{paths.show(module)} holds {' and '.join(names)}, which looks like attention "
                f"that {' and '.join(map(str, layouts))} does not cover (it covers "
                f"{paths.show(kernels[0][:-1]) if kernels else 'nothing'}). Write a layout for "
                "each kind, with block= patterns that say which is whose, and pass them as a list; "
                "layouts.ignore(block) leaves attention alone."
            )


def _children(block: Path, shapes: Shapes) -> str:
    inside = {
        "/".join(path[len(block) :]): shape
        for path, shape in shapes.items()
        if path[: len(block)] == block
    }
    return ", ".join(f"{name} {shape}" for name, shape in inside.items())
