"""Heads as matrices, of weights, gradients and updates."""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from muonclip_jax._core.meshes import in_auto_axes
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.blocks import Layouts, find_blocks
from muonclip_jax._layouts.leaves import leaves_of
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import GAIN_ROLES, Role

PerRole = dict[Role, jax.Array]


def head_matrices(tree: Any, layout: Layouts) -> dict[str, PerRole]:
    """Every head's kernels as matrices, whatever way the model stores them.

    `jax.tree.map(mc.stable_rank, mc.head_matrices(params, layout))` is the stable rank of each
    head's query, key, value and output kernel; any measure will do, and so will gradients, updates
    or momentum instead of parameters.

    Args:
      tree: The parameters, or any tree with their structure and shapes.
      layout: Where the heads are; several layouts as a list.

    Returns:
      For each attention block (by path) and role, such as `"q"`, or `"k_nope"` and `"kv_down"` of
      MLA, `[stack..., heads, in, features]`, and of the output `"o"` `[stack..., heads, features,
      out]`, in the tree's dtypes. What all heads share has one head. Biases and gains of norms are
      not in it. Cost: one copy of the kernels.

    Raises:
      TypeError, ValueError: What `find_blocks` raises.
    """
    blocks = find_blocks(layout, tree)
    parts = {b.name: [part for part in b.parts if part.role not in GAIN_ROLES] for b in blocks}
    leaves = leaves_of(blocks, {part.role for own in parts.values() for part in own}, tree)
    kernels = {part.kernel: leaves[part.kernel] for own in parts.values() for part in own}

    def per_block(fn):
        return {name: {part.role: fn(part) for part in own} for name, own in parts.items()}

    def take(kernels):
        return per_block(lambda part: part.take(kernels[part.kernel]))

    return in_auto_axes(take, per_block(lambda part: _split(part, kernels)))(kernels)


def _split(part: Part, kernels: dict[Path, jax.Array]) -> PartitionSpec:
    """Over the Explicit axes of its mesh, if any."""
    return part.split_of_heads(jax.typeof(kernels[part.kernel]).sharding)
