"""The studies' own clips, against float64 searches and loops."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from studies.common.links import clip_by_each_head, clip_by_least_change, least_change
from studies.common.model import ModelConfig, attention_layout, init_params
from studies.common.optimizers import Optimizer

GROUPS = {  # γ of the heads, ‖Q_h‖² and ‖K‖²
    "one head": ([0.8], [1.0], 1.0),
    "one of four": ([0.8, 1, 1, 1], [1.0, 1.0, 1.0, 1.0], 1.0),
    "all, mildly": ([0.999, 0.9995, 0.9999], [3.0, 2.0, 1.0], 0.5),
    "a tiny key": ([0.5, 0.9], [1.0, 2.0], 1e-6),
    "tiny queries": ([0.5, 0.9], [1e-7, 2e-7], 3.0),
    "two minima, the lower with the key kept": ([0.01], [1.0], 1.1),
    "two minima, the lower with the queries kept": ([0.01, 0.01], [1.0, 0.1], 1.0),
    "the least γ that the clip knows": ([1e-6, 1], [1.0, 1.0], 1.0),
    "large weights": ([0.3, 0.7], [1e20, 1e18], 1e19),
}


def change(kappa, gamma, queries, key):
    """What `least_change` minimises, float64 `[len(kappa)]`."""
    kappa = np.float64(kappa).reshape(-1)
    gamma, queries = np.float64(gamma), np.float64(queries)
    of_queries = queries * (1 - gamma / kappa[:, None]) ** 2
    return key * (1 - kappa) ** 2 + of_queries.sum(axis=-1)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_least_change_is_the_least(group):
    gamma, queries, key = (jnp.asarray(x, jnp.float32) for x in group)
    found = np.asarray(jax.jit(least_change)(gamma, queries, key))
    group = [np.float64(x) for x in (gamma, queries, key)]  # as float32 rounded them
    grid = np.geomspace(group[0].min(), 1, 400_001)
    brute = change(grid, *group)
    # Where f is flat κ may differ, so f is compared. A κ that float32 rounds by 6e-8 is 1e-4 of the
    # mildest clip here, of which f feels the square; the grid's own steps are felt less.
    np.testing.assert_allclose(change(found, *group), brute.min(), rtol=1e-5)
    assert group[0].min() <= found <= 1


def test_least_change_of_many_at_once():
    rng = np.random.default_rng(0)
    gamma = np.where(rng.random((3, 5, 4)) < 0.5, 1, rng.uniform(0.02, 1, (3, 5, 4)))
    queries, key = np.exp(rng.normal(size=(3, 5, 4))), np.exp(rng.normal(size=(3, 5)))
    gamma[0, 0] = 1
    gamma, queries, key = (np.float32(x) for x in (gamma, queries, key))
    found = np.asarray(jax.jit(least_change)(*map(jnp.asarray, (gamma, queries, key))))
    for place in np.ndindex(3, 5):
        group = gamma[place], queries[place], np.float64(key[place])
        brute = change(np.geomspace(gamma[place].min(), 1, 20_001), *group).min()
        assert change(found[place], *group)[0] <= brute * (1 + 1e-5) + 1e-14
    assert found[0, 0] == 1  # exactly: no head of it is clipped


GROUPED = ModelConfig(vocab_size=31, d_model=16, layers=2, heads=4, kv_heads=2, rope=4, v=4)


@pytest.fixture(scope="module")
def grouped():
    """Parameters of two layers in which two query heads read a key, their layout, and updates."""
    params = init_params(GROUPED, 0)
    return params, attention_layout(GROUPED), jax.tree.map(lambda x: 0.1 * x, params)


MAXIMA = np.array([[8.0, 1.0, 3.0, 4.0], [1.0, 1.0, -1.0, 16.0]])  # of the layers' heads
SOWN = {"layers": {"attn": {"max_logits": jnp.asarray(MAXIMA, jnp.float32)}}}
TAU = 2.0


def clipped(link, layout, params, updates):
    """What a step arrives at, and by role in float64, `[layers, heads, in, features]`."""
    tx = link(layout, TAU)
    updates, _ = jax.jit(tx.update)(updates, tx.init(params), params, max_logits=SOWN)
    arrived = optax.apply_updates(params, updates)
    (kernels,) = mc.head_matrices(arrived, layout).values()
    return arrived, {role: np.float64(x) for role, x in kernels.items()}


def test_the_clip_of_least_change_gives_each_head_its_factor(grouped):
    params, layout, updates = grouped
    before = optax.apply_updates(params, updates)
    after, kernels = clipped(clip_by_least_change, layout, params, updates)
    (unclipped,) = mc.head_matrices(before, layout).values()
    gamma = np.where(MAXIMA > TAU, TAU / MAXIMA, 1)
    for layer, head in np.ndindex(2, 4):
        own = [np.float64(unclipped[role][layer]) for role in ("q", "k")]
        new = [kernels[role][layer] for role in ("q", "k")]
        logits, expected = (
            each[0][head] @ each[1][head // 2].T for each in (new, own)
        )  # of all pairs of inputs
        np.testing.assert_allclose(logits, gamma[layer, head] * expected, rtol=1e-5, atol=1e-9)
    for layer, key in np.ndindex(2, 2):
        heads = slice(2 * key, 2 * key + 2)
        sizes = [(np.float64(unclipped[role][layer]) ** 2).sum((-2, -1)) for role in ("q", "k")]
        group = gamma[layer, heads], sizes[0][heads], sizes[1][key]
        grid = np.geomspace(group[0].min(), 1, 100_001)
        moved = sum(
            ((kernels[role][layer][part] - np.float64(unclipped[role][layer][part])) ** 2).sum()
            for role, part in (("q", heads), ("k", key))
        )
        # Of float32 weights.
        np.testing.assert_allclose(moved, change(grid, *group).min(), rtol=1e-4, atol=1e-12)
    values = [tree["layers"]["attn"]["wv"]["kernel"] for tree in (before, after)]
    np.testing.assert_array_equal(*values)


def test_each_head_multiplies_a_shared_key_of_groups(grouped):
    params, layout, updates = grouped
    (before,) = mc.head_matrices(optax.apply_updates(params, updates), layout).values()
    _, after = clipped(clip_by_each_head, layout, params, updates)
    # Of layer 0: γ = 1/4, 1, 2/3 and 1/2; of layer 1 the last head alone, 1/8.
    root = np.sqrt([[1 / 4, 1, 2 / 3, 1 / 2], [1, 1, 1, 1 / 8]])
    keys = np.sqrt([[1 / 4, 1 / 3], [1, 1 / 8]])
    for role, factors in (("q", root), ("k", keys)):
        ratio = after[role] / np.float64(before[role])
        np.testing.assert_allclose(
            ratio, np.broadcast_to(factors[..., None, None], ratio.shape), rtol=1e-5
        )


def test_each_head_multiplies_the_shared_rope_key_of_latent_attention():
    config = ModelConfig(
        vocab_size=31, d_model=16, layers=2, heads=4, nope=4, rope=4, v=4, q_rank=8, kv_rank=8,
        attention="latent",
    )  # fmt: skip
    params, layout = init_params(config, 0), attention_layout(config)
    updates = jax.tree.map(jnp.zeros_like, params)
    (before,) = mc.head_matrices(params, layout).values()
    _, after = clipped(clip_by_each_head, layout, params, updates)
    root = np.sqrt([[1 / 4, 1, 2 / 3, 1 / 2], [1, 1, 1, 1 / 8]])
    factors = {"q_nope": root, "k_nope": root, "q_rope": root, "k_rope": root.prod(1)[:, None]}
    for role, kernel in before.items():
        ratio = after[role] / np.float64(kernel)
        wanted = factors.get(role, np.ones(ratio.shape[:2]))[..., None, None]
        wanted = np.broadcast_to(wanted, ratio.shape)
        np.testing.assert_allclose(ratio, wanted, rtol=1e-5)  # float32


def test_an_optimizer_ends_with_the_clip_that_it_names(grouped):
    params, layout, grads = grouped
    links = {
        "untouched": mc.qk_clip(layout, TAU),
        "split": mc.qk_clip(layout, TAU, shared_keys="split"),
        "least_change": clip_by_least_change(layout, TAU),
        "each_head": clip_by_each_head(layout, TAU),
    }
    adam = Optimizer(direction="adam", warmup=0)

    def keys(tx):
        step = jax.jit(tx.update)
        updates, _ = step(grads, tx.init(params), params, max_logits=SOWN)
        return updates["layers"]["attn"]["wk"]["kernel"]

    found = []
    for rule, link in links.items():
        own = keys(replace(adam, threshold=TAU, shared_keys=rule).chain(GROUPED))
        # The same programs but for a learning rate that is a schedule.
        wanted = keys(optax.chain(adam.chain(GROUPED), link))
        np.testing.assert_allclose(own, wanted, rtol=1e-5, atol=1e-8, err_msg=rule)
        found.append(own)
    for i, one in enumerate(found):
        assert not any(np.allclose(one, other, rtol=1e-3) for other in found[:i])
