"""QuacK: learning rates of the query and key weights under which logits change as they first did.

Source: B. Anson and L. Aitchison, "Controlling changes to attention logits", arXiv 2511.21377.

Axis names:  stack  leading axes of scanned or vmapped layers, carried through
             heads  those of the part at hand: query heads, key heads, 1 where all share it
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from muonclip_jax._core import paths
from muonclip_jax._core.lapack import each_matrix
from muonclip_jax._core.meshes import in_auto_axes, specs_of
from muonclip_jax._core.options import is_concrete_number
from muonclip_jax._core.paths import Path
from muonclip_jax._core.states import find_state
from muonclip_jax._layouts.blocks import (
    Block,
    Layouts,
    as_layouts,
    find_blocks,
    multipliers,
)
from muonclip_jax._layouts.checks import refuse_qk_norm
from muonclip_jax._layouts.leaves import leaves_of
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import GAIN_ROLES, Role

QuackRule = Literal["paper", "normalized_min", "latent_norm", "fixed"]
Norm = Literal["frobenius", "spectral"]

PerRole = dict[str, jax.Array]  # role → [stack..., heads]
PerBlock = dict[str, PerRole]  # block name → ...

_PLAIN_ROLES = {"q", "k"}
_LATENT_ROLES = {"q_nope", "q_rope", "k_nope", "k_rope", "kv_down"}  # and q_down, if compressed
_PROJECTION_ROLES = {*_PLAIN_ROLES, *_LATENT_ROLES, "q_down"}

_POWER_ITERATIONS = 2  # per step, from where the last step left off
# Below this share of its first norm a matrix has collapsed: its next step is larger than itself,
# and the first-order changes that the factors are about no longer describe it.
_COLLAPSED = 1e-3


class QuackState(NamedTuple):
    """What `scale_by_quack` remembers; read it by name with `quack_state(opt_state)`.

    Attributes:
      initial_norms: For each attention block (by path) and role, the norms of the parameters
        that `init` was given, `[stack..., heads]`, float32 (float64 for float64 parameters).
        Never computed again: a restored checkpoint keeps them. Empty with `rule="fixed"`.
      factors: What the last update was multiplied by, same keys and shapes;
        `relative_learning_rate` before the first.
      vectors: With `norm="spectral"`, the leading right singular vectors,
        `[stack..., heads, features]`; else empty.
    """

    initial_norms: PerBlock
    factors: PerBlock
    vectors: PerBlock


def scale_by_quack(
    layout: Layouts,
    relative_learning_rate: jax.typing.ArrayLike = 1.0,
    norm: Norm = "frobenius",
    *,
    rule: QuackRule = "paper",
    floor: jax.typing.ArrayLike = 0.0,
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
      `gain - 1`. Attention
      without latents in the same model goes by the paper's rule.
    - `"fixed"`: τ for every query and key projection, the paper's baseline; no norms.

    Where it goes: on the final direction, after Muon's or Adam's preconditioning, which would
    undo a scaled gradient, and outside `optax.partition` and `optax.masked`, which hide a matrix's
    partners: `chain(partition(...), scale_by_quack(layout), add_decayed_weights(...),
    scale_by_learning_rate(...))`. Placed so, weight decay is not scaled (the paper does not say);
    placed after `add_decayed_weights`, it is.

    Norms are those of the parameters that `update` is given, before the step. A bias is one more
    input row of its projection (large key biases count) and its update is scaled like the
    kernel's; a gain is a diagonal matrix. A matrix smaller than 1/1000 of its first norm counts as
    that large: without a bound its partners' factors would become infinite, and steps larger than
    the matrix are no longer of first order. `floor` sets a higher one. Arithmetic is float32
    (float64 for float64 parameters), which holds products of three norms of any weights between
    1e-9 and 1e9; updates keep their dtype.

    Cost, under `jax.jit`: one read of the query and key kernels, from which all their parts are
    measured, and a multiplication fused into the update (steps with donated buffers may copy these
    kernels once); with `norm="spectral"` four reads for each part. No host synchronisation. Memory:
    two numbers per head and role, and a vector each for `"spectral"`.

    Kernels may be sharded in any way, on meshes with Auto and Explicit axes: updates keep their
    sharding, and on Explicit meshes the state is replicated. No kernel is gathered: each is summed
    over its inputs where it lies, and what travels is a few of its rows, for `"spectral"` columns
    as well (but `"spectral"`'s init, once, brings together heads that share an axis with others).
    Inside `jax.shard_map` and `jax.pmap` each device takes what it holds for the whole. That is
    right for whole kernels, and for plain attention whose heads are spread (the heads that share a
    key head on one device). It is wrong for kernels split along their inputs or features, and for
    multi-head latent attention with spread heads, whose shared matrices need the largest of all:
    update those outside, under `jax.jit`.

    Args:
      layout: Which kernels hold the queries and keys of which head.
      relative_learning_rate: τ > 0, the learning rate of queries and keys relative to that of
        the other parameters. For a schedule, wrap this function in `optax.inject_hyperparams`.
      norm: `"frobenius"`, as in the paper's runs, or `"spectral"`, by a power iteration that
        goes on from step to step. It follows the matrix from below: within 0.5% at random steps of
        1%; up to a quarter too low, for some tens of steps, where another direction takes over.
      rule: See above.
      floor: The smallest RMS entry that a matrix is taken to have, at initialisation and later:
        its norm counts as at least that of a random matrix with such entries. For models that
        start with queries or keys at zero: the standard deviation with which the others start.
        With more than that, factors follow no growth below it; with much less, the partners
        of what starts at zero hardly move for as long as it is small.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError: A function for a number, or what is no layout.
      ValueError: When built, τ <= 0, floor < 0, an unknown norm or rule; when applied, what
        `find_blocks` and `refuse_qk_norm` raise, a block without a role that the rule needs, no
        `params`; at init, a matrix that is zero (and no floor) or not finite. Under `jax.jit`
        values cannot be looked at: its initial norm is NaN, and so are its partners' updates.
    """
    as_layouts(layout)
    _check_options(relative_learning_rate, norm, rule, floor)

    roles = _scaled_roles(rule)

    def init(params: optax.Params) -> QuackState:
        blocks = _read_blocks(layout, params, rule)
        dtype = _dtype(params, blocks)

        def measure(params, floor):
            norms, vectors = _measure(params, blocks, rule, norm, floor, dtype, {})
            return _usable(norms, blocks), vectors

        own = leaves_of(blocks, roles, params)
        norms, vectors = in_auto_axes(measure, PartitionSpec())(own, floor)
        tau = jnp.asarray(relative_learning_rate, dtype)
        return QuackState(norms, _constant(blocks, roles, tau), vectors)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "scale_by_quack reads the norms of the weights: call "
                "tx.update(grads, state, params)."
            )
        blocks = _read_blocks(layout, params, rule)
        dtype = _dtype(params, blocks)

        def scale(updates, state, params, tau, floor):
            norms, vectors = _measure(params, blocks, rule, norm, floor, dtype, state.vectors)
            tau, first = jnp.asarray(tau, dtype), state.initial_norms
            if rule == "fixed":
                factors = _constant(blocks, roles, tau)
            else:
                factors = {name: _relative(rule, tau, norms[name], first[name]) for name in norms}
            by_path = multipliers(blocks, factors)
            scaled = {path: _multiply(u, by_path[path]) for path, u in updates.items()}
            return scaled, QuackState(first, factors, vectors)

        own = leaves_of(blocks, roles, updates)
        scaled, state = in_auto_axes(scale, (specs_of(own), PartitionSpec()))(
            own, state, leaves_of(blocks, roles, params), relative_learning_rate, floor
        )
        return paths.map_with_path(lambda path, u: scaled.get(path, u), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def quack_state(opt_state: Any) -> QuackState:
    """The `QuackState` inside any Optax state (or `nnx.Optimizer.opt_state`), for logging.

    Args:
      opt_state: Any tree that holds one.

    Returns:
      It, with plain arrays for NNX's variables.

    Raises:
      ValueError: There is none, or more than one.
    """
    return find_state(opt_state, QuackState, "scale_by_quack")


# Which parts, and what a rule needs


def _check_options(relative_learning_rate, norm, rule, floor):
    for name, value, choices in (("norm", norm, Norm), ("rule", rule, QuackRule)):
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}.")
    _check_number("relative_learning_rate", relative_learning_rate, lambda x: x > 0, "above 0")
    _check_number("floor", floor, lambda x: x >= 0, "at least 0")


def _check_number(name: str, value: Any, is_right: Callable[[Any], Any], wanted: str) -> None:
    if callable(value):
        raise TypeError(
            f"{name} must be a number; for a schedule wrap scale_by_quack in "
            "optax.inject_hyperparams."
        )
    if is_concrete_number(name, value) and not (is_right(value) and np.isfinite(value)):
        raise ValueError(f"{name} must be finite and {wanted}, got {value}.")


def _read_blocks(layout: Layouts, params: Any, rule: QuackRule) -> tuple[Block, ...]:
    blocks = find_blocks(layout, params)
    for block in blocks:
        _check_roles(block)
    if rule == "latent_norm":
        _check_gains(blocks)
    if rule != "fixed":  # which scales updates, and these count behind a norm as before it
        refuse_qk_norm(blocks)
    return blocks


def _check_roles(block: Block) -> None:
    given = {part.role for part in block.parts} & _PROJECTION_ROLES
    wanted = _LATENT_ROLES | (given & {"q_down"}) if block.latent else _PLAIN_ROLES
    if given != wanted:
        raise ValueError(
            f"{block.name}: the layout names the roles {sorted(given)}; QuacK needs the logits' "
            f"whole path from the input, {sorted(wanted)}. Add the missing pieces, or leave the "
            "block out with the layout's block= pattern."
        )


def _check_gains(blocks: Sequence[Block]) -> None:
    latent = [block for block in blocks if block.latent]
    if not latent:
        raise ValueError(
            f'{blocks[0].name}: rule="latent_norm" is for multi-head latent attention and its '
            'norms on the latents; here is none. Use rule="paper".'
        )
    for block in latent:
        wanted = {"kv_gain"} | ({"q_gain"} if block.part("q_down") else set())
        missing = wanted - {part.role for part in block.parts}
        if missing:
            raise ValueError(
                f'{block.name}: rule="latent_norm" needs the gains of the norms on the latents; '
                f"the layout names no {' and no '.join(sorted(missing))}. Name the norms: "
                'layouts.mla(..., query_norm="q_norm", key_value_norm="kv_norm"), or, if the model '
                'has none, use rule="paper".'
            )


def _scaled_roles(rule: QuackRule) -> set[Role]:
    """Of the parts whose updates the rule scales."""
    return _PROJECTION_ROLES | (set(GAIN_ROLES) if rule == "latent_norm" else set())


def _parts(block: Block, roles: Collection[Role]) -> list[Part]:
    return [part for part in block.parts if part.role in roles]


def _dtype(params: Any, blocks: Sequence[Block]) -> jnp.dtype:
    kernels = {part.kernel for block in blocks for part in block.parts}
    found = (leaf.dtype for path, leaf in paths.leaves(params) if path in kernels)
    return jnp.result_type(jnp.float32, *found)


# Norms


def _measure(
    params: Mapping[Path, jax.Array],
    blocks: Sequence[Block],
    rule: QuackRule,
    norm: Norm,
    floor: jax.typing.ArrayLike,
    dtype: jnp.dtype,
    vectors: PerBlock,
) -> tuple[PerBlock, PerBlock]:
    """The norms of all parts that the rule compares, and leading vectors to go on from."""
    if rule == "fixed":
        return {}, {}
    norms: PerBlock = {}
    new_vectors: PerBlock = {}
    for block in blocks:
        for part in _parts(block, _scaled_roles(rule)):
            arrays = [params[p].astype(dtype) for p in (part.kernel, part.bias) if p is not None]
            if norm == "frobenius":
                size = jnp.sqrt(sum(part.sums(jnp.square(x)) for x in arrays))
            elif part.role in GAIN_ROLES:
                size = jnp.abs(part.take(arrays[0])).max((-2, -1))
            else:
                vector = vectors.get(block.name, {}).get(part.role)
                size, vector = _spectral(part, arrays, vector)
                new_vectors.setdefault(block.name, {})[part.role] = vector
            smallest = floor * _size_of_noise(part, norm)
            norms.setdefault(block.name, {})[part.role] = jnp.maximum(size, smallest)
    return norms, new_vectors


def _spectral(
    part: Part, arrays: list[jax.Array], vector: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The largest singular value, from below, and its right vector `[stack..., heads, features]`.

    Products as multiply-and-sum: one read of the matrix in full precision on every backend.

    Args:
      part: Whose heads are the matrices.
      arrays: The kernel and, maybe, its bias as one more row.
      vector: Where to go on from; None starts from the exact vector.
    """
    if vector is None:
        vector = _leading_vector([part.take(x) for x in arrays])
    for _ in range(_POWER_ITERATIONS):
        images = [part.times_features(x, vector) for x in arrays]
        left = jnp.sqrt(sum(jnp.square(image).sum(-1, keepdims=True) for image in images))
        images = [image / jnp.where(left == 0, 1, left) for image in images]
        pulled = sum(part.times_inputs(x, i) for x, i in zip(arrays, images, strict=True))
        size = _length(pulled)
        # A matrix that is zero, or not finite, keeps the vector for when it is back.
        goes_on = (size > 0) & (size < jnp.inf)
        pulled = pulled / jnp.where(goes_on, size, 1)[..., None]
        vector = jnp.where(goes_on[..., None], pulled, vector)
    return size, vector


def _leading_vector(matrices: list[jax.Array]) -> jax.Array:
    """Of kernels, and biases with one input, `[stack..., heads, in, features]`."""
    multiply = functools.partial(jnp.einsum, "...if,...ig->...fg", precision="highest")
    vector = each_matrix(jnp.linalg.eigh, sum(multiply(m, m) for m in matrices))[1][..., -1]
    # Its sign is as the rounding of the Gram matrix has it; this one is the same everywhere.
    return jnp.where(vector.sum(-1, keepdims=True) < 0, -vector, vector)


def _length(vectors: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(vectors).sum(-1))


def _size_of_noise(part: Part, norm: Norm) -> float:
    """The norm that random entries of RMS 1 would give the part (its bias being one more row)."""
    rows, columns = part.matrix
    rows += part.bias is not None
    if norm == "frobenius":
        return math.sqrt(rows * columns)
    return 1.0 if part.role in GAIN_ROLES else math.sqrt(rows) + math.sqrt(columns)


def _usable(norms: PerBlock, blocks: Sequence[Block]) -> PerBlock:
    """Raises ValueError for an initial norm that is zero or not finite; NaN under tracing."""

    def check(norm: jax.Array, block: Block, role: str) -> jax.Array:
        usable = (norm > 0) & (norm < jnp.inf)
        if not isinstance(usable, jax.core.Tracer) and not usable.all():
            kernel = block.part(role).kernel
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
        block.name: {role: check(size, block, role) for role, size in norms[block.name].items()}
        for block in blocks
        if block.name in norms
    }


# Factors


def _constant(blocks: Sequence[Block], roles: Collection[Role], tau: jax.Array) -> PerBlock:
    return {
        block.name: {
            part.role: jnp.full((*part.stack, part.heads), tau) for part in _parts(block, roles)
        }
        for block in blocks
    }


def _relative(rule: QuackRule, tau: jax.Array, norms: PerRole, first: PerRole) -> PerRole:
    """`τ s₀ / s` for each role, `[stack..., heads]` of the role."""
    norms = {role: jnp.maximum(norms[role], _COLLAPSED * first[role]) for role in norms}
    now, then = _sensitivities(norms), _sensitivities(first)
    if rule == "paper":
        growth = {role: _largest(now[role]) / _largest(then[role]) for role in now}
    else:
        growth = {
            role: _largest(s / s_0 for s, s_0 in zip(now[role], then[role], strict=True))
            for role in now
        }
    return {role: jnp.broadcast_to(tau / growth[role], norms[role].shape) for role in norms}


def _sensitivities(norms: PerRole) -> dict[str, tuple[jax.Array, ...]]:
    """The table of `scale_by_quack`: s along each path from a matrix to the logits."""
    if "k_nope" in norms:
        return _latent_sensitivities(norms)
    q, k = norms["q"], norms["k"]
    grouped = q.reshape(*k.shape, -1)  # head h reads key h // group
    keys = jnp.broadcast_to(k[..., None], grouped.shape).reshape(q.shape)
    return {"q": (keys,), "k": (grouped.max(-1),)}


def _latent_sensitivities(norms: PerRole) -> dict[str, tuple[jax.Array, ...]]:
    uq, uk, qr, kr = (norms[role] for role in ("q_nope", "k_nope", "q_rope", "k_rope"))
    q_latent = norms.get("q_gain", norms.get("q_down", jnp.ones_like(kr)))
    kv_latent = norms.get("kv_gain", norms["kv_down"])
    any_head = functools.partial(jnp.max, axis=-1, keepdims=True)
    sensitivities = {
        "q_nope": (q_latent * uk * kv_latent,),
        "k_nope": (uq * q_latent * kv_latent,),
        "q_rope": (q_latent * kr,),
        "k_rope": (any_head(qr * q_latent),),
    }
    beyond = {
        "q": (any_head(uq * uk * kv_latent), any_head(qr * kr)),
        "kv": (any_head(uq * q_latent * uk),),
    }
    for latent, paths_beyond in beyond.items():
        gain, down = norms.get(f"{latent}_gain"), norms.get(f"{latent}_down")
        if gain is not None:
            sensitivities[f"{latent}_gain"] = paths_beyond
        if down is not None:
            # Behind a norm only the direction of the latent counts: relative changes of `down`.
            scale = 1 if gain is None else gain / down
            sensitivities[f"{latent}_down"] = tuple(scale * s for s in paths_beyond)
    return sensitivities


def _largest(arrays: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.maximum, arrays)


def _multiply(update: jax.Array, multiplier: jax.Array) -> jax.Array:
    # A factor of 1 leaves the bits, also of numbers that multiplication flushes to zero.
    return jnp.where(multiplier == 1, update, (update * multiplier).astype(update.dtype))
