"""Checks of what the transformations are built with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import ensure_compile_time_eval, tree
from jax.core import Tracer


def is_function(value: Any) -> bool:
    """Whether it is a function, and not a tree whose class can be called (`equinox.Module`)."""
    is_leaf = jax.tree_util.treedef_is_leaf(tree.structure(value))
    return callable(value) and (is_leaf or isinstance(value, jax.tree_util.Partial))


def check_number(
    name: str, value: Any, is_right: Callable[[Any], Any], wanted: str, owner: str
) -> None:
    """Raises for an option that is not one number, or not the wanted one.

    Traced numbers come from `optax.inject_hyperparams`, which was given the concrete ones.

    Raises:
      TypeError: It is not one number.
      ValueError: It is not right.
    """
    if isinstance(value, Tracer):
        return
    if callable(value):
        raise TypeError(
            f"{name} must be a number; for a schedule wrap {owner} in optax.inject_hyperparams."
        )
    if np.ndim(value) or not jnp.issubdtype(np.asarray(value).dtype, jnp.number):
        raise TypeError(f"{name} must be one number, got {value!r}.")
    if not is_right(value):
        raise ValueError(f"{name} must be {wanted}, got {value}.")


def check_ascent(name: str, tx: optax.GradientTransformation) -> None:
    """Raises for a direction that descends: the learning rate, which follows, turns it around.

    It is asked once, with a gradient of 1 for a parameter called `probe`.

    Raises:
      ValueError: It turns a positive gradient into a negative update.
    """
    probe = {"probe": jnp.ones(())}
    with ensure_compile_time_eval():
        try:
            updates, _ = tx.update(probe, tx.init(probe), probe)
        except Exception:  # one that knows its parameters by name or needs extra arguments
            return
    update = tree.leaves(updates)[0]
    if not isinstance(update, Tracer) and update < 0:
        raise ValueError(
            f"{name} must come without a learning rate and its sign, since both follow for all "
            "parameters; this one turns a gradient of 1 into an update of "
            f"{float(update):.3g}. Use optax.scale_by_adam() in place of optax.adam or adamw."
        )
