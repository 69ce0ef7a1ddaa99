"""Gradient accumulation: several micro-batches, one step of the optimizer."""

import functools
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from muonclip_jax._attention.max_logits import read_max_logits
from muonclip_jax._core import paths
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.meshes import in_auto_axes
from muonclip_jax._core.paths import Path
from muonclip_jax._core.states import find_state
from muonclip_jax._transforms.qk_clip import QKClipState, fit_maxima


class AccumulateState(NamedTuple):
    """State of `accumulate`; read it by name with `accumulate_state(opt_state)`.

    Attributes:
      micro_step: int32, the micro-batches that have come since the last real step.
      step: int32, the real steps so far.
      mean: Like the parameters, in the accumulator's dtype: the mean gradient of these
        micro-batches; after a real step, of those that it was made of.
      max_logits: For each attention block that a `qk_clip` inside clips, its largest logits in
        the same micro-batches, float32 `[stack..., heads]`; -inf before the first.
      inner_state: The state of the optimizer inside.
    """

    micro_step: jax.Array
    step: jax.Array
    mean: Any
    max_logits: dict[str, jax.Array]
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
    `max_logits=`, as a running maximum of each head. The updates that it returns are zeros until
    the last of them, which is the real step: `tx` gets the mean and the maxima, and its updates are
    returned. On the other micro-batches `tx` is not executed (`jax.lax.cond`), so Muon
    orthogonalizes, schedules count and QK-Clip clips once for each real step.

    `optax.MultiSteps` executes its optimizer for every micro-batch and discards the result of all
    but the last, and gives it the last micro-batch's `max_logits` only: heads that passed the
    threshold in the others are not clipped.

    It is the outermost transformation: `qk_clip` behind it would clip between real steps.
    `optax.apply_if_finite` outside of it drops a micro-batch that is not finite (the next takes its
    place), and inside of it the whole real step.

    - The mean weighs all micro-batches alike. For the mean over examples, or tokens, let them have
      the same number.
    - `max_logits` are kept by attention block, in any form that `read_max_logits` takes, and
      must be given with every micro-batch. A NaN in one of them stays until the real step, where
      `qk_clip` counts it. Without a `qk_clip` inside they are an extra argument like all
      others.
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
        parameter, several modules that sowed `max_logits` inside of one block, and what `tx`
        raises, on every micro-batch.
    """
    _check_options(tx, every, accumulator_dtype)
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> AccumulateState:
        inner_state = tx.init(params)
        return AccumulateState(
            micro_step=jnp.zeros([], jnp.int32),
            step=jnp.zeros([], jnp.int32),
            mean=jax.tree.map(functools.partial(_zeros, accumulator_dtype), params),
            max_logits=_nothing_seen(inner_state),
            inner_state=inner_state,
        )

    def update(updates, state, params=None, **extra_args):
        count = state.micro_step
        mean = paths.map_with_path(functools.partial(_mean, count), state.mean, updates)
        maxima = state.max_logits
        if maxima and extra_args.get("max_logits") is not None:
            sown = read_max_logits(extra_args["max_logits"])
            maxima, extra_args["max_logits"] = _maxima(count, maxima, sown)

        @jax.jit  # so that it is traced once, for its shapes and as a branch
        def step(inner_state):
            gradient = jax.tree.map(lambda m, g: m.astype(g.dtype), mean, updates)
            new, new_state = tx.update(gradient, inner_state, params, **extra_args)
            typed_state = jax.tree.map(_typed_like, new_state, inner_state)
            return jax.tree.map(_sharded_like, new, mean), typed_state

        def wait(inner_state):
            zeros = jax.tree.map(lambda m, u: jnp.zeros_like(m, u.dtype), mean, shapes)
            return zeros, inner_state

        shapes, _ = jax.eval_shape(step, state.inner_state)
        size = every(state.step) if callable(every) else every
        is_real = count + 1 >= size
        updates, inner_state = jax.lax.cond(is_real, step, wait, state.inner_state)
        return updates, AccumulateState(
            micro_step=jnp.where(is_real, 0, count + 1),
            step=jnp.where(is_real, optax.safe_increment(state.step), state.step),
            mean=mean,
            max_logits=maxima,
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
    """
    return find_state(opt_state, AccumulateState, "accumulate")


def _check_options(tx, every, accumulator_dtype):
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            "accumulate's first argument must be an Optax transformation (of optax.MultiSteps, "
            f"its .gradient_transformation()), got {tx!r}."
        )
    if not callable(every) and (isinstance(every, bool) or not isinstance(every, Integral)):
        raise TypeError(
            "every must be a whole number of micro-batches, or a function from the number of real "
            f"steps to one, got {every!r}."
        )
    if not callable(every) and every < 1:
        raise ValueError(f"every, micro-batches for a real step, must be at least 1, got {every}.")
    if accumulator_dtype is not None and not jnp.issubdtype(accumulator_dtype, jnp.inexact):
        raise TypeError(f"accumulator_dtype must be floating point, got {accumulator_dtype}.")


# The mean of the gradients


def _zeros(dtype: jax.typing.DTypeLike | None, param: jax.Array) -> jax.Array:
    return jnp.zeros_like(param, dtype=accumulation_dtype(param.dtype) if dtype is None else dtype)


def _mean(count: jax.Array, path: Path, mean: jax.Array, gradient: jax.Array) -> jax.Array:
    """The mean of `count` gradients and one more. Kept as a mean and not as a sum, that of equal
    values is exactly this value, and none overflows for their number."""
    if jnp.shape(gradient) != mean.shape:
        raise ValueError(
            f"accumulate got a gradient of shape {jnp.shape(gradient)} for {paths.show(path)} "
            f"{mean.shape}. Call tx.update once for each micro-batch, with its gradient alone."
        )
    dtype = accumulation_dtype(mean.dtype)
    before, new = jnp.where(count == 0, 0, mean).astype(dtype), gradient.astype(dtype)
    return (before + (new - before) / (count + 1)).astype(mean.dtype)


# The maximum of the max logits


def _nothing_seen(inner_state: Any) -> dict[str, jax.Array]:
    """-inf for every head of every block that a `qk_clip` inside clips."""
    is_clip = lambda node: isinstance(node, QKClipState)  # noqa: E731
    clips = filter(is_clip, jax.tree.leaves(inner_state, is_leaf=is_clip))
    return {
        name: jnp.full_like(maxima, -jnp.inf)
        for clip in clips
        for name, maxima in clip.max_logits.items()
    }


def _maxima(
    count: jax.Array, before: dict[str, jax.Array], sown: dict[Path, jax.Array]
) -> tuple[dict[str, jax.Array], dict[Path, jax.Array]]:
    """The maxima of `count` micro-batches and one more: by block, and by the module that sowed
    them.

    Layouts may leave out attention that stands inside of a block, and only `qk_clip` knows them. It
    gets the maxima by module, so that it is its rules that apply.
    """
    modules = _modules(before, sown)

    def larger(count, before, sown):
        def of_block(name, maxima):
            old = jnp.where(count == 0, -jnp.inf, before[name])
            # `jnp.maximum` keeps NaNs.
            return jnp.maximum(old, fit_maxima(name, old.shape, maxima).astype(old.dtype))

        return {name: of_block(name, maxima) for name, maxima in sown.items()}

    of_blocks = {name: sown[path] for name, path in modules.items()}
    new = in_auto_axes(larger, PartitionSpec())(count, before, of_blocks)
    return {**before, **new}, {**sown, **{path: new[name] for name, path in modules.items()}}


def _modules(blocks: Iterable[str], sown: Iterable[Path]) -> dict[str, Path]:
    """For each block the module that sowed its maxima: itself, or one inside."""
    found: dict[str, Path] = {}
    for path in sown:
        around = (paths.show(path[:end]) for end in range(len(path), -1, -1))
        block = next((name for name in around if name in blocks), None)
        if block in found:
            raise ValueError(
                f"max_logits were sown in {paths.show(found[block])} and in {paths.show(path)}, "
                f"both in the attention block {block}, of which accumulate keeps one maximum for "
                "each head. Hand over one: delete the others from read_max_logits(intermediates), "
                "or replace them by their maximum."
            )
        if block is not None:
            found[block] = path
    return found


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
