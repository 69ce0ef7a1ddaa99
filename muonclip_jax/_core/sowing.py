"""Values out of a Flax model's forward pass: sown in a module, read by its path."""

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from flax import linen

from muonclip_jax._core import paths

if TYPE_CHECKING:  # NNX takes as long to import as this package: only who uses it waits for it
    from flax import nnx

COLLECTION = "intermediates"
"""Linen's collection; NNX's variable type is `nnx.Intermediate`."""

MAX_LOGITS = "max_logits"
"""The name under which an attention block sows its max logits."""

MAX_OUTPUT = "max_output"
"""The name under which a block sows the largest entry that it, or each of its heads, writes."""

RECORDED = "recorded_max_logits"
"""The attribute of an NNX module that keeps them until the next update; see `record_max_logits`."""

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
    from flax.nnx import bridge

    if not isinstance(module, nnx.Module):
        raise TypeError(
            "module must be a flax.linen.Module or flax.nnx.Module, found "
            f"{type(module).__name__}: pass the attention block, `self` in its own method."
        )
    captures = hasattr(module, "__captures__")
    around = None if captures else bridge.wrappers.current_linen_module()
    if isinstance(around, bridge.ToLinen):
        # The module lives for this call; what it holds afterwards becomes Linen's variables.
        init_fn, reduce_fn = reduction.get("init_fn", tuple), reduction.get("reduce_fn", _append)
        held = getattr(module, name, None)  # of an earlier call, also as Linen's plain value
        held = held.get_value() if isinstance(held, nnx.Variable) else held
        before = init_fn() if held is None else held
        setattr(module, name, nnx.data(nnx.Intermediate(reduce_fn(before, value))))
        return around.is_mutable_collection(COLLECTION)
    # Flax releases with this option can be told that `sow` outside of `nnx.capture` does nothing;
    # in those before it, `nnx.capture` marks the modules that collect with an attribute.
    if "capture_noop" in inspect.signature(nnx.Module.sow).parameters:
        reduction["capture_noop"] = True
    elif not captures:
        return False
    return module.sow(nnx.Intermediate, name, value, **reduction)


def _append(calls: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    return (*calls, value)


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


def nothing_given(owner: str, signal: str, blocks: list[str]) -> str:
    """The message of a clip whose update got no signal: where it comes from, with Flax and
    without, and what hands it over where a trainer owns the step."""
    in_trainers = (
        " In a trainer that owns its step: mc.record_max_logits(model) in NNX, "
        "mc.TrainState.apply_gradients(grads=grads, max_logits=intermediates) in Linen; mc.quack "
        "needs none."
    )
    return (
        f"{owner} got no {signal}. Pass what the forward pass sowed: "
        f"tx.update(grads, state, params, {signal}=intermediates), where intermediates comes from "
        'model.apply(..., mutable=["intermediates"]) in Linen or '
        "nnx.capture(lambda model: ..., nnx.Intermediate)(model) in NNX. Without Flax a plain dict "
        f"will do, an array [heads] for each block: {{{', '.join(map(repr, blocks[:1]))}: "
        f"{{{signal!r}: ...}}}}.{in_trainers if signal == MAX_LOGITS else ''}"
    )


def sow_signal(module: "linen.Module | nnx.Module", name: str, value: jax.Array) -> bool:
    """Sows one number per head, or one for all heads, under a name, for `read_signal`.

    A module called twice keeps the maximum. Linen's collection is `intermediates`, NNX's variable
    type `nnx.Intermediate`.

    Args:
      module: The attention module, `self` in its own method.
      name: The signal's name, such as `"max_output"`.
      value: `[..., heads]`, or `[..., 1]` for what all heads share; floating point. Stored as
        float32, without gradient; leading axes are kept.

    Returns:
      Whether the value was stored. It is not where nothing collects: in Linen when
      `intermediates` is not mutable, in NNX outside of `nnx.capture`.

    Raises:
      TypeError: `module` is not a Flax module, or the value is not floating point.
      ValueError: The value has no head axis.

    Example:
        >>> class Loud(nn.Module):
        ...     def __call__(self, x):
        ...         mc.sow_signal(self, "max_output", jnp.abs(x).max((0, 1)))
        >>> _, out = Loud().apply({}, jnp.ones((2, 5, 4)), mutable=["intermediates"])
        >>> mc.read_signal(out, "max_output")[()].shape
        (4,)
    """
    _check_per_head(value, name)
    value = jnp.asarray(value, jnp.float32)
    stopped = jax.lax.stop_gradient(value)
    stored = sow(module, name, stopped, init_fn=lambda: -jnp.inf, reduce_fn=jnp.maximum)
    if name != MAX_LOGITS or RECORDED not in vars(module):
        return stored
    from muonclip_jax._core.recording import record

    record(cast("nnx.Module", module), value)
    return True


def read_signal(intermediates: Mapping[Any, Any], name: str) -> dict[paths.Path, jax.Array]:
    """The numbers per head that a forward pass sowed under a name, by the path of the module.

    Args:
      intermediates: What the forward pass gave: Linen's `intermediates` collection or the
        variables that hold it, the NNX State from `nnx.capture` or `nnx.pop`, or a plain
        nested dict of the same module paths. Values sown under other names are ignored.
        The result of this function is taken as well.
      name: The signal's name.

    Returns:
      `{path: value}`, such as `{("layers", "0", "attn"): [heads]}`. Scanned layers keep
      their leading axis: `[layers, heads]`. Where plain `sow` made a tuple of several calls,
      their maximum.

    Raises:
      ValueError: Nothing of this name, or a value without a head axis, or calls that differ in
        shape.
      TypeError: Not a mapping, or values that are not floating point.

    Example:
        >>> mc.read_signal({"attn": {"max_output": jnp.ones(2)}}, "max_output")
        {('attn',): Array([1., 1.], dtype=float32)}
    """
    if isinstance(intermediates, Mapping) and intermediates:
        keys = list(intermediates)
        # By module already; a flat dict of all that was sown has the name in its keys.
        if all(isinstance(key, tuple) and key[-1:] != (name,) for key in keys):
            by_path = {paths.parse(key): value for key, value in intermediates.items()}
            return {path: _maximum(path, value, name) for path, value in by_path.items()}
    found = list(sown(intermediates))
    values = {path[:-1]: _maximum(path, x, name) for path, x in found if path[-1:] == (name,)}
    if not values:
        how = (
            "Call sow_max_logits(self, max_logits) in each, or give Flax's attention modules "
            "attention_fn=mc.attention_fn and call them with sow_weights=True. "
            if name == MAX_LOGITS
            else f"Call sow_signal(self, {name!r}, value) in each. "
        )
        raise ValueError(
            f"No value named {name!r} in the intermediates; found "
            f"{paths.some((path for path, _ in found), none='nothing')}. Did the blocks sow? "
            f"{how}{WAS_IT_COLLECTED}"
        )
    return values


def _maximum(path: paths.Path, value: Any, name: str) -> jax.Array:
    """One array of what a Variable, a box, or the tuple of several calls holds."""
    what = f"The {name.replace('_', ' ')} sown at {paths.show(path)}"
    calls = jax.tree.leaves(value)
    for call in calls:
        _check_per_head(call, what)
    shapes = [jnp.shape(call) for call in calls]
    if len(set(shapes)) != 1:
        raise ValueError(
            f"{what} must be one array, or one of the same shape for every call of the block, "
            f"found {shapes}."
        )
    return functools.reduce(jnp.maximum, map(jnp.asarray, calls))


def _check_per_head(value: Any, what: str) -> None:
    dtype = getattr(value, "dtype", type(value))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{what} must be floating point, found {jnp.dtype(dtype)}.")
    if jnp.ndim(value) == 0:
        raise ValueError(
            f"{what} must be [..., heads], found a scalar: "
            "reduce over batch, queries and keys, not over heads. (One number for all heads of a "
            "signal other than max logits: [1].)"
        )
