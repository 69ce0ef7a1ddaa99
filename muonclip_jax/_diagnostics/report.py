"""Every head in numbers: what the clip saw, what its kernels and its keys are like."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from muonclip_jax._attention.max_logits import MAX_LOGITS, read_max_logits
from muonclip_jax._core.dtypes import accumulation_dtype, of_product
from muonclip_jax._core.masks import Frozen, check_frozen
from muonclip_jax._core.options import check_number
from muonclip_jax._core.paths import Path
from muonclip_jax._core.pictures import heat_map
from muonclip_jax._core.sowing import sown
from muonclip_jax._core.states import states_of
from muonclip_jax._core.tables import Mark, Readable, Sheet, number
from muonclip_jax._diagnostics.activations import KEYS, read_activations
from muonclip_jax._diagnostics.measures import (
    effective_rank,
    factored,
    participation_ratio,
    spectral_norm,
)
from muonclip_jax._layouts import roles
from muonclip_jax._layouts.blocks import Block, Layouts, blocks_with_logits, with_frozen
from muonclip_jax._layouts.leaves import Leaves, read_leaves
from muonclip_jax._layouts.roles import QUERY_ROLES, ROLES, Role
from muonclip_jax._layouts.sown import fit, pair
from muonclip_jax._orthogonalize.normalization import nonzero
from muonclip_jax._transforms.clip import INEFFECTIVE
from muonclip_jax._transforms.qk_clip import QKClipState, qk_clip_state

_READ_ROLES = (*QUERY_ROLES, *roles.KEY_ROLES, *roles.SHARED_KEY_ROLES, *roles.LATENT_ROLES)

# A softmax over logits within ±0.1 weighs no key more than exp(0.2) = 1.2 times another.
_SILENT = 0.1

# Beside a balanced head with the same logits, at a ratio of 100 one side is a tenth and the other
# ten times as large: updates of a given RMS turn the small one ten times as fast, and decay takes
# ten times as much of the large one. No initialization is near: what folds the softmax's scale
# into the queries makes them 1/16 of the keys, for heads of 256 features.
_COLLAPSED = 100.0


class HeadReport(NamedTuple):
    """One attention block, or a stack of them, in numbers.

    Attributes:
      max_logits: Largest logit in the batch, `[stack..., heads]`.
      gamma: The factor of the last clip, below 1 where it clipped, same shape; None without
        QK-Clip.
      query_norms: ‖W_q‖₂, same shape.
      key_norms: ‖W_k‖₂, `[stack..., key heads]`. None, as ranks and key_rms, where the layout has
        queries alone.
      ranks: Effective rank (gamma 1) of W_q W_kᵀ, which the logits are made with,
        `[stack..., heads]`; at most head_features.
      key_participation_ratios: Participation ratio (of singular values) of the keys over tokens,
        `[stack..., key heads]`; None unless keys were sown.
      above: bool `[stack..., heads]`: the largest logit is above the threshold. QK-Clip handles
        such a head.
      exploding: bool `[stack..., heads]`: QK-Clip does not hold the head. Its largest logit is NaN
        or +Inf; or it is above the threshold, the last clip in `opt_state` clipped it (γ < 1), and
        it is larger than the one which that clip saw. So it can only be told from maxima that
        come after that clip: of the next step, with the state from before its update, or of an
        evaluation. Without these, or without QK-Clip, it means NaN or +Inf.
      dead: bool `[stack..., heads]`: the head reads all its tokens alike. Its largest logit is
        within ±0.1, and so is whatever its kernels make of inputs of RMS 1,
        `‖W_q W_kᵀ‖₂ · in / sqrt(head_features) < 0.1`.
      ineffective: bool `[stack..., heads]`: three clips in a row or more were without effect
        (`QKClipState.ineffective_clips`). Is the clip the last link of the chain? Are the clipped
        parameters those that make the logits, and not frozen behind the clip? False without
        QK-Clip.
      query_rms: RMS of the entries of the head's query kernel, `[stack..., heads]`; of MLA the
        smaller of its nope and rope pieces. Adam's updates, and Muon's with `"match_adam"`, have an
        RMS of about 0.2 η: over this number it is the step relative to the weights.
      key_rms: The same of the keys, `[stack..., key heads]`.
      collapsed: bool `[stack..., heads]`: of a query piece and the key piece that it meets (of MLA
        nope and rope each by itself) one has less than a hundredth of the other's RMS, or is zero.
        Many clips that are not shared alike do that: `shared_keys="split"`, or `alpha` far from ½;
        so does a side that starts at zero. See `qk_clip` for what follows.
      frozen: bool `[stack..., heads]`: all that makes the head's logits is frozen, so no clip holds
        it, also where it is above the threshold.

    Example:
      >>> heads = mc.attention_report(params, None, sown, layout).blocks["attn"]
      >>> heads.above.tolist(), heads.ranks.shape
      ([False, False], (2,))
    """

    max_logits: jax.Array
    gamma: jax.Array | None
    query_norms: jax.Array
    key_norms: jax.Array | None
    ranks: jax.Array | None
    key_participation_ratios: jax.Array | None
    above: jax.Array
    exploding: jax.Array
    dead: jax.Array
    ineffective: jax.Array
    query_rms: jax.Array
    key_rms: jax.Array | None
    collapsed: jax.Array
    frozen: jax.Array


class _Quantity(NamedTuple):
    """How the heads of a layer are shown: as one scalar, and with a header in the table."""

    field: str
    header: str | None
    name: str
    reduce: Callable[[np.ndarray], Any]


_QUANTITIES = (
    _Quantity("max_logits", "max logit", "max_logit", np.max),
    _Quantity("gamma", "γ", "gamma", np.min),
    _Quantity("query_norms", "‖W_q‖₂", "query_norm", np.max),
    _Quantity("key_norms", "‖W_k‖₂", "key_norm", np.max),
    _Quantity("ranks", "rank of W_q W_kᵀ", "rank", np.mean),
    _Quantity("key_participation_ratios", "PR of keys", "key_participation_ratio", np.mean),
    _Quantity("query_rms", None, "query_rms", np.min),
    _Quantity("key_rms", None, "key_rms", np.min),
)
_FLAGS = (
    _Quantity("above", "above", "above", np.sum),
    _Quantity("exploding", "exploding", "exploding", np.sum),
    _Quantity("dead", "dead", "dead", np.sum),
    _Quantity("ineffective", "clips without effect", "ineffective", np.sum),
    _Quantity("collapsed", "collapsed", "collapsed", np.sum),
    _Quantity("frozen", "frozen", "frozen", np.sum),
)
_NOTES = {
    "ineffective": "clips without effect: three in a row, and the next largest logit was not even "
    "half as far down as it should be. Is the clip the last link of the chain? Do the clipped "
    "parameters make the logits? Are they frozen, or restored, behind the clip?",
    "collapsed": "collapsed: one side of the logits, queries or keys, has less than a hundredth of "
    "the other's RMS. Updates of a given RMS soon turn the small side over, and weight decay takes "
    "more of the large one than updates give. Is alpha near ½, and shared_keys untouched?",
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class AttentionReport(Readable):
    """What `attention_report` found. A pytree, so `jax.jit` may return it; outside of it,
    `print` and `rich.print` show a table of layers, a notebook also a map of all heads, and
    `scalars` are for a logger.

    Attributes:
      blocks: A `HeadReport` for each attention block, by path.

    Example:
      >>> report = mc.attention_report(params, None, sown, layout)
      >>> report.scalars()["above/attn"]
      0.0
    """

    blocks: dict[str, HeadReport]

    def scalars(self) -> dict[str, float]:
        """Each layer in a few numbers, over its heads: `{"max_logit/layers/attn/3": 41.2, ...}`.

        Largest max logit, smallest gamma, largest norms, mean rank and participation ratio,
        smallest RMS of query and key weights, and how many heads are above the threshold,
        exploding, dead, clipped without effect and collapsed. One transfer from the device.
        """
        return {
            f"{quantity.name}/{layer}": float(quantity.reduce(values))
            for layer, heads in self._layers()
            for quantity in (*_QUANTITIES, *_FLAGS)
            if (values := getattr(heads, quantity.field)) is not None
        }

    def __repr__(self) -> str:
        heads = {name: list(block.max_logits.shape) for name, block in self.blocks.items()}
        return f"AttentionReport(heads={heads})"

    def _sheets(self) -> list[Sheet]:
        rows = list(self._layers())
        shown = [
            q
            for q in _QUANTITIES
            if q.header and any(getattr(heads, q.field) is not None for _, heads in rows)
        ]
        notes = [
            note
            for flag, note in _NOTES.items()
            if any(getattr(heads, flag).any() for _, heads in rows)
        ]
        caption = "\n".join(["lowest … highest of a layer's heads", *notes])
        numbers = [quantity.header or "" for quantity in shown]
        cells = [
            (layer, *(extent(getattr(heads, q.field)) for q in shown), _flags(heads))
            for layer, heads in rows
        ]
        marks: list[Mark] = [
            "bad" if heads.exploding.any() else "look" if _flags(heads) else "" for _, heads in rows
        ]
        headers = ("layer", *numbers, "look at")
        return [Sheet(headers, cells, caption=caption, numbers=numbers, marks=marks)]

    def _picture(self) -> str:
        rows = dict(self._layers())
        return heat_map(
            {layer: np.asarray(heads.max_logits) for layer, heads in rows.items()},
            {layer: np.asarray(heads.above) for layer, heads in rows.items()},
            "largest logit of each head, framed above the threshold",
        )

    def _layers(self) -> Iterator[tuple[str, HeadReport]]:
        """Every layer by itself, on the host, `[heads]`."""
        for name, block in jax.device_get(self.blocks).items():
            for index, layer in layers(name, block.max_logits.shape[:-1]):
                yield layer, HeadReport._make(None if x is None else x[index] for x in block)


def attention_report(
    params: Any,
    opt_state: Any,
    intermediates: Any,
    layout: Layouts,
    *,
    threshold: ArrayLike = 100.0,
    frozen: Frozen | None = None,
) -> AttentionReport:
    """Reports every attention head in numbers: logits, clip, kernels, keys, and whether to worry.

    Works under `jax.jit` and outside; with `jax.lax.cond` at every N-th step of a jitted one. No
    host synchronisation. Computes in float32 (float64 for float64 parameters).

    W_q and W_k take the block's input to the head's queries and keys. Of MLA they are multiplied
    out, `W_q = q_down · [q_nope | q_rope]` and `W_k = [kv_down · k_nope | k_rope]`. Biases, norms
    on latents, adapters, QK-norm and positions are left out. Of several streams W_q and W_k are
    those of all, one above the other. W_q W_kᵀ is never formed: with `W = Q R` by
    Householder, its singular values are those of `R_q R_kᵀ`, `[head_features, head_features]`.

    Cost, with f = head_features: for each query and key head a QR of `[in, f]` and an SVD of
    `[f, f]`, and one SVD more for the product; of MLA also as much as projecting `in` tokens up.
    With keys, for each key head, a QR of `[tokens, f]` and an SVD. For layers 768 wide with 12
    heads on two CPU cores that is 0.5% of their forward and backward pass over 8192 tokens, and
    2.6% with the keys of all of these. Scanned layers are taken one by one: the memory is that of
    one.

    Args:
      params: The parameters.
      opt_state: The optimizer's state, for the last clip if there is a `qk_clip` in it; or None.
      intermediates: What the forward pass sowed: max logits (`sow_max_logits`), and keys, if it did
        (`sow_activations(self, keys=k)`). None, or without max logits: those of the last clip.
      layout: Where the heads are; several layouts as a list. A QK-norm is no obstacle.
      threshold: The clip's, to say which heads are above it.
      frozen: What nothing moves, as in `qk_clip`.

    Returns:
      An `AttentionReport`. On a mesh its arrays are replicated.

    Raises:
      TypeError, ValueError: What `find_blocks` and `read_max_logits` raise; a block without max
        logits; keys that belong to no block or do not fit its heads.

    Example:
      >>> tx = mc.qk_clip(layout, threshold=100.0)
      >>> report = mc.attention_report(params, tx.init(params), sown, layout, threshold=100.0)
      >>> list(report.blocks)
      ['attn']
    """
    check_number("threshold", threshold, lambda x: x > 0, "above 0")
    check_frozen(frozen)
    blocks = blocks_with_logits(layout, params)
    still = {block.name for block in with_frozen(blocks, frozen, params) if block.is_frozen}
    clip = _last_clip(opt_state)
    gamma, clipped = (clip.gamma, clip.max_logits) if clip else ({}, {})
    counts = clip.ineffective_clips if clip else {}

    def by_block(values: Mapping[Path, jax.Array]) -> dict[str, list[jax.Array]]:
        modules = pair(layout, blocks, params, values).modules
        return {name: [values[path] for path in paths] for name, paths in modules.items()}

    if _has(intermediates, MAX_LOGITS) or clip is None:
        maxima = by_block(read_max_logits(intermediates))
    else:
        maxima = {name: [values] for name, values in clipped.items()}
    _check_maxima(blocks, maxima)
    keys = by_block(read_activations(intermediates, KEYS)) if _has(intermediates, KEYS) else None
    seen = {
        b.name: _Seen(
            maxima[b.name],
            None if keys is None else _keys(b, keys[b.name]),
            gamma.get(b.name),
            clipped.get(b.name),
            counts.get(b.name, jnp.zeros(b.shape, jnp.int32)),
            jnp.full(b.shape, b.name in still),
        )
        for b in blocks
    }
    if keys is not None and all(each.keys is None for each in seen.values()):
        raise ValueError(
            f"attention_report: the {KEYS} sown are in no block of the layout; it has "
            f"{', '.join(seen)}."
        )

    def report(leaves, seen, threshold):
        return {b.name: _head_report(b, leaves, seen[b.name], threshold) for b in blocks}

    return AttentionReport(read_leaves(report, blocks, _READ_ROLES, params, seen, threshold))


class _Seen(NamedTuple):
    """What forward passes said of one block."""

    maxima: list[jax.Array]  # of every module in it that sowed
    keys: jax.Array | None
    gamma: jax.Array | None  # of the last clip
    clipped: jax.Array | None  # the maxima that this clip saw
    ineffective: jax.Array  # how many clips in a row had no effect
    frozen: jax.Array


def _head_report(block: Block, leaves: Leaves, seen: _Seen, threshold: ArrayLike) -> HeadReport:
    numbers = _of_kernels(_pieces(block, leaves))
    maxima = reduce(
        jnp.maximum, (fit(block.name, block.shape, each, MAX_LOGITS) for each in seen.maxima)
    )
    above = maxima > threshold
    exploding = jnp.isnan(maxima) | (maxima == jnp.inf)
    if seen.gamma is not None and seen.clipped is not None:
        rising = maxima.astype(seen.clipped.dtype) > seen.clipped
        exploding |= above & (seen.gamma < 1) & rising
    return HeadReport(
        max_logits=maxima,
        gamma=seen.gamma,
        query_norms=numbers.query_norms,
        key_norms=numbers.key_norms,
        ranks=numbers.ranks,
        key_participation_ratios=None if seen.keys is None else participation_ratio(seen.keys),
        above=above,
        exploding=exploding,
        dead=(jnp.abs(maxima) < _SILENT) & (numbers.reach < _SILENT),
        ineffective=seen.ineffective >= INEFFECTIVE,
        query_rms=numbers.query_rms,
        key_rms=numbers.key_rms,
        collapsed=numbers.collapsed,
        frozen=seen.frozen,
    )


def _pieces(block: Block, leaves: Leaves) -> dict[Role, jax.Array]:
    """The kernels by role. Those of several streams are one above the other, as if a token were
    the inputs of all, zero but for its own."""
    found: dict[Role, jax.Array] = {}
    for part in block.parts:
        if part.role in _READ_ROLES and not part.is_vector:
            kernel = part.take(leaves[part.kernel])
            above = found.get(part.role)
            found[part.role] = kernel if above is None else jnp.concatenate([above, kernel], -2)
    return found


class _KernelNumbers(NamedTuple):
    query_norms: jax.Array
    key_norms: jax.Array | None
    ranks: jax.Array | None
    reach: jax.Array  # how large a logit inputs of RMS 1 can make
    query_rms: jax.Array
    key_rms: jax.Array | None
    collapsed: jax.Array


@jax.jit
def _of_kernels(pieces: Mapping[Role, jax.Array]) -> _KernelNumbers:
    """Of pieces `[stack..., heads, in, features]`, layer by layer."""
    stack = next(iter(pieces.values())).shape[:-3]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-3:]), pieces)
    numbers = jax.lax.map(_of_layer, flat)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), numbers)


def _of_layer(pieces: Mapping[Role, jax.Array]) -> _KernelNumbers:
    if not _meeting(pieces):
        return _of_queries(pieces)
    sizes = [(_rms(pieces[query]), _rms(pieces[key])) for query, key in _meeting(pieces)]
    ratios = [q / jnp.repeat(k, len(q) // len(k), axis=0) for q, k in sizes]
    far = [(ratio < 1 / _COLLAPSED) | (ratio > _COLLAPSED) for ratio in ratios]
    query_rms, key_rms = (reduce(jnp.minimum, side) for side in zip(*sizes, strict=True))
    queries, keys = query_key_matrices(pieces)
    (r_q, scale_q), (r_k, scale_k) = factored(queries), factored(keys)
    group = len(queries) // len(keys)
    product = _matmul(r_q, jnp.repeat(r_k, group, axis=0).mT)
    scale = scale_q * jnp.repeat(scale_k, group, axis=0)
    inputs = math.sqrt(queries.shape[-2] * keys.shape[-2])
    return _KernelNumbers(
        query_norms=spectral_norm(r_q) * scale_q[:, 0],
        key_norms=spectral_norm(r_k) * scale_k[:, 0],
        ranks=effective_rank(product),
        reach=spectral_norm(product) * scale[:, 0] * inputs / math.sqrt(queries.shape[-1]),
        query_rms=query_rms,
        key_rms=key_rms,
        collapsed=reduce(jnp.logical_or, far),
    )


def _of_queries(pieces: Mapping[Role, jax.Array]) -> _KernelNumbers:
    """Of queries whose keys are another layer's: what they make is not known."""
    queries: list[Role] = [role for role in QUERY_ROLES if role in pieces]
    r_q, scale_q = factored(_side(pieces, queries))
    norms = spectral_norm(r_q) * scale_q[:, 0]
    rms = reduce(jnp.minimum, (_rms(pieces[role]) for role in queries))
    unknown = jnp.full_like(norms, jnp.inf)
    return _KernelNumbers(norms, None, None, unknown, rms, None, jnp.zeros_like(norms, bool))


def _meeting(pieces: Mapping[Role, jax.Array]) -> list[tuple[Role, Role]]:
    """The query pieces, each with the keys that it is multiplied with."""
    return [
        (role, key)
        for role in QUERY_ROLES
        if role in pieces and (key := ROLES[role].partner) and key in pieces
    ]


def _rms(x: jax.Array) -> jax.Array:
    """Of each matrix `[heads, in, features]`; squares neither overflow nor vanish."""
    x = x.astype(accumulation_dtype(x.dtype))
    largest = jnp.abs(x).max((-2, -1), keepdims=True)
    return jnp.sqrt(jnp.mean(jnp.square(x / nonzero(largest)), (-2, -1))) * largest[:, 0, 0]


def query_key_matrices(pieces: Mapping[Role, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """W_q `[heads, in, features]` and W_k `[key heads, in, features]` of one layer's pieces.

    Example, MLA with q_down `[1, in, r]`, q_nope `[heads, r, n]`, q_rope `[heads, r, p]`:

        W_q = [q_down · q_nope | q_down · q_rope]    [heads, in, n + p]
        W_k = [kv_down · k_nope | k_rope]            [heads, in, n + p], k_rope for every head
    """

    queries, keys = zip(*_meeting(pieces), strict=True)
    return _side(pieces, queries), _side(pieces, keys)


def _side(pieces: Mapping[Role, jax.Array], names: Sequence[Role]) -> jax.Array:
    """The maps from a block's input to its queries, or keys, with all their features."""

    def through(role: Role) -> jax.Array:
        down = ROLES[role].behind
        return _matmul(pieces[down], pieces[role]) if down and down in pieces else pieces[role]

    heads = max(len(pieces[role]) for role in names)
    maps = [through(role) for role in names]
    return jnp.concatenate([jnp.repeat(x, heads // len(x), axis=0) for x in maps], axis=-1)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, **of_product(accumulation_dtype(a.dtype)))


def layers(block: str, stack: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Index and name of every layer of a block."""
    for index in np.ndindex(stack):
        yield index, "/".join([block, *map(str, index)])


def _last_clip(opt_state: Any) -> QKClipState | None:
    return qk_clip_state(opt_state) if states_of(opt_state, QKClipState) else None


def _has(intermediates: Any, name: str) -> bool:
    """Whether something was sown under the name. What `read_max_logits` gave is max logits."""
    if isinstance(intermediates, Mapping) and any(isinstance(key, tuple) for key in intermediates):
        return name == MAX_LOGITS
    return any(path[-1:] == (name,) for path, _ in sown(intermediates))


def _check_maxima(blocks: Sequence[Block], maxima: Mapping[str, list[jax.Array]]) -> None:
    for block in blocks:
        if not maxima.get(block.name):
            raise ValueError(
                f"attention_report: {block.name} has query and key kernels but no max logits; "
                f"there are those of {', '.join(name for name, x in maxima.items() if x) or 'none'}"
                ". Sow them in that module (sow_max_logits, or sow_weights=True for Flax's "
                "attention), or leave the block out with the layout's block= pattern."
            )


def _keys(block: Block, sown: list[jax.Array]) -> jax.Array | None:
    """`[stack..., key heads or heads, tokens, features]` of a block whose modules sowed any."""
    for keys in sown:
        fits = keys.shape[:-2] in (block.shape, (*block.stack, block.kv_heads))
        if block.keys and not fits:
            raise ValueError(
                f"attention_report: {block.name} sowed keys of shape {keys.shape} (heads "
                f"first), but its kernels have {block.kv_heads} key heads"
                f"{f' in stacked layers {block.stack}' if block.stack else ''}. Sow "
                "[batch, length, heads, features], in each layer."
            )
    if len(sown) > 1:
        raise ValueError(
            f"attention_report: {len(sown)} modules in {block.name} sowed {KEYS}; sow once, "
            "under other names what else you want to read."
        )
    return sown[0] if sown else None


def extent(values: np.ndarray | None) -> str:
    """Lowest and highest, for a cell of a table."""
    if values is None:
        return ""
    ends = [number(float(end)) for end in (np.min(values), np.max(values))]
    return " … ".join(dict.fromkeys(ends))


def _flags(heads: HeadReport) -> str:
    named = ((flag.header, np.flatnonzero(getattr(heads, flag.field))) for flag in _FLAGS)
    return "; ".join(f"{name}: {', '.join(map(str, which))}" for name, which in named if len(which))
