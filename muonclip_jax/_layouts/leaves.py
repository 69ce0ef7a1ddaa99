"""The frame of everything that acts on heads: find the leaves, work on them, put them back.

blocks ─► their own leaves ─► fn, which sees Auto mesh axes only ─► back into the tree
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from muonclip_jax._core import paths
from muonclip_jax._core.meshes import in_auto_axes, specs_of
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.blocks import Block
from muonclip_jax._layouts.roles import Role

Leaves = dict[Path, jax.Array]


def leaves_of(blocks: Sequence[Block], roles: Collection[Role], tree: Any) -> Leaves:
    """Kernels, biases, gains and adapters of the parts with these roles, in a tree like the params.

    Raises:
      ValueError: One is not there.
    """
    parts = [part for block in blocks for part in block.parts if part.role in roles]
    leaves = dict(paths.leaves(tree))
    wanted = dict.fromkeys(path for part in parts for path, _ in part.leaves)
    for path in wanted:
        if path not in leaves:
            raise ValueError(
                f"{paths.show(path)} is among the parameters but not the updates; give trees alike."
            )
    return {path: leaves[path] for path in wanted}


def read_leaves(
    fn: Callable[..., Any],
    blocks: Sequence[Block],
    roles: Collection[Role],
    tree: Any,
    *args: Any,
    out_specs: Any = PartitionSpec(),  # noqa: B008 (immutable)
) -> Any:
    """`fn(leaves, *args)` of the blocks' leaves with these roles, by path.

    On Explicit meshes the result is replicated, or split as `out_specs` says.
    """
    return in_auto_axes(fn, out_specs)(leaves_of(blocks, roles, tree), *args)


def change_leaves(
    fn: Callable[..., tuple[Leaves, Any]],
    blocks: Sequence[Block],
    roles: Collection[Role],
    tree: Any,
    *args: Any,
) -> tuple[Any, Any]:
    """`(new, more) = fn(leaves, *args)`: the tree with the new leaves for the old, and more.

    Other leaves are the same arrays. On Explicit meshes the new leaves keep the sharding of the old
    ones, and `more` is replicated.
    """
    own = leaves_of(blocks, roles, tree)
    changed, rest = in_auto_axes(fn, (specs_of(own), PartitionSpec()))(own, *args)
    return paths.map_with_path(lambda path, leaf: changed.get(path, leaf), tree), rest
