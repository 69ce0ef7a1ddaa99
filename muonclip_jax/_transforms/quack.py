"""QuacK: learning rates of the query and key weights under which logits change as they first did.

Source: B. Anson and L. Aitchison, "Controlling changes to attention logits", arXiv 2511.21377.

Axis names:  stack  leading axes of scanned or vmapped layers, carried through
             heads  those of the part at hand: query heads, key heads, 1 where all share it
"""

import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._core import paths
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.masks import Frozen, check_frozen
from muonclip_jax._core.options import check_choice, check_number
from muonclip_jax._core.paths import Path
from muonclip_jax._core.states import check_same, find_state, without_parameters
from muonclip_jax._layouts.blocks import (
    Block,
    Layouts,
    as_layouts,
    blocks_with_logits,
    multipliers,
    with_frozen,
)
from muonclip_jax._layouts.checks import refuse_what_escapes
from muonclip_jax._layouts.leaves import change_leaves, leaves_of, read_leaves
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import (
    GAIN_ROLES,
    KEY_ROLES,
    LATENT_ROLES,
    QUERY_ROLES,
    ROLES,
    SHARED_KEY_ROLES,
    Role,
)

QuackRule = Literal["paper", "normalized_min", "latent_norm", "fixed"]

PerRole = dict[Role, jax.Array]  # role → [stack..., heads]
PerBlock = dict[str, PerRole]  # block name → ...

_PROJECTION_ROLES: set[Role] = {*QUERY_ROLES, *KEY_ROLES, *SHARED_KEY_ROLES, *LATENT_ROLES}
_VALUE_LATENTS = {ROLES[role].behind for role in KEY_ROLES}  # which values share with the keys
_QUERY_LATENTS = {ROLES[role].behind for role in QUERY_ROLES}  # which models may do without
_ROTARY = {each for key in SHARED_KEY_ROLES for each in (key, ROLES[key].partner)}  # or both

# Below this share of its first norm a matrix has collapsed: its next step is larger than itself,
# and the first-order changes that the factors are about no longer describe it.
_COLLAPSED = 1e-3


class QuackState(NamedTuple):
    """What `scale_by_quack` remembers; read it by name with `quack_state(opt_state)`.

    Attributes:
      initial_norms: For each attention block (by path) and role, the norms of the parameters
        that `init` was given, `[stack..., heads]`, float32 (float64 for float64 parameters).
        Never computed again: a restored checkpoint keeps them. Empty with `rule="fixed"`.
      factors: What the last update was multiplied by (where it was not frozen), same keys and
        shapes; `relative_learning_rate` before the first. (With `rule="fixed"` that of kv_down is
        1.)

    Example:
        >>> state = mc.scale_by_quack(layout).init(params)
        >>> state.initial_norms["attn"].keys()
        dict_keys(['q', 'k'])
    """

    initial_norms: PerBlock
    factors: PerBlock


def scale_by_quack(
    layout: Layouts,
    relative_learning_rate: ArrayLike = 1.0,
    *,
    rule: QuackRule = "paper",
    floor: ArrayLike = 0.0,
    frozen: Frozen | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the updates of queries and keys, per head, by the norms of what they meet.

    A step ΔW_Q changes the logits in proportion to ‖W_K‖, so the larger the keys have grown, the
    smaller the queries' step, and the other way round. With s(W) how far a unit change of W can
    move a logit, and s₀(W) the same at initialisation, the update of W is multiplied by
    `τ s₀(W) / s(W)`, τ being `relative_learning_rate`:

    | attention | W | s(W); names stand for norms |
    | --- | --- | --- |
    | MHA (Algorithm 1) | q | k |
    | | k | q |
    | GQA, MQA | q of each head | k of its group |
    | | k of each group | max over its heads of q |
    | MLA (Algorithm 2) | q_nope | q_down · k_nope · kv_down |
    | | k_nope | q_nope · q_down · kv_down |
    | | q_rope | q_down · k_rope |
    | | k_rope, shared | max over heads of q_rope · q_down |
    | | q_down, shared | max of: max over heads of q_nope · k_nope · kv_down; of q_rope · k_rope |
    | | kv_down, shared | max over heads of q_nope · k_nope · q_down |

    Several pieces of one role (streams that attend to one another, a second key projection) count
    as the largest of them, and take the same factor: a step ΔW_Q of one stream meets the keys of
    all, so it moves a logit by at most `‖x‖‖x'‖‖ΔW_Q‖` times the largest ‖W_K‖. A bias that stands
    by itself (`r_w_bias`) is one more input row of each.

    Without query compression q_down counts as 1. GQA is not in the paper; its keys are treated as
    the paper treats MLA's shared matrices, and with one query head per key head it is Algorithm 1.
    Values, outputs and gates are not touched.

    To first order a head's logit then changes by at most
    `η τ ‖x‖‖x'‖ (‖K₀‖‖O_Q‖ + ‖Q₀‖‖O_K‖) / sqrt(head_features)` a step (Lemma 1), however far the
    weights have grown; O is the update given and η the learning rate.

    The rules:

    - `"paper"`: the table.
    - `"normalized_min"`: q_down's two paths are products of three norms and of two, of which the
      paper takes the larger; this compares each with its own start, `max(path₁ / path₁₀,
      path₂ / path₂₀)`, so that neither exceeds it. Never larger than the paper's factor, and the
      same for everything else.
    - `"latent_norm"`: for MLA with RMSNorm on the latents, as in DeepSeek. Behind the norm the
      scale of q_down and kv_down cancels, so the paper's factors damp growth that the logits never
      see. Here the norms' gains (q_gain, kv_gain) stand for q_down and kv_down in the table. A
      change of a down-projection counts relative to its size: `s(q_down) = q_gain / q_down ·` its
      entry, and kv_down likewise; their factors rise with their own norms, which weight decay
      should hold. The gains' updates are scaled as well, by the entries alone. Paths are compared
      as in `"normalized_min"`. Gains are taken as they multiply: not for norms that store
      `gain - 1`. Attention without latents in the same model goes by the paper's rule. With a
      clip of queries and keys behind it factors of the down-projections have no bound: at thirty
      times the best rate four of five runs overflowed, which neither alone does (`mla_norm` in
      docs/explanation/studies.md).
    - `"fixed"`: a lower learning rate for queries and keys, the paper's baseline; no norms. τ for
      every projection on the way to a query or a key, MLA's q_down and k_rope among them. Only
      kv_down keeps its rate, since values come from it as well: its factor is 1. (A rate multiplies
      the decay, too: place it after `add_decayed_weights`, as `quack` does.)

    Where it goes: on the final direction, after Muon's or Adam's preconditioning, which would
    undo a scaled gradient, and outside `optax.partition` and `optax.masked`, which hide a matrix's
    partners: `chain(partition(...), scale_by_quack(layout), add_decayed_weights(...),
    scale_by_learning_rate(...))`. Placed so, weight decay is not scaled (the paper does not say);
    placed after `add_decayed_weights`, it is.

    Norms are Frobenius norms, as in the paper's runs, of the parameters that `update` is given,
    before the step. A bias is one more input row of its projection (large key biases
    count) and its update is scaled like the kernel's; a gain is a diagonal matrix. A matrix smaller
    than 1/1000 of its first norm counts as that large: without a bound its partners' factors would
    become infinite, and steps larger than the matrix are no longer of first order. `floor` sets a
    higher one. Arithmetic is float32
    (float64 for float64 parameters), which holds products of three norms of any weights between
    1e-9 and 1e9; updates keep their dtype.

    Cost, under `jax.jit`: one read of the query and key kernels, from which all their parts are
    measured, and a multiplication fused into the update (steps with donated buffers may copy these
    kernels once). No host synchronisation. Memory: two numbers per head and role.

    Kernels may be sharded in any way, on meshes with Auto and Explicit axes: updates keep their
    sharding, and on Explicit meshes the state is replicated. No kernel is gathered: each is summed
    over its inputs where it lies, and what travels is a few of its rows.
    Inside `jax.shard_map` and `jax.pmap` each device takes what it holds for the whole. That is
    right for whole kernels, and for plain attention whose heads are spread (the heads that share a
    key head on one device). It is wrong for kernels split along their inputs or features, and for
    multi-head latent attention with spread heads, whose shared matrices need the largest of all:
    update those outside, under `jax.jit`.

    Args:
      layout: Which kernels hold the queries and keys of which head.
      relative_learning_rate: τ > 0, the learning rate of queries and keys relative to that of
        the other parameters. For a schedule, wrap this function in `optax.inject_hyperparams`.
      rule: See above.
      floor: The smallest RMS entry that a matrix is taken to have, at initialisation and later:
        its norm counts as at least that of a random matrix with such entries. For models that
        start with queries or keys at zero: the standard deviation with which the others start.
        With more than that, factors follow no growth below it; with much less, the partners
        of what starts at zero hardly move for as long as it is small.
      frozen: What nothing moves, as in `qk_clip`. Its updates are not scaled, and its norms count
        as they are: what meets frozen weights only has the factor τ. Blocks of which all that makes
        the logits is frozen are left out.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError: A function for a number, or what is no layout; at init, queries or keys that are
        not floating point, or shapes alone (`jax.eval_shape(tx.init, params)` takes those).
      ValueError: When built, τ <= 0, floor < 0, an unknown rule; when applied, what
        `find_blocks` raises, a QK-norm, a parameter without a role that enters the logits, a block
        without a role that the rule needs, no `params`; at init, a matrix that is zero (and no
        floor) or not finite. Under `jax.jit` values cannot be looked at: its initial norm is NaN,
        and so are its partners' updates.

    Example:
        >>> tx = optax.chain(optax.scale_by_adam(), mc.scale_by_quack(layout, 0.5))
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> mc.quack_state(state).factors["attn"]["k"]
        Array([0.5, 0.5], dtype=float32)
    """
    _check_options(layout, relative_learning_rate, rule, floor)
    check_frozen(frozen)
    gains: set[Role] = set(GAIN_ROLES) if rule == "latent_norm" else set()
    roles = _PROJECTION_ROLES | gains

    def measure(params, blocks: Sequence[Block], floor: ArrayLike, dtype: DTypeLike) -> PerBlock:
        if rule == "fixed":
            return {}
        return _per_role(blocks, roles, lambda parts: _norm(parts, params, floor, dtype))

    def init(params: optax.Params) -> QuackState:
        if paths.holds_nothing(params):
            return without_parameters(QuackState)
        blocks = _read_blocks(layout, params, rule, frozen)
        _check_measurable(leaves_of(blocks, roles, params))
        dtype = _dtype(params, blocks)

        def usable_norms(params, floor):
            return _usable(measure(params, blocks, floor, dtype), blocks)

        norms = read_leaves(usable_norms, blocks, roles, params, floor)
        return QuackState(
            norms, _constant(blocks, roles, rule, jnp.asarray(relative_learning_rate, dtype))
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "scale_by_quack reads the norms of the weights: call "
                "tx.update(grads, state, params)."
            )
        blocks = _read_blocks(layout, params, rule, frozen)
        dtype = _dtype(params, blocks)

        def scale(updates, first, params, tau, floor):
            norms, tau = measure(params, blocks, floor, dtype), jnp.asarray(tau, dtype)
            factors = {name: _relative(rule, tau, norms[name], first[name]) for name in norms}
            factors = factors or _constant(blocks, roles, rule, tau)
            by_path = multipliers(blocks, factors)
            scaled = {path: _multiply(u, by_path[path]) for path, u in updates.items()}
            return scaled, QuackState(first, factors)

        own, first = leaves_of(blocks, roles, params), state.initial_norms
        # Without shardings: on Explicit meshes those would have to go together.
        plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), own)
        wanted = jax.eval_shape(lambda own: measure(own, blocks, floor, dtype), plain)
        check_same("initial norms", first, wanted, "the layout, the rule or the parameters")
        tau = relative_learning_rate
        return change_leaves(scale, blocks, roles, updates, first, own, tau, floor)

    return optax.GradientTransformationExtraArgs(init, update)


def quack_state(opt_state: Any) -> QuackState:
    """The `QuackState` inside any Optax state (or `nnx.Optimizer.opt_state`), for logging.

    Args:
      opt_state: Any tree that holds one.

    Returns:
      It, with plain arrays for NNX's variables.

    Raises:
      ValueError: There is none, or more than one.

    Example:
        >>> state = mc.quack(1e-3, layout=layout).init(params)
        >>> mc.quack_state(state).factors["attn"]["q"]
        Array([1., 1.], dtype=float32)
    """
    return find_state(opt_state, QuackState, "scale_by_quack")


def _check_options(layout: Layouts, relative_learning_rate: Any, rule: Any, floor: Any) -> None:
    as_layouts(layout)
    check_choice("rule", rule, get_args(QuackRule))
    for name, value, least, wanted in (
        ("relative_learning_rate", relative_learning_rate, operator.gt, "above 0"),
        ("floor", floor, operator.ge, "at least 0"),
    ):
        is_right = functools.partial(lambda least, x: least(x, 0) and np.isfinite(x), least)
        check_number(name, value, is_right, f"finite and {wanted}", "scale_by_quack")


# Which parts, and what a rule needs


def _read_blocks(
    layout: Layouts, params: Any, rule: QuackRule, frozen: Frozen | None
) -> tuple[Block, ...]:
    every = with_frozen(blocks_with_logits(layout, params), frozen, params)
    blocks = tuple(block for block in every if not block.is_frozen)
    for block in blocks:
        _check_roles(block)
    if rule == "latent_norm" and blocks:
        _check_gains(blocks)
    if rule != "fixed":  # which scales updates, and these count behind a norm as before it
        refuse_what_escapes(blocks, params)
    return blocks


def _check_roles(block: Block) -> None:
    given = {part.role for part in block.parts} & _PROJECTION_ROLES
    for path in (path for part in block.parts for path, _ in part.adapters):
        raise ValueError(
            f"{paths.show(path)} {block.shapes[path]} is an adapter of a projection of "
            f"{block.name}, whose norm is that of both together, and which starts at zero: QuacK "
            "cannot follow it. Merge it into the kernel first, or leave the block out with the "
            "layout's block= pattern; a clip scales it with its kernel."
        )
    if not block.keys:
        raise ValueError(
            f"{block.name}: the layout has queries alone, with the roles {sorted(given)}; QuacK "
            "compares them with the keys that they meet, and these are another layer's or no "
            "parameters. Add their pieces, or leave the block out with layouts.ignore(...) in "
            "QuacK's layout; a clip takes it as it is."
        )
    plain: set[Role] = {role for role in _PROJECTION_ROLES if not _has_latents(role)}
    latent = _PROJECTION_ROLES - plain
    wanted = latent - (_QUERY_LATENTS - given) if block.latent else plain
    if not given & _ROTARY:
        wanted -= _ROTARY
    if given != wanted:
        raise ValueError(
            f"{block.name}: the layout names the roles {sorted(given)}; QuacK needs the logits' "
            f"whole path from the input, {sorted(wanted)}. Add the missing pieces, or leave the "
            "block out with the layout's block= pattern."
        )


def _has_latents(role: Role) -> bool:
    """Whether it is a role of multi-head latent attention."""
    partner = ROLES[role].partner
    return partner is None or any(ROLES[one].behind for one in (role, partner))


def _check_gains(blocks: Sequence[Block]) -> None:
    latent = [block for block in blocks if block.latent]
    if not latent:
        raise ValueError(
            f'{blocks[0].name}: rule="latent_norm" is for multi-head latent attention and its '
            'norms on the latents; here is none. Use rule="paper".'
        )
    for block in latent:
        given = {part.role for part in block.parts}
        missing = {role for role in GAIN_ROLES if ROLES[role].behind in given} - given
        if missing:
            raise ValueError(
                f'{block.name}: rule="latent_norm" needs the gains of the norms on the latents; '
                f"the layout names no {' and no '.join(sorted(missing))}. Name the norms: "
                'layouts.mla(..., query_norm="q_norm", key_value_norm="kv_norm"), or, if the model '
                'has none, use rule="paper".'
            )


def _per_role(
    blocks: Sequence[Block], roles: Collection[Role], fn: Callable[[list[Part]], jax.Array]
) -> PerBlock:
    found: PerBlock = {}
    for block in blocks:
        parts: dict[Role, list[Part]] = {}
        for part in block.parts:
            if part.role in roles:
                parts.setdefault(part.role, []).append(part)
        found[block.name] = {role: fn(several) for role, several in parts.items()}
    return found


def _constant(
    blocks: Sequence[Block], roles: Collection[Role], rule: QuackRule, tau: jax.Array
) -> PerBlock:
    """τ everywhere, but for what a lower rate of queries and keys leaves alone."""
    as_it_is = _VALUE_LATENTS if rule == "fixed" else set()

    def factor(parts: list[Part]) -> jax.Array:
        part = parts[0]
        value = jnp.ones_like(tau) if part.role in as_it_is else tau
        return jnp.full((*part.stack, part.heads), value)

    return _per_role(blocks, roles, factor)


def _dtype(params: Any, blocks: Sequence[Block]) -> DTypeLike:
    kernels = {part.kernel for block in blocks for part in block.parts}
    found = (leaf.dtype for path, leaf in paths.leaves(params) if path in kernels)
    return accumulation_dtype(*found)


# Norms


def _check_measurable(own: Mapping[Path, jax.Array]) -> None:
    """Raises for parameters of which no norm is a start."""
    paths.check_trainable("scale_by_quack", own)
    for path, leaf in own.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"scale_by_quack measures the parameters in init, and {paths.show(path)} "
                f"{leaf.shape} is a jax.ShapeDtypeStruct. For the state's shapes alone call "
                "jax.eval_shape(tx.init, params)."
            )


def _norm(
    parts: Sequence[Part], params: Mapping[Path, jax.Array], floor: ArrayLike, dtype: DTypeLike
) -> jax.Array:
    """The norm of each head, its bias being one more row; at least that of noise of RMS `floor`.

    Of several projections with one role the largest; biases that stand by themselves are one more
    row of each.
    """
    projections = [part for part in parts if not part.is_vector] or parts[:1]
    vectors = [part for part in parts if part not in projections]

    def norm(part: Part) -> jax.Array:
        leaves = [(part, part.kernel), (part, part.bias), *((one, one.kernel) for one in vectors)]
        squares = [
            one.sums(jnp.square(params[path].astype(dtype)))
            for one, path in leaves
            if path is not None
        ]
        size = jnp.sqrt(functools.reduce(operator.add, squares))
        rows, columns = part.matrix
        rows += (part.bias is not None) + len(vectors)
        return jnp.maximum(size, floor * math.sqrt(rows * columns))

    return functools.reduce(jnp.maximum, map(norm, projections))


def _usable(norms: PerBlock, blocks: Sequence[Block]) -> PerBlock:
    """Raises ValueError for an initial norm that is zero or not finite; NaN under tracing."""

    def check(norm: jax.Array, block: Block, part: Part) -> jax.Array:
        kernel, role = part.kernel, part.role
        usable = (norm > 0) & (norm < jnp.inf)
        if not isinstance(usable, Tracer) and not usable.all():
            where = [tuple(map(int, index)) for index in np.argwhere(~np.asarray(usable))]
            raise ValueError(
                f"{paths.show(kernel)} of shape {block.shapes[kernel]}: the {role} of {block.name} "
                f"has an initial norm of {float(norm[where[0]])} in {len(where)} of {norm.size} "
                f"heads (index {', '.join(map(str, where[:8]))}{', ...' * (len(where) > 8)}), to "
                "which no later norm can be compared. Initialise it to something finite other than "
                "zero, or give scale_by_quack floor=, the smallest RMS entry to count: the "
                "standard deviation with which the others start."
            )
        return jnp.where(usable, norm, jnp.nan)

    return {
        block.name: {
            role: check(norm, block, part)
            for role, norm in norms[block.name].items()
            if (part := block.part(role))
        }
        for block in blocks
        if block.name in norms
    }


# Factors


def _relative(rule: QuackRule, tau: jax.Array, norms: PerRole, first: PerRole) -> PerRole:
    """`τ s₀ / s` for each role, `[stack..., heads]` of the role."""
    norms = {role: jnp.maximum(norms[role], _COLLAPSED * first[role]) for role in norms}
    now, then = _sensitivities(norms), _sensitivities(first)
    largest = functools.partial(functools.reduce, jnp.maximum)
    if rule == "paper":
        growth = {role: largest(now[role]) / largest(then[role]) for role in now}
    else:
        growth = {
            role: largest([s / s_0 for s, s_0 in zip(now[role], then[role], strict=True)])
            for role in now
        }
    return {role: jnp.broadcast_to(tau / growth[role], norms[role].shape) for role in norms}


def _sensitivities(norms: PerRole) -> dict[Role, list[jax.Array]]:
    """The table of `scale_by_quack`: for each matrix s along each of its paths to the logit.

    A path is all that is multiplied in one of the logit's products, such as
    `q_down · q_nope · k_nope · kv_down` and `q_down · q_rope · k_rope`; s is the product of all
    others in it, the largest over the heads that share the matrix.
    """
    gains: dict[Role | None, Role] = {
        ROLES[role].behind: role for role in GAIN_ROLES if role in norms
    }
    heads = max(norm.shape[-1] for norm in norms.values())
    found: dict[Role, list[jax.Array]] = {role: [] for role in norms}
    for query in QUERY_ROLES:
        key = ROLES[query].partner
        if query not in norms or key is None:
            continue
        factors: tuple[Role | None, ...] = (ROLES[query].behind, query, key, ROLES[key].behind)
        # Behind a norm only its gain counts, and not the size of the latent.
        path: list[Role] = [gains.get(role, role) for role in factors if role and role in norms]
        for role in path:
            others = [_of_query_heads(norms[other], heads) for other in path if other != role]
            product = functools.reduce(operator.mul, others)
            *stack, own_heads = norms[role].shape
            product = jnp.broadcast_to(product, (*stack, heads)).reshape(*stack, own_heads, -1)
            found[role].append(product.max(-1))
    for down, gain in gains.items():
        # Behind a norm only the latent's direction counts: relative changes of `down`.
        if down in norms:
            found[down] = [norms[gain] / norms[down] * s for s in found[gain]]
    return found


def _of_query_heads(norm: jax.Array, heads: int) -> jax.Array:
    """Query head h reads key head h // group; what all heads share broadcasts."""
    own = norm.shape[-1]
    return jnp.repeat(norm, heads // own, axis=-1) if 1 < own < heads else norm


def _multiply(update: jax.Array, multiplier: jax.Array) -> jax.Array:
    # A factor of 1 leaves the bits, also of numbers that multiplication flushes to zero.
    return jnp.where(multiplier == 1, update, (update * multiplier).astype(update.dtype))
