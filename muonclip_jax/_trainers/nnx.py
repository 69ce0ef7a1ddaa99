"""NNX trainers that own their step: the model records its max logits, the optimizer reads them."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import einops
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.core.scope import in_filter, union_filters
from flax.nnx.bridge import ToNNX

from muonclip_jax._attention.flax import attention_fn
from muonclip_jax._core import paths
from muonclip_jax._core.recording import UNSEEN, MaxLogits, record
from muonclip_jax._core.sowing import COLLECTION, MAX_LOGITS, RECORDED, read_signal, sown
from muonclip_jax._layouts.blocks import Layouts, find_blocks, module_path
from muonclip_jax.layouts import find_layout

# Where an `nnx.bridge.ToNNX` keeps its attention's variables: it gives Linen nothing called so.
IN_LINEN = "to_nnx__recorded"

Model = TypeVar("Model", bound=nnx.Module)
Optimizer = TypeVar("Optimizer", bound=nnx.Optimizer)


def record_max_logits(
    model: Model, layout: Layouts | None = None, *, softmax: str | None = None
) -> Model:
    """Makes a model keep its max logits as a variable, for `use_recorded_max_logits`.

    Each attention module gets a variable `mc.MaxLogits`, in which `sow_max_logits` and
    `attention_fn` take the maximum of what they are given until the next update. Flax's own
    attention modules need no more than this call: they get `attention_fn=mc.attention_fn`, unless
    they have another than Flax's, and call it with `sow_weights=True`. Of attention that sows
    nothing, Tunix's say, `softmax=` takes the maxima of what it gives to `jax.nn.softmax`. In a
    Linen module (`nnx.bridge.ToNNX`, initialised) attention sows as in Linen: `mc.sow_max_logits`,
    or `attention_fn=mc.attention_fn` called with `sow_weights=True`.

    Only passes that are differentiated are recorded, so evaluation between two steps changes
    nothing. Everything that carries batch statistics carries the variable: `nnx.jit`, `nnx.scan`
    and `nnx.vmap` (which split it over axis 0 with the layers), `nnx.remat`, `nnx.split` and
    `nnx.merge`. What is written in a pure function (`jax.jit` of a merged model) is lost unless the
    function returns it.

    Call it on every model that is built, before a checkpoint is restored into it.

    Args:
      model: Changed in place.
      layout: The model's attention, as for `qk_clip`; None is `find_layout`'s.
      softmax: How these modules lay out the logits that they give to `jax.nn.softmax`, and the
        heads in them, as an einops reduction: `"b heads t s -> heads"`, or for grouped queries
        `"b k g t s -> (k g)"`. While such a module is called, `jax.nn.softmax` is another function,
        for all threads. Logits that were soft-capped before are seen as they are then.

    Returns:
      The model.

    Raises:
      TypeError: No NNX module, or a `softmax` that is no reduction.
      ValueError: What `find_layout` and `find_blocks` raise; attention that is not in a module of
        its own; `softmax=` for a Linen module; in the forward pass, maxima of another shape than
        `[stack..., heads]`.

    Example:
        >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        >>> tx = mc.muonclip(1e-3, layout=mc.find_layout(nnx.state(model, nnx.Param)))
        >>> optimizer = nnx.Optimizer(mc.record_max_logits(model), tx, wrt=nnx.Param)
        >>> optimizer = mc.use_recorded_max_logits(optimizer)
        >>> grads = nnx.grad(lambda model, x: model(x).sum())(model, jnp.ones((5, 8)))
        >>> _ = optimizer.update(model, grads)
        >>> mc.qk_clip_state(optimizer.opt_state).max_logits["<root>"].shape
        (2,)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"record_max_logits needs an nnx.Module, found {type(model).__name__}. In Linen the "
            "maxima are the intermediates of model.apply: give them to "
            "mc.TrainState.apply_gradients(grads=..., max_logits=...)."
        )
    if softmax is not None and not (isinstance(softmax, str) and "->" in softmax):
        raise TypeError(
            "record_max_logits: softmax must be text, an einops reduction of the logits to their "
            f'heads such as "b heads t s -> heads", got {softmax!r}.'
        )
    params = nnx.state(model, nnx.Param)
    modules = {paths.parse(path): module for path, module in nnx.iter_modules(model)}
    of_linen = {path: module for path, module in modules.items() if isinstance(module, ToNNX)}
    for block in find_blocks(layout or find_layout(params), params):
        path = module_path(block.path)
        module = modules.get(path)
        above = (path[:n] for n in range(len(path) + 1))
        around = next((p for p in above if p in of_linen), None)
        if around is not None:
            if softmax is not None:
                raise ValueError(_unwatched(block.name, around))
            module = _place_in_linen(of_linen[around], path[len(around) :])
        if module is None:
            raise ValueError(
                f"{block.name} is not a module of its own in {type(model).__name__}, so nothing "
                "can be recorded there. Collect the maxima with nnx.capture, and give them to "
                "optimizer.update(model, grads, max_logits=...)."
            )
        setattr(module, RECORDED, MaxLogits(jnp.full(block.shape, UNSEEN, jnp.float32)))
        if softmax is not None:
            _become(module, _watched_attention(type(module), softmax))
        elif isinstance(module, nnx.MultiHeadAttention):
            _become(module, _sowing_attention(type(module)))
            if module.attention_fn is nnx.dot_product_attention:
                module.attention_fn = attention_fn
    return model


def use_recorded_max_logits(optimizer: Optimizer) -> Optimizer:
    """Makes an `nnx.Optimizer` hand the max logits that a model recorded to its transformation.

    `optimizer.update(model, grads)` reads the model's `mc.MaxLogits`, gives them as `max_logits=`,
    and resets them, so that a step without a forward pass clips nothing by old ones: it sees +inf,
    which the clip's state shows as `nonfinite_heads`. Maxima of several forward passes before one
    update, micro-batches of which the trainer adds up the gradients, are taken together. So are
    those of the micro-batches of `optax.MultiSteps`, when it is the whole transformation. A
    `max_logits=` that is given goes first.

    Args:
      optimizer: Changed in place, before it is jitted: its class becomes a subclass. State and
        checkpoints stay as they are.

    Returns:
      The optimizer.

    Raises:
      TypeError: No `nnx.Optimizer`, or the deprecated `nnx.ModelAndOptimizer`; at update, an
        optimizer that takes no `max_logits=`.
      ValueError: At update, a model that records nothing.

    Example:
        >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        >>> tx = mc.muonclip(1e-3, layout=mc.find_layout(nnx.state(model, nnx.Param)))
        >>> optimizer = nnx.Optimizer(mc.record_max_logits(model), tx, wrt=nnx.Param)
        >>> mc.use_recorded_max_logits(optimizer) is optimizer
        True
    """
    if not isinstance(optimizer, nnx.Optimizer) or isinstance(optimizer, nnx.ModelAndOptimizer):
        raise TypeError(
            "use_recorded_max_logits needs an nnx.Optimizer(model, tx, wrt=nnx.Param), found "
            f"{type(optimizer).__name__}."
        )
    _become(optimizer, _reading_optimizer(type(optimizer)))
    return optimizer


def _place_in_linen(wrapper: ToNNX, path: paths.Path) -> nnx.Module:
    """Where the variable goes of the attention at this path of a Linen module. The wrapper gets
    what records there."""
    if IN_LINEN not in vars(wrapper):
        nnx.pop(wrapper, nnx.Intermediate)  # what the pass that initialised it sowed
        setattr(wrapper, IN_LINEN, _Places())
        _become(wrapper, _recording_linen(type(wrapper)))
    place = getattr(wrapper, IN_LINEN)
    for name in path:
        if name not in vars(place):
            setattr(place, name, _Places())
        place = getattr(place, name)
    return place


class _Places(nnx.Module):
    """A module of Linen that holds attention, or is it: where its variable is kept."""


@functools.cache
def _recording_linen(kind: Any) -> type:
    class RecordingLinen(kind):
        """A Linen module inside NNX, of which what it sows is recorded."""

        def __call__(self, *inputs, mutable=None, **options):
            mutable = False if mutable is None else mutable
            collecting = union_filters(mutable, COLLECTION)
            out = super().__call__(*inputs, mutable=collecting, **options)
            asked = in_filter(mutable, COLLECTION)
            given = (nnx.state if asked else nnx.pop)(self, nnx.Intermediate)
            if any(path[-1] == MAX_LOGITS for path, _ in sown(given)):
                for path, maxima in read_signal(given, MAX_LOGITS).items():
                    if place := _nearest_place(getattr(self, IN_LINEN), path):
                        record(place, maxima, owner=self)
            return out

    return RecordingLinen


def _nearest_place(place: nnx.Module, path: paths.Path) -> nnx.Module | None:
    """That of the innermost attention at a path of sown maxima or above it, if there is one."""
    inside = vars(place).get(path[0]) if path else None
    found = None if inside is None else _nearest_place(inside, path[1:])
    return place if found is None and RECORDED in vars(place) else found


def _unwatched(name: str, around: paths.Path) -> str:
    return (
        f"record_max_logits: softmax= watches modules of NNX, and {name} is in a Linen module "
        f"({paths.show(around)} is an nnx.bridge.ToNNX). Leave softmax out and let it sow, as in "
        "Linen: mc.sow_max_logits(self, maxima), or attention_fn=mc.attention_fn, called with "
        "sow_weights=True."
    )


def _become(thing: Any, kind: type) -> None:
    object.__setattr__(thing, "__class__", kind)


@functools.cache
def _sowing_attention(kind: Any) -> type:
    class SowingAttention(kind):
        """Flax's attention, which gives itself to its `attention_fn` at every call."""

        def __call__(self, *inputs, **options):
            return super().__call__(*inputs, **options | {"sow_weights": True})

    return kind if kind.__name__ == "SowingAttention" else SowingAttention


@functools.cache
def _watched_attention(kind: Any, axes: str) -> type:
    """Its methods are watched one by one: under `nnx.remat` an inner one has another `self`, and
    only that may be written."""
    if kind.__name__ == "WatchedAttention":
        kind = kind.__base__

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self, *args, **kwargs):
            with _softmax_recorded_in(self, axes):
                return method(self, *args, **kwargs)

        return call

    methods = {
        name: watched(method)
        for base in reversed(kind.__mro__)
        if issubclass(base, nnx.Module) and base is not nnx.Module
        for name, method in vars(base).items()
        if inspect.isfunction(method) and (name == "__call__" or not name.startswith("__"))
    }
    return type(kind)("WatchedAttention", (kind,), methods)


@contextmanager
def _softmax_recorded_in(module: nnx.Module, axes: str) -> Iterator[None]:
    name, mark, now = "softmax", "unwatched", jax.nn.softmax
    # Inside of another watched method this one's module alone is told.
    original = getattr(now, mark, now)

    def softmax(x, *args, **kwargs):
        record(module, einops.reduce(x, axes, "max"))
        return original(x, *args, **kwargs)

    setattr(softmax, mark, original)
    setattr(jax.nn, name, softmax)
    try:
        yield
    finally:
        setattr(jax.nn, name, now)


@functools.cache
def _reading_optimizer(kind: Any) -> type:
    class ReadingOptimizer(kind):
        """An optimizer of NNX that gives its transformation what the model recorded."""

        def update(self, model, grads, /, **extra_args):
            recorded = _recorded(model)
            maxima = {path: variable.get_value() for path, variable in recorded.items()}
            updates = super().update(model, grads, **{MAX_LOGITS: maxima} | extra_args)
            waits = _waits(self.opt_state)
            for path, variable in recorded.items():
                unseen = jnp.full_like(maxima[path], UNSEEN)
                variable.set_value(jnp.where(waits, maxima[path], unseen))
            return updates

    return kind if kind.__name__ == "ReadingOptimizer" else ReadingOptimizer


def _recorded(model: nnx.Module) -> dict[paths.Path, MaxLogits]:
    """The variables, by the path of their module."""
    modules = {paths.parse(path): vars(module) for path, module in nnx.iter_modules(model)}
    recorded = {
        tuple(name for name in path if name != IN_LINEN): held[RECORDED]
        for path, held in modules.items()
        if RECORDED in held
    }
    if not recorded:
        raise ValueError(
            f"{type(model).__name__} records no max logits: call mc.record_max_logits(model) "
            "before the first step, and before a checkpoint is restored."
        )
    return recorded


def _waits(opt_state: Any) -> jax.Array | bool:
    """Whether `optax.MultiSteps` has only added up a gradient, and the step is still to come."""
    state = nnx.as_pure(opt_state)
    return state.mini_step != 0 if isinstance(state, optax.MultiStepsState) else False
