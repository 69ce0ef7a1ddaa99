"""Parameter paths, the same in every kind of tree.

A path is a tuple of strings such as `("layers", "0", "attn", "query", "kernel")`. Keys that hold
slashes are paths themselves (Haiku's `{"net/attn/q": {"w": ...}}`), and the key under which a
wrapper holds its one array (NNX's Variables, Flax's boxes, named arrays) is no part of any.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.meta import AxisMetadata
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey, all_leaves
from optax import MaskedNode

Path = tuple[str, ...]
IsLeaf = Callable[[Any], bool] | None

_SHOWN = 8  # paths in a message

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def name(key: Any) -> Any:
    """What one key of a JAX key path says: a dict's key, an attribute's name, a position."""
    match key:
        case DictKey(key=found) | FlattenedIndexKey(key=found) | GetAttrKey(name=found):
            return found
        case SequenceKey(idx=index):
            return index
        case _:
            return str(key)


def parse(names: Iterable[Any]) -> Path:
    """A path out of names: `("layers", 0)`, `("layers/0",)` and `(("layers", 0),)` are the same."""
    path: Path = ()
    for found in names:
        path += parse(found) if isinstance(found, tuple) else tuple(str(found).split("/"))
    return path


def words(name: str) -> tuple[str, ...]:
    """The words and numbers in a name, in lower case: `add_qProj1` is add, q, proj, 1."""
    return tuple(word.lower() for word in _WORD.findall(name))


def show(path: Path) -> str:
    """`layers/0/attn/query/kernel`, as it stands in error messages and tables."""
    return "/".join(path) if path else "<root>"


def some(found: Iterable[Path], none: str = "none") -> str:
    """The first of these paths, for messages."""
    every = list(found)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return (", ".join(map(show, every[:_SHOWN])) or none) + more


def nearest(glob: str, names: Iterable[str]) -> str:
    """Those of these names that are most like a glob that matches none, for messages."""
    return ", ".join(get_close_matches(glob, names, n=_SHOWN, cutoff=0))


def leaves(tree: Any, is_leaf: IsLeaf = None) -> Iterator[tuple[Path, Any]]:
    """Every leaf with its path.

    Raises:
      ValueError: Two leaves have one path, by slashes in their keys.
    """
    seen: set[Path] = set()
    for path, leaf in _walk(tree, is_leaf):
        if path in seen:
            raise ValueError(
                f"Two parameters have the path {show(path)}: keys with slashes in them count as "
                "paths. Rename one of them."
            )
        seen.add(path)
        yield path, leaf


def entry_for(path: Path, entries: Mapping[Path, Any]) -> Path | None:
    """Which entry of a prefix tree, by path, is for this path: that of its longest prefix."""
    prefixes = (path[:depth] for depth in range(len(path), -1, -1))
    return next((prefix for prefix in prefixes if prefix in entries), None)


def check_no_stray(name: str, entries: Iterable[Path], every_path: Sequence[Path]) -> None:
    """Raises ValueError if an entry of a prefix tree, a user's option, is for none of the paths."""
    known = {path[:depth] for path in every_path for depth in range(len(path) + 1)}
    for stray in entries:
        if stray not in known:
            raise ValueError(
                f"{name} has an entry for {show(stray)}, which is no parameter; "
                f"remove it or correct it. There are: {some(every_path)}."
            )


def shapes(tree: Any) -> dict[Path, tuple[int, ...]]:
    """The shape of every leaf, arrays, numbers or `jax.ShapeDtypeStruct`s, by its path.

    Raises:
      TypeError: A leaf that is none of these.
    """
    found = {}
    for path, leaf in leaves(tree):
        if not hasattr(leaf, "shape") and not isinstance(leaf, int | float | complex):
            raise TypeError(
                f"{show(path)} is no array, it is a {type(leaf).__name__}. Give the arrays of the "
                "model only: of an Equinox module eqx.filter(model, eqx.is_inexact_array)."
            )
        found[path] = np.shape(leaf)
    return found


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, a `jax.ShapeDtypeStruct` or a number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def check_trainable(owner: str, tree: Any, kind: Any = jnp.floating) -> None:
    """Raises for leaves of which no optimizer can take steps.

    Args:
      owner: The transformation's name, for messages.
      tree: The parameters that it computes with.
      kind: What it can compute with: `jnp.floating`, or `jnp.inexact`, complex numbers as well.

    Raises:
      TypeError: A leaf of another dtype.
      ValueError: A leaf without entries.
    """
    for path, shape in shapes(tree).items():
        if 0 in shape:
            raise ValueError(
                f"{owner}: {show(path)} has shape {shape}, with an axis of length zero: there is "
                "nothing to train. Leave it out of the parameters."
            )
    for path, leaf in leaves(tree):
        if not jnp.issubdtype(dtype_of(leaf), kind):
            raise TypeError(
                f"{owner}: {show(path)} {np.shape(leaf)} is {dtype_of(leaf)}, and only floating "
                "point can be trained. Keep it out of the parameters (NNX: nnx.state(model, "
                "nnx.Param); Equinox: eqx.filter(model, eqx.is_inexact_array)) or of this "
                "transformation (optax.masked, or optax.partition with optax.set_to_zero())."
            )


def masked(tree: Any) -> list[Path]:
    """Where `optax.masked` or `optax.partition` left nothing."""
    is_masked = lambda node: isinstance(node, MaskedNode)  # noqa: E731
    return [path for path, leaf in leaves(tree, is_leaf=is_masked) if is_masked(leaf)]


def absent(tree: Any) -> list[Path]:
    """Where there could be a parameter and is none: what is masked, and None."""
    is_none = lambda node: node is None  # noqa: E731
    return masked(tree) + [path for path, leaf in leaves(tree, is_leaf=is_none) if leaf is None]


def holds_nothing(tree: Any) -> bool:
    """Whether this is what `optax.tree_map_params` calls `init` with, to find the copies of the
    parameters in a state: a node of a class of its own without anything inside."""
    structure = jax.tree.structure(tree)
    plain = tree is None or isinstance(tree, Mapping | list | tuple)
    return structure.num_nodes == 1 and structure.num_leaves == 0 and not plain


def is_variable(node: Any) -> bool:
    """Whether it is an NNX Variable. (None exists before NNX, slow to import, is.)"""
    nnx = sys.modules.get("flax.nnx.variablelib")
    return nnx is not None and isinstance(node, nnx.Variable)


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: IsLeaf = None) -> Any:
    """`jax.tree.map` whose function gets the path first."""
    first, treedef = jax.tree.flatten(tree, is_leaf)
    columns = (first, *map(treedef.flatten_up_to, rest))
    named = (path for path, _ in leaves(tree, is_leaf))
    return treedef.unflatten(map(fn, named, *columns))


def _walk(tree: Any, is_leaf: IsLeaf) -> Iterator[tuple[Path, Any]]:
    is_end = is_leaf or (lambda _: False)
    held = lambda node: [] if is_end(node) else _held(node, is_end)  # noqa: E731
    stop = lambda node: is_end(node) or bool(held(node))  # noqa: E731
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stop):
        path = parse(map(name, keys))
        if inside := held(node):
            yield from ((path + rest, leaf) for rest, leaf in _walk(inside[0], is_leaf))
        else:
            yield path, node


def _held(node: Any, is_end: Callable[[Any], bool]) -> list[Any]:
    """The one thing that a wrapper holds under a key that is no name; nothing of other nodes.

    NNX's Variables and Flax's boxes are known by their type. Of other classes it is one array under
    a key that says nothing: none at all (`tree_flatten` without keys), `array` or `data_array`.
    """
    if node is None or isinstance(node, dict | list | tuple) or all_leaves([node]):
        return []
    children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda inner: inner is not node)
    if len(children) != 1:
        return []
    ((*_, key), child), *_ = children
    if isinstance(node, AxisMetadata) or is_variable(node):
        return [child]
    says_nothing = isinstance(key, FlattenedIndexKey) or (
        isinstance(key, GetAttrKey) and key.name in ("array", "data_array")
    )
    ends = (
        child is None
        or all_leaves([child], is_end)
        or isinstance(child, MaskedNode)
        or _held(child, is_end)
    )
    return [child] if says_nothing and ends else []
