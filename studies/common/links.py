"""Clips that the studies compare with `mc.qk_clip`: they differ in what shared keys take.

Of a group of query heads that read one key, with γ_h the clip factor of head h, the key takes κ and
each query γ_h/κ, so that every head's logits scale by its own γ_h whatever κ is.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import muonclip_jax as mc
from muonclip_jax.layouts import Block, Role

KAPPAS = 32  # tried before the best of them is refined
HALVINGS = 24  # of the interval around it: all digits of float32


def clip_by_least_change(
    layout: mc.Layout, threshold: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """A clip per head for grouped queries, by `least_change` of the weights that a step arrives
    at."""

    def of_weights(params: optax.Params) -> optax.GradientTransformationExtraArgs:
        kernels = mc.head_matrices(params, layout)
        squares = jax.tree.map(lambda w: jnp.square(w).sum(axis=(-2, -1)), kernels)

        def factors(block: Block, gamma: jax.Array) -> Mapping[Role, jax.Array]:
            grouped = (*block.stack, block.kv_heads, -1)
            own, gammas = squares[block.name], gamma.reshape(grouped)
            kappa = least_change(gammas, own["q"].reshape(grouped), own["k"])
            return {"q": (gammas / kappa[..., None]).reshape(gamma.shape), "k": kappa}

        return mc.clip_by_signal(layout, threshold, signal="max_logits", factors=factors)

    def init(params):
        return of_weights(params).init(params)

    def update(updates, state, params=None, **extra_args):
        arrived = optax.apply_updates(params, updates)
        return of_weights(arrived).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def least_change(gamma: jax.Array, queries: jax.Array, key: jax.Array) -> jax.Array:
    """The κ of a key that moves the weights of its group least, in norm, for the same logits.

    It minimises `f(κ) = ‖K‖² (1 - κ)² + Σ_h ‖Q_h‖² (1 - γ_h/κ)²`, and is between the smallest γ_h
    and 1. f may have two minima, as it can be cheaper to move one side alone. So that interval is
    searched in equal ratios first; then halving the steps around the best finds where f' changes
    its sign. That is right to the digits of κ, where comparing values of f would be right to half
    of them.

    Args:
      gamma: γ_h in (0, 1], float32 `[..., heads]`.
      queries: ‖Q_h‖², same shape.
      key: ‖K‖², `[...]`.

    Returns:
      κ, float32 `[...]`; exactly 1 where no head is clipped.
    """
    total = jnp.maximum(key + queries.sum(axis=-1), jnp.finfo(key.dtype).tiny)
    key = key / total
    queries = queries / total[..., None]

    def change(kappa: jax.Array) -> jax.Array:
        of_queries = queries * jnp.square(1 - gamma / kappa[..., None])
        return key * jnp.square(1 - kappa) + of_queries.sum(axis=-1)

    def is_below(kappa: jax.Array) -> jax.Array:
        """Whether f still falls here: f'κ³/2 < 0."""
        of_queries = (queries * gamma * (kappa[..., None] - gamma)).sum(axis=-1)
        return of_queries < key * (1 - kappa) * kappa**3

    powers = jnp.linspace(0, 1, KAPPAS).reshape(-1, *(1 for _ in key.shape))
    tried = gamma.min(axis=-1) ** powers  # from 1 down to the smallest γ
    best = jnp.argmin(jax.vmap(change)(tried), axis=0)

    def beside(step: int) -> jax.Array:
        index = jnp.clip(best + step, 0, KAPPAS - 1)
        return jnp.take_along_axis(tried, index[None], axis=0)[0]

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        below = is_below(middle)
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, HALVINGS, halve, (beside(1), beside(-1)))
    return jnp.where(gamma.min(axis=-1) < 1, (low + high) / 2, 1)


def clip_by_each_head(
    layout: mc.Layout, threshold: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """The pitfall that the source tells of: a clip per head that takes a shared key for each head's
    own.

    Each head above the threshold multiplies its queries and its keys by √γ, the key that it shares
    with others too. A key that several such heads share takes the product.
    """
    return mc.clip_by_signal(layout, threshold, signal="max_logits", factors=each_head)


def each_head(block: Block, gamma: jax.Array) -> Mapping[Role, jax.Array]:
    """What each role of a block is multiplied by, `[stack..., heads of the role]`."""
    root = jnp.sqrt(gamma)
    rope = block.part("k_rope")
    keys = (*block.keys, *([rope] if rope else []))
    of_keys = {part.role: root.reshape(*part.stack, part.heads, -1).prod(axis=-1) for part in keys}
    return {**{part.role: root for part in block.queries}, **of_keys}
