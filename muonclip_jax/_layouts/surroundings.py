"""What stands around the projections: norms behind them, biases, attention nobody described."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.extras import on_values_side
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import KEY_ROLES, QUERY_ROLES, ROLES

Shapes = Mapping[Path, tuple[int, ...]]

_QK_NORM = re.compile(
    r"^_?((q|k|query|key)\w*(_ln|norm|_gamma)(_?(scale|weight|w))?|(ln|norm)_(q|k|query|key)"
    r"|qk_?norm\w*)$"
)
_LOGIT_SCALE = re.compile(r"^(\w+_)?logits?_scale$")  # of cosine attention
_KEY_GAIN = re.compile(r"^(k|key)_(scale|gain)$")  # queries alone may have a temperature
_KEYS_ALONE = re.compile(r"^_?(k|key)(?!_?v)")  # not kv_norm: keys and values share a latent
_IN_FRONT = re.compile(r"^(pre|in|input|before)_|_(in|input)$")
_QK_BIAS = re.compile(r"^(q|k|qkv|kv|query|key)\w*bias$|^b(q|k|qkv)$|^bias_(q|k|qkv|query|key)$")

# Modules or parameters that, together in one module, give attention away.
_ATTENTION = (
    ("query", "key"),
    ("q_proj", "k_proj"),
    ("wq", "wk"),
    ("q", "k"),
    ("wq_b", "wkv_b"),
    ("wq", "wkv_b"),
    ("q_b_proj", "kv_b_proj"),
    ("w_uq", "w_ukv"),
    ("w_q", "w_k"),
    ("to_q", "to_k"),
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
    sides = QUERY_ROLES + KEY_ROLES
    projections = [part for part in parts if part.role in sides and not part.is_vector]
    depth = len(projections[0].stack)
    per_head = {(part.heads, part.view.sizes["features"]) for part in projections}
    # A latent whose norm is a part has no other one; a head may well be as long as it.
    gained = {ROLES[part.role].behind for part in parts if ROLES[part.role].side == "gain"}
    inputs = {part.ins for part in projections if ROLES[part.role].behind not in gained}
    one_head = {part.features for part in projections} | {size for _, size in per_head}
    outputs = one_head | {part.heads * part.features for part in projections}
    single = {part.features for part in projections if part.heads == 1}
    heads = {1, *(part.heads for part in projections)}
    latent = any(part.role == "k_nope" for part in projections)
    own_modules = {block, *(part.kernel[:-1] for part in projections)}
    own = {path for part in parts for path, _ in part.leaves}
    for path, shape in shapes.items():
        module = path[:-1]
        if path[: len(block)] != block or path in own or len(shape) < depth:
            continue
        place = min(stack_axis, len(shape) - depth)
        lengths = shape[:place] + shape[place + depth :]
        if module in own_modules:
            gain = _KEY_GAIN.search(path[-1]) and lengths in per_head | {(n,) for n in one_head}
            scale = _LOGIT_SCALE.search(path[-1]) and math.prod(lengths) in heads
            if _QK_NORM.search(path[-1]) or gain or scale:
                yield path
        elif any(name.startswith("WeightNorm") for name in module[len(block) :]):
            yield path
        elif path[-1] != "bias" and (
            path[-1] != "kernel" or len(lengths) == 1 or _QK_NORM.search(module[-1])
        ):
            # MLA's latent norms are in front, and some are called q_norm.
            in_front = latent and len(lengths) == 1 and lengths[0] in inputs
            in_front = in_front and not _KEYS_ALONE.search(module[-1])
            values = on_values_side(module[len(block) :])
            behind = lengths in per_head or (len(lengths) == 1 and lengths[0] in outputs - inputs)
            if len(lengths) == 1 and lengths[0] in one_head - single:
                # As long as a head and as the input: only its name can tell.
                behind |= not latent and not _IN_FRONT.search(module[-1])
            if (behind and not values) or (_QK_NORM.search(module[-1]) and not in_front):
                yield path


def bias_beside(kernel: Path, shapes: Shapes) -> Path | None:
    """The bias in the kernel's own module, by Flax's and Haiku's names."""
    beside = ((*kernel[:-1], name) for name in ("bias", "b"))
    return next((path for path in beside if path in shapes and path != kernel), None)


def unnamed_biases(block: Path, parts: Sequence[Part], shapes: Shapes) -> list[Path]:
    """Parameters beside the kernels that are called as biases of queries or keys are."""
    modules = {block, *(part.kernel[:-1] for part in parts)}
    named = {path for part in parts for path in (part.kernel, part.bias)}
    return [
        path
        for path in shapes
        if path[:-1] in modules and path not in named and _QK_BIAS.search(path[-1])
    ]


def norm_lengths(block: Path, shapes: Shapes, stack_axis: int = 0) -> set[int]:
    """How long the scales are in the nearest module around the block that has any."""
    for end in reversed(range(len(block))):
        found = [
            shape
            for path, shape in shapes.items()
            if path[-1] == "scale" and shape and path[:end] == block[:end]
            and path[: len(block)] != block
        ]  # fmt: skip
        if found:
            return {shape[0] if stack_axis else shape[-1] for shape in found}
    return set()


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
