"""QK-Clip: rescale the query and key weights of the heads whose logits grew too large.

Source: Su Jianlin, "QK-Clip" (spaces.ac.cn/archives/11126); Kimi K2 report, arXiv 2507.20534.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from muonclip_jax._attention.max_logits import read_max_logits
from muonclip_jax._core import paths
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.maxima import AxisName, largest, largest_of_devices
from muonclip_jax._core.meshes import in_auto_axes, specs_of
from muonclip_jax._core.options import is_concrete_number
from muonclip_jax._core.paths import Path
from muonclip_jax._core.states import find_state
from muonclip_jax._layouts.blocks import (
    Block,
    Layouts,
    as_layouts,
    find_blocks,
    left_out,
    module_path,
    multipliers,
    outside_patterns,
)
from muonclip_jax._layouts.checks import refuse_qk_norm
from muonclip_jax._layouts.leaves import leaves_of
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import KEY_ROLES, QUERY_ROLES, Role

Scope = Literal["head", "layer"]

_Leaves = Mapping[Path, jax.Array]
_CLIPPED_ROLES: tuple[Role, ...] = QUERY_ROLES + KEY_ROLES


class QKClipState(NamedTuple):
    """What the last step saw and did; read it by name with `qk_clip_state(opt_state)`.

    Attributes:
      max_logits: For each attention block (by path), the maxima given to the last update,
        float32 `[stack..., heads]`; -inf before the first.
      gamma: The clip factors of the last update, same keys and shapes; 1 where not clipped.
      heads_clipped: int32, heads clipped in the last update, over all blocks.
      nonfinite_heads: int32, running count of NaN or +Inf maxima. They clip nothing.
      lost_heads: int32, running count of clipped heads of which some kernel, rounded to the
        parameters' own half-precision dtype, moved less than half as far as it should. Keep
        float32 master weights if it grows.
    """

    max_logits: dict[str, jax.Array]
    gamma: dict[str, jax.Array]
    heads_clipped: jax.Array
    nonfinite_heads: jax.Array
    lost_heads: jax.Array


def qk_clip(
    layout: Layouts,
    threshold: jax.typing.ArrayLike = 100.0,
    *,
    alpha: jax.typing.ArrayLike = 0.5,
    scope: Scope = "head",
    axis_name: AxisName = None,
    heads_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips attention heads after the optimizer's own update: the last link of the chain.

    With S the largest logit of head h in this step's batch and `gamma = threshold / S` where
    S > threshold (else 1), the weights that the step arrives at are multiplied by

    | attention | query side | key side |
    | --- | --- | --- |
    | MHA | `gamma**alpha` | `gamma**(1-alpha)` |
    | GQA, MQA | `gamma_h / kappa` | `kappa = min(gamma over the key head's group)**(1-alpha)` |
    | MLA | nope `gamma**alpha`, rope `gamma` | nope `gamma**(1-alpha)`, shared rope untouched |

    so that every head's logits scale by exactly its own `gamma`. `alpha=1` changes queries
    only, the other choice for GQA and MQA. Biases scale with their kernel. Any Optax optimizer
    may come before it: `optax.chain(optax.adamw(1e-3), qk_clip(layout))` is AdamClip.

    The update needs the maxima: `tx.update(grads, state, params, max_logits=intermediates)`
    with what `sow` produced (see `read_max_logits`). Arithmetic is float32 (float64 if any
    parameter is float64); updates keep their dtype. Cost, under `jax.jit`: one pass over the
    query and key kernels, fused into the update (two more over half-precision ones, for
    `lost_heads`); no host synchronisation.

    Under `jax.jit` kernels, biases and maxima may be sharded in any way, on meshes with Auto and
    Explicit axes: no kernel is gathered (what travels is a few rows of it), updates keep their
    sharding, and on Explicit meshes the state is replicated. Inside `jax.shard_map` and `jax.pmap`
    each device sows the maxima of its own share of the batch: name the axes, `axis_name="data"`,
    or the replicas part ways.

    Half-precision parameters: a clip milder than the dtype's spacing (0.4% in bfloat16) can
    round away; `lost_heads` counts those. Keep parameters in float32 and compute in bfloat16
    (Flax: `param_dtype=jnp.float32, dtype=jnp.bfloat16`).

    Args:
      layout: Which parameters hold the queries and keys of which head; several layouts, as a
        list, for a model with several kinds of attention.
      threshold: τ > 0, in units of the logit; 100 in Kimi K2.
      alpha: The share of the factor that goes to the queries, in [0, 1].
      scope: `"head"` clips each head by its own factor. `"layer"` is the first version of the
        method, kept for comparison: all heads of a layer take the layer's smallest factor, so
        heads that did nothing are clipped too.
      axis_name: Inside `jax.shard_map` or `jax.pmap`, the axes over which devices see other tokens
        of the same heads (data, context): the maxima are reduced over them.
      heads_axis_name: Inside `jax.shard_map`, the axes over which the heads themselves are spread
        (tensor parallelism): every device clips its own, and only the state's counts, and the
        smallest factor of `scope="layer"`, are taken over all. The heads that share a key head
        must be on one device.

    Raises:
      TypeError: An option of the wrong type.
      ValueError: threshold <= 0, alpha outside [0, 1] or an unknown scope when built; when
        applied, what `find_blocks` raises, a QK-norm behind the projections, no `max_logits`, or
        maxima that do not pair with the blocks, each named; an axis that is not there.
    """
    options = _Options(scope, axis_name, heads_axis_name)
    _check_options(layout, threshold, alpha, options)

    def init(params: optax.Params) -> QKClipState:
        blocks = _blocks(layout, params)
        zero = functools.partial(jnp.zeros, [], jnp.int32)  # one buffer each: states are donated
        return QKClipState(
            max_logits={b.name: jnp.full(b.shape, -jnp.inf, jnp.float32) for b in blocks},
            gamma={b.name: jnp.ones(b.shape, jnp.float32) for b in blocks},
            heads_clipped=zero(),
            nonfinite_heads=zero(),
            lost_heads=zero(),
        )

    def update(updates, state, params=None, *, max_logits=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("qk_clip rescales weights: call tx.update(grads, state, params, ...).")
        blocks = _blocks(layout, params)
        dtype = _dtype(params)

        def clip(updates, state, params, sown, threshold, alpha):
            plan = _plan(blocks, sown, dtype, threshold, alpha, options)
            clipped = {
                path: _arrive_at_multiple(update, params[path], plan.multipliers[path])
                for path, update in updates.items()
            }
            lost = _lost_heads(plan, params, updates, clipped)
            counts = [
                _count(gamma < 1 for gamma in plan.gamma.values()),
                _count(map(_is_fault, plan.maxima.values())),
                _count(lost),
            ]
            if heads_axis_name is not None:
                counts = jax.lax.psum(counts, heads_axis_name)
            heads_clipped, nonfinite_heads, lost_heads = counts
            return clipped, QKClipState(
                max_logits=_float32(plan.maxima),
                gamma=_float32(plan.gamma),
                heads_clipped=heads_clipped,
                nonfinite_heads=state.nonfinite_heads + nonfinite_heads,
                lost_heads=state.lost_heads + lost_heads,
            )

        own = leaves_of(blocks, _CLIPPED_ROLES, updates)
        clipped, state = in_auto_axes(clip, (specs_of(own), PartitionSpec()))(
            own,
            state,
            leaves_of(blocks, _CLIPPED_ROLES, params),
            _pair(layout, blocks, params, max_logits),
            threshold,
            alpha,
        )
        return paths.map_with_path(lambda path, u: clipped.get(path, u), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def apply_qk_clip(
    params: Any,
    max_logits: Any,
    layout: Layouts,
    threshold: jax.typing.ArrayLike = 100.0,
    *,
    alpha: jax.typing.ArrayLike = 0.5,
    scope: Scope = "head",
    axis_name: AxisName = None,
    heads_axis_name: AxisName = None,
) -> Any:
    """The same clip as `qk_clip`, from parameters to parameters.

    For training loops without Optax, and for clipping a finished model once. Clips that
    rounding to half-precision parameters undoes are not counted here; `qk_clip` does.

    Args:
      params: The parameters, as for `find_blocks`.
      max_logits: The sown maxima, as for `read_max_logits`.
      layout: Which parameters hold the queries and keys of which head; several layouts, as a
        list, for a model with several kinds of attention.
      threshold: τ > 0.
      alpha: The share of the factor that goes to the queries, in [0, 1].
      scope: `"head"` or `"layer"`, see `qk_clip`.
      axis_name: Inside `jax.shard_map` or `jax.pmap`, the axes of the data, see `qk_clip`.
      heads_axis_name: Inside `jax.shard_map`, the axes of the heads, see `qk_clip`.

    Returns:
      The parameters, same tree, dtypes and shardings; leaves that are no query or key are the
      same arrays.

    Raises:
      TypeError: As `qk_clip`.
      ValueError: As `qk_clip`.
    """
    options = _Options(scope, axis_name, heads_axis_name)
    _check_options(layout, threshold, alpha, options)
    blocks = _blocks(layout, params)
    dtype = _dtype(params)

    def clip(params, sown, threshold, alpha):
        plan = _plan(blocks, sown, dtype, threshold, alpha, options)
        return {path: _multiple(param, plan.multipliers[path]) for path, param in params.items()}

    own = leaves_of(blocks, _CLIPPED_ROLES, params)
    sown = _pair(layout, blocks, params, max_logits)
    clipped = in_auto_axes(clip, specs_of(own))(own, sown, threshold, alpha)
    return paths.map_with_path(lambda path, param: clipped.get(path, param), params)


def clip_factor(
    max_logits: jax.Array, threshold: jax.typing.ArrayLike, scope: Scope = "head"
) -> jax.Array:
    """γ = threshold / S for every head whose maximum S is finite and above it, else exactly 1.

    Args:
      max_logits: `[..., heads]`. S <= 0, -inf (the head saw no key), NaN and +Inf give 1.
      threshold: τ > 0.
      scope: `"layer"` gives every head the smallest factor among the heads.

    Returns:
      γ in (0, 1], same shape, float32 or wider.
    """
    maxima = max_logits.astype(accumulation_dtype(max_logits.dtype))
    threshold = jnp.asarray(threshold, maxima.dtype)
    exceeds = jnp.isfinite(maxima) & (maxima > threshold)
    gamma = jnp.where(exceeds, threshold / jnp.where(exceeds, maxima, 1), 1)
    if scope == "layer":
        gamma = jnp.broadcast_to(gamma.min(axis=-1, keepdims=True), gamma.shape)
    return gamma


def qk_clip_state(opt_state: Any) -> QKClipState:
    """The `QKClipState` inside any Optax state (or `nnx.Optimizer.opt_state`), for logging.

    Args:
      opt_state: Any tree that holds one.

    Returns:
      It, with plain arrays for NNX's variables.

    Raises:
      ValueError: There is none, or more than one.
    """
    return find_state(opt_state, QKClipState, "qk_clip")


class _Options(NamedTuple):
    """What is fixed when a clip is built."""

    scope: Scope
    axis_name: AxisName
    heads_axis_name: AxisName


def _check_options(layout, threshold, alpha, options: _Options) -> None:
    as_layouts(layout)
    if options.scope not in get_args(Scope):
        raise ValueError(f'scope must be "head" or "layer", got {options.scope!r}.')
    if is_concrete_number("threshold", threshold) and not threshold > 0:
        raise ValueError(f"threshold must be above 0 (a logit; Kimi K2 uses 100), got {threshold}.")
    if is_concrete_number("alpha", alpha) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha, the queries' share of the clip, must be in [0, 1], got {alpha}.")
    names = [
        axis
        for option in ("axis_name", "heads_axis_name")
        for axis in _axes(option, getattr(options, option))
    ]
    if twice := [axis for axis in names if names.count(axis) > 1]:
        raise ValueError(f"axis_name and heads_axis_name name {twice[0]!r} twice.")


def _axes(option: str, value: AxisName) -> tuple[str, ...]:
    axes = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(axes, tuple) or not all(isinstance(axis, str) for axis in axes):
        raise TypeError(
            f"{option} must be the name of an axis, or a tuple of names, got {value!r}."
        )
    return axes


def _blocks(layout: Layouts, params: Any) -> tuple[Block, ...]:
    blocks = find_blocks(layout, params)
    refuse_qk_norm(blocks)
    return blocks


class _Plan(NamedTuple):
    """All that a step's maxima decide, before any weight is touched."""

    blocks: tuple[Block, ...]
    maxima: dict[str, jax.Array]  # block name → [stack..., heads]
    gamma: dict[str, jax.Array]
    multipliers: dict[Path, jax.Array]  # parameter → broadcasts against it


def _plan(
    blocks: tuple[Block, ...],
    sown: dict[str, list[jax.Array]],
    dtype: Any,
    threshold: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike,
    options: _Options,
) -> _Plan:
    for option in ("axis_name", "heads_axis_name"):
        _check_bound(option, getattr(options, option))
    maxima = largest_of_devices(
        {
            b.name: functools.reduce(
                jnp.maximum, (fit_maxima(b.name, b.shape, x) for x in sown[b.name])
            )
            for b in blocks
        },
        options.axis_name,
    )
    gamma = {
        name: clip_factor(s.astype(dtype), threshold, options.scope) for name, s in maxima.items()
    }
    if options.scope == "layer" and options.heads_axis_name is not None:
        gamma = jax.lax.pmin(gamma, options.heads_axis_name)
    factors = {block.name: _role_factors(block, gamma[block.name], alpha) for block in blocks}
    return _Plan(blocks, maxima, gamma, multipliers(blocks, factors))


def _dtype(params: Any) -> Any:
    return jnp.result_type(jnp.float32, *(leaf.dtype for _, leaf in paths.leaves(params)))


def _check_bound(option: str, value: AxisName) -> None:
    for axis in _axes(option, value):
        try:
            jax.lax.axis_size(axis)
        except NameError:
            raise ValueError(
                f"{option}={value!r}: no jax.shard_map or jax.pmap around this call has an axis "
                f"{axis!r}. Under jax.jit leave {option} out: sharded arrays are whole there."
            ) from None


def _pair(
    layout: Layouts, blocks: tuple[Block, ...], params: Any, max_logits: Any
) -> dict[str, list[jax.Array]]:
    """The maxima sown in each block; every value must find its block, unless the layout's pattern
    leaves out where it was sown."""
    if max_logits is None:
        raise ValueError(
            "qk_clip got no max_logits. Pass what the forward pass sowed: "
            "tx.update(grads, state, params, max_logits=intermediates), where intermediates comes "
            'from model.apply(..., mutable=["intermediates"]) in Linen or '
            "nnx.capture(lambda model: ..., nnx.Intermediate)(model) in NNX; Flax's "
            "TrainState.apply_gradients does not forward it, call tx.update yourself."
        )
    sown = read_max_logits(max_logits)
    found: dict[str, list[jax.Array]] = {block.name: [] for block in blocks}
    excluded = [module_path(path) for path in left_out(layout, params)]
    for path, values in sown.items():
        # The block itself, or the innermost one around a sub-module that sowed.
        around = [b for b in blocks if path[: len(module_path(b.path))] == module_path(b.path)]
        block = max(around, key=lambda b: len(b.path), default=None)
        inside = len(module_path(block.path)) if block else 0
        if any(path[: len(other)] == other and len(other) >= inside for other in excluded):
            continue
        if block is None and outside_patterns(layout, path):
            continue
        if block is None:
            raise ValueError(
                f"max_logits were sown in {paths.show(path)}, where the layout finds no query and "
                f"key kernels; it has {', '.join(found)}. Sow in the attention module itself, or "
                "correct the layout."
            )
        found[block.name].append(values)
    for name, values in found.items():
        if not values:
            raise ValueError(
                f"{name} has query and key kernels but sowed no max_logits; sown: "
                f"{', '.join(map(paths.show, sown))}. Sow them in that module (sow_max_logits, or "
                "sow_weights=True for Flax's attention), or leave the block out with the layout's "
                "block= pattern."
            )
    return found


def fit_maxima(block: str, shape: tuple[int, ...], sown: jax.Array) -> jax.Array:
    """What a block sowed as `[stack..., heads]`, its shape: axes that its kernels do not have (a
    batch, a vmapped call) are reduced by the maximum.

    Raises:
      ValueError: It has other heads or another stack, or does not tell which axis is the stack.
    """
    *stack, heads = shape
    depth, extra = len(stack), sown.ndim - len(shape)
    after_stack = sown.shape[:depth] == shape[:-1]
    before_stack = sown.shape[extra:-1] == shape[:-1] if extra >= 0 else False
    if sown.shape[-1:] != (heads,) or extra < 0 or not (after_stack or before_stack):
        raise ValueError(
            f"{block} sowed max_logits of shape {sown.shape}, but its kernels have "
            f"{heads} query heads{f' in stacked layers {shape[:-1]}' if depth else ''}: "
            f"expected {shape}. "
            "Sow one maximum per query head, and check the layout's heads= (flat kernels need it)."
        )
    if depth and extra and after_stack and before_stack:
        raise ValueError(
            f"{block} sowed max_logits of shape {sown.shape}: which axis is the stack "
            f"{shape[:-1]} is ambiguous. Reduce the others first, here or where they are sown: "
            f"jax.tree.map(lambda s: s.max(axis=...), read_max_logits(intermediates))."
        )
    axes = range(depth, depth + extra) if after_stack else range(extra)
    return largest(sown, tuple(axes))


def _role_factors(
    block: Block, gamma: jax.Array, alpha: jax.typing.ArrayLike
) -> dict[Role, jax.Array]:
    """The table of `qk_clip`. With one query head per key head, GQA's rule is MHA's."""
    group = block.heads // block.kv_heads
    grouped = gamma.reshape(*block.stack, block.kv_heads, group)
    kappa = grouped.min(axis=-1) ** (1 - jnp.asarray(alpha, gamma.dtype))
    query = (grouped / kappa[..., None]).reshape(gamma.shape)
    return {"q": query, "q_nope": query, "q_rope": gamma, "k": kappa, "k_nope": kappa}


def _arrive_at_multiple(update: jax.Array, param: jax.Array, multiplier: jax.Array) -> jax.Array:
    """The update after which the parameter is `multiplier * (param + update)`.

    Written so that a multiplier of 1 gives the update back as it was.
    """
    dtype = jnp.promote_types(accumulation_dtype(param.dtype), update.dtype)
    m, u, p = (x.astype(dtype) for x in (multiplier, update, param))
    return jnp.where(m == 1, u, m * u + (m - 1) * p).astype(update.dtype)


def _multiple(param: jax.Array, multiplier: jax.Array) -> jax.Array:
    dtype = accumulation_dtype(param.dtype)
    return (param.astype(dtype) * multiplier.astype(dtype)).astype(param.dtype)


def _lost_heads(
    plan: _Plan, params: _Leaves, updates: _Leaves, clipped: _Leaves
) -> Iterator[jax.Array]:
    """For each block, the clipped heads of which a half-precision kernel did not move as asked."""

    def lost(part: Part, block: Block) -> jax.Array:
        path = part.kernel
        before, after = (
            _rounded(params[path].astype(jnp.float32) + step[path], params[path].dtype)
            for step in (updates, clipped)
        )
        # Projected on the kernel itself, where rounding of single entries averages out.
        asked, moved = (
            part.sums(change * before)
            for change in ((1 - plan.multipliers[path]) * before, before - after)
        )
        short = jnp.abs(asked - moved) > 0.5 * jnp.abs(asked)
        return jnp.repeat(short, block.heads // part.heads, axis=-1)

    for block in plan.blocks:
        clipped_parts = (*block.queries, *block.keys)
        half = [part for part in clipped_parts if jnp.finfo(params[part.kernel].dtype).bits < 32]
        if half:
            anywhere = functools.reduce(jnp.logical_or, [lost(part, block) for part in half])
            yield anywhere & (plan.gamma[block.name] < 1)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """x as numbers of this dtype. (XLA may leave out a conversion there and back.)"""
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


def _is_fault(maxima: jax.Array) -> jax.Array:
    return jnp.isnan(maxima) | jnp.isposinf(maxima)


def _count(masks: Iterable[jax.Array]) -> jax.Array:
    return sum((mask.sum(dtype=jnp.int32) for mask in masks), start=jnp.zeros([], jnp.int32))


def _float32(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
