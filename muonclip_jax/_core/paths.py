"""Parameter paths, the same for Linen dicts, NNX States and plain trees.

A path is a tuple of strings such as `("layers", "0", "attn", "query", "kernel")`.
"""

from collections.abc import Iterator
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

Path = tuple[str, ...]


def _part(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case _:
            return str(key)


def parse(key_path: tuple[Any, ...]) -> Path:
    """A JAX key path as strings, without the attribute in which NNX Variables and
    Linen boxes (e.g. `nn.Partitioned`) hold their array."""
    if key_path and isinstance(key_path[-1], GetAttrKey) and key_path[-1].name == "value":
        key_path = key_path[:-1]
    return tuple(_part(key) for key in key_path)


def show(path: Path) -> str:
    """`layers/0/attn/query/kernel`, as it stands in error messages and tables."""
    return "/".join(path) if path else "<root>"


def leaves(tree: Any, is_leaf=None) -> Iterator[tuple[Path, Any]]:
    """Every leaf with its path."""
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        yield parse(key_path), leaf


def shapes(tree: Any) -> dict[Path, tuple[int, ...]]:
    """The shape of every leaf, arrays or `jax.ShapeDtypeStruct`s, by its path."""
    return {path: tuple(leaf.shape) for path, leaf in leaves(tree)}


def map_with_path(fn, tree: Any, *rest: Any, is_leaf=None) -> Any:
    """`jax.tree.map` whose function gets the path first."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, *xs: fn(parse(key_path), *xs), tree, *rest, is_leaf=is_leaf
    )
