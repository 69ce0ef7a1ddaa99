"""Gradient accumulation: several micro-batches, one step of the optimizer."""

import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from muonclip_jax._core import paths
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.meshes import in_auto_axes
from muonclip_jax._core.options import as_dtype, check_transformation
from muonclip_jax._core.paths import Path
from muonclip_jax._core.sowing import read_signal
from muonclip_jax._core.states import find_state
from muonclip_jax._layouts.sown import Observed, fit, names, observations

Maxima = dict[str, dict[str, jax.Array]]  # signal → block → [stack..., heads]


class AccumulateState(NamedTuple):
    """State of `accumulate`; read it by name with `accumulate_state(opt_state)`.

    Attributes:
      micro_step: int32, the micro-batches that have come since the last real step.
      step: int32, the real steps so far.
      mean: Like the parameters, in the accumulator's dtype: the mean gradient of these
        micro-batches; after a real step, of those that it was made of.
      maxima: For each signal that a clip inside reads (`max_logits`), and each attention block,
        the largest value in the same micro-batches, float32 `[stack..., heads]`; -inf before the
        first.
      inner_state: The state of the optimizer inside.

    Example:
        >>> state = mc.accumulate(optax.sgd(0.1), every=4).init(params)
        >>> int(state.micro_step), int(state.step), bool(state.has_updated)
        (0, 0, False)
    """

    micro_step: jax.Array
    step: jax.Array
    mean: Any
    maxima: Maxima
    inner_state: Any

    @property
    def has_updated(self) -> jax.Array:
        """bool, whether the last micro-batch completed a real step."""
        return (self.micro_step == 0) & (self.step > 0)


def accumulate(
    tx: optax.GradientTransformation,
    every: int | Callable[[jax.Array], jax.typing.ArrayLike],
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes one step of `tx` of `every` micro-batches, as of one batch of all their examples.

        tx = accumulate(muonclip(3e-4, layout=layout), every=8)

    Call `tx.update` once for each micro-batch. It takes in the gradient, as a running mean, and
    `max_logits=` or what other signal a clip inside reads, as a running maximum of each head. The
    updates that it returns are zeros until the last of them, which is the real step: `tx` gets the
    mean and the maxima, and its updates are returned. On the other micro-batches `tx` is not
    executed (`jax.lax.cond`), so Muon orthogonalizes, schedules count and QK-Clip clips once for
    each real step.

    `optax.MultiSteps` executes its optimizer for every micro-batch and discards the result of all
    but the last, and gives it the last micro-batch's `max_logits` only: heads that passed the
    threshold in the others are not clipped.

    It is the outermost transformation: `qk_clip` behind it would clip between real steps.
    `optax.apply_if_finite` outside of it drops a micro-batch that is not finite (the next takes its
    place), and inside of it the whole real step.

    - The mean weighs all micro-batches alike. For the mean over examples, or tokens, let them have
      the same number.
    - `max_logits`, and signals of `clip_by_signal`, are kept by attention block, in any form that
      `read_signal` takes, and must be given with every micro-batch. A NaN in one of them stays
      until the real step, where the clip counts it. Without a clip inside they are an extra
      argument like all others.
    - Other extra arguments (`value=`) reach `tx` from the last micro-batch only.
    - The state of `tx` keeps the dtypes that its `init` gives it and, on meshes with Explicit axes,
      the shardings; updates have those of the parameters, as the accumulator has.
    - Inside `jax.shard_map` and `jax.pmap` reduce the maxima over the devices before
      (`jax.lax.pmax`): what is kept from one micro-batch to the next must be the same everywhere.

    Cost for each micro-batch: one read and one write of the accumulator and, with
    `optax.apply_updates`, of the parameters. Memory: the accumulator, float32 for each parameter
    and sharded as it is. (On meshes with Auto axes, as all Optax states: if `init` runs outside of
    `jax.jit`, or with `out_shardings`.) Call `update` under `jax.jit`: outside, each call compiles
    anew.

    Args:
      tx: Any Optax transformation.
      every: How many micro-batches make a real step, at least 1; or a function from the number
        of real steps so far (int32 `[]`) to it, in which less than 1 counts as 1.
      accumulator_dtype: The dtype in which the mean is stored; None is that of each parameter,
        but at least float32. The mean is computed in float32 or wider and reaches `tx` in the
        gradient's dtype.

    Returns:
      A transformation whose updates, and what it needs of `params` and extra arguments, are those
      of `tx`.

    Raises:
      TypeError: When built, a `tx` that is no transformation, an `every` that is neither an
        integer nor a function, an `accumulator_dtype` that is not floating point.
      ValueError: When built, `every` < 1; at update, a gradient of another shape than its
        parameter, a clip inside that reads other signals, or of other blocks, than it did at
        init, and what `tx` raises, on every micro-batch.

    Example:
        >>> tx = mc.accumulate(mc.muonclip(1e-3, layout=layout), every=2)
        >>> update, state = jax.jit(tx.update), tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = update(grads, state, params, max_logits=sown)
        >>> bool(mc.accumulate_state(state).has_updated)
        True
    """
    _check_options(tx, every, accumulator_dtype)
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> AccumulateState:
        maxima: Any = _nothing_seen(_heard(tx, params))
        if paths.holds_nothing(params):  # `optax.tree_map_params`: its blocks are not known
            maxima = dict.fromkeys(maxima, jnp.zeros([]))
        return AccumulateState(
            micro_step=jnp.zeros([], jnp.int32),
            step=jnp.zeros([], jnp.int32),
            mean=jax.tree.map(functools.partial(_zeros, accumulator_dtype), params),
            maxima=maxima,
            inner_state=tx.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        count = state.micro_step
        mean = paths.map_with_path(functools.partial(_mean, count), state.mean, updates)
        maxima = state.maxima
        if params is not None:
            maxima, extra_args = _maxima(tx, count, maxima, params, extra_args)
        size = every(state.step) if callable(every) else every
        is_real = count + 1 >= size
        updates, inner_state = _step_or_wait(
            tx, is_real, state.inner_state, mean, updates, params, extra_args
        )
        return updates, AccumulateState(
            micro_step=jnp.where(is_real, 0, count + 1),
            step=jnp.where(is_real, optax.safe_increment(state.step), state.step),
            mean=mean,
            maxima=maxima,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def accumulate_state(opt_state: Any) -> AccumulateState:
    """The `AccumulateState` inside any Optax state (or `nnx.Optimizer.opt_state`), to ask whether
    the last update was a real step: `accumulate_state(opt_state).has_updated`.

    Args:
      opt_state: Any tree that holds one.

    Returns:
      It, with plain arrays for NNX's variables.

    Raises:
      ValueError: There is none, or more than one.

    Example:
        >>> tx = optax.chain(optax.clip(1.0), mc.accumulate(optax.sgd(0.1), every=4))
        >>> bool(mc.accumulate_state(tx.init(params)).has_updated)
        False
    """
    return find_state(opt_state, AccumulateState, "accumulate")


def _step_or_wait(tx, is_real, inner_state, mean, updates, params, extra_args):
    """The updates and the state after a real step, or zeros and the state as it is."""
    leaves, tree = jax.tree.flatten(extra_args)
    on_devices = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    others = [None if i in on_devices else x for i, x in enumerate(leaves)]

    # Both branches get all arrays as arguments. JAX would keep those that they close over for
    # as long as what it compiled of them.
    @jax.jit  # so that it is traced once, for its shapes and as a branch
    def step(inner_state, mean, updates, params, on_devices):
        gradient = jax.tree.map(lambda m, g: m.astype(paths.dtype_of(g)), mean, updates)
        extra_args = tree.unflatten(on_devices.get(i, x) for i, x in enumerate(others))
        new, new_state = tx.update(gradient, inner_state, params, **extra_args)
        typed_state = jax.tree.map(_typed_like, new_state, inner_state)
        return jax.tree.map(_sharded_like, new, mean), typed_state

    def wait(inner_state, mean, *_):
        zeros = jax.tree.map(lambda m, u: jnp.zeros_like(m, u.dtype), mean, shapes)
        return zeros, inner_state

    arguments = inner_state, mean, updates, params, on_devices
    shapes, _ = jax.eval_shape(step, *arguments)
    return jax.lax.cond(is_real, step, wait, *arguments)


def _check_options(tx, every, accumulator_dtype):
    check_transformation("accumulate: tx", tx)
    if not callable(every) and (isinstance(every, bool) or not isinstance(every, Integral)):
        raise TypeError(
            "every must be a whole number of micro-batches, or a function from the number of real "
            f"steps to one, got {every!r}."
        )
    if not callable(every) and every < 1:
        raise ValueError(f"every, micro-batches for a real step, must be at least 1, got {every}.")
    dtype = as_dtype(accumulator_dtype)
    if accumulator_dtype is not None and not (dtype and jnp.issubdtype(dtype, jnp.inexact)):
        raise TypeError(f"accumulator_dtype must be floating point, got {accumulator_dtype!r}.")


# The mean of the gradients


def _zeros(dtype: jax.typing.DTypeLike | None, param: jax.Array) -> jax.Array:
    return jnp.zeros_like(
        param, dtype=accumulation_dtype(paths.dtype_of(param)) if dtype is None else dtype
    )


def _mean(count: jax.Array, path: Path, mean: jax.Array, gradient: jax.Array) -> jax.Array:
    """The mean of `count` gradients and one more. Kept as a mean and not as a sum, that of equal
    values is exactly this value, and none overflows for their number."""
    if jnp.shape(gradient) != mean.shape:
        raise ValueError(
            f"accumulate got a gradient of shape {jnp.shape(gradient)} for {paths.show(path)} "
            f"{mean.shape}. Call tx.update once for each micro-batch, with its gradient alone."
        )
    dtype = accumulation_dtype(mean.dtype)
    before, new = jnp.where(count == 0, 0, mean).astype(dtype), jnp.asarray(gradient, dtype)
    return (before + (new - before) / (count + 1).astype(dtype)).astype(mean.dtype)


# The maxima of signals


def _heard(tx: optax.GradientTransformation, params: optax.Params) -> Sequence[Observed]:
    """What the clips inside read: they tell when `init` is called. Nothing is computed, and an
    `init` that is compiled (`jax.jit`) is called as it is, since a cached one tells nothing."""
    with observations() as heard, jax.disable_jit():
        jax.eval_shape(lambda params: tx.init(params), params)  # a new function: JAX caches by it
    return heard


def _nothing_seen(heard: Sequence[Observed]) -> Maxima:
    """-inf for every head of every block that a clip inside observes."""
    maxima: Maxima = {}
    for one in heard:
        of_blocks = maxima.setdefault(one.signal, {})
        of_blocks |= {b: jnp.full(shape, -jnp.inf, jnp.float32) for b, shape in one.shapes.items()}
    return maxima


def _maxima(
    tx: optax.GradientTransformation,
    count: jax.Array,
    before: Maxima,
    params: optax.Params,
    extra_args: Mapping[str, Any],
) -> tuple[Maxima, dict[str, Any]]:
    """The maxima of `count` micro-batches and one more, and the extra arguments with them.

    Only a clip's layout says which modules are in which block, and an attention that it leaves out
    is in none. The clip says so when it is asked to `init` (nothing is computed). It then gets the
    maxima of a block from each of the block's modules, and what is in no block as it was given:

        attn sowed 3, attn/core 5, attn/ignored 9     clip: attn ← [attn, attn/core]
        before: {attn: 4}  →  now: {attn: 5}, and the clip gets attn 5, attn/core 5, attn/ignored 9
    """
    heard = _heard(tx, params)
    _check_same(before, heard)
    modules: dict[str, dict[str, list[Path]]] = {}
    given = {name: extra_args[name] for name in before if extra_args.get(name) is not None}
    seen = {signal: read_signal(value, signal) for signal, value in given.items()}
    if not seen:
        return before, dict(extra_args)
    for one in heard:
        if one.signal in seen:
            found = one.pair(seen[one.signal]).modules
            for block, paired in found.items():
                others = modules.setdefault(one.signal, {}).setdefault(block, paired)
                if others != paired:
                    raise ValueError(
                        f"Two clips inside accumulate take {one.signal} of {block} from different "
                        f"modules, {names(others)} and {names(paired)}: accumulate keeps one "
                        "maximum for each head. Give them the same layouts."
                    )

    def larger(count, before, seen):
        new = {signal: dict(blocks) for signal, blocks in before.items()}
        for signal, blocks in modules.items():
            for block, paired in blocks.items():
                old = jnp.where(count == 0, -jnp.inf, before[signal][block])
                values = (fit(block, old.shape, seen[signal][path], signal) for path in paired)
                # `jnp.maximum` keeps NaNs.
                new[signal][block] = functools.reduce(
                    jnp.maximum, (value.astype(old.dtype) for value in values), old
                )
        return new

    paired = {
        signal: {path: seen[signal][path] for paths_ in blocks.values() for path in paths_}
        for signal, blocks in modules.items()
    }
    new = in_auto_axes(larger, PartitionSpec())(count, before, paired)
    for signal, blocks in modules.items():
        seen[signal] |= {path: new[signal][b] for b, paired in blocks.items() for path in paired}
    return new, {**extra_args, **seen}


def _check_same(maxima: Maxima, heard: Sequence[Observed]) -> None:
    """Raises ValueError when the clips inside are not those of which the state keeps maxima."""
    known = {signal: {b: x.shape for b, x in blocks.items()} for signal, blocks in maxima.items()}
    now: dict[str, dict[str, tuple[int, ...]]] = {}
    for one in heard:
        now.setdefault(one.signal, {}).update(one.shapes)
    if now != known:
        raise ValueError(
            f"accumulate keeps the maxima of {known or 'no signal'}, and its optimizer now reads "
            f"{now or 'no signal'}: the state is of another optimizer or other parameters. "
            "Begin with the state of this optimizer's init."
        )


# Both branches of a condition must have the same types


def _typed_like(x: jax.Array, other: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    x = _sharded_like(x if x.dtype == other.dtype else x.astype(other.dtype), other)
    # Inside `jax.shard_map` `other` may vary over an axis and `x` not. JAX releases name the cast
    # differently; a choice between the two varies in all of them.
    return x if jax.typeof(x) == jax.typeof(other) else jnp.where(True, x, other)


def _sharded_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, which on Explicit meshes has a sharding in its type, with that of `other`."""
    sharding = jax.typeof(other).sharding
    explicit = bool(sharding.mesh.explicit_axes)
    same = jax.typeof(x).sharding == sharding
    return jax.sharding.reshard(x, sharding) if explicit and not same else x
