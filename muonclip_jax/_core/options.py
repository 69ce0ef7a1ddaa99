"""Checks of what the public functions are called with: option, finding, and what it may be.

All concrete options are checked when a chain is built. Numbers that are traced come from
`optax.inject_hyperparams`, which was given the concrete ones.
"""

from collections.abc import Callable, Collection
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import ensure_compile_time_eval, tree
from jax.core import Tracer

# In which dtypes matrices are iterated, and momentum is kept.
FLOATS = ("bfloat16", "float16", "float32", "float64")


def is_function(value: Any) -> bool:
    """Whether it is a function, and not a tree whose class can be called (`equinox.Module`)."""
    is_leaf = jax.tree_util.treedef_is_leaf(tree.structure(value))
    return callable(value) and (is_leaf or isinstance(value, jax.tree_util.Partial))


def check_number(
    name: str, value: Any, is_right: Callable[[Any], Any], wanted: str, owner: str = ""
) -> None:
    """Raises for an option that is not one number, or not the wanted one.

    Args:
      name: The option.
      value: What was given.
      is_right: Whether a number is the wanted one.
      wanted: The same in words.
      owner: The transformation to wrap for a schedule, if it can be wrapped.

    Raises:
      TypeError: It is not one number.
      ValueError: It is not right.
    """
    if isinstance(value, Tracer):
        return
    if owner and callable(value):
        raise TypeError(
            f"{name} must be a number, {wanted}; for a schedule wrap {owner} in "
            "optax.inject_hyperparams."
        )
    if not _is_number(value):
        raise TypeError(f"{name} must be one number, {wanted}, got {value!r}.")
    if not is_right(value):
        raise ValueError(f"{name} must be {wanted}, got {value}.")


def check_rate(name: str, value: Any) -> None:
    """Raises for what is no number of at least 0, and no Optax schedule.

    Raises:
      TypeError: It is neither a number nor a function.
      ValueError: It is negative or not finite.
    """
    if isinstance(value, Tracer) or callable(value):
        return
    if not _is_number(value):
        raise TypeError(f"{name} must be one number or an Optax schedule, got {value!r}.")
    if not (np.asarray(value) >= 0 and np.isfinite(value)):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError for what is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_text(name: str, value: Any, optional: bool = False) -> None:
    """Raises TypeError for what is no text, None excepted where it is optional."""
    if not isinstance(value, str) and not (optional and value is None):
        raise TypeError(f"{name} must be text{' or None' * optional}, got {value!r}.")


def check_pattern(name: str, value: Any) -> None:
    """Raises TypeError for what is no glob, no globs and no function of a path."""
    several = [value] if isinstance(value, str) else value
    is_globs = isinstance(several, list | tuple) and bool(several)
    if not callable(value) and not (is_globs and all(isinstance(x, str) for x in several)):
        raise TypeError(
            f"{name} must be text, a glob over block paths, or several as a tuple, or a function "
            f"of a path, got {value!r}."
        )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError for what is no whole number of at least so much, and TypeError for one that
    `optax.inject_hyperparams` made an array of."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be known when the program is compiled, got a JAX array: name it in "
            f"optax.inject_hyperparams(..., static_args=({name!r},))."
        )
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def check_choice(name: str, value: Any, choices: Collection[str], beside: str = "") -> None:
    """Raises ValueError for what is none of the names; `beside` says what else it may be."""
    if not isinstance(value, str) or value not in choices:
        names = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be one of {names}{beside}, got {value!r}.")


def check_float(name: str, dtype: Any, optional: bool = True, beside: tuple[str, ...] = ()) -> None:
    """Raises TypeError for what is no dtype to compute in, None excepted where it is optional;
    `beside` says what else it may be."""
    found = as_dtype(dtype)
    if (found is None or found.name not in FLOATS) and not (optional and dtype is None):
        wanted = ", ".join((*FLOATS, *beside)) + ", or None" * optional
        got = repr(dtype) if found is None else found.name
        raise TypeError(f"{name} must be one of {wanted}, got {got}.")


def as_dtype(dtype: Any) -> jnp.dtype | None:
    """The dtype that this stands for, if any."""
    try:
        return None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        return None


def check_transformation(name: str, tx: Any) -> None:
    """Raises TypeError for what is no Optax transformation."""
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an Optax transformation such as optax.scale_by_adam() (of "
            f"optax.MultiSteps, its .gradient_transformation()), got {tx!r}."
        )


def check_ascent(name: str, tx: optax.GradientTransformation) -> None:
    """Raises for a direction that descends: the learning rate, which follows, turns it around.

    It is asked once, with a gradient of 1 for a parameter called `probe`.

    Raises:
      TypeError: It is no transformation.
      ValueError: It turns a positive gradient into a negative update.
    """
    check_transformation(name, tx)
    update = _update_of_one(tx, step=0)
    if update < 0:
        raise ValueError(
            f"{name} must come without a learning rate and its sign, since both follow for all "
            "parameters; this one turns a gradient of 1 into an update of "
            f"{update:.3g}. Use optax.scale_by_adam() in place of optax.adam or adamw."
        )


def check_not_frozen(name: str, tx: optax.GradientTransformation, weight_decay: Any) -> None:
    """Raises for a direction that gives no updates at all, under a decay that still moves weights.

    Raises:
      ValueError: A gradient of 1 gives 0, at the first step and at later ones, where a schedule
        would be above 0.
    """
    may_decay = isinstance(weight_decay, Tracer) or callable(weight_decay) or weight_decay != 0
    if may_decay and not any(_update_of_one(tx, step) for step in (*range(16), 10**3, 10**5)):
        raise ValueError(
            f"{name} gives no updates, and weight_decay={weight_decay} would still move these "
            "parameters. To freeze them, name them in the recipe's frozen=, or keep them from the "
            "recipe: optax.partition({'train': mc.muon(...), 'freeze': optax.set_to_zero()}, "
            "labels) around it. Or give weight_decay=0, or a weight_decay_mask."
        )


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, int | float | np.generic | np.ndarray | jax.Array)
    return is_one and np.ndim(value) == 0 and jnp.issubdtype(np.asarray(value).dtype, jnp.number)


def _update_of_one(tx: optax.GradientTransformation, step: int) -> float:
    """What a gradient of 1 becomes, with all counts of the state at `step`; NaN if unknown."""
    probe = {"probe": jnp.ones(())}

    def at_step(count: Any) -> Any:
        is_count = jnp.issubdtype(jnp.result_type(count), jnp.integer)
        return jnp.full_like(count, step) if is_count else count

    with ensure_compile_time_eval():
        try:
            updates, _ = tx.update(probe, tree.map(at_step, tx.init(probe)), probe)
            return float(tree.leaves(updates)[0])
        except Exception:  # one that knows its parameters by name or needs extra arguments
            return np.nan
