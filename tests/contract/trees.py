"""The same parameters in the trees in which other people keep them.

All order their leaves as the nested dict does, so that runs are compared leaf by leaf.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import flax.struct
import jax
from flax import nnx


@jax.tree_util.register_pytree_node_class
class Named:
    """An array in a wrapper without keys, as named arrays are."""

    def __init__(self, array: Any):
        self.array = array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def rebuilt(make: Callable[[dict[str, Any]], Any], tree: Any) -> Any:
    """Every dict as what `make` gives for its items, from the inside out."""
    if not isinstance(tree, dict):
        return tree
    return make({name: rebuilt(make, tree[name]) for name in sorted(tree)})


# One class for each set of names: trees of one structure have the same.
@functools.cache
def _tuple_class(names: tuple[str, ...]) -> type:
    return collections.namedtuple("Node", names)


@functools.cache
def _data_class(names: tuple[str, ...]) -> type:
    body = {"__annotations__": dict.fromkeys(names, Any), "__call__": _never}
    return flax.struct.dataclass(type("Node", (), body))


@functools.cache
def _module_class(names: tuple[str, ...]) -> type:
    body = {"__annotations__": dict.fromkeys(names, Any), "__call__": _never}
    return type("Node", (eqx.Module,), body)


def _never(self, *_):
    raise AssertionError("a tree was taken for a function")


def _haiku(tree: dict[str, Any]) -> dict[str, Any]:
    """One dict key for a module, with slashes in it."""
    found: dict[str, Any] = {}

    def walk(path: tuple[str, ...], node: dict[str, Any]) -> None:
        for name in sorted(node):
            if isinstance(node[name], dict):
                walk((*path, name), node[name])
            else:
                found.setdefault("/".join(path), {})[name] = node[name]

    walk((), tree)
    return found


def _with_none(tree: dict[str, Any]) -> dict[str, Any]:
    """Every module has a bias that is None where it has none."""
    return rebuilt(lambda items: {"absent": None, **items}, tree)


class Kind(NamedTuple):
    """A way to keep parameters.

    Attributes:
      store: From nested dicts to the tree.
      prefix: The path in front of what the nested dicts have.
    """

    store: Callable[[dict[str, Any]], Any]
    prefix: tuple[str, ...] = ()


KINDS = {
    "Linen's variables": Kind(lambda tree: {"params": tree}),
    "FrozenDict": Kind(flax.core.freeze),
    "named tuples": Kind(
        lambda tree: rebuilt(lambda items: _tuple_class(tuple(items))(**items), tree)
    ),
    "dataclasses that can be called": Kind(
        lambda tree: rebuilt(lambda items: _data_class(tuple(items))(**items), tree)
    ),
    "Equinox modules": Kind(
        lambda tree: rebuilt(lambda items: _module_class(tuple(items))(**items), tree)
    ),
    "an NNX State": Kind(lambda tree: nnx.State(jax.tree.map(nnx.Param, tree))),
    "Haiku": Kind(_haiku),
    "wrapped arrays": Kind(lambda tree: jax.tree.map(Named, tree)),
    "None leaves": Kind(_with_none),
    "a list of layers": Kind(lambda tree: {"layers": [tree]}, ("layers", "0")),
    "whole-number keys": Kind(lambda tree: {"layers": {0: tree}}, ("layers", "0")),
}
