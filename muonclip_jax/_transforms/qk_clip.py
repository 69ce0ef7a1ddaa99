"""QK-Clip: rescale the query and key weights of the heads whose logits grew too large.

Source: Su Jianlin, "QK-Clip" (spaces.ac.cn/archives/11126); Kimi K2 report, arXiv 2507.20534.
"""

import functools
from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from muonclip_jax._core import paths
from muonclip_jax._core.masks import Frozen
from muonclip_jax._core.maxima import AxisName
from muonclip_jax._core.options import check_choice, check_number
from muonclip_jax._core.sowing import MAX_LOGITS
from muonclip_jax._core.states import find_state
from muonclip_jax._layouts.blocks import Block, Layouts
from muonclip_jax._layouts.roles import KEY_ROLES, ROLES, SHARED_KEY_ROLES, Role
from muonclip_jax._transforms.clip import Clip, Scope, Threshold

Params = TypeVar("Params")
SharedKeys = Literal["untouched", "split"]


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
      ineffective_clips: For each block, int32 `[stack..., heads]`: how many clips by γ < 0.9 in a
        row were without effect, up to the last but one. A clip is when the next maximum is above
        √γ times the one that it saw: `log(S'/S) > ½ log γ`. At 3 something is wrong with the
        wiring, and `attention_report` flags the head: is the clip the last link of the chain, are
        the clipped parameters those that make the logits, are they frozen behind it?

    Example:
        >>> state = mc.qk_clip(layout).init(params)
        >>> state.max_logits["attn"]
        Array([-inf, -inf], dtype=float32)
    """

    max_logits: dict[str, jax.Array]
    gamma: dict[str, jax.Array]
    heads_clipped: jax.Array
    nonfinite_heads: jax.Array
    lost_heads: jax.Array
    ineffective_clips: dict[str, jax.Array]


def qk_clip(
    layout: Layouts,
    threshold: Threshold = 100.0,
    *,
    alpha: ArrayLike = 0.5,
    shared_keys: SharedKeys = "untouched",
    scope: Scope = "head",
    frozen: Frozen | None = None,
    axis_name: AxisName = None,
    heads_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips attention heads after the optimizer's own update: the last link of the chain.

    With S the largest logit of head h in this step's batch and `gamma = threshold / S` where
    S > threshold (else 1), the weights that the step arrives at are multiplied by

    | attention | query side | key side |
    | --- | --- | --- |
    | MHA | `gamma**alpha` | `gamma**(1-alpha)` |
    | GQA, MQA | `gamma` | untouched |
    | the same, `shared_keys="split"` | `gamma_h / kappa` | `kappa = min(gamma_h)**(1-alpha)` |
    | MLA | nope `gamma**alpha`, rope `gamma` | nope `gamma**(1-alpha)`, shared rope untouched |
    | any, `scope="layer"` | `gamma**alpha` | `gamma**(1-alpha)`, what heads share too |

    so that every head's logits scale by exactly its own `gamma` (the minimum is over the query
    heads that read the key). Biases scale with their kernel. Any Optax optimizer may come before
    it: `optax.chain(optax.adamw(1e-3), qk_clip(layout))` is AdamClip. For another signal than the
    logits, or other weights, see `clip_by_signal`.

    What heads share is not clipped, as the source has it for MLA's rope key: a clip per head that
    scales a shared key too lowers the logits of all heads that read it, also of those that were
    never above the threshold. A split key is lowered as well, and their queries are raised to make
    good for it; both drift with every clip, and none brings them back (50 clips by 0.8: the key at
    0.004 of its weights, an innocent query at 265 times its own).

    Any side that takes most of many clips becomes small, and its partner large: queries where keys
    are shared, MLA's q_rope, either side where `alpha` is far from ½. Updates do not shrink with
    it. Those of Adam, and of Muon by `"match_adam"`, have an RMS of about 0.2 η, so that weights of
    RMS w turn over in `w / (0.2 η)` steps of one direction, or the square of that of random ones.
    On the large side decay, ηλw a step, takes more than an update gives once w is above 0.2 / λ.
    `attention_report` flags such heads: `HeadReport.collapsed`.

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

    γ is never 0: at least 8 times the spacing of the coarsest dtype among these kernels and
    their updates (1e-6 in float32, 1/32 in bfloat16, 1/128 in float16). A head further above the
    threshold than that is clipped over several steps, and a split key lives on.

    It must be the last link. What stands behind it changes what it arrived at; such a clip is
    noticed by its lack of effect, `QKClipState.ineffective_clips`.

    It does not see what is frozen in front of it (`optax.partition`, `set_to_zero`): `frozen` says
    it. Nothing of that moves, and what is left takes all of γ, so that logits still scale by
    exactly γ. A side, queries or keys, is held as soon as one of its kernels or biases is frozen:

    | held | query side | key side |
    | --- | --- | --- |
    | keys, or they are another layer's (a layout without them) | `gamma` | frozen |
    | queries, each with a key head of its own | frozen | `gamma` |
    | the same, `scope="layer"` | frozen | `gamma`, also what heads share |
    | queries whose key heads share: GQA, MQA, MLA's rope | raises | |
    | both sides, while something that makes the logits trains | raises | |
    | all that makes the logits | left out, no maxima asked | |

    LoRA on a frozen base is of the last kind but one: `lora_b` alone scales a part of the logits.
    Of an adapter whose base trains too, `lora_b` and DoRA's magnitude scale with the kernel.

    Args:
      layout: Which parameters hold the queries and keys of which head; several layouts, as a
        list, for a model with several kinds of attention.
      threshold: τ > 0, in units of the logit; 100 in Kimi K2. Or an Optax schedule, from this
        link's own count of steps to τ: infinity clips nothing, so that `lambda step:
        jnp.where(step < 10_000, 100.0, jnp.inf)` ends the clip. Its values at the steps 0, 1, 10,
        …, 10⁶ are checked when it is built. The state is then a `ScheduledClipState`.
      alpha: The share of the factor that goes to the queries, in [0, 1], where a query head has a
        key of its own.
      shared_keys: What a key takes that several query heads read: `"untouched"`, nothing, whatever
        alpha is; or `"split"`, the share that its smallest factor leaves.
      scope: `"head"` clips each head by its own factor. `"layer"` is the first version of the
        method, kept for comparison: all heads of a layer take the layer's smallest factor, on all
        of their queries and keys, so heads that did nothing are clipped too.
      frozen: What nothing moves: a tree of bools like the parameters (True: frozen, as for
        `optax.freeze`; of the labels of `optax.partition` `jax.tree.map(lambda label: label ==
        "freeze", labels)`), a prefix of one, a function to one, or globs over the parameters'
        paths, `("embed/*", "layers/0/*")`.
      axis_name: Inside `jax.shard_map` or `jax.pmap`, the axes over which devices see other tokens
        of the same heads (data, context): the maxima are reduced over them.
      heads_axis_name: Inside `jax.shard_map`, the axes over which the heads themselves are spread
        (tensor parallelism): every device clips its own, and only the state's counts, and the
        smallest factor of `scope="layer"`, are taken over all. With `"split"`, the heads that share
        a key head must be on one device. Untouched are all keys that the layout lets heads share
        (`gqa`), even where this device has one query head a key: those of others may read it.

    Raises:
      TypeError: An option of the wrong type; kernels that are scaled and of whole numbers, or of
        less than 16 bits.
      ValueError: threshold <= 0, alpha outside [0, 1], unknown shared_keys or scope when built;
        when applied, what `find_blocks` raises, a QK-norm behind the projections, a parameter that
        enters the logits and has no role, a mask that hides a part of a block, heads of which so
        much is frozen that no clip can scale their logits, no `max_logits`, or maxima that do not
        pair with the blocks, each named; an axis that is not there.

    Example:
        >>> tx = optax.chain(optax.adamw(1e-3), mc.qk_clip(layout, threshold=0.01))
        >>> updates, state = tx.update(grads, tx.init(params), params, max_logits=sown)
        >>> int(mc.qk_clip_state(state).heads_clipped)
        2
    """
    clip = _built(
        "qk_clip", layout, threshold, alpha, shared_keys, scope, frozen, axis_name, heads_axis_name
    )
    return clip.transformation(QKClipState, threshold, alpha)


def apply_qk_clip(
    params: Params,
    max_logits: Any,
    layout: Layouts,
    threshold: ArrayLike = 100.0,
    *,
    alpha: ArrayLike = 0.5,
    shared_keys: SharedKeys = "untouched",
    scope: Scope = "head",
    frozen: Frozen | None = None,
    axis_name: AxisName = None,
    heads_axis_name: AxisName = None,
) -> Params:
    """The same clip as `qk_clip`, from parameters to parameters.

    For training loops without Optax, and for clipping a finished model once. Clips that
    rounding to half-precision parameters undoes are not counted here, nor clips without effect;
    `qk_clip` does. The smallest γ is 1e-19 (float16: 1/128), so that weights stay normal numbers.

    Args:
      params: The parameters, as for `find_blocks`.
      max_logits: The sown maxima, as for `read_max_logits`.
      layout: Which parameters hold the queries and keys of which head; several layouts, as a
        list, for a model with several kinds of attention.
      threshold: τ > 0.
      alpha: The share of the factor that goes to the queries, in [0, 1].
      shared_keys: `"untouched"` or `"split"`, see `qk_clip`.
      scope: `"head"` or `"layer"`, see `qk_clip`.
      frozen: What nothing moves, see `qk_clip`.
      axis_name: Inside `jax.shard_map` or `jax.pmap`, the axes of the data, see `qk_clip`.
      heads_axis_name: Inside `jax.shard_map`, the axes of the heads, see `qk_clip`.

    Returns:
      The parameters, same tree, dtypes and shardings; leaves that are no query or key are the
      same arrays.

    Raises:
      TypeError: As `qk_clip`.
      ValueError: As `qk_clip`.

    Example:
        >>> clipped = mc.apply_qk_clip(params, sown, layout, threshold=0.01)
        >>> clipped["attn"]["value"]["kernel"] is params["attn"]["value"]["kernel"]
        True
    """
    owner = "apply_qk_clip"
    if callable(threshold):
        raise TypeError("apply_qk_clip counts no steps: give the threshold of this one, a number.")
    clip = _built(
        owner, layout, threshold, alpha, shared_keys, scope, frozen, axis_name, heads_axis_name
    )
    return clip.apply(params, max_logits, threshold, alpha)


def qk_clip_state(opt_state: Any) -> QKClipState:
    """The `QKClipState` inside any Optax state (or `nnx.Optimizer.opt_state`), for logging.

    Args:
      opt_state: Any tree that holds one.

    Returns:
      It, with plain arrays for NNX's variables.

    Raises:
      ValueError: There is none, or more than one.

    Example:
        >>> state = mc.muonclip(1e-3, layout=layout).init(params)
        >>> mc.qk_clip_state(state).gamma["attn"]
        Array([1., 1.], dtype=float32)
    """
    return find_state(opt_state, QKClipState, "qk_clip")


def _built(
    owner: str, layout: Layouts, threshold: Threshold, alpha: ArrayLike, shared_keys: SharedKeys,
    scope: Scope, frozen: Frozen | None, axis_name: AxisName, heads_axis_name: AxisName,
) -> Clip:  # fmt: skip
    check_choice("shared_keys", shared_keys, get_args(SharedKeys))
    rule = (
        _factors_of_layers
        if scope == "layer"
        else functools.partial(
            _factors_of_heads,
            untouched=shared_keys == "untouched",
            keys_elsewhere=heads_axis_name is not None,
        )
    )
    clip = Clip(owner, layout, MAX_LOGITS, rule, scope, axis_name, heads_axis_name, frozen)
    clip.check(threshold)
    name = "alpha, the queries' share of the clip,"
    check_number(name, alpha, lambda x: 0 <= x <= 1, "in [0, 1]", owner)
    return clip


def _factors_of_layers(block: Block, gamma: jax.Array, alpha: ArrayLike) -> dict[Role, jax.Array]:
    """All heads of a layer have one γ: every query takes its share of it, and every key the other,
    also those that heads share."""
    alpha = jnp.asarray(alpha, gamma.dtype)
    factors: dict[Role, jax.Array] = {}
    for query, key in _meetings(block, staying=(), shared=False):
        alone = not (query and key)
        if query:
            factors[query] = gamma if alone else gamma**alpha
        if key and (part := block.part(key)):
            own = gamma[..., : part.heads]
            factors[key] = own if alone else own ** (1 - alpha)
    return factors


def _factors_of_heads(
    block: Block, gamma: jax.Array, alpha: ArrayLike, *, untouched: bool, keys_elsewhere: bool
) -> dict[Role, jax.Array]:
    """The table of `qk_clip`: a key takes κ, a query γ over what its partner takes. A key that all
    heads share takes nothing, nor do those of groups unless they are split: these are not among
    the factors, so no kernel of theirs is passed over.

    Where heads are spread by hand (`keys_elsewhere`), a device does not see whether heads of others
    read its keys; what the layout says decides.
    """
    shared = block.heads > block.kv_heads or (keys_elsewhere and block.layout.shared_keys)
    staying = (*SHARED_KEY_ROLES, *(KEY_ROLES if shared and untouched else ()))
    factors: dict[Role, jax.Array] = {}
    for query, key in _meetings(block, staying, shared):
        if query and key:
            factors[query], factors[key] = _split(block, gamma, alpha)
        elif side := query or key:
            factors[side] = gamma
    return factors


def _split(block: Block, gamma: jax.Array, alpha: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """What queries and keys take of γ where both do: γ/κ and κ, the smallest of a group's
    `γ ** (1 - alpha)`."""
    alpha = jnp.asarray(alpha, gamma.dtype)
    grouped = gamma.reshape(*block.stack, block.kv_heads, -1)
    smallest = grouped.min(axis=-1, keepdims=True)
    kappa = smallest ** (1 - alpha)
    # γ/κ; of the smallest γ to the last bit, since XLA does not make 1 of γ/γ.
    beside = jnp.where(grouped == smallest, smallest**alpha, grouped / kappa).reshape(gamma.shape)
    return beside, kappa.squeeze(-1)


def _meetings(
    block: Block, staying: Collection[Role], shared: bool
) -> Iterator[tuple[Role | None, Role | None]]:
    """Of each query and the key that it meets in the logits, those that are scaled: the one rule
    of which side takes γ. One of them has to.

    A side is scaled unless a part of it is frozen, or is not there. A key is not where it stays as
    it is, nor, if several query heads read it, without its queries: it has one factor, and they
    have several.

    Raises:
      ValueError: Neither can be scaled.
    """
    queries: dict[Role, None] = dict.fromkeys(part.role for part in block.queries)
    for query in queries:
        key = ROLES[query].partner
        with_query = not block.held(query)
        with_key = (
            key is not None
            and block.part(key) is not None
            and key not in staying
            and (with_query or not shared)
            and not block.held(key)
        )
        if not (with_query or with_key):
            raise ValueError(_nothing_to_scale(block, query, key))
        yield (query if with_query else None), (key if with_key else None)


def _nothing_to_scale(block: Block, query: Role, key: Role | None) -> str:
    frozen = ", ".join(f"{paths.show(path)} {block.shapes[path]}" for path in block.held(query))
    part = block.part(key) if key else None
    if part is None:
        why = "the layout has no keys that they meet"
    elif held := block.held(part.role):
        why = f"{', '.join(map(paths.show, held))} of their keys are frozen too"
    else:
        why = (
            f"several query heads read one head of {paths.show(part.kernel)} {part.shape}, which "
            "cannot take the factor of each"
        )
    return (
        f"{block.name}: frozen= holds {frozen}, the {query} of every head, and {why}: nothing is "
        "left that would scale each head's logits by its own factor. Let the queries train, or "
        "leave the block out of the clip: with frozen= for all that makes its logits, or "
        f"layouts.ignore({block.name!r})."
    )
