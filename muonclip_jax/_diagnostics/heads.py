"""Heads as matrices, of weights, gradients and updates."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from muonclip_jax._core import paths
from muonclip_jax._layouts.blocks import Block, Layouts, find_blocks
from muonclip_jax._layouts.leaves import leaves_of, read_leaves
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import ROLES, Role

PerRole = dict[str, jax.Array]


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
      out]`, in the tree's dtypes. Of several pieces with one role each further one is called by its
      parameter too, `"q of query_txt/kernel"`. What all heads share has one head. Biases and gains
      of norms are not in it. Cost: one copy of the kernels.

    Raises:
      TypeError, ValueError: What `find_blocks` raises.

    Example:
      >>> params = {"attn": {name: jnp.ones((8, 4, 2)) for name in ("query", "key")}}
      >>> heads = mc.head_matrices(params, mc.layouts.mha(value=None, out=None))
      >>> heads["attn"]["q"].shape
      (4, 8, 2)
    """
    blocks = find_blocks(layout, tree)
    roles: set[Role] = {role for role, facts in ROLES.items() if facts.side != "gain"}

    def of_parts(fn: Callable[[Part], Any]) -> dict[str, dict[str, Any]]:
        return {block.name: {name: fn(part) for name, part in _named(block)} for block in blocks}

    kernels = leaves_of(blocks, roles, tree)
    split = of_parts(lambda part: part.split_of_heads(jax.typeof(kernels[part.kernel]).sharding))
    take = lambda leaves: of_parts(lambda part: part.take(leaves[part.kernel]))  # noqa: E731
    return read_leaves(take, blocks, roles, tree, out_specs=split)


def _named(block: Block) -> Iterator[tuple[str, Part]]:
    """The parts that have matrices, by their roles; further ones by their parameters too."""
    for part in block.parts:
        if not part.is_vector:
            inside = paths.show(part.kernel[len(block.path) :])
            yield part.role if part == block.part(part.role) else f"{part.role} of {inside}", part
