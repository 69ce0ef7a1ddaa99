"""What stands around the projections: norms behind them, adapters, attention nobody described."""

import re
from collections.abc import Iterator, Mapping, Sequence

from muonclip_jax.layouts.pieces import KEY_ROLES, QUERY_ROLES, Part
from muonclip_jax.paths import Path

Shapes = Mapping[Path, tuple[int, ...]]

_QK_NORM = re.compile(r"^_?((q|k|query|key)\w*(_ln|norm)|norm_(q|k|query|key))$")

# Modules or parameters that, together in one module, give attention away.
_ATTENTION = (
    ("query", "key"),
    ("q_proj", "k_proj"),
    ("wq", "wk"),
    ("q", "k"),
    ("wq_b", "wkv_b"),
    ("wq", "wkv_b"),
    ("q_b_proj", "kv_b_proj"),
    ("q_einsum", "kv_einsum"),
    ("q_einsum", "k_einsum"),
    ("qkv_einsum",),
    ("qkv_proj",),
    ("qkv",),
    ("query_key_value",),
    ("c_attn",),
)


def qk_norms(
    block: Path, parts: Sequence[Part], shapes: Shapes, stack_axis: int = 0
) -> Iterator[Path]:
    """Scales of norms behind the projections: known by their names, or because they are as
    long as all heads, one head or a piece of one, where a norm in front of a projection is
    as long as its input."""
    projections = [part for part in parts if part.role in QUERY_ROLES + KEY_ROLES]
    depth = len(projections[0].stack)
    feature_axis = depth if stack_axis == 0 else 0
    inputs = {part.ins for part in projections}
    outputs = {part.features for part in projections}
    outputs |= {part.heads * part.features for part in projections}
    outputs |= {part.sizes["features"] for part in projections}
    latent = any(part.role == "k_nope" for part in projections)
    own_modules = {block, *(part.kernel[:-1] for part in projections)}
    for path, shape in shapes.items():
        module = path[:-1]
        if path[: len(block)] != block or module in own_modules:
            continue
        if any(name.startswith("WeightNorm") for name in module[len(block) :]):
            yield path
        elif path[-1] not in ("kernel", "bias") and len(shape) == depth + 1:
            length = shape[feature_axis]
            # MLA's latent norms are in front, and some are called q_norm.
            named = _QK_NORM.search(module[-1]) and not (latent and length in inputs)
            if named or length in outputs - inputs:
                yield path


def other_parameters(block: Path, kernel: Path, shapes: Shapes) -> list[Path]:
    """Parameters in the kernel's own module other than its bias: adapters, usually."""
    module = kernel[:-1]
    if module == block:
        return []
    return [
        path
        for path in shapes
        if path[: len(module)] == module and path != kernel and path[-1] != "bias"
    ]


def looks_like_attention(shapes: Shapes) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Modules with children that are called as projections to queries and keys are."""
    children: dict[Path, set[str]] = {}
    for path, shape in shapes.items():
        if len(shape) >= 2:
            for depth in (1, 2)[: len(path)]:
                children.setdefault(path[:-depth], set()).add(path[-depth])
    for module, names in children.items():
        for pair in _ATTENTION:
            if names.issuperset(pair):
                yield module, pair
                break
