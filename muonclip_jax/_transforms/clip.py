"""Clip by any signal: rescale the weights of the heads in which something grew too large.

    forward pass ─► a number per head, sown ─► γ = threshold / number, where above the threshold
                                             ─► each role's weights times its power of γ

QK-Clip (`qk_clip.py`) is the instance for max logits, `max_output_clip` the one for outputs.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._core import paths
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.masks import Frozen, check_frozen
from muonclip_jax._core.maxima import AxisName, largest_of_devices
from muonclip_jax._core.options import check_choice, check_number
from muonclip_jax._core.paths import Path
from muonclip_jax._core.sowing import MAX_LOGITS, nothing_given, read_signal
from muonclip_jax._core.states import check_same, without_parameters
from muonclip_jax._layouts.blocks import (
    Block,
    Layouts,
    as_layouts,
    blocks_with_logits,
    find_blocks,
    multipliers,
    with_frozen,
)
from muonclip_jax._layouts.checks import refuse_what_escapes
from muonclip_jax._layouts.leaves import Leaves, change_leaves, leaves_of
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import EVERY_ROLE, LOGIT_ROLES, Role
from muonclip_jax._layouts.sown import fit, names, observe, pair
from muonclip_jax._transforms.arrivals import arrive_at_multiple

# After so many clips in a row without effect something is wrong with the wiring.
INEFFECTIVE = 3

Scope = Literal["head", "layer"]
Threshold = ArrayLike | Callable[[Any], ArrayLike]  # an Optax schedule, from the step
Factors = Callable[..., Mapping[Role, jax.Array]]


class ClipState(NamedTuple):
    """What the last step saw and did: `optax.tree.get(opt_state, "ClipState")`.

    Attributes:
      maxima: By the signal's name and the block's path, the signal given to the last update,
        float32 `[stack..., heads]`; -inf before the first.
      gamma: The clip factors of the last update, same keys and shapes; 1 where not clipped.
      heads_clipped: int32, heads clipped in the last update, over all blocks.
      nonfinite_heads: int32, running count of NaN or +Inf maxima. They clip nothing.
      lost_heads: int32, running count of clipped heads of which some kernel, rounded to the
        parameters' own half-precision dtype, moved less than half as far as it should. Keep
        float32 master weights if it grows.
      ineffective_clips: Same keys, int32 `[stack..., heads]`: how many clips in a row, up to the
        last but one, were without effect, as in `QKClipState`. From 3 on something is wrong with
        the wiring.

    Example:
        >>> state = mc.max_output_clip(layout, 30.0).init(params)
        >>> state.maxima["max_output"]["attn"]
        Array([-inf, -inf], dtype=float32)
    """

    maxima: dict[str, dict[str, jax.Array]]
    gamma: dict[str, dict[str, jax.Array]]
    heads_clipped: jax.Array
    nonfinite_heads: jax.Array
    lost_heads: jax.Array
    ineffective_clips: dict[str, dict[str, jax.Array]]


class ScheduledClipState(NamedTuple):
    """The state of a clip whose threshold is a schedule.

    Attributes:
      step: int32, how many steps there were so far: what the schedule is asked with.
      clip: `QKClipState`, or `ClipState`.

    Example:
        >>> tx = mc.qk_clip(layout, lambda step: jnp.where(step < 100, 50.0, jnp.inf))
        >>> state = tx.init(params)
        >>> int(state.step), mc.qk_clip_state(state) is not None
        (0, True)
    """

    step: jax.Array
    clip: Any


def clip_by_signal(
    layout: Layouts,
    threshold: Threshold,
    *,
    signal: str,
    factors: Callable[[Block, jax.Array], Mapping[Role, jax.Array]],
    scope: Scope = "head",
    frozen: Frozen | None = None,
    axis_name: AxisName = None,
    heads_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips attention heads by a signal that they sowed: the last link of a chain.

    With S the signal of a head in this step's batch and `gamma = threshold / S` where
    S > threshold (else 1), the weights that the step arrives at are multiplied by what `factors`
    says. `qk_clip` is the instance for `max_logits`, and its notes on cost, shardings and half
    precision hold for all.

    The model sows the signal in its attention modules, `sow_signal(self, "max_output", largest)`,
    one number per query head, or `[1]` for all of them; several calls keep the maximum. The update
    takes it as an argument of this name: `tx.update(grads, state, params,
    max_output=intermediates)`. Every block of the layout must sow it, those of linear attention
    too. A layout of one `Piece("o", ...)` with `softmax=False` makes blocks of MLPs or experts.

    Several clips, each by its own signal, may stand at the end of one chain in any order: each
    arrives at a multiple of the weights that it is given.

    Args:
      layout: Which parameters hold the pieces of which head; several layouts as a list.
      threshold: τ > 0, in units of the signal, or an Optax schedule of it; see `qk_clip`.
      signal: The name under which the signal is sown, and of the update's argument.
      factors: From an attention block and γ `[stack..., heads]` to what the weights of each role
        are multiplied by, `[stack..., heads of that role]`; roles that it leaves out keep their
        weights. `block.stack`, `block.heads` and `block.kv_heads` tell the shapes, and
        `block.held(role)` the frozen parameters of a role.
      scope: `"head"` clips each head by its own factor, `"layer"` all of a layer by the smallest.
      frozen: What nothing moves, in the forms that `qk_clip` takes. A block is left out, and its
        signal not asked for, where all that `factors` scales is frozen. Where some of it trains,
        only `factors` knows what that takes of γ: a role is held as soon as one of its kernels or
        biases is frozen, and `factors` must leave it out.
      axis_name: Inside `jax.shard_map` or `jax.pmap`, the axes of the data, see `qk_clip`.
      heads_axis_name: Inside `jax.shard_map`, the axes of the heads, see `qk_clip`.

    Returns:
      A transformation whose `update` needs `params` and the signal; its state is a `ClipState`.

    Raises:
      TypeError: An option of the wrong type.
      ValueError: As `qk_clip`; when applied, a role or a shape of `factors` that a block does not
        have, or a role that is held.

    Example:
        >>> tx = mc.clip_by_signal(
        ...     layout, 30.0, signal="max_value", factors=lambda block, gamma: {"v": gamma}
        ... )
        >>> large = {"attn": {"max_value": jnp.array([60.0, 1.0])}}
        >>> _, state = tx.update(grads, tx.init(params), params, max_value=large)
        >>> state.gamma["max_value"]["attn"]
        Array([0.5, 1. ], dtype=float32)
    """
    check_signal(signal)
    if not callable(factors):
        raise TypeError(f"factors must be a function of a block and gamma, got {factors!r}.")
    clip = Clip(
        *("clip_by_signal", layout, signal, factors, scope, axis_name, heads_axis_name, frozen),
        acts_on="factors",
    )
    clip.check(threshold)
    return clip.transformation(ClipState, threshold)


@dataclass(frozen=True)
class Clip:
    """What a clip is built of; its number arguments, which may be traced, come with each call.

    Attributes:
      owner: The public function's name, for messages.
      layout: As in `clip_by_signal`, and so are all others.
      factors: Takes the further number arguments behind the block and γ.
      frozen: Parameters that it must not move. Blocks that are frozen whole are left out; of others
        the factors must know.
      acts_on: What is frozen in a block that is frozen whole: all that makes its logits, or all
        that the factors scale where nothing is frozen.
    """

    owner: str
    layout: Layouts
    signal: str
    factors: Factors
    scope: Scope
    axis_name: AxisName
    heads_axis_name: AxisName
    frozen: Frozen | None = None
    acts_on: Literal["logits", "factors"] = "logits"

    def check(self, threshold: Threshold) -> None:
        """Raises what `clip_by_signal` raises when built."""
        as_layouts(self.layout)
        check_frozen(self.frozen)
        check_choice("scope", self.scope, get_args(Scope))
        unit = "a logit; Kimi K2 uses 100" if self.signal == MAX_LOGITS else f"a {self.signal}"
        wanted = f"above 0 ({unit})"
        _check_threshold(threshold, wanted)
        axes = [axis for _, axes in self._axes() for axis in axes]
        if twice := [axis for axis in axes if axes.count(axis) > 1]:
            raise ValueError(f"axis_name and heads_axis_name name {twice[0]!r} twice.")

    def transformation(
        self, kind: Callable[..., Any], threshold: Threshold, *arguments: ArrayLike
    ) -> optax.GradientTransformationExtraArgs:
        """The link of a chain. `kind` is a state with the fields of `ClipState`."""
        if not callable(threshold):
            return self._with_number(kind, threshold, *arguments)
        at = functools.partial(self._with_number, kind)

        def init(params: optax.Params) -> ScheduledClipState:
            clip = at(jnp.inf, *arguments).init(params)
            return ScheduledClipState(jnp.zeros([], jnp.int32), clip)

        def update(updates, state, params=None, **extra_args):
            now = at(threshold(state.step), *arguments)
            updates, clip = now.update(updates, state.clip, params, **extra_args)
            step = jnp.asarray(optax.safe_increment(state.step))
            return updates, ScheduledClipState(step, clip)

        return optax.GradientTransformationExtraArgs(init, update)

    def _with_number(
        self, kind: Callable[..., Any], threshold: ArrayLike, *arguments: ArrayLike
    ) -> optax.GradientTransformationExtraArgs:
        """The same with one threshold for all steps."""

        def init(params: optax.Params) -> Any:
            if paths.holds_nothing(params):
                observe(self.signal, self.layout, (), params)
                return without_parameters(kind)
            every, blocks, *_ = self._find(params, arguments)
            observe(self.signal, self.layout, every, params)

            def full(value, dtype=jnp.float32):
                return {block.name: jnp.full(block.shape, value, dtype) for block in blocks}

            # One buffer for each count: states are donated.
            counts = (jnp.zeros([], jnp.int32) for _ in range(3))
            return self._state(kind, full(-jnp.inf), full(1), *counts, full(0, jnp.int32))

        def update(updates, state, params=None, **extra_args):
            if params is None:
                raise ValueError(
                    f"{self.owner} rescales weights: call tx.update(grads, state, params, ...)."
                )
            every, blocks, touched, own = self._find(params, arguments)
            observe(self.signal, self.layout, every, params)
            like = {block.name: jax.ShapeDtypeStruct(block.shape, jnp.float32) for block in blocks}
            wanted = self._state(kind, like, *state[1:])[0]
            check_same("maxima", state[0], wanted, "the layout or the parameters")
            dtype = _dtype(params)
            floor = _floor_of_updates(own, leaves_of(touched, EVERY_ROLE, updates))

            def clip(updates, state, params, sown, threshold, arguments):
                decided = self._decide(blocks, sown, dtype, threshold, arguments, floor)
                clipped = {
                    path: arrive_at_multiple(update, params[path], decided.multipliers[path])
                    for path, update in updates.items()
                }
                counts = [
                    _count(gamma < 1 for gamma in decided.gamma.values()),
                    _count(jnp.isnan(s) | jnp.isposinf(s) for s in decided.maxima.values()),
                    _count(_lost_heads(touched, decided, params, updates, clipped)),
                ]
                if self.heads_axis_name is not None:
                    counts = jax.lax.psum(counts, self.heads_axis_name)
                fields = _next_state(self._fields(state), decided, counts)
                return clipped, self._state(kind, *fields)

            sown = self._pair(every, params, extra_args.get(self.signal))
            return change_leaves(
                clip, touched, EVERY_ROLE, updates, state, own, sown, threshold, arguments
            )

        return optax.GradientTransformationExtraArgs(init, update)

    def _state(self, kind: Callable[..., Any], *fields: Any) -> Any:
        """A state of this kind. `ClipState` names the signal, which `QKClipState` has in its own
        name."""
        if kind is ClipState:
            fields = tuple({self.signal: x} if type(x) is dict else x for x in fields)
        return kind(*fields)

    def _fields(self, state: Any) -> list[Any]:
        """Undoes `_state`."""
        named = isinstance(state, ClipState)
        return [x[self.signal] if named and isinstance(x, dict) else x for x in state]

    def apply(self, params: Any, sown: Any, threshold: ArrayLike, *arguments: ArrayLike) -> Any:
        """From parameters to parameters."""
        every, blocks, touched, own = self._find(params, arguments)
        dtype, floor = _dtype(params), _floor(own)

        def clip(params, sown, threshold, arguments):
            decided = self._decide(blocks, sown, dtype, threshold, arguments, floor)
            by = decided.multipliers
            return {path: _multiple(param, by[path]) for path, param in params.items()}, None

        sown = self._pair(every, params, sown)
        return change_leaves(clip, touched, EVERY_ROLE, params, sown, threshold, arguments)[0]

    def _find(
        self, params: Any, arguments: Sequence[ArrayLike]
    ) -> tuple[tuple[Block, ...], list[Block], list[Block], Leaves]:
        """All blocks; those that are not frozen; these with no parts but those that are clipped;
        the leaves of such parts."""
        scaled = functools.partial(self._scaled, arguments)
        acts_on = scaled if self.acts_on == "factors" else lambda _: LOGIT_ROLES
        find = blocks_with_logits if self.signal == MAX_LOGITS else find_blocks
        every = with_frozen(find(self.layout, params), self.frozen, params, acts_on)
        blocks = [block for block in every if not block.is_frozen]
        touched: list[Block] = []
        before_softmax: list[Block] = []
        for block in blocks:
            roles = scaled(block)
            parts = tuple(part for part in block.parts if part.role in roles)
            touched.append(replace(block, parts=parts))
            if not roles.isdisjoint(LOGIT_ROLES):
                before_softmax.append(block)
        refuse_what_escapes(before_softmax, params)
        own = leaves_of(touched, EVERY_ROLE, params)
        for path, leaf in own.items():
            dtype = paths.dtype_of(leaf)
            if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
                raise TypeError(
                    f"{paths.show(path)} {jnp.shape(leaf)} is {dtype}, which cannot be "
                    f"scaled by factors near 1. Give {self.owner} the weights that it is quantized "
                    "from, float32 or at least 16 bits, or leave the block out with the layout's "
                    "block= pattern."
                )
        return every, blocks, touched, own

    def _scaled(self, arguments: Sequence[ArrayLike], block: Block) -> frozenset[Role]:
        """The roles of a block that the factors scale."""
        number = jax.ShapeDtypeStruct((), jnp.float32)
        gamma = jax.ShapeDtypeStruct(block.shape, jnp.float32)
        rule = functools.partial(self.factors, block)
        abstract = jax.eval_shape(rule, gamma, *(number for _ in arguments))
        _check_factors(self.owner, block, abstract)
        return frozenset(abstract)

    def _pair(self, blocks: Sequence[Block], params: Any, given: Any) -> dict[str, list[jax.Array]]:
        """What was sown in each block. Every value must find its block, unless the layout leaves
        out where it was sown."""
        signal = self.signal
        if all(block.is_frozen for block in blocks):
            return {}
        if given is None:
            raise ValueError(nothing_given(self.owner, signal, [block.name for block in blocks]))
        sown = read_signal(given, signal)
        found = pair(self.layout, blocks, params, sown)
        if found.strays:
            raise ValueError(
                f"{signal} were sown in {paths.show(found.strays[0])}, where the layout finds no "
                f"query and key kernels; it has {', '.join(found.modules)}. Sow in the attention "
                "module itself, or correct the layout."
            )
        for name, modules in found.modules.items():
            if not modules:
                how = "sow_max_logits, or sow_weights=True for Flax's attention"
                raise ValueError(
                    f"{name} has query and key kernels but sowed no {signal}; sown: "
                    f"{names(sown)}. Sow them in that module "
                    f"({how if signal == MAX_LOGITS else 'sow_signal'}), or leave the block out "
                    "with the layout's block= pattern."
                )
        return {name: [sown[path] for path in modules] for name, modules in found.modules.items()}

    def _decide(
        self,
        blocks: Sequence[Block],
        sown: Mapping[str, Sequence[jax.Array]],
        dtype: DTypeLike,
        threshold: ArrayLike,
        arguments: Sequence[ArrayLike],
        floor: float,
    ) -> "_Decided":
        for option, axes in self._axes():
            _check_bound(option, getattr(self, option), axes)
        maxima = {
            b.name: functools.reduce(
                jnp.maximum, (fit(b.name, b.shape, x, self.signal) for x in sown[b.name])
            )
            for b in blocks
        }
        maxima = largest_of_devices(maxima, self.axis_name)
        gamma = {
            name: clip_factor(s.astype(dtype), threshold, self.scope, floor)
            for name, s in maxima.items()
        }
        if self.scope == "layer" and self.heads_axis_name is not None:
            gamma = jax.lax.pmin(gamma, self.heads_axis_name)
        factors = {b.name: self.factors(b, gamma[b.name], *arguments) for b in blocks}
        return _Decided(maxima, gamma, multipliers(blocks, factors))

    def _axes(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        for option in ("axis_name", "heads_axis_name"):
            value = getattr(self, option)
            axes = (value,) if isinstance(value, str) else () if value is None else value
            if not isinstance(axes, tuple) or not all(isinstance(axis, str) for axis in axes):
                raise TypeError(
                    f"{option} must be the name of an axis, or a tuple of names, got {value!r}."
                )
            yield option, axes


def clip_factor(
    maxima: jax.Array, threshold: ArrayLike, scope: Scope = "head", floor: float = 0.0
) -> jax.Array:
    """γ = threshold / S for every head whose maximum S is finite and above it, else exactly 1.

    Args:
      maxima: `[..., heads]`. S <= 0, -inf (the head saw no key), NaN and +Inf give 1.
      threshold: τ > 0.
      scope: `"layer"` gives every head the smallest factor among the heads.
      floor: The smallest γ.

    Returns:
      γ in (0, 1], same shape, float32 or wider.
    """
    maxima = maxima.astype(accumulation_dtype(maxima.dtype))
    threshold = jnp.asarray(threshold, maxima.dtype)
    exceeds = jnp.isfinite(maxima) & (maxima > threshold)
    gamma = jnp.where(exceeds, jnp.maximum(threshold / jnp.where(exceeds, maxima, 1), floor), 1)
    if scope == "layer":
        gamma = jnp.broadcast_to(gamma.min(axis=-1, keepdims=True), gamma.shape)
    return gamma


def ineffective(
    count: jax.Array, before: jax.Array, gamma: jax.Array, maxima: jax.Array
) -> jax.Array:
    """How many clips in a row were without effect, once the maxima behind the last are seen.

    A clip by γ < 0.9 should bring S down to γ S. Where a step later it is above √γ S, less than
    half of that was done (of the logarithm): a later link undid it, or the logits are not made with
    these weights. One step's growth can hide a clip as well, but hardly three in a row: the logits
    would have to grow by more than 1/√γ in each.

    Args:
      count: The number so far, `[..., heads]`, int32.
      before: The maxima that the last clip saw, same shape.
      gamma: Its factors.
      maxima: Those of the step after it. NaN, Inf and -Inf tell nothing.
    """
    failed = (gamma < 0.9) & (maxima > jnp.sqrt(gamma) * before)
    return jnp.where(jnp.isfinite(maxima), jnp.where(failed, count + 1, 0), count)


class _Decided(NamedTuple):
    """All that a step's maxima decide, before any weight is touched."""

    maxima: dict[str, jax.Array]  # block name → [stack..., heads]
    gamma: dict[str, jax.Array]
    multipliers: dict[Path, jax.Array]  # parameter → broadcasts against it


def _next_state(state: Sequence[Any], decided: _Decided, counts: Sequence[jax.Array]) -> list[Any]:
    """The fields of `ClipState` after a step, from those before it."""
    maxima, gamma = jax.tree.map(lambda x: x.astype(jnp.float32), (decided.maxima, decided.gamma))
    maxima_before, gamma_before, _, nonfinite_before, lost_before, before = state
    clipped, nonfinite, lost = counts
    in_a_row = jax.tree.map(ineffective, before, maxima_before, gamma_before, maxima)
    return [maxima, gamma, clipped, nonfinite_before + nonfinite, lost_before + lost, in_a_row]


def check_signal(signal: Any) -> None:
    """Raises ValueError for what cannot be the name of `update`'s argument."""
    if not isinstance(signal, str) or not signal.isidentifier():
        raise ValueError(f"signal must be a name for an argument, got {signal!r}.")


def _check_threshold(threshold: Threshold, wanted: str) -> None:
    """Raises for what is no positive number and no schedule of such, at the steps 0, 1, 10, …"""
    is_right = lambda x: x > 0  # noqa: E731
    if not callable(threshold):
        check_number("threshold", threshold, is_right, wanted)
    else:
        with jax.ensure_compile_time_eval():
            for step in (0, *(10**n for n in range(7))):
                value = threshold(jnp.asarray(step, jnp.int32))
                check_number(f"threshold at step {step}", value, is_right, wanted)


def _check_factors(owner: str, block: Block, abstract: Any) -> None:
    if not isinstance(abstract, Mapping):
        raise TypeError(f"{owner}: factors must return a dict by role, got {abstract!r}.")
    for role, factor in abstract.items():
        part = block.part(role)
        if part is None:
            raise ValueError(
                f"{owner}: factors names the role {role!r}, which the layout does not give "
                f"{block.name}; it has {', '.join(part.role for part in block.parts)}."
            )
        wanted = (*part.stack, part.heads)
        if factor.shape != wanted:
            raise ValueError(
                f"{owner}: factors gives {role!r} of {block.name} the shape {factor.shape}; it "
                f"must be [stack..., heads] = {wanted}. With fewer key heads than query heads, "
                "reduce gamma over each group: "
                "gamma.reshape(*block.stack, block.kv_heads, -1).min(-1)."
            )
        if held := block.held(role):
            shown = ", ".join(f"{paths.show(path)} {block.shapes[path]}" for path in held)
            raise ValueError(
                f"{owner}: factors scales {role!r} of {block.name}, and frozen= holds {shown} of "
                f"it. Where block.held({role!r}) is not empty, let it leave this role out and give "
                "gamma to what trains; or leave the block out of the clip with "
                f"layouts.ignore({block.name!r})."
            )


def _check_bound(option: str, value: AxisName, axes: Sequence[str]) -> None:
    for axis in axes:
        try:
            jax.lax.axis_size(axis)
        except NameError:
            raise ValueError(
                f"{option}={value!r}: no jax.shard_map or jax.pmap around this call has an axis "
                f"{axis!r}. Under jax.jit leave {option} out: sharded arrays are whole there."
            ) from None


def _floor(params: Leaves) -> float:
    """The smallest γ with which weights stay normal numbers: half of the narrowest dtype's range of
    exponents, so that neither `γ w` nor, in a group of queries whose key is split, `w / γ` leaves
    it."""
    return max((float(jnp.finfo(x.dtype).tiny) ** 0.5 for x in params.values()), default=0.0)


def _floor_of_updates(params: Leaves, updates: Leaves) -> float:
    """The same where `p + u` makes `γ p` of numbers as large as p: by eight times the spacing of
    the coarsest dtype, what is left of p is right to a sixteenth."""
    spacings = (float(jnp.finfo(x.dtype).eps) for x in (*params.values(), *updates.values()))
    return max(_floor(params), 8 * max(spacings, default=0.0))


def _dtype(params: Any) -> DTypeLike:
    dtypes = [paths.dtype_of(leaf) for _, leaf in paths.leaves(params)]
    return accumulation_dtype(*(d for d in dtypes if jnp.issubdtype(d, jnp.floating)))


def _multiple(param: jax.Array, multiplier: jax.Array) -> jax.Array:
    dtype = accumulation_dtype(param.dtype)
    return (param.astype(dtype) * multiplier.astype(dtype)).astype(param.dtype)


def _lost_heads(
    touched: Sequence[Block], decided: _Decided, params: Leaves, updates: Leaves, clipped: Leaves
) -> Iterator[jax.Array]:
    """For each block, the clipped heads of which a half-precision kernel did not move as asked."""

    def lost(part: Part, heads: int) -> jax.Array:
        path = part.kernel
        before, after = (
            _rounded(params[path].astype(jnp.float32) + step[path], params[path].dtype)
            for step in (updates, clipped)
        )
        # Projected on the kernel itself, where rounding of single entries averages out.
        asked, moved = (
            part.sums(change * before)
            for change in ((1 - decided.multipliers[path]) * before, before - after)
        )
        short = jnp.abs(asked - moved) > 0.5 * jnp.abs(asked)
        return jnp.repeat(short, heads // part.heads, axis=-1)

    for block in touched:
        gamma = decided.gamma[block.name]
        half = [
            lost(part, gamma.shape[-1])
            for part in block.parts
            if jnp.finfo(params[part.kernel].dtype).bits < 32
        ]
        if half:
            yield functools.reduce(jnp.logical_or, half) & (gamma < 1)


def _rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x as numbers of this dtype. (XLA may leave out a conversion there and back.)"""
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


def _count(masks: Iterable[jax.Array]) -> jax.Array:
    return sum((mask.sum(dtype=jnp.int32) for mask in masks), start=jnp.zeros([], jnp.int32))
