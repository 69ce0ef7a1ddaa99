"""One transformation's state: inside an optimizer's, and for `optax.tree_map_params`."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from muonclip_jax._core import paths

State = TypeVar("State")


def states_of(opt_state: Any, *kinds: type[State]) -> list[State]:
    """All states of these kinds in any tree, with plain arrays for NNX's variables."""
    is_kind = lambda node: isinstance(node, kinds)  # noqa: E731
    found = filter(is_kind, jax.tree.leaves(opt_state, is_leaf=is_kind))
    value = lambda x: x.get_value() if paths.is_variable(x) else x  # noqa: E731
    return [jax.tree.map(value, state, is_leaf=paths.is_variable) for state in found]


def find_state(opt_state: Any, kind: type[State], transformation: str) -> State:
    """The only state of this kind in any tree, with plain arrays for NNX's variables.

    Raises:
      ValueError: There is none, or more than one.
    """
    found = states_of(opt_state, kind)
    if len(found) != 1:
        raise ValueError(
            f"Expected one {kind.__name__} in this optimizer state, found {len(found)}. Is "
            f"{transformation} in the chain (once, with a list of layouts for several kinds of "
            "attention)?"
        )
    return found[0]


def without_parameters(kind: Any) -> Any:
    """The state of this kind, a NamedTuple, that says to `optax.tree_map_params` that no field of
    it is a copy of the parameters: one number for each, whatever is in it."""
    return kind(*(jnp.zeros([]) for _ in kind._fields))


def check_same(what: str, state: Any, now: Any, cause: str) -> None:
    """Raises for a state that another optimizer, or another model, left.

    Args:
      what: What the state keeps, for messages.
      state: Arrays.
      now: What they should be like: the same paths and shapes.
      cause: What may have changed.

    Raises:
      ValueError: A path or a shape differs.
    """
    kept, wanted = paths.shapes(state), paths.shapes(now)
    for path in (*kept, *wanted):
        old, new = kept.get(path), wanted.get(path)
        if old != new:
            has = f"no {what}" if old is None else f"{what} of shape {old}"
            raise ValueError(
                f"{paths.show(path)} has {has} in this state, and should have "
                f"{'none' if new is None else new}: {cause} changed since the state was made. "
                "Build the optimizer as it was then, or start anew, tx.init(params)."
            )
