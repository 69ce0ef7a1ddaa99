"""Values out of a Flax model's forward pass: sown in a module, read by its path."""

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import linen

from muonclip_jax._core import paths

if TYPE_CHECKING:  # NNX takes as long to import as this package: only who uses it waits for it
    from flax import nnx

COLLECTION = "intermediates"
"""Linen's collection; NNX's variable type is `nnx.Intermediate`."""

WAS_IT_COLLECTED = (
    "Was it collected? Linen: model.apply(..., mutable=['intermediates']), and scanned layers "
    "need nn.scan(..., variable_axes={'intermediates': 0}). "
    "NNX: nnx.capture(lambda model: ..., nnx.Intermediate)(model). "
    "Was it returned? jit, grad (has_aux=True) and vmap drop what their function does not "
    "return."
)


def sow(module: "linen.Module | nnx.Module", name: str, value: jax.Array, **reduction: Any) -> bool:
    """Flax's `sow`, which stores nothing, and says so, where nothing collects.

    Args:
      module: The module in whose method this is called.
      name: The value's name.
      value: The value.
      reduction: Flax's `init_fn` and `reduce_fn`; without them several calls make a tuple.

    Returns:
      Whether it was stored.

    Raises:
      TypeError: `module` is not a Flax module.
    """
    if isinstance(module, linen.Module):
        return module.sow(COLLECTION, name, value, **reduction)
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise TypeError(
            "module must be a flax.linen.Module or flax.nnx.Module, found "
            f"{type(module).__name__}: pass the attention block, `self` in its own method."
        )
    # Flax releases with this option can be told that `sow` outside of `nnx.capture` does nothing;
    # in those before it, `nnx.capture` marks the modules that collect with an attribute.
    if "capture_noop" in inspect.signature(nnx.Module.sow).parameters:
        reduction["capture_noop"] = True
    elif not hasattr(module, "__captures__"):
        return False
    return module.sow(nnx.Intermediate, name, value, **reduction)


def sown(intermediates: Any) -> Iterator[tuple[paths.Path, Any]]:
    """Everything sown, with its path, of which the last part is its name.

    Args:
      intermediates: What the forward pass gave: Linen's `intermediates` collection or the
        variables that hold it, an NNX State, a nested dict of the same module paths, or None.

    Raises:
      TypeError: Not a mapping.
    """
    if intermediates is None:
        return iter(())
    if not isinstance(intermediates, Mapping):
        raise TypeError(
            "intermediates must be a mapping (Linen's `intermediates` collection, the State from "
            f"nnx.capture, a dict), found {type(intermediates).__name__}. Flax returns them "
            "second: `output, intermediates = ...`."
        )
    return paths.leaves(
        intermediates.get(COLLECTION, intermediates),
        is_leaf=lambda node: not isinstance(node, Mapping | list),
    )


def names(found: list[paths.Path], shown: int = 8) -> str:
    """What was sown instead, for messages."""
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return (", ".join(map(paths.show, found[:shown])) or "nothing") + more
