"""QK-Clip on any storage, maxima and dtype is its formula in float64, entry by entry.

The formula is written anew here, from the table in `qk_clip`'s documentation, and applied to heads
sliced by hand (`STORAGES`). `tests/transforms/test_clip_property.py` holds what follows from it for
logits.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

import muonclip_jax as mc
from tests.fuzz.draws import cases, choose
from tests.layouts.test_layouts import STACKS, STORAGES, heads_by_hand, stacked

SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -3.0, 1e-30]
DTYPES = ["float32", "bfloat16", "float16", "float64"]


def factors(maxima, threshold, alpha, shared_keys, scope, heads_of, floor):
    """By role of queries and keys `[stack..., heads of the role]`, as in the table; and γ."""
    clipped = np.isfinite(maxima) & (maxima > threshold)
    gamma = np.where(clipped, np.maximum(threshold / np.where(clipped, maxima, 1), floor), 1.0)
    if scope == "layer":
        gamma = np.broadcast_to(gamma.min(-1, keepdims=True), gamma.shape)
        queries = dict.fromkeys(heads_of.keys() & {"q", "q_nope", "q_rope"}, gamma**alpha)
        keys = heads_of.keys() & {"k", "k_nope", "k_rope"}
        return queries | {k: gamma[..., : heads_of[k]] ** (1 - alpha) for k in keys}, gamma
    if "k_nope" in heads_of:
        return {"q_nope": gamma**alpha, "q_rope": gamma, "k_nope": gamma ** (1 - alpha)}, gamma
    group = gamma.shape[-1] // heads_of["k"]
    if group > 1 and shared_keys == "untouched":
        return {"q": gamma}, gamma
    kappa = gamma.reshape(*gamma.shape[:-1], heads_of["k"], -1).min(-1) ** (1 - alpha)
    return {"q": gamma / np.repeat(kappa, group, -1), "k": kappa}, gamma


def draw_maxima(rng, shape, threshold, largest):
    maxima = threshold * 10 ** rng.uniform(-2, largest, shape)
    special = rng.random(shape) < 0.2
    return np.where(special, rng.choice(SPECIAL, shape), maxima).astype(np.float32)


def heads_of_tree(storage, tree, stack, axis):
    """`{(role, "kernel" or "bias"): [stack..., heads, ...]}` in float64."""
    kinds = {"kernel": storage.heads, "bias": storage.biases}
    return {
        (role, kind): heads_by_hand(heads, np.asarray(tree[name], np.float64), stack, axis)
        for kind, table in kinds.items()
        for role, (name, heads) in table.items()
    }


@cases(few=8)
def test_clip_is_its_formula(rng):
    storage = choose(rng, STORAGES.values())
    (stack, axis), dtype = choose(rng, STACKS), choose(rng, DTYPES)
    alpha, scope = choose(rng, [0.0, 0.3, 0.5, 1.0]), choose(rng, ["head", "head", "layer"])
    shared_keys = choose(rng, ["untouched", "split"])
    threshold = float(10 ** rng.uniform(-2, 3))
    with jax.enable_x64(dtype == "float64"):
        draw = lambda size: {  # noqa: E731
            name: jnp.asarray(size * rng.normal(size=stacked(shape, stack, axis)), dtype)
            for name, shape in storage.shapes.items()
        }
        params, updates = draw(1.0), draw(0.1)
        heads = heads_of_tree(storage, params, stack, axis)
        heads_of = {role: heads[role, "kernel"].shape[len(stack)] for role in storage.heads}
        shape = (*stack, heads_of.get("q", heads_of.get("q_nope")))
        maxima = draw_maxima(rng, shape, threshold, largest=3)
        layout = dataclasses.replace(storage.layout, stack_axis=axis)
        tx = mc.qk_clip(layout, threshold, alpha=alpha, shared_keys=shared_keys, scope=scope)
        tree = {"attn": unflatten_dict(params, sep="/")}
        new, state = jax.jit(tx.update)(
            {"attn": unflatten_dict(updates, sep="/")},
            tx.init(tree),
            tree,
            max_logits={"attn": {"max_logits": maxima}},
        )
        check_state(state, maxima, threshold)
        found = {name: leaf_of(new["attn"], name) for name in params}
        kind = jnp.finfo(dtype)  # γ p stays normal, and is left of p + u to a sixteenth
        floor = max(float(kind.tiny) ** 0.5, 8 * float(kind.eps))
        wide = maxima.astype(np.float64)
        expected, gamma = factors(wide, threshold, alpha, shared_keys, scope, heads_of, floor)
        # In a group with another clipped head γ/κ may be 1 to rounding only.
        kept = {role: m == 1 for role, m in expected.items()}
        kept |= {"q": kept["q"] & (gamma == 1)} if "q" in kept else {}
        check_heads(storage, stack, axis, dtype, params, updates, found, expected, kept)


def leaf_of(tree, name):
    for key in name.split("/"):
        tree = tree[key]
    return tree


def check_state(state, maxima, threshold):
    np.testing.assert_array_equal(state.max_logits["attn"], maxima)
    gamma = np.asarray(state.gamma["attn"])
    assert np.all((gamma > 0) & (gamma <= 1))
    assert int(state.heads_clipped) == int((gamma < 1).sum())
    assert int(state.nonfinite_heads) == int((np.isnan(maxima) | (maxima == np.inf)).sum())


def check_heads(storage, stack, axis, dtype, params, updates, found, expected, kept):
    before, step, after = (
        heads_of_tree(storage, tree, stack, axis) for tree in (params, updates, found)
    )
    # The update is m·u + (m - 1)·p in float32 (or float64), where powers of γ round a few times,
    # then rounded to its dtype.
    eps, wide_eps = (float(jnp.finfo(d).eps) for d in (dtype, jnp.promote_types(dtype, "float32")))
    for (role, kind), p in before.items():
        u = step[role, kind]
        ones = np.ones(p.shape[: len(stack) + 1])
        m, same = (
            np.expand_dims(x, tuple(range(x.ndim, p.ndim)))
            for x in (expected.get(role, ones), kept.get(role, ones == 1))
        )
        wanted = m * (p + u) - p
        size = eps * (m * np.abs(u) + np.abs(m - 1) * np.abs(p)) + wide_eps * (m + 1) * np.abs(p)
        error = np.abs(after[role, kind] - wanted)
        held = np.where(same, after[role, kind] == u, error <= 16 * size)
        assert held.all(), f"{role} {kind}: {error[~held]} against {size[~held]}"
    whose = {name for name, _ in (*storage.heads.values(), *storage.biases.values())}
    for name in found.keys() - whose:
        np.testing.assert_array_equal(found[name], updates[name])
