"""Finding one transformation's state inside an optimizer's."""

from typing import Any, TypeVar

import jax
import optax

State = TypeVar("State")


def find_state(opt_state: Any, kind: type[State], transformation: str) -> State:
    """The only state of this kind in any tree, with plain arrays for NNX's variables.

    Raises:
      ValueError: There is none, or more than one.
    """
    found = [state for _, state in optax.tree.get_all_with_path(opt_state, kind.__name__)]
    if len(found) != 1:
        raise ValueError(
            f"Expected one {kind.__name__} in this optimizer state, found {len(found)}. Is "
            f"{transformation} in the chain (once, with a list of layouts for several kinds of "
            "attention)?"
        )
    from flax import nnx  # slow to import, so not before it is needed

    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree.map(
        lambda x: x.get_value() if is_variable(x) else x, found[0], is_leaf=is_variable
    )
