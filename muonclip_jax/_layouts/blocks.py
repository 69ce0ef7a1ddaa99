"""Layouts and the attention blocks that they find in a parameter tree."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from muonclip_jax._core import paths
from muonclip_jax._core.masks import Frozen, read_frozen
from muonclip_jax._core.options import check_count, check_flag, check_pattern, check_text
from muonclip_jax._core.paths import Path
from muonclip_jax._core.tables import as_html
from muonclip_jax._layouts import checks, drawing, extras
from muonclip_jax._layouts.adapters import inner, with_adapters
from muonclip_jax._layouts.pieces import Part, Piece, shared_along_inputs
from muonclip_jax._layouts.roles import (
    KEY_ROLES,
    LOGIT_ROLES,
    QUERY_ROLES,
    ROLES,
    SEVERAL_ROLES,
    Role,
)
from muonclip_jax._layouts.surroundings import (
    Shapes,
    bias_beside,
    looks_like_attention,
    qk_norms,
    unnamed_biases,
)

# Globs over block paths, or a function of one.
BlockPattern = str | Sequence[str] | Callable[[str], bool]


@dataclass(frozen=True, repr=False)
class Layout:
    """Where the queries, keys, values and outputs of one kind of attention block are.

    Make one with `mha`, `gqa`, `mla`, `fused_qkv`, `linear_attention` or `ignore`, or write down its
    pieces.

    Attributes:
      name: For messages and tables.
      pieces: The parts of the block's parameters. All of them must be there.
      shared_keys: Whether several query heads may read one key head; head `h` then reads key head
        `h // (heads // kv_heads)`.
      harmless: Modules inside the block, or parameters of it, that look as if they changed what
        scaling the projections does to the logits, and do not: a norm as long as a head is taken
        for a QK-norm, and queries, keys, positions and adapters without a role for further terms
        of the logits. QK-Clip and QuacK refuse both unless they are named here. (What leaves no
        trace in the parameters, such as a QK-norm without a learned scale, cannot be seen.)
      block: Where to look: a glob over block paths (`layers/*/self_attn`), several of them, or a
        function of a path (as text) that says whether; None takes every module that has the query
        and key parameters.
      stack_axis: Where the axes of scanned or vmapped layers are in every parameter; MaxText and
        `nn.scan(variable_axes={"params": 1})` put them at 1.
      softmax: Whether its queries and keys meet in a softmax. Without one (linear attention) there
        are no max logits: QK-Clip, QuacK and the report pass over its blocks and ask for no sown
        values; Muon and `head_matrices` take its heads like all others, and so do clips by other
        signals. Without one `o` may stand alone: the output projection of an MLP, or of experts as
        heads, for `max_output_clip`.

    Raises:
      ValueError: No piece for queries, or two pieces with one role that is no stream's.

    Example:
      >>> from muonclip_jax.layouts import Layout, Piece
      >>> gemma = Layout("gemma", (
      ...     Piece("q", "q_einsum/w", "heads in features"),
      ...     Piece("k", "kv_einsum/w", "part heads in features", select={"part": 0}),
      ...     Piece("v", "kv_einsum/w", "part heads in features", select={"part": 1}),
      ... ), shared_keys=True)
      >>> attn = {"q_einsum": {"w": jnp.ones((8, 64, 16))}, "kv_einsum": {"w": jnp.ones((2, 1, 64, 16))}}
      >>> block, = mc.layouts.find_blocks(gemma, {"attn": attn})
      >>> block.heads, block.kv_heads
      (8, 1)
    """  # noqa: E501

    name: str
    pieces: tuple[Piece, ...]
    shared_keys: bool = False
    harmless: tuple[str, ...] = ()
    block: BlockPattern | None = None
    stack_axis: int = 0
    softmax: bool = True

    def __post_init__(self):
        self._check_fields()
        object.__setattr__(self, "pieces", tuple(self.pieces))
        if isinstance(self.block, list):
            object.__setattr__(self, "block", tuple(self.block))
        if self.pieces or self.block is None:
            self._check_roles()

    def _check_roles(self) -> None:
        roles: list[Role] = [piece.role for piece in self.pieces]
        if not set(roles) & set(QUERY_ROLES) and not self._is_output:
            raise ValueError(
                f"{self}: pieces have the roles {roles}; there must be a Piece of {QUERY_ROLES}. "
                "(Keys may be missing, where they are another layer's: queries then take all of a "
                "clip. Keys alone do not tell how many query heads read them; leave such a block "
                "out with layouts.ignore(block). What is frozen is described all the same, and "
                "named by frozen=. An output projection alone, of an MLP say, has softmax=False.)"
            )
        unique: dict[Role, None] = dict.fromkeys(roles)
        for role in unique:
            first, *others = (piece for piece in self.pieces if piece.role == role)
            names = [piece.parameter for piece in (first, *others)]
            if first.is_vector and ROLES[role].side != "gain":
                raise ValueError(
                    f"{self}: {first} has no axis 'in', so it is a bias, and no projection with "
                    f"the role {role!r} stands before it. Correct its axes, or name the projection "
                    "first."
                )
            if others and (role not in SEVERAL_ROLES or len(set(names)) < len(names)):
                raise ValueError(
                    f"{self}: two pieces have the role {role!r}, {' and '.join(names)}; each has "
                    f"one, but {', '.join(SEVERAL_ROLES)} may have several, of different "
                    "parameters: streams that attend to one another, further keys."
                )

    def _check_fields(self) -> None:
        check_text("Layout: name", self.name)
        if self.block is not None:
            check_pattern("Layout: block", self.block)
        check_flag("Layout: shared_keys", self.shared_keys)
        check_flag("Layout: softmax", self.softmax)
        check_count("Layout: stack_axis", self.stack_axis, least=0)
        for name, kind, wanted in (("pieces", Piece, "Piece"), ("harmless", str, "text")):
            given = getattr(self, name)
            if not isinstance(given, tuple | list) or not all(isinstance(x, kind) for x in given):
                raise TypeError(f"Layout: {name} must be a tuple of {wanted}, got {given!r}.")

    @property
    def _is_output(self) -> bool:
        """Whether it describes nothing but output projections, of MLPs or experts."""
        return not self.softmax and {piece.role for piece in self.pieces} == {"o"}

    def takes(self, block: Path) -> bool:
        """Whether the `block` pattern admits the module at this path."""
        if self.block is None:
            return True
        name = paths.show(module_path(block))
        if callable(self.block):
            return bool(self.block(name))
        globs = [self.block] if isinstance(self.block, str) else self.block
        return any(fnmatchcase(name, glob) for glob in globs)

    def places(self, shapes: Shapes) -> list[Path]:
        """The modules that hold a query or key parameter; of outputs alone, one of these."""
        anchors = ("o",) if self._is_output else QUERY_ROLES + KEY_ROLES
        leaves = [leaf for p in self.pieces if p.role in anchors for leaf in p.leaves]
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

        Raises:
          ValueError: A parameter that is not there or does not fit, with path, shape and fix.
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
        norms, others = (), ()
        if self.softmax:
            parts = tuple(with_adapters(block, part, parts, inside) for part in parts)
            norms, others = self._around(block, parts, inside)
        own = [path for part in parts for path, _ in part.leaves]
        shapes = {path: inside[path] for path in (*own, *norms, *others)}
        found = Block(block, self, parts, shapes, norms, others)
        checks.check_block(found, around)
        return found

    def _around(
        self, block: Path, parts: Sequence[Part], inside: Shapes
    ) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
        """QK-norms, and what else enters the logits without a role.

        Raises:
          ValueError: A bias that no piece names.
        """
        for bias in unnamed_biases(block, parts, inside):
            raise ValueError(
                f"{paths.show(bias)} {inside[bias]} looks like a bias of queries or keys, and no "
                f'piece names it: Piece(..., bias="{"/".join(bias[len(block) :])}").'
            )
        read_only = inner(parts, inside)
        norms, others = (
            tuple(
                path
                for path in find(block, parts, inside, self.stack_axis)
                if not self._is_harmless(path[len(block) :]) and path not in read_only
            )
            for find in (qk_norms, extras.without_role)
        )
        return norms, tuple(path for path in others if path not in norms)

    def _is_harmless(self, inside: Path) -> bool:
        named = [tuple(name.split("/")) for name in self.harmless]
        return any(inside[: len(name)] == name for name in named)

    def _part(self, block: Path, piece: Piece, shapes: Shapes) -> Part:
        kernel = next((p for leaf in piece.leaves if (p := (*block, *leaf)) in shapes), None)
        if kernel is None:
            raise ValueError(
                f"{paths.show(block)}: layouts.{self.name} expects {piece.parameter}, or "
                f"{piece.parameter}/kernel, here (role {piece.role!r}) and there is none; the "
                f"block has {checks.inside_of(block, shapes)}. Correct its name in the layout "
                "(query=, key=, value=, out=, kernel=; of mla key_value= and norms; value=None and "
                "out=None leave those to Muon's general routing), or leave this block out with the "
                "layout's block= pattern."
            )
        bias = self._bias(block, piece, kernel, shapes)
        with_shape = (bias, shapes[bias]) if bias else None
        return piece.fit(kernel, shapes[kernel], with_shape, stack_axis=self.stack_axis)

    def _bias(self, block: Path, piece: Piece, kernel: Path, shapes: Shapes) -> Path | None:
        if piece.role == "o" or piece.is_vector:  # of no head; or itself one
            return None
        if piece.bias is None:
            return bias_beside(kernel, shapes)
        told = (*block, *piece.bias.split("/"))
        if told not in shapes:
            raise ValueError(
                f"{paths.show(block)}: the bias {piece.bias} that {piece} names is not there; the "
                f"block has {checks.inside_of(block, shapes)}."
            )
        return told

    def __str__(self) -> str:
        told = {}
        for piece in self.pieces:
            told |= {f"{name} of {piece.parameter}": n for name, n in dict(piece.sizes).items()}
        told |= {"block": self.block} if self.block else {}
        return f"layouts.{self.name}({', '.join(f'{k}={v}' for k, v in told.items())})"

    def __repr__(self) -> str:
        pieces = ", ".join(f"{piece.role}: {piece.parameter}" for piece in self.pieces)
        return f"Layout({self.name!r}, {pieces})"

    def _repr_html_(self) -> str:
        table = drawing.sheet_of(self.name, self.pieces).html()
        return as_html([table], drawing.picture_of(self.pieces, shared_keys=self.shared_keys))


# What every function that asks for a layout takes: one, or several for a model with several kinds.
Layouts = Layout | Sequence[Layout]


@dataclass(frozen=True, repr=False)
class Block:
    """One attention block found in a parameter tree (several layers of it when stacked).

    Attributes:
      path: The module's path.
      layout: The layout that it was read with.
      parts: Its pieces, fitted to their parameters.
      shapes: The shape of every parameter of a part, of the biases, and of those that follow.
      qk_norms: Scales of norms that stand behind its projections.
      without_role: Parameters that enter its logits and that no part describes.
      frozen: Those of its parameters that nothing moves.
      is_frozen: Whether nothing trains of what is acted on: of what makes the logits, or of what
        the factors of `clip_by_signal` scale.

    Example:
      >>> block = mc.layouts.find_blocks(layout, params)[0]
      >>> block.name, block.shape  # one number a query head
      ('attn', (2,))
    """

    path: Path
    layout: Layout
    parts: tuple[Part, ...]
    shapes: Shapes
    qk_norms: tuple[Path, ...] = ()
    without_role: tuple[Path, ...] = ()
    frozen: tuple[Path, ...] = ()
    is_frozen: bool = False

    def __repr__(self) -> str:
        return f"Block({self.name!r}, {self.layout}, heads={list(self.shape)})"

    @property
    def name(self) -> str:
        """The module path that `sow` uses, `layers/0/attn`."""
        return paths.show(module_path(self.path))

    @property
    def stack(self) -> tuple[int, ...]:
        """Lengths of the stack axes."""
        return self.parts[0].stack

    @property
    def queries(self) -> tuple[Part, ...]:
        """The parts on the query side of the logits."""
        return tuple(part for part in self.parts if part.role in QUERY_ROLES)

    @property
    def keys(self) -> tuple[Part, ...]:
        """The parts on the key side of which every key head has its own."""
        return tuple(part for part in self.parts if part.role in KEY_ROLES)

    @property
    def heads(self) -> int:
        """Query heads; of an output projection alone its own."""
        return (self.queries or self.parts)[0].heads

    @property
    def kv_heads(self) -> int:
        """Key heads; as many as query heads where the layout has no keys."""
        return self.keys[0].heads if self.keys else self.heads

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one number per query head: `[stack..., heads]`."""
        return (*self.stack, self.heads)

    @property
    def latent(self) -> bool:
        """Whether this is multi-head latent attention."""
        return self.part("k_nope") is not None

    def held(self, role: Role) -> tuple[Path, ...]:
        """The frozen parameters of the parts with this role. Where there are any, none of these
        parts is scaled: one kernel of several, or a kernel without its bias, would not scale what
        they give together."""
        parts = (part for part in self.parts if part.role == role)
        return tuple(path for part in parts for path, _ in part.leaves if path in self.frozen)

    def part(self, role: Role) -> Part | None:
        """The part with this role, if the layout has one; of several the first."""
        return next((part for part in self.parts if part.role == role), None)

    def multipliers(self, factors: Mapping[Role, jax.Array]) -> dict[Path, jax.Array]:
        """Per-head factors as arrays that broadcast against the kernels and their biases.

        For a kernel `[in, heads, features]` that is `[1, heads, features]`.

        Args:
          factors: For some roles, `[stack..., heads of that part]`. Everything else gets 1, and so
            does what is frozen.
        """
        multipliers: dict[Path, jax.Array] = {}
        for part in self.parts:
            if part.role not in factors:
                continue
            factor = factors[part.role]
            for path, view in part.leaves:
                row = shared_along_inputs(view)
                before = multipliers.setdefault(path, jnp.ones(row.shape, factor.dtype))
                if path in self.frozen:
                    continue
                ones = [1 for _ in (*row.rows, *row.cols)]
                each = factor.reshape(*(row.length((name,)) for name in row.batch), *ones)
                multipliers[path] = row.put(before, row.take(before) * each)
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

    Returns:
      The blocks, in the order of the layouts and of the tree.

    Raises:
      TypeError: `layout` is none.
      ValueError: A layout without a block, a block without one of its parameters, a shape that
        does not fit, a block that two layouts describe, or a module that looks like attention
        and that none describes (unless the only layout has a `block` pattern); each with path,
        shape and fix.

    Example:
      >>> [block.name for block in mc.layouts.find_blocks(layout, params)]
      ['attn']
    """
    layouts = as_layouts(layout)
    shapes = paths.shapes(params)
    try:
        return _find(layouts, shapes)
    except ValueError as error:
        if not (masked := paths.masked(params)):
            raise
        raise ValueError(
            f"Some parameters are masked ({paths.some(masked)}): this transformation stands "
            "inside optax.partition or optax.masked; move it outside, to the end of the chain. As "
            f"it stands: {error}"
        ) from None


def blocks_with_logits(layout: Layouts, params: Any) -> tuple[Block, ...]:
    """The blocks of `find_blocks` whose queries and keys meet in a softmax.

    Raises:
      TypeError, ValueError: What `find_blocks` raises; a model of linear attention alone.
    """
    found = find_blocks(layout, params)
    blocks = tuple(block for block in found if block.layout.softmax)
    if found and not blocks:
        raise ValueError(
            f"{paths.some(block.path for block in found)}: the layout has linear attention only, "
            "which has no max logits: there is nothing to clip and nothing for QuacK to hold. Use "
            "mc.muon, or add the layout of the blocks that have a softmax."
        )
    return blocks


def _find(layouts: Sequence[Layout], shapes: Shapes) -> tuple[Block, ...]:
    blocks: dict[Path, Block] = {}
    owners: dict[Path, Path] = {}  # parameter → its block
    inside: dict[Path, dict[Path, tuple[int, ...]]] = {}  # module, at any depth → its parameters
    for path, shape in shapes.items():
        for end in range(len(path)):
            inside.setdefault(path[:end], {})[path] = shape
    for one in layouts:
        if not one.pieces and not any(map(one.takes, inside)):
            raise ValueError(
                f"{one}: no module matches {one.block!r}; correct the pattern, or leave the layout "
                f"out. There are {checks.matrices_of(shapes)}."
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
    only_outputs = all(one._is_output for one in layouts)
    if not only_outputs and (len(layouts) > 1 or layouts[0].block is None):
        _check_all_covered(layouts, list(owners), shapes)
    return tuple(blocks.values())


def with_frozen(
    blocks: Sequence[Block],
    frozen: Frozen | None,
    params: Any,
    acts_on: Callable[[Block], Collection[Role]] = lambda _: LOGIT_ROLES,
) -> tuple[Block, ...]:
    """The blocks, each with those of its parameters that `frozen` names.

    Args:
      blocks: The blocks.
      frozen: The user's option.
      params: The parameters.
      acts_on: Of a block of which nothing is known to be frozen, the roles that are acted on. It is
        frozen where all of these are.

    Raises:
      TypeError, ValueError: What `read_frozen` raises.
    """
    found = read_frozen(frozen, params)
    if not found:
        return tuple(blocks)

    def marked(block: Block) -> Block:
        roles = acts_on(block)
        own = [path for part in block.parts if part.role in roles for path, _ in part.leaves]
        still = tuple(path for path in block.shapes if path in found)
        return replace(block, frozen=still, is_frozen=bool(own) and found.issuperset(own))

    return tuple(map(marked, blocks))


def as_layouts(layout: Layouts) -> tuple[Layout, ...]:
    """One layout or several as a tuple.

    Raises:
      TypeError: It is none.
    """
    if isinstance(layout, Layout):
        return (layout,)
    several = tuple(layout) if isinstance(layout, Sequence) and not isinstance(layout, str) else ()
    for one in several or (layout,):
        if not isinstance(one, Layout):
            raise TypeError(
                "layout must be a layout such as layouts.mha() or find_layout(params), or a list "
                f"of them, got {one!r}."
            )
    return several


def left_out(layout: Layouts, params: Any) -> tuple[Path, ...]:
    """The modules that are attention, or named by `ignore`, and that the layouts leave out, or that
    have no softmax; also those of which `optax.masked` hides all queries and keys."""
    layouts = as_layouts(layout)
    shapes = paths.shapes(params)
    masked = {path: () for path in paths.masked(params)}
    modules = {path[:end] for path in shapes for end in range(len(path))}
    ignored = [path for path in modules if _ignored(layouts, path)]
    linear = [path for one in layouts if not one.softmax for path in one.places(shapes)]
    everywhere = [replace(one, block=None) for one in layouts if one.pieces and one.softmax]
    attention = [path for one in everywhere for path in one.places(shapes)]
    hidden = [path for one in layouts if one.pieces for path in one.places(masked)]
    elsewhere = [path for path in attention if not any(one.takes(path) for one in layouts)]
    return (*ignored, *linear, *elsewhere, *(path for path in hidden if path not in attention))


def outside_patterns(layout: Layouts, path: Path) -> bool:
    """Whether no layout's `block` pattern admits the module at this path."""
    return not any(one.takes(path) for one in as_layouts(layout) if one.pieces)


def module_path(block: Path) -> Path:
    """A block's path as `sow` knows it: without the `params` collection of a Linen tree."""
    return block[1:] if block[:1] == ("params",) else block


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
    weights = [f"{name}/weight" for name in dict.fromkeys(wanted)]
    if there := [name for name in weights if any(name in paths.show(path) for path in shapes)]:
        return (
            f"{message} {there[0]} is there: kernels called weight, as in PyTorch and Equinox, are "
            f"[out, in]. Give the layout their names with /weight and transposed=True, or let "
            "mc.find_layout(params, heads=...) find them."
        )
    elsewhere = replace(layout, block=None).places(shapes)
    if elsewhere:
        return f"{message} Modules that hold them: {paths.some(elsewhere)}; correct block=."
    return (
        f"{message} Matrices in this tree: {checks.matrices_of(shapes)}. Name the projections "
        'in the layout: mha(query="q_proj", key="k_proj", value="v_proj", out="o_proj"), '
        "gqa(kv_heads, heads=..., query=...) for flat kernels, mla(..., query=...), "
        "fused_qkv(...), or Layout(name, pieces=(Piece(...), ...)) for any other."
    )


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
