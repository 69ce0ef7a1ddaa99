"""Attention layouts: which slice of which kernel is the query or the key of which head.

A layout is a declaration; `Layout.blocks(params)` finds the attention blocks that fit it and
checks every shape. QK-Clip reads nothing else about a model.

Axis names:  stack  leading axes of scanned or vmapped layers, carried through
             in     the projection's input features (Flax kernels are [in, out])
             heads  query heads;  kv_heads  key heads (fewer under GQA and MQA)
             head_features  one head's slice of the output features
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from optax import MaskedNode

from muonclip_jax import paths
from muonclip_jax.paths import Path

Role = Literal["q", "k", "q_nope", "q_rope", "k_nope"]

QUERY_ROLES = ("q", "q_nope", "q_rope")
KEY_ROLES = ("k", "k_nope")
_QK_NORM = re.compile(r"^((q|k|query|key)\w*(_ln|norm)|norm_(q|k|query|key))$")


@dataclass(frozen=True)
class Piece:
    """The part of one projection that plays one role in the logits.

    Attributes:
      role: What the part is: `q` and `k` of plain attention; `q_nope`, `q_rope` and `k_nope`
        of multi-head latent attention. (Its rotary key is shared by all heads and is never
        scaled, so no piece names it.)
      projection: Path of the projection's module inside the attention block, e.g. `query`;
        the piece covers its `kernel` and, where there is one, its `bias`.
      start: First feature of the slice within one head.
      stop: End of the slice; None for the head's last feature.
    """

    role: Role
    projection: str
    start: int = 0
    stop: int | None = None

    def length(self, head_features: int) -> int:
        """Features of one head that the piece covers."""
        return (head_features if self.stop is None else self.stop) - self.start


@dataclass(frozen=True)
class Layout:
    """What the query and key projections of one kind of attention block look like.

    Make one with `mha`, `gqa` or `mla`; use `dataclasses.replace` for what those do not name.

    Attributes:
      name: For messages and tables.
      pieces: The query and key parts of the block's projections.
      heads: Number of query heads when kernels are flat, `[stack..., in, heads*head_features]`;
        None when they have a head axis, `[stack..., in, heads, head_features]`, or when
        `head_features` tells.
      kv_heads: Number of key heads; None to read it from the key kernel's head axis.
      head_features: Features per head of each projection, where the layout knows them.
      shared_keys: Whether several query heads may read one key head.
      harmless_norms: Modules inside the block, with a `scale` as long as one head, that do not
        normalise queries or keys after their projection. Any other such norm is taken for a
        QK-norm and refused, since scaling a kernel in front of one does nothing. (A QK-norm
        without a learned scale leaves no trace in the parameters and cannot be seen.)
      block: Glob over block paths (`layers/*/self_attn`) restricting where to look; None
        takes every module that has the projections.
    """

    name: str
    pieces: tuple[Piece, ...]
    heads: int | None = None
    kv_heads: int | None = None
    head_features: tuple[tuple[str, int], ...] = ()
    shared_keys: bool = False
    harmless_norms: tuple[str, ...] = ()
    block: str | None = None

    def __post_init__(self):
        for name in ("heads", "kv_heads"):
            if getattr(self, name) is not None:
                _check_count(f"layouts.{self.name}: {name}", getattr(self, name))
        roles = {piece.role for piece in self.pieces}
        if not (
            roles <= set(get_args(Role)) and roles & set(QUERY_ROLES) and roles & set(KEY_ROLES)
        ):
            raise ValueError(
                f"layouts.{self.name}: pieces have the roles {sorted(roles)}; there must be one of "
                f"{QUERY_ROLES} and one of {KEY_ROLES}, and no other."
            )
        if self.heads and self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(
                f"layouts.{self.name}: {self.heads} query heads cannot share "
                f"{self.kv_heads} key heads evenly; heads must be a multiple of kv_heads."
            )
        if self.shared_keys and self.heads and not self.kv_heads:
            raise ValueError(
                f"layouts.{self.name}: flat kernels (heads={self.heads}) do not tell how many key "
                "heads there are; give kv_heads=."
            )

    @property
    def projections(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(piece.projection for piece in self.pieces))

    @property
    def latent(self) -> bool:
        """Whether keys come from a latent with the values, so that their heads differ in size."""
        return any(piece.role == "k_nope" for piece in self.pieces)

    def blocks(self, params: Any) -> tuple["Block", ...]:
        """Every attention block of `params` that this layout describes.

        Works on shapes alone, so it costs nothing under `jax.jit`.

        Args:
          params: A parameter tree: Linen dict (with or without the outer `params`), NNX State,
            or any tree of arrays with the same module paths.

        Raises:
          ValueError: No block, a block without one of its kernels, a kernel whose shape does
            not fit, a QK-norm behind the projections or, without a `block` pattern, another
            module that looks like attention; each with path, shape and fix.
        """
        shapes = paths.shapes(params)
        found = self._block_paths(shapes)
        if not found:
            raise ValueError(self._nothing_found(params, shapes))
        if self.block is None:
            _check_all_covered(str(self), found, shapes)
        return tuple(self._read_block(path, shapes) for path in found)

    def _block_paths(self, shapes: Mapping[Path, Any]) -> list[Path]:
        found: dict[Path, None] = {}
        for path in shapes:
            for projection in self.projections:
                suffix = (*projection.split("/"), "kernel")
                block = path[: -len(suffix)]
                if path[-len(suffix) :] == suffix and self.takes(block):
                    found[block] = None
        return list(found)

    def takes(self, block: Path) -> bool:
        """Whether the `block` pattern admits the module at this path."""
        return self.block is None or fnmatchcase(paths.show(module_path(block)), self.block)

    def _nothing_found(self, params: Any, shapes: Mapping[Path, Any]) -> str:
        message = (
            f"layouts.{self.name}: no attention block found. Looked for modules holding "
            + " and ".join(f"{projection}/kernel" for projection in self.projections)
            + (f" at paths like {self.block!r}" if self.block else "")
            + "."
        )
        masked = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, MaskedNode))
        if any(isinstance(leaf, MaskedNode) for leaf in masked):
            return (
                f"{message} Some parameters are masked: this transformation stands inside "
                "optax.partition or optax.masked; move it outside, to the end of the chain."
            )
        return (
            f"{message} Kernels in this tree: {_some_kernels(shapes)}. Name the projections "
            'in the layout: mha(query="q_proj", key="k_proj"), gqa(kv_heads, heads=..., '
            'query="q_proj", key="k_proj") for flat kernels, mla(..., query="wq").'
        )

    def _read_block(self, path: Path, shapes: Mapping[Path, tuple[int, ...]]) -> "Block":
        where = paths.show(path)
        projections = tuple(
            self._read_projection(path, projection, shapes) for projection in self.projections
        )
        query, key = (
            next(p for p in projections if any(piece.role in roles for piece in p.pieces))
            for roles in (QUERY_ROLES, KEY_ROLES)
        )
        for projection in projections:
            if projection.stack != query.stack:
                raise ValueError(
                    f"{where}: {paths.show(query.kernel)} has stack axes {query.stack} but "
                    f"{paths.show(projection.kernel)} has {projection.stack}; the kernels of one "
                    "attention block must be stacked alike."
                )
        self._refuse_qk_norm(path, projections, shapes)
        if query.heads % key.heads or (query.heads != key.heads and not self.shared_keys):
            raise ValueError(
                f"{where}: {query.heads} query heads ({paths.show(query.kernel)} "
                f"{shapes[query.kernel]}) and {key.heads} key heads ({paths.show(key.kernel)} "
                f"{shapes[key.kernel]}) do not fit layouts.{self.name}. Use layouts.gqa() when "
                "several query heads share a key head."
            )
        if not self.latent and query.head_features != key.head_features:
            raise ValueError(
                f"{where}: {paths.show(query.kernel)} {shapes[query.kernel]} has "
                f"{query.head_features} features per head and {paths.show(key.kernel)} "
                f"{shapes[key.kernel]} has {key.head_features}; they must agree. If query heads "
                "share key heads, use layouts.gqa(kv_heads, heads=...)."
            )
        return Block(path, query.heads, key.heads, query.stack, projections)

    def _refuse_qk_norm(
        self, block: Path, projections: tuple["Projection", ...], shapes: Mapping[Path, Any]
    ) -> None:
        for path in self._qk_norms(block, projections, shapes):
            module = "/".join(path[len(block) : -1])
            if module not in self.harmless_norms:
                raise ValueError(
                    f"{paths.show(path)} {shapes[path]} normalises queries or keys after their "
                    f"projection: scaling the kernels of {paths.show(block)} would change nothing. "
                    "QK-norm already bounds the logits: drop it, or leave the block out with the "
                    "layout's block= pattern. If this norm does something else, say so with "
                    f"dataclasses.replace(layout, harmless_norms=({module!r},))."
                )

    def _qk_norms(
        self, block: Path, projections: tuple["Projection", ...], shapes: Mapping[Path, Any]
    ) -> Iterator[Path]:
        """Scales of norms behind the projections: known by their names, or because they are as
        long as all heads, one head or a piece of one, where a norm in front of a projection is
        as long as its input."""
        one_axis = 1 + len(projections[0].stack)
        inputs = {shapes[p.kernel][len(p.stack)] for p in projections}
        outputs = {p.heads * p.head_features for p in projections}
        outputs |= {p.head_features for p in projections}
        outputs |= {piece.length(p.head_features) for p in projections for piece in p.pieces}
        own_modules = {block, *(p.kernel[:-1] for p in projections)}
        for path, shape in shapes.items():
            module = path[:-1]
            if path[: len(block)] != block or module in own_modules:
                continue
            if any(part.startswith("WeightNorm") for part in module[len(block) :]):
                yield path
            elif path[-1] not in ("kernel", "bias") and len(shape) == one_axis:
                # MLA's latent norms are in front, and some are called q_norm.
                named = _QK_NORM.search(module[-1]) and not (self.latent and shape[-1] in inputs)
                if named or shape[-1] in outputs - inputs:
                    yield path

    def _read_projection(
        self, block: Path, name: str, shapes: Mapping[Path, tuple[int, ...]]
    ) -> "Projection":
        kernel = (*block, *name.split("/"), "kernel")
        if kernel not in shapes:
            raise ValueError(
                f"{paths.show(block)}: layouts.{self.name} expects {name}/kernel here and there is "
                f"none; the block has {_children(block, shapes)}."
            )
        module = kernel[:-1]
        others = [
            p for p in shapes if p[: len(module)] == module and p[-1] not in ("kernel", "bias")
        ]
        if others:
            raise ValueError(
                f"{paths.show(others[0])} {shapes[others[0]]} also takes part in {name}: scaling "
                "the kernel alone would not scale what the projection gives. Merge adapters (LoRA) "
                "into the kernel first, or leave the block out with the layout's block= pattern."
            )
        shape = shapes[kernel]
        pieces = tuple(piece for piece in self.pieces if piece.projection == name)
        flat, heads, features = self._split(kernel, shape, name, self._told_heads(pieces))
        bias = (*kernel[:-1], "bias")
        return Projection(
            kernel=kernel,
            bias=bias if bias in shapes else None,
            stack=shape[: -2 if flat else -3],
            heads=heads,
            head_features=features,
            flat=flat,
            pieces=pieces,
        )

    def _told_heads(self, pieces: tuple[Piece, ...]) -> int | None:
        """How many heads the layout says that this projection has."""
        if any(piece.role in QUERY_ROLES for piece in pieces):
            return self.heads
        return self.kv_heads or self.heads

    def _split(
        self, kernel: Path, shape: tuple[int, ...], name: str, told_heads: int | None
    ) -> tuple[bool, int, int]:
        """(is the head axis flattened into the last, heads, features per head)."""
        told_features = dict(self.head_features).get(name)
        flat = self.heads is not None or (
            told_features is not None and (len(shape) == 2 or shape[-1] != told_features)
        )
        problem = None
        if len(shape) < (2 if flat else 3):
            problem = (
                "is not [stack..., in, heads, head_features]; for flat kernels "
                "[stack..., in, heads*head_features] give the layout heads= (gqa: and kv_heads=)"
            )
        elif flat:
            heads = told_heads or max(1, shape[-1] // told_features)
            features = shape[-1] // heads
            if shape[-1] % heads:
                problem = f"has {shape[-1]} output features, which do not split into {heads} heads"
        else:
            heads, features = shape[-2:]
            if told_heads not in (None, heads):
                problem = f"has {heads} heads on axis -2, not {told_heads} as the layout says"
        if problem is None and told_features not in (None, features):
            problem = (
                f"has {features} features for each of {heads} heads where the layout says "
                f"{told_features}; check the sizes (nope, rope, v) and heads="
            )
        if problem:
            raise ValueError(f"{paths.show(kernel)} of shape {shape} {problem} ({self}).")
        for piece in self.pieces:
            if piece.projection == name and not (
                0 <= piece.start < (piece.stop or features) <= features
            ):
                raise ValueError(
                    f"{paths.show(kernel)} of shape {shape} has {features} features per head, "
                    f"which {piece} does not fit."
                )
        return flat, heads, features

    def __str__(self) -> str:
        told = {"heads": self.heads, "kv_heads": self.kv_heads, **dict(self.head_features)}
        sizes = ", ".join(f"{name}={size}" for name, size in told.items() if size is not None)
        return f"layouts.{self.name}({sizes})"


@dataclass(frozen=True)
class Projection:
    """One kernel (and bias) of a block, with the pieces it holds."""

    kernel: Path
    bias: Path | None
    stack: tuple[int, ...]
    heads: int
    head_features: int
    flat: bool
    pieces: tuple[Piece, ...]

    def multipliers(self, factors: Mapping[str, jax.Array]) -> dict[Path, jax.Array]:
        """Per-head factors as arrays that broadcast against the kernel and the bias.

        Args:
          factors: For each role, `[stack..., heads]`.
        """
        dtype = jnp.result_type(*(factors[piece.role] for piece in self.pieces))
        per_feature = jnp.ones((*self.stack, self.heads, self.head_features), dtype)
        for piece in self.pieces:
            per_feature = per_feature.at[..., piece.start : piece.stop].set(
                factors[piece.role][..., None]
            )
        if self.flat:
            per_feature = per_feature.reshape(*self.stack, self.heads * self.head_features)
        for_kernel = jnp.expand_dims(per_feature, len(self.stack))
        return {self.kernel: for_kernel} | ({self.bias: per_feature} if self.bias else {})


@dataclass(frozen=True)
class Block:
    """One attention block found in a parameter tree (several layers of it when stacked)."""

    path: Path
    heads: int
    kv_heads: int
    stack: tuple[int, ...]
    projections: tuple[Projection, ...]

    @property
    def name(self) -> str:
        """The module path that `sow` uses, `layers/0/attn`."""
        return paths.show(module_path(self.path))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one number per head: `[stack..., heads]`."""
        return (*self.stack, self.heads)

    def multipliers(self, factors: Mapping[str, jax.Array]) -> dict[Path, jax.Array]:
        """`Projection.multipliers` of all projections together."""
        return {
            path: array
            for projection in self.projections
            for path, array in projection.multipliers(factors).items()
        }


def mha(
    *, heads: int | None = None, query: str = "query", key: str = "key", block: str | None = None
) -> Layout:
    """Multi-head attention: every query head has a key head of its own.

    Kernels are Flax's `[stack..., in, heads, head_features]`, or `[stack..., in, out]` when
    `heads` is given. The defaults fit `flax.linen.MultiHeadDotProductAttention` and
    `flax.nnx.MultiHeadAttention`.

    Args:
      heads: Number of heads, for flat kernels only.
      query: Module of the query projection inside the block.
      key: Module of the key projection inside the block.
      block: Glob over block paths, to take only some of the model's attention blocks.
    """
    return Layout(
        name="mha",
        pieces=(Piece("q", query), Piece("k", key)),
        heads=heads,
        kv_heads=heads,
        block=block,
    )


def gqa(
    kv_heads: int | None = None,
    *,
    heads: int | None = None,
    query: str = "query",
    key: str = "key",
    block: str | None = None,
) -> Layout:
    """Grouped-query attention; with `kv_heads=1`, multi-query attention.

    Query head `h` reads key head `h // (heads // kv_heads)`.

    Args:
      kv_heads: Number of key heads (the groups). None reads it from the key kernel's head
        axis; flat kernels need it.
      heads: Number of query heads, for flat kernels `[stack..., in, out]` only.
      query: Module of the query projection inside the block.
      key: Module of the key projection inside the block.
      block: Glob over block paths, to take only some of the model's attention blocks.
    """
    return Layout(
        name="gqa",
        pieces=(Piece("q", query), Piece("k", key)),
        heads=heads,
        kv_heads=kv_heads,
        shared_keys=True,
        block=block,
    )


def mla(
    nope: int,
    rope: int,
    v: int,
    *,
    heads: int | None = None,
    query: str = "wq_b",
    key_value: str = "wkv_b",
    block: str | None = None,
) -> Layout:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    The query kernel holds `[q_nope | q_rope]` per head, the key/value kernel `[k_nope | v]`;
    the rotary key comes from another kernel, is shared by all heads and is never scaled, nor
    is the value. Kernels are `[stack..., in, heads, features]` or flat, `[stack..., in, out]`;
    the number of heads follows from the sizes.

    Args:
      nope: Features per head without position, of query and key.
      rope: Rotary features per head.
      v: Value features per head.
      heads: Number of heads; only needed for flat, stacked kernels of a single head.
      query: Module of the query projection: `wq_b` after query compression; the single query
        kernel, e.g. `wq`, without it.
      key_value: Module of the key/value up-projection.
      block: Glob over block paths, to take only some of the model's attention blocks.

    Raises:
      ValueError: A size that is no whole number of at least 1.
    """
    for name, size in (("nope", nope), ("rope", rope), ("v", v)):
        _check_count(f"layouts.mla: {name}", size)
    return Layout(
        name="mla",
        pieces=(
            Piece("q_nope", query, 0, nope),
            Piece("q_rope", query, nope, nope + rope),
            Piece("k_nope", key_value, 0, nope),
        ),
        heads=heads,
        head_features=((query, nope + rope), (key_value, nope + v)),
        block=block,
    )


def find_layout(params: Any) -> Layout:
    """The layout of a model built from Flax's own attention modules, Linen or NNX.

    A block is a module with `query`, `key`, `value` and `out` kernels. Returns `mha()` when
    every block has as many key heads as query heads, else `gqa()`, which reads each block's
    own group size.

    Args:
      params: The model's parameters (arrays or `jax.ShapeDtypeStruct`s).

    Raises:
      ValueError: No such block: the message lists the kernels found and the layouts to use. Or
        what `Layout.blocks` raises.
    """
    shapes = paths.shapes(params)
    blocks = [block for block in _parents(shapes) if is_flax_attention(block, shapes)]
    if not blocks:
        raise ValueError(
            "find_layout: no Flax attention module (query, key, value and out kernels in one "
            f"module) in these parameters. Kernels found: {_some_kernels(shapes)}. Write "
            "the layout: layouts.mha(query=..., key=...), layouts.gqa(...) or "
            "layouts.mla(nope, rope, v)."
        )
    equal = all(
        shapes[(*block, "query", "kernel")][-2] == shapes[(*block, "key", "kernel")][-2]
        for block in blocks
    )
    layout = mha() if equal else gqa()
    layout.blocks(params)  # raises here rather than at the first step
    return layout


def is_flax_attention(block: Path, shapes: Mapping[Path, tuple[int, ...]]) -> bool:
    """Whether `block` holds the four kernels of Flax's attention, each with a head axis."""
    kernels = [
        shapes.get((*block, name, "kernel"), ()) for name in ("query", "key", "value", "out")
    ]
    query, key, value, out = kernels
    return (
        min(map(len, kernels)) >= 3
        and query[-2] == out[-3]
        and value[-1] == out[-2]
        and key[-2] == value[-2]
        and query[-2] % key[-2] == 0
        and query[-1] == key[-1]
    )


def module_path(block: Path) -> Path:
    """A block's path as `sow` knows it: without the `params` collection of a Linen tree."""
    return block[1:] if block[:1] == ("params",) else block


def _check_count(what: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, got {value!r}.")


# Pairs of projections that give attention away.
_QUERY_AND_KEY = (
    ("query", "key"),
    ("q_proj", "k_proj"),
    ("wq", "wk"),
    ("q", "k"),
    ("wq_b", "wkv_b"),
    ("wq", "wkv_b"),
    ("q_b_proj", "kv_b_proj"),
)


def _check_all_covered(layout: str, found: list[Path], shapes: Mapping[Path, Any]) -> None:
    """Raises ValueError for a module that looks like attention and is in none of the blocks."""
    for module in _parents(shapes):
        if any(module[: len(block)] == block for block in found):
            continue
        for pair in _QUERY_AND_KEY:
            if all((*module, name, "kernel") in shapes for name in pair):
                raise ValueError(
                    f"{paths.show(module)} holds {' and '.join(pair)}, which looks like attention "
                    f"that {layout} does not cover (it covers {paths.show(found[0])}). Write a "
                    "layout for each kind, with block= patterns that say which is whose."
                )


def _parents(shapes: Mapping[Path, Any]) -> list[Path]:
    """The modules that hold modules with parameters."""
    return list(dict.fromkeys(path[:-2] for path in shapes if len(path) >= 2))


def _some_kernels(shapes: Mapping[Path, Any]) -> str:
    kernels = [paths.show(path) for path in shapes if path[-1] == "kernel"]
    return ", ".join(kernels[:8]) or "none"


def _children(block: Path, shapes: Mapping[Path, tuple[int, ...]]) -> str:
    inside = {
        "/".join(path[len(block) :]): shape
        for path, shape in shapes.items()
        if path[: len(block)] == block
    }
    return ", ".join(f"{name} {shape}" for name, shape in inside.items())
