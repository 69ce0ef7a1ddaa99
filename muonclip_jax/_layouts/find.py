"""Layouts found rather than told: Flax's own attention modules."""

from typing import Any

from muonclip_jax._core import paths
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.blocks import Layout, find_blocks
from muonclip_jax._layouts.checks import matrices_of
from muonclip_jax._layouts.kinds import gqa, mha
from muonclip_jax._layouts.surroundings import Shapes


def find_layout(params: Any) -> Layout:
    """The layout of a model built from Flax's own attention modules, Linen or NNX.

    A block is a module with `query`, `key`, `value` and `out` kernels. Returns `mha()` when
    every block has as many key heads as query heads, else `gqa()`, which reads each block's
    own group size.

    Args:
      params: The model's parameters (arrays or `jax.ShapeDtypeStruct`s).

    Raises:
      ValueError: No such block: the message lists the kernels found and the layouts to use. Or
        what `find_blocks` raises.

    Example:
      >>> mc.find_layout(params).name
      'mha'
    """
    shapes = paths.shapes(params)
    modules = dict.fromkeys(path[:-2] for path in shapes if len(path) >= 2)
    blocks = [block for block in modules if is_flax_attention(block, shapes)]
    if not blocks:
        raise ValueError(
            "find_layout: no Flax attention module (query, key, value and out kernels in one "
            f"module) in these parameters. Matrices found: {matrices_of(shapes)}. Write "
            "the layout: layouts.mha(query=..., key=...), layouts.gqa(...), "
            "layouts.fused_qkv(...), layouts.mla(nope, rope, v), or "
            "layouts.Layout(name, pieces=(layouts.Piece(...), ...))."
        )
    equal = all(
        shapes[(*block, "query", "kernel")][-2] == shapes[(*block, "key", "kernel")][-2]
        for block in blocks
    )
    layout = mha() if equal else gqa()
    find_blocks(layout, params)  # raises here rather than at the first step
    return layout


def is_flax_attention(block: Path, shapes: Shapes) -> bool:
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
