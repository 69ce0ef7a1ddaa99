"""Optimizer states of earlier versions, restored."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._core import paths
from muonclip_jax._core.paths import Path
from muonclip_jax._transforms.accumulate import AccumulateState
from muonclip_jax._transforms.clip import ClipState
from muonclip_jax._transforms.momentum import CorrectedTraceState
from muonclip_jax._transforms.qk_clip import QKClipState
from muonclip_jax._transforms.quantized import QuantizedTrace, floats_like, quantized


def upgrade_state(old: Any, like: optax.OptState) -> optax.OptState:
    """The state of an optimizer that an earlier version saved, in today's form.

    | earlier | today |
    | --- | --- |
    | `MuonState(count, momentum)` | `(TraceState(trace), EmptyState())`; with `bias_correction` the first is `CorrectedTraceState(trace, step)` |
    | `QuackState(initial_norms, factors, vectors)` | `QuackState(initial_norms, factors)` |
    | `AccumulateState(..., max_logits={block: x}, ...)` | `AccumulateState(..., maxima={"max_logits": {block: x}}, ...)` |
    | `QKClipState`, `ClipState` without `ineffective_clips` | with them, counted from 0 |
    | momentum in floats, where `like` has it in 8 bits (`mu_dtype="int8"`) | rounded to 8 bits |
    | `ClipState(maxima={block: x}, ...)` | `ClipState(maxima={signal: {block: x}}, ...)` |

    Everything else is as it was, and a state of today comes back unchanged.

    Args:
      old: What Orbax, or `flax.serialization.msgpack_restore`, restores without a target: dicts and
        lists of arrays, also tuples.
      like: `tx.init(params)`, or its `jax.eval_shape`, of the same optimizer as it is built today.

    Returns:
      A state with the structure and dtypes of `like`, and its shardings where it has arrays.

    Raises:
      ValueError: Something is missing in `old`, or has another shape; with its path.

    Example:
        >>> optimizer = mc.scale_by_muon()
        >>> kernels = {"up": jnp.ones((4, 8))}
        >>> old = {"count": jnp.array(3), "momentum": {"up": jnp.full((4, 8), 2.0)}}
        >>> trace, _ = mc.upgrade_state(old, like=optimizer.init(kernels))
        >>> float(trace.trace["up"][0, 0])
        2.0
    """  # noqa: E501
    return _upgrade(old, like, ())


def _upgrade(old: Any, like: Any, path: Path) -> Any:
    children, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=lambda x: x is not like)
    if treedef == jax.tree.structure(0):
        return as_like(old, like, path)
    first = like[0] if isinstance(like, tuple) and like else None
    if isinstance(first, optax.TraceState | CorrectedTraceState) and _is_muon_state(old):
        trace = _upgrade(_child(old, "momentum", 1, path), first.trace, (*path, "momentum"))
        if isinstance(first, CorrectedTraceState):
            step = as_like(_child(old, "count", 0, path), first.step, (*path, "count"))
            return CorrectedTraceState(trace, step), *like[1:]
        return optax.TraceState(trace), *like[1:]
    if isinstance(like, QuantizedTrace) and not _in_bits(old):
        return all_as_like(quantized(_upgrade(old, floats_like(like), path)), like)
    if isinstance(like, AccumulateState) and like.maxima:
        old = _with_maxima(old)
    if isinstance(like, QKClipState | ClipState):
        old = _with_ineffective_clips(old, like)
    if isinstance(like, ClipState):
        old = _by_signal(old, like)
    new = []
    for index, (key_path, child) in enumerate(children):
        name = str(paths.name(key_path[-1]))
        inside = (*path, name)
        empty = not jax.tree.leaves(child)
        new.append(child if empty else _upgrade(_child(old, name, index, inside), child, inside))
    return jax.tree.unflatten(treedef, new)


def _is_muon_state(old: Any) -> bool:
    if isinstance(old, Mapping):
        return "momentum" in old
    return len(old) == 2 and jnp.ndim(jax.tree.leaves(old[0])[0]) == 0


def _in_bits(old: Any) -> bool:
    """Whether it has momentum in 8 bits; there may be no matrices at all."""
    found = jax.tree.leaves(old)
    return not found or any(paths.dtype_of(x) == jnp.int8 for x in found)


def _with_maxima(old: Any) -> Any:
    """`AccumulateState` of the signals' names, where it had max logits only."""
    if isinstance(old, Mapping):
        return old if "maxima" in old else {**old, "maxima": {"max_logits": old["max_logits"]}}
    told = "max_logits" in old[3]
    return old if told else (*old[:3], {"max_logits": old[3]}, *old[4:])


def _with_ineffective_clips(old: Any, like: QKClipState | ClipState) -> Any:
    """The state of a clip, which did not count clips without effect."""
    name = "ineffective_clips"
    before = like._fields.index(name)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like.ineffective_clips)
    if isinstance(old, Mapping):
        told = {str(key) for key in old} & {name, str(before)}
        return old if told else {**old, name: none}
    return old if len(old) > before else (*old, none)


def _by_signal(old: Any, like: ClipState) -> Any:
    """The state of a clip, which named its blocks and not its signal."""

    def named(field: str, x: Any) -> Any:
        wanted = getattr(like, field)
        told = not isinstance(wanted, Mapping) or set(x) == set(wanted)
        return x if told else dict.fromkeys(wanted, x)

    if not isinstance(old, Mapping):
        return tuple(map(named, like._fields, old))
    fields = {str(i): field for i, field in enumerate(like._fields)}
    return {key: named(fields.get(str(key), str(key)), x) for key, x in old.items()}


def _child(old: Any, name: str, index: int, path: Path) -> Any:
    if not isinstance(old, Mapping):
        return old[index]
    for key in old:
        if str(key) in (name, str(index)):
            return old[key]
    raise ValueError(
        f"The old state has nothing at {paths.show(path)}; it has {', '.join(map(str, old))}. Is "
        "`like` the state of the same optimizer, with the same options?"
    )


def as_like(old: Any, like: Any, path: Path) -> jax.Array:
    """An old array in the dtype and, where it has one, the sharding of a new one.

    Raises:
      ValueError: They have different shapes.
    """
    if jnp.shape(old) != like.shape:
        raise ValueError(
            f"The old state has the shape {jnp.shape(old)} at {paths.show(path)}, and `like` "
            f"{like.shape}. Give the state of the same parameters."
        )
    new = jnp.asarray(old, like.dtype)
    return jax.device_put(new, like.sharding) if isinstance(like, jax.Array) else new


def all_as_like(old: Any, like: Any) -> Any:
    """The same for trees of one structure."""
    return paths.map_with_path(lambda path, new, x: as_like(x, new, path), like, old)
