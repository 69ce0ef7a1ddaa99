"""Finding one transformation's state inside an optimizer's."""

from typing import Any, TypeVar

import jax

from muonclip_jax._core import paths

State = TypeVar("State")


def find_state(opt_state: Any, kind: type[State], transformation: str) -> State:
    """The only state of this kind in any tree, with plain arrays for NNX's variables.

    Raises:
      ValueError: There is none, or more than one.
    """
    is_kind = lambda node: isinstance(node, kind)  # noqa: E731
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_kind) if is_kind(node)]
    if len(found) != 1:
        raise ValueError(
            f"Expected one {kind.__name__} in this optimizer state, found {len(found)}. Is "
            f"{transformation} in the chain (once, with a list of layouts for several kinds of "
            "attention)?"
        )
    return jax.tree.map(
        lambda x: x.get_value() if paths.is_variable(x) else x, found[0], is_leaf=paths.is_variable
    )
