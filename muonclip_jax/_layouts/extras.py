"""Parameters beside the projections that enter the logits: second streams, relative positions,
extra keys, adapters. Scaling the projections alone would not scale what they add.

Only names and shapes are seen. Known are the names that models give them, where the shape is that
of a query or key, not that of a bias on logits `[heads, ...]`, which clips need not scale.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from muonclip_jax._core import paths
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import KEY_ROLES, QUERY_ROLES, ROLES

Shapes = Mapping[Path, tuple[int, ...]]

_QUERY = re.compile(r"^[wud]?(q|qk|kq|qkv|quer(y|ies))$")
_KEY = re.compile(r"^[wud]?(k|qk|kq|qkv|kv|keys?)$")
_VALUES = {"v", "value", "values", "o", "out", "output", "gate", "gating", "g"}
_POSITIONS = {"rel", "relative", "relpos", "pos", "position", "positional", "r"}
_POSITIONS |= {"seg", "segment"}
_EXTRA_KEYS = {"null", "mem", "memory", "memories", "persistent", "prefix", "sink", "extra", "bos"}
ADAPTERS = {"lora", "dora", "adapter", "adapters", "magnitude", "loha", "lokr"}
_INPUTS = {"embed", "embedding", "embeddings", "token", "tokens", "latents"}
# Norms are known elsewhere, a convolution without bias keeps a factor, and an MLP is no attention.
_NO_PART = {"norm", "ln", "layernorm", "rmsnorm", "cache", "cached", "conv", "dropout", "rng"}
_NO_PART |= {"index", "mask", "mlp", "ffn", "ff", "moe", "experts", "router"}


class _Lengths(NamedTuple):
    """What axes of queries and keys can be long."""

    inputs: set[int]
    features: set[int]
    per_head: set[tuple[int, int]]  # (heads, features)
    flat: set[int]  # heads times features


def without_role(
    block: Path, parts: Sequence[Part], shapes: Shapes, stack_axis: int = 0
) -> Iterator[Path]:
    """Parameters of the block that enter its logits and that no part describes.

    Args:
      block: The block's path.
      parts: Its parts.
      shapes: The parameters of the module there.
      stack_axis: Where the stack axes are.
    """
    sides = [part for part in parts if part.role in QUERY_ROLES + KEY_ROLES]
    sizes = [(part.heads, n) for part in sides for n in (part.features, _features(part))]
    lengths = _Lengths(
        {part.ins for part in sides if not part.is_vector},
        {n for _, n in sizes},
        set(sizes),
        {heads * n for heads, n in sizes},
    )
    known = {path for part in parts for path, _ in part.leaves}
    apart = [*_values_modules(block, parts), *_attention_inside(block, parts, shapes)]
    depth = len(sides[0].stack)
    for path, shape in shapes.items():
        if path in known or len(shape) < depth or any(path[: len(m)] == m for m in apart):
            continue
        place = min(stack_axis, len(shape) - depth)
        own = shape[:place] + shape[place + depth :]
        if _enters_logits(path[len(block) :], own, lengths):
            yield path


def on_values_side(inside: Path) -> bool:
    """Whether a path inside a block is called as values, outputs and gates are."""
    told = words_in(inside)
    return bool(told & _VALUES) and not _of_queries_or_keys(told)


def _enters_logits(inside: Path, shape: tuple[int, ...], lengths: _Lengths) -> bool:
    """By the path inside the block and the shape without stack axes."""
    told = words_in(inside)
    on_logits_side = _of_queries_or_keys(told)
    if told & _NO_PART or on_values_side(inside):
        return False
    if told & ADAPTERS:
        return on_logits_side or bool(ADAPTERS & words_in(inside[:1]))
    if not shape:
        return False
    last = shape[-1]
    per_head = shape[-2:] in lengths.per_head
    if on_logits_side and told & _EXTRA_KEYS:
        return last in lengths.features | lengths.flat or per_head
    if "bias" in told:  # of queries and keys, else it is one on logits
        flat = len(shape) == 1 and last in lengths.flat and bool(told & _POSITIONS)
        return shape in lengths.per_head or flat
    if told & _POSITIONS:
        projection = inside[-1] in ("kernel", "w", "weight", "weights") and len(shape) == 2
        of_one_head = len(shape) >= 2 and last in lengths.features - lengths.inputs
        return per_head or of_one_head or (projection and last in lengths.flat)
    if not on_logits_side or len(shape) < 2:
        return inside[-1] == "u" and shape in lengths.per_head
    return not _in_front(told, shape, lengths)


def _in_front(told: set[str], shape: tuple[int, ...], lengths: _Lengths) -> bool:
    """Whether it makes the input of a projection: a latent, or learned inputs."""
    if len(shape) != 2 or shape[-1] not in lengths.inputs:
        return False
    narrows = shape[0] not in lengths.inputs and shape[-1] not in lengths.flat
    return narrows or bool(told & _INPUTS)


def _of_queries_or_keys(told: set[str]) -> bool:
    return any(_QUERY.match(word) or _KEY.match(word) for word in told)


def _features(part: Part) -> int:
    return part.view.sizes["features"]


def words_in(inside: Path) -> set[str]:
    """The words in all names of a path."""
    return {word for name in inside for word in paths.words(name)}


def _values_modules(block: Path, parts: Sequence[Part]) -> Iterator[Path]:
    """Modules that hold nothing on the side of queries and keys."""
    others = [part.kernel for part in parts if ROLES[part.role].side != "value"]
    for part in parts:
        module = part.kernel[: len(block) + 1]
        if ROLES[part.role].side == "value" and all(k[: len(module)] != module for k in others):
            yield module


def _attention_inside(block: Path, parts: Sequence[Part], shapes: Shapes) -> Iterator[Path]:
    """Modules inside the block, without a part of it, that have queries and keys of their own."""
    kernels = [part.kernel for part in parts]
    children: dict[Path, set[str]] = {}
    for path in shapes:
        for end in range(len(block) + 1, len(path)):
            children.setdefault(path[:end], set()).add(path[end])
    for module, names in children.items():
        told = words_in(tuple(names))
        apart = all(kernel[: len(module)] != module for kernel in kernels)
        if apart and any(map(_QUERY.match, told)) and any(map(_KEY.match, told)):
            yield module
