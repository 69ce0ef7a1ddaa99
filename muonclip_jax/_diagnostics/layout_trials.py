"""Trials of a layout on its model: scale what it says, and compare what must follow.

    q, k by the clip's factors      → each head's max logit × its own γ
    q and k by -1, behind a QK-norm → other heads' max logits stay
    v × 2ⁿ and o × 2⁻ⁿ              → the output stays
    o = 0, then q or gate by -1     → the output stays: these heads have no other way to it
    what all heads share by -1, and what meets it too → everything stays

All factors are powers of two, which rounding of no dtype sees: a right layout gives the same bits
wherever the model does the same operations, so that a wrong one stands out in bfloat16 too.
"""

import functools
import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax._core import paths
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._layouts.blocks import Block, module_path
from muonclip_jax._layouts.leaves import change_leaves
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import (
    GAIN_ROLES,
    LATENT_ROLES,
    ROLES,
    SHARED_KEY_ROLES,
    Role,
    Side,
)
from muonclip_jax._transforms.qk_clip import apply_qk_clip

# How far a head's max logit may be from γ times what it was, relative to that, by the bytes of the
# coarsest dtype: the factors round nothing, but a model may do the rest in another order (a soft
# cap undone, sums of terms that were subnormal).
_TOLERANCES = {8: 1e-6, 4: 1e-4, 2: 2e-2}
# Of the output, relative to what turning the layer's queries around changes.
_SHARE_OF_EFFECT = 0.02

_CUT = (
    "the heads lie otherwise than axes= says (interleaved for blocked), heads= or kv_heads= is "
    "another number, select= cuts elsewhere, or a bias has no piece"
)


class Outcome(NamedTuple):
    """What one forward pass gave: the output's float leaves, and each block's max logits."""

    output: list[jax.Array]
    maxima: dict[str, jax.Array]


class Finding(NamedTuple):
    """What a trial found wrong: where, what was measured, and what it may come from."""

    where: str
    measured: str
    likely: str

    def __str__(self) -> str:
        return f"{self.where}: {self.measured}. Likely: {self.likely}."


@dataclass(frozen=True)
class Layer:
    """One layer of a block in the model around it.

    Attributes:
      run: The forward pass.
      params: The parameters, with those of other layers.
      base: What they give.
      noise: How far apart two forward passes were.
      block: The block.
      index: Which layer of the block's stack.
    """

    run: Callable[[Any], Outcome]
    params: Any
    base: Outcome
    noise: float
    block: Block
    index: tuple[int, ...]

    @property
    def name(self) -> str:
        """`layers/0/attn`; `layers/attn, layer 2` of a stack."""
        which = f", layer {', '.join(map(str, self.index))}" if self.index else ""
        return self.block.name + which

    @functools.cached_property
    def maxima(self) -> np.ndarray:
        """`[heads]`, as the model is."""
        return self.maxima_of(self.base)

    @property
    def tolerance(self) -> float:
        """Of a max logit, by the coarsest dtype in sight."""
        own = dict(paths.leaves(self.params))
        dtypes = [own[part.kernel].dtype for part in self.block.parts]
        dtypes += [x.dtype for x in self.base.output]
        return _TOLERANCES[min(jnp.dtype(dtype).itemsize for dtype in dtypes)]

    @functools.cached_property
    def level(self) -> float:
        """A power of two that brings the logits to about 8, where attention depends on them."""
        return 2.0 ** np.clip(np.round(np.log2(8 / np.median(np.abs(self.maxima)))), -10, 10)

    def maxima_of(self, seen: Outcome) -> np.ndarray:
        return np.asarray(seen.maxima[self.block.name], np.float64)[self.index]

    def part(self, role: Role) -> Part:
        return next(part for part in self.block.parts if part.role == role)

    def see(self, factors: Mapping[Role, np.ndarray]) -> Outcome:
        """A forward pass with this layer's heads multiplied, `{role: [heads of that role]}`."""
        whole: dict[Role, np.ndarray] = {}
        for role, factor in factors.items():
            whole[role] = np.ones((*self.block.stack, self.part(role).heads), np.float32)
            whole[role][self.index] = factor

        def scale(leaves, factors):
            by = self.block.multipliers(factors)
            dtype = {path: accumulation_dtype(leaves[path].dtype) for path in by}
            wide = {path: leaves[path].astype(dtype[path]) * m for path, m in by.items()}
            return {path: x.astype(leaves[path].dtype) for path, x in wide.items()}, None

        given = jax.tree.map(jnp.asarray, whole)
        return self.run(change_leaves(scale, (self.block,), set(whole), self.params, given)[0])

    def turned(self, sign: float, heads: np.ndarray) -> dict[Role, np.ndarray]:
        """Factors that turn the queries of these heads around, at a level that matters."""
        by = np.where(heads, sign * self.level, 1)
        return {part.role: by for part in self.block.queries}

    @functools.cached_property
    def effect(self) -> float:
        """How much of the output depends on the layer's queries."""
        every = np.ones(self.block.heads, bool)
        return difference(*(self.see(self.turned(sign, every)) for sign in (1, -1)))

    def change(self, one: Outcome, other: Outcome) -> float:
        """How far the outputs are apart; 0 where that is rounding."""
        apart = difference(one, other)
        return 0.0 if apart <= _SHARE_OF_EFFECT * self.effect + 4 * self.noise else apart

    def of(self, role: Role, per_head: np.ndarray) -> np.ndarray:
        """`[heads]` as `[heads of the role]`, where all that share one are alike."""
        return per_head.reshape(self.part(role).heads, -1)[:, 0]

    def where(
        self, roles: Sequence[Role], heads: Sequence[int] | np.ndarray = (), either: bool = False
    ) -> str:
        """Layer, heads and pieces in words."""
        parts = [part for part in self.block.parts if part.role in roles]
        named = {f"{paths.show(part.kernel)} {part.shape}" for part in parts}
        key = "key " if {"v"} & set(roles) and self.block.kv_heads < self.block.heads else ""
        which = f", {key}head{'s' * (len(heads) > 1)} {_some(heads)}" if len(heads) else ""
        joined = (" or " if either else " and ").join(roles)
        return f"{self.name}{which}, {joined} ({' and '.join(sorted(named))})"


def difference(one: Outcome, other: Outcome) -> float:
    """The largest of the output."""
    apart = [
        jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max(initial=0)
        for x, y in zip(one.output, other.output, strict=True)
    ]
    return max(map(float, apart))


def findings(layer: Layer) -> list[Finding]:
    """Everything that the trials find wrong in a layer."""
    if len(unseen := np.flatnonzero(~np.isfinite(layer.maxima) | (layer.maxima == 0))):
        return [
            Finding(
                layer.where([part.role for part in layer.block.queries], unseen),
                f"the max logit is {layer.maxima[unseen[0]]}, and scaling shows nothing of it",
                "the batch masks every key of this head, or the model is not finite",
            )
        ]
    logits = list(_behind_norm(layer) if layer.block.qk_norms else _clipped(layer))
    scale = max(float(jnp.abs(x).max(initial=0)) for x in layer.base.output)
    eps = max(float(jnp.finfo(x.dtype).eps) for x in layer.base.output)
    if not layer.effect > max(4 * eps * scale, 50 * layer.noise):
        return logits or [
            Finding(
                layer.where([part.role for part in layer.block.queries]),
                f"turning its queries around changes the output by {layer.effect:.1e} of "
                f"{scale:.1e}, so the output tells nothing of values and outputs",
                "the output is none of this layer's, or every query of the batch sees one key",
            )
        ]
    trusted = not logits
    return [*logits, *_values(layer, trusted), *(_shared(layer) if trusted else ())]


def _clipped(layer: Layer) -> Iterator[Finding]:
    """The clip's promise, and where it is broken each side alone."""
    block = layer.block
    gamma = _factors(block)
    sown = np.zeros(block.shape, np.float32)
    sown[layer.index] = 1 / gamma
    alone = replace(block.layout, block=glob.escape(block.name))
    maxima = {module_path(block.path): sown}
    # Split, so that keys which heads share are tried too.
    seen = layer.run(apply_qk_clip(layer.params, maxima, alone, 1.0, shared_keys="split"))
    if not _off(layer, seen, gamma).any():
        return
    queries, keys = _roles(block, "query"), _roles(block, "key")
    shared = [role for role in keys if not ROLES[role].per_head]
    group = np.repeat(gamma.reshape(block.kv_heads, -1).min(1), block.heads // block.kv_heads)
    sides = [
        (roles, factors, layer.see({role: layer.of(role, factors) for role in roles}))
        for roles, factors in (
            (queries, gamma),
            (keys, np.full_like(gamma, 0.25) if shared else group),
        )
        if roles
    ]
    wrong = [trial for trial in sides if _off(layer, trial[2], trial[1]).any()]
    # Where what is shared meets its partner as it should, the pieces of each head are wrong.
    met = all(
        _turned_together(layer, role, others) == (0, 0)
        for role, others in shared_pieces(block).items()
        if role in shared
    )
    for roles, factors, scaled in wrong or [((met and keys) or [*queries, *keys], gamma, seen)]:
        heads = np.flatnonzero(_off(layer, scaled, factors))
        before, after = layer.maxima, layer.maxima_of(scaled)
        h = heads[0]
        yield Finding(
            layer.where([role for role in roles if not (met and role in shared)], heads),
            f"scaled by {factors[h]:g}, head {h}'s max logit went from {before[h]:.4g} to "
            f"{after[h]:.4g} instead of {before[h] * factors[h]:.4g}",
            _reason(layer, after / before, factors, heads)
            if met
            else "select= cuts nope and rope, whose factors differ, at the wrong place or in the "
            f"wrong order; or {_CUT}",
        )


def _roles(block: Block, side: Side) -> list[Role]:
    roles: dict[Role, None] = dict.fromkeys(part.role for part in block.parts)
    return [role for role in roles if ROLES[role].side == side]


def _reason(layer: Layer, ratio: np.ndarray, factors: np.ndarray, heads: np.ndarray) -> str:
    if np.allclose(ratio[heads], 1, rtol=layer.tolerance):
        return (
            "it does not enter these logits: it is another piece (the order in a fused kernel; a "
            "gate, a value), or belongs to another module than the one that sowed"
        )
    if np.allclose(np.sort(ratio), np.sort(factors), rtol=layer.tolerance):
        return "the heads come in another order than the sown max logits"
    return f"{_CUT}; or the max logits were sown behind a soft cap or a bias"


def _off(layer: Layer, seen: Outcome, factors: np.ndarray) -> np.ndarray:
    """Which heads' max logits did not scale by these factors."""
    return ~(np.abs(layer.maxima_of(seen) / layer.maxima / factors - 1) <= layer.tolerance)


def _behind_norm(layer: Layer) -> Iterator[Finding]:
    """Where a norm would undo a scale, signs: they change the logits of their own heads only."""
    block = layer.block
    for side, parts in (("query", block.queries), ("key", block.keys)):
        if not parts:
            continue
        count = parts[0].heads
        for chosen in _halves(count):
            seen = layer.see({part.role: np.where(chosen, -1, 1) for part in parts})
            changed = _off(layer, seen, np.ones(block.heads))
            expected = np.repeat(chosen, block.heads // count)
            if (wrong := np.flatnonzero(changed != expected)).size:
                did = "changed" if changed[wrong[0]] else "did not change"
                yield Finding(
                    layer.where([part.role for part in parts], wrong),
                    f"with {side} heads {_some(np.flatnonzero(chosen))} turned around, head "
                    f"{wrong[0]}'s max logit {did}",
                    _CUT,
                )
                break


def _values(layer: Layer, trusted: bool) -> Iterator[Finding]:
    """Values against outputs, outputs and values against the queries if these are `trusted`."""
    block = layer.block
    has = {part.role for part in block.parts}
    apart = 0.0
    if {"v", "o"} <= has:
        apart = _apart(layer, _exponents(block.kv_heads))
    elif "v" in has:
        seen = layer.see({"v": np.full(layer.part("v").heads, 2.0)})
        if (off := _off(layer, seen, np.ones(block.heads))).any():
            heads = np.flatnonzero(off)
            yield Finding(layer.where(["v"], heads), "scaling it changes the logits", _CUT)
    leaks: dict[Role, float] = {}
    for part in reversed(block.parts) if trusted else ():
        tried = part.role == "o" or (part.role == "v" and (apart or "o" not in has))
        if tried and (leak := _leak(layer, part.role, _halves(part.heads))):
            leaks[part.role] = leak
    if apart:
        single = np.eye(block.kv_heads, dtype=int)
        heads = [g for g in range(block.kv_heads) if _apart(layer, single[g])]
        yield Finding(
            layer.where(list(leaks) or (["v"] if trusted else ["v", "o"]), heads, not trusted),
            f"v times a power of two and o divided by it changed the output by {apart:.3g} (the "
            f"queries change it by {layer.effect:.3g})",
            f"{_CUT}; or something between v and o is not linear",
        )
    elif leaks:
        role, leak = next(iter(leaks.items()))
        single = np.eye(layer.part(role).heads, dtype=bool)
        heads = [h for h, one in enumerate(single) if _leak(layer, role, [one])]
        yield Finding(
            layer.where(["v", "o"] if {"v", "o"} <= has else [role], heads),
            f"with {role} of some heads zero, their queries still change the output by {leak:.3g}",
            "its heads are not those of the queries: interleaved for blocked, or another order",
        )
    gated = trusted and {"gate", "o"} <= has and not leaks
    if gated and (leak := _leak(layer, "o", _halves(block.heads), ("gate",))):
        yield Finding(
            layer.where(["gate"]),
            f"with o of some heads zero, their gates still change the output by {leak:.3g}",
            f"it is no gate of these heads; {_CUT}",
        )


def _apart(layer: Layer, exponents: np.ndarray) -> float:
    """How far v × 2ⁿ and o × 2⁻ⁿ move the output, n by key head; 0 where they do not."""
    n = np.repeat(exponents, layer.block.heads // layer.block.kv_heads)
    seen = layer.see({"v": layer.of("v", 2.0**n), "o": layer.of("o", 2.0**-n)})
    return layer.change(seen, layer.base)


def _leak(
    layer: Layer, role: Role, sets: Sequence[np.ndarray], turned: Sequence[Role] = ()
) -> float:
    """How much queries (or `turned`) change the output though their heads' `role` is zero."""
    worst = 0.0
    for chosen in sets:
        heads = np.repeat(chosen, layer.block.heads // len(chosen))
        zero: dict[Role, np.ndarray] = {role: np.where(chosen, 0, 1)}
        seen = []
        for sign in (1, -1):
            turn: dict[Role, np.ndarray] = {each: np.where(heads, sign, 1) for each in turned}
            seen.append(layer.see(zero | (turn or layer.turned(sign, heads))))
        worst = max(worst, layer.change(*seen))
    return worst


def _shared(layer: Layer) -> Iterator[Finding]:
    """What all heads share, and what it meets: both by -1. RMSNorm keeps a sign, and RoPE does."""
    for role, others in shared_pieces(layer.block).items():
        if not others:
            continue
        off, changed = _turned_together(layer, role, others)
        if off or changed:
            yield Finding(
                layer.where([role]),
                f"times -1, together with {' and '.join(others)}, it changes the max logits of "
                f"{off} heads, and the output by {changed:.3g}",
                "select= cuts the latent and the shared key at the wrong place or in the wrong "
                "order; or a norm on the latent that adds a bias, behind which no sign is kept",
            )


def _turned_together(layer: Layer, role: Role, others: Sequence[Role]) -> tuple[int, float]:
    """How many max logits change, and how far the output, when all of them are turned around."""
    seen = layer.see({r: -np.ones(layer.part(r).heads) for r in (role, *others)})
    off = _off(layer, seen, np.ones(layer.block.heads))
    return int(off.sum()), layer.change(seen, layer.base)


def shared_pieces(block: Block) -> dict[Role, list[Role]]:
    """Each piece that all heads share, and the pieces behind it, or that it meets in the logits."""
    has: list[Role] = list(dict.fromkeys(part.role for part in block.parts))
    found: dict[Role, list[Role]] = {}
    for role in has:
        if role in SHARED_KEY_ROLES:
            found[role] = [r for r in has if r == ROLES[role].partner]
        elif role in LATENT_ROLES + GAIN_ROLES:
            latent = ROLES[role].behind or role
            found[role] = [r for r in has if ROLES[r].behind == latent and ROLES[r].per_head]
            if latent == "kv_down":  # the values come out of the same latent
                found[role] = [*found[role], "v"] if "v" in has else []
    return found


def _factors(block: Block) -> np.ndarray:
    """γ per head, powers of four, so that their roots are powers of two. They differ between heads
    of a group, and the smallest of each group between groups."""
    group = block.heads // block.kv_heads
    exponents = _exponents(block.kv_heads)[:, None] + 1 - np.arange(group) % 2
    return 4.0 ** -exponents.reshape(-1)


def _exponents(count: int) -> np.ndarray:
    """1, 2 and 3, drawn, so that no order of heads leaves them as they are."""
    return 1 + np.random.default_rng(0).permutation(count) % 3


def _halves(count: int) -> list[np.ndarray]:
    """Two halves of the heads, which any other order of them mixes: the even, the first."""
    heads = np.arange(count)
    return [heads % 2 == 0, heads < count // 2] if count > 1 else [heads == 0]


def _some(heads: Sequence[int] | np.ndarray) -> str:
    shown = ", ".join(str(int(h)) for h in heads[:8])
    return shown + (f" and {len(heads) - 8} more" if len(heads) > 8 else "")
