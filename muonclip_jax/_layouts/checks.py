"""What is wrong with a layout, a block or a tree, in words: finding, path, shapes and fix."""

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from muonclip_jax._core import paths
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts import extras
from muonclip_jax._layouts.roles import (
    EQUAL_LENGTHS,
    EQUAL_LENGTHS_OF_LINEAR,
    ROLES,
    EqualLengths,
)
from muonclip_jax._layouts.surroundings import Shapes, norm_lengths

if TYPE_CHECKING:
    from muonclip_jax._layouts.blocks import Block

_IN_WORDS = {"heads": "heads", "features": "features", "ins": "input features"}


def check_block(block: "Block", around: Shapes) -> None:
    """Raises ValueError when the pieces of a block do not go together.

    Args:
      block: The block.
      around: The shapes of the whole model's parameters.
    """
    _check_alike(block)
    if block.layout.softmax:
        _check_heads(block)
        _check_input(block, around)
        _check_lengths(block, EQUAL_LENGTHS)
    else:
        _check_lengths(block, EQUAL_LENGTHS_OF_LINEAR)
    _check_overlap(block)


def _check_alike(block: "Block") -> None:
    """Parts with one role have the same heads: queries of all streams meet the keys of all."""
    for part in block.parts:
        first = block.part(part.role)
        if first and (part.heads, part.features) != (first.heads, first.features):
            shared = part.heads == 1 and ROLES[part.role].side in ("query", "key")
            fix = (
                " What all heads share cannot take the factor of each: give it no piece, and where "
                "no clip scales that side (keys with alpha=1, or untouched) name it in harmless=."
            )
            raise ValueError(
                f"{block.name}: {paths.show(first.kernel)} {first.shape} has {first.heads} heads "
                f"of {first.features} features and {paths.show(part.kernel)} {part.shape} "
                f"{part.heads} of {part.features}; pieces with one role ({part.role}) must agree."
                f"{fix if shared else ' Correct axes=, sizes= or select=.'}"
            )


def _check_heads(block: "Block") -> None:
    if not block.keys:
        return
    query, key = block.part("q_nope") or block.queries[0], block.keys[0]
    shown = [f"{paths.show(p.kernel)} {p.shape}" for p in (query, key)]
    if query.heads % key.heads or (query.heads != key.heads and not block.layout.shared_keys):
        raise ValueError(
            f"{block.name}: {query.heads} query heads ({shown[0]}) and {key.heads} key heads "
            f"({shown[1]}) do not fit layouts.{block.layout.name}. Use layouts.gqa() when several "
            "query heads share a key head."
        )
    if query.features != key.features:
        raise ValueError(
            f"{block.name}: {shown[0]} has {query.features} features per head and {shown[1]} "
            f"has {key.features}; they must agree. If query heads share key heads, use "
            "layouts.gqa(kv_heads, heads=...)."
        )


def _check_input(block: "Block", shapes: Shapes) -> None:
    """No norm before the block is as long as its input. Without an output projection nothing else
    would show that a stack of flat kernels was read as one with heads."""
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


def _check_lengths(block: "Block", equal: Sequence[EqualLengths]) -> None:
    for one_role, one_length, other_role, other_length in equal:
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


def _check_overlap(block: "Block") -> None:
    for kernel in dict.fromkeys(part.kernel for part in block.parts):
        parts = [part for part in block.parts if part.kernel == kernel]
        if reduce(np.add, (part.view.entries() for part in parts)).max() > 1:
            raise ValueError(
                f"{paths.show(kernel)} of shape {parts[0].shape}: the pieces "
                f"{', '.join(part.role for part in parts)} overlap; correct their select=."
            )


def refuse_what_escapes(blocks: "Sequence[Block]", params: Any) -> None:
    """Raises ValueError where scaling the kernels of a block would not scale its logits: what
    `refuse_qk_norm` raises, a parameter without a role, one that is masked."""
    refuse_qk_norm(blocks)
    masked = paths.masked(params)
    for block in blocks:
        if block.without_role:
            found = ", ".join(
                f"{paths.show(path)} {block.shapes[path]}" for path in block.without_role
            )
            raise ValueError(
                f"{found}: enters the logits of {paths.show(block.path)} beside its projections, "
                "and the layout gives it no role: scaling the kernels would not scale its part. "
                "Merge it into a kernel (an adapter), describe it with a Piece, or leave the block "
                "out with the layout's block= pattern. If it takes no part in the logits, or if it "
                "is on the side of keys that no clip touches (alpha=1, or untouched shared keys), "
                f"{_say_harmless(block.path, *block.without_role)}."
            )
        for path in masked:
            inside = path[len(block.path) :]
            if path[: len(block.path)] == block.path and not extras.on_values_side(inside):
                raise ValueError(
                    f"{paths.show(path)} is masked (optax.masked or optax.partition), and "
                    f"{paths.show(block.path)}, in which it is, is not: what scaling its kernels "
                    "does cannot be told. Move this transformation outside, to the end of the "
                    "chain; a mask around it must hide a block whole, or nothing of it."
                )


def refuse_qk_norm(blocks: "Sequence[Block]") -> None:
    """Raises ValueError when a norm behind a projection undoes what scaling its kernel does."""
    for block in blocks:
        for path in block.qk_norms:
            raise ValueError(
                f"{paths.show(path)} {block.shapes[path]} normalises queries or keys after their "
                f"projection: scaling the kernels of {paths.show(block.path)} would change "
                "nothing. QK-norm already bounds the logits: drop it, use mc.muon, which splits "
                "heads behind a norm too, or leave the block out with the layout's block= pattern. "
                f"If this parameter does something else, {_say_harmless(block.path, path)}."
            )


def _say_harmless(block: Path, *found: Path) -> str:
    """Modules inside the block, or parameters of the block itself."""
    inside = (path[len(block) :] for path in found)
    names = tuple(dict.fromkeys("/".join(path[:-1] or path) for path in inside))
    return f"say so with dataclasses.replace(layout, harmless={names!r})"


def matrices_of(shapes: Shapes) -> str:
    """The first matrices of a tree."""
    matrices = [
        path for path, shape in shapes.items() if len(shape) >= 2 and path[-1:] != ("bias",)
    ]
    return paths.some(matrices)


def inside_of(block: Path, shapes: Shapes) -> str:
    """What a module holds, with shapes."""
    inside = {path[len(block) :]: s for path, s in shapes.items() if path[: len(block)] == block}
    return ", ".join(f"{'/'.join(path)} {shape}" for path, shape in inside.items())
