"""Masks: how a user says which parameters, by a tree of bools or by paths."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np

from muonclip_jax._core import paths
from muonclip_jax._core.options import is_function
from muonclip_jax._core.paths import Path

# A tree of bools like the parameters, or a prefix of one, or a function to one.
Mask = Any | Callable[[Any], Any]
# A mask, True for what is frozen; or globs over the parameters' paths.
Frozen = Mask | str | Sequence[str]


def check_mask(name: str, mask: Mask | None) -> None:
    """Raises TypeError or ValueError, when a chain is built, for a mask that can be none."""
    if isinstance(mask, bool | np.bool_ | jax.Array):
        raise ValueError(
            f"{name} must be a tree of bools or a function to one, got {mask}. "
            "optax.inject_hyperparams takes every function for a schedule: name it there, "
            f'static_args="{name}".'
        )
    if mask is not None and not is_function(mask):
        _entries(name, mask)


def read_mask(name: str, mask: Mask, params: Any) -> dict[Path, bool]:
    """A user's mask by path.

    Args:
      name: The option.
      mask: What was given.
      params: The parameters; only paths and shapes are read.

    Raises:
      TypeError: An entry that is no bool.
      ValueError: A mask that fits other parameters.
    """
    entries = _entries(name, mask(params) if is_function(mask) else mask)
    found: dict[Path, bool] = {}
    shapes = paths.shapes(params)
    for path, shape in shapes.items():
        entry = paths.entry_for(path, entries)
        if entry is None:
            raise ValueError(
                f"{name} says nothing about {paths.show(path)} {shape}; it "
                f"has {paths.some(list(entries))}. Give it True or False: "
                "jax.tree.map(lambda p: p.ndim > 1, params)."
            )
        found[path] = entries[entry]
    paths.check_no_stray(name, entries, [*shapes, *paths.absent(params)])
    return found


def check_frozen(frozen: Frozen | None) -> None:
    """Raises TypeError or ValueError, when a chain is built, for what can be no mask or globs."""
    if _globs(frozen) is None:
        check_mask("frozen", frozen)


def read_frozen(frozen: Frozen | None, params: Any) -> frozenset[Path]:
    """The paths of the parameters that are frozen.

    Raises:
      TypeError: An entry that is neither a bool nor a glob.
      ValueError: A mask that fits other parameters, a glob that matches none.
    """
    if frozen is None:
        return frozenset()
    globs = _globs(frozen)
    if globs is None:
        mask = read_mask("frozen", frozen, params)
        return frozenset(path for path, is_frozen in mask.items() if is_frozen)
    every_path = [*paths.shapes(params), *paths.absent(params)]
    found: set[Path] = set()
    for glob in globs:
        matching = [path for path in every_path if fnmatchcase(paths.show(path), glob)]
        if not matching:
            raise ValueError(
                f"frozen={glob!r} matches no parameter; remove it or correct it. Nearest are: "
                f"{paths.nearest(glob, map(paths.show, every_path))}."
            )
        found.update(matching)
    return frozenset(found)


def _globs(frozen: Frozen | None) -> tuple[str, ...] | None:
    """What was given as globs, if it was."""
    if isinstance(frozen, str):
        return (frozen,)
    if not isinstance(frozen, list | tuple) or not frozen:
        return None
    return tuple(map(str, frozen)) if all(isinstance(x, str) for x in frozen) else None


def _entries(name: str, mask: Any) -> dict[Path, bool]:
    entries = dict(paths.leaves(mask))
    for path, entry in entries.items():
        if not isinstance(entry, bool | np.bool_):
            raise TypeError(
                f"{name} has {entry!r} for {paths.show(path)}; it must be True or "
                "False: jax.tree.map(lambda p: p.ndim > 1, params)."
            )
    return {path: bool(entry) for path, entry in entries.items()}
