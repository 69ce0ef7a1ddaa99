"""QuacK's formulas and what they are for: how much a step changes the logits. All in float64.

Rotary embeddings are left out: they keep every norm.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transforms import quack_reference
from tests.transforms.quack_models import (
    ATTENTION,
    FEATURES,
    GQA,
    HEADS,
    KV_RANK,
    LATENT,
    LATENT_PLAIN_QUERY,
    MHA,
    MLA,
    MLA_PLAIN_QUERY,
    MLA_WITH_GAINS,
    NOPE,
    ROPE,
    TAU,
    WIDTH,
    as_jax,
    attention,
    compiled,
    latent,
    matrices,
    scaled_by_hand,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64 rounding of sums of products of order 1 to 100


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    with jax.enable_x64(True):
        yield


# The formulas

algorithm_2_normalized = functools.partial(quack_reference.algorithm_2, normalized_min=True)
shared_keys = functools.partial(attention, kv_heads=2)
one_key = functools.partial(attention, kv_heads=1)
plain_query = functools.partial(latent, compressed=False)


def leading_rope(rng):
    """MLA whose raw path through the rotary key is, at first, the larger one."""
    params = latent(rng)
    params["attn"]["wkv_b"]["kernel"] *= 0.05
    return params


CASES = {
    "mha": (MHA, "paper", ATTENTION, attention, quack_reference.algorithm_1),
    "gqa": (GQA, "paper", ATTENTION, shared_keys, quack_reference.grouped),
    "mqa": (GQA, "paper", ATTENTION, one_key, quack_reference.grouped),
    "gqa without groups": (GQA, "paper", ATTENTION, attention, quack_reference.algorithm_1),
    "mla": (MLA, "paper", LATENT, latent, quack_reference.algorithm_2),
    "mla, leading rope": (MLA, "paper", LATENT, leading_rope, quack_reference.algorithm_2),
    "mla, plain query": (
        MLA_PLAIN_QUERY,
        "paper",
        LATENT_PLAIN_QUERY,
        plain_query,
        quack_reference.algorithm_2,
    ),
    "normalized_min": (MLA, "normalized_min", LATENT, latent, algorithm_2_normalized),
    "latent_norm": (MLA_WITH_GAINS, "latent_norm", LATENT, latent, quack_reference.latent_norm),
    "latent_norm, plain query": (
        MLA_PLAIN_QUERY,
        "latent_norm",
        LATENT_PLAIN_QUERY,
        plain_query,
        quack_reference.latent_norm,
    ),
}


def moved(rng, params):
    """Every leaf times a factor of its own in [1/3, 3], and then some."""
    return jax.tree.map(
        lambda x: 3 ** rng.uniform(-1, 1) * x + 0.3 * rng.normal(size=x.shape), params
    )


# float32: about 40 squares a norm and six norms a factor, each rounding by 6e-8 and at random.
@pytest.mark.parametrize(
    "case, dtype, rtol",
    [(case, "float64", 1e-12) for case in CASES]
    + [(case, "float32", 1e-6) for case in ("gqa", "mla", "latent_norm")],
)
def test_transcription_of_the_paper(case, dtype, rtol):
    layout, rule, places, make, reference = CASES[case]
    init, update = compiled(layout, rule=rule)
    rng = np.random.default_rng(0)
    first = now = as_jax(make(rng), dtype)
    state = init(first)
    for step in range(3):
        raw = as_jax(make(rng), dtype)
        scaled, state = update(raw, state, now)
        expected = reference(matrices(places, now), matrices(places, first), TAU)
        given_factors = state.factors["attn"]
        assert set(given_factors) == set(expected)
        for role, factors in expected.items():
            np.testing.assert_allclose(given_factors[role], factors, rtol=rtol, err_msg=role)
            assert step == 0 or not np.allclose(factors, TAU, rtol=1e-2)  # the weights moved
        chex.assert_trees_all_close(scaled, scaled_by_hand(places, raw, expected), rtol=rtol)
        chex.assert_trees_all_equal_dtypes(scaled, raw)
        now = as_jax(moved(rng, now), dtype)


def test_normalized_min_damps_a_path_that_grows_in_the_shadow_of_the_other():
    first = latent(np.random.default_rng(6))
    first["attn"]["wkv_b"]["kernel"][..., :NOPE] *= 1e-4
    now = jax.tree.map(np.array, first)
    now["attn"]["wkv_b"]["kernel"][..., :NOPE] *= 50
    factors = {}
    for rule in ("paper", "normalized_min"):
        init, update = compiled(MLA, rule=rule)
        _, state = update(as_jax(now), init(as_jax(first)), as_jax(now))
        factors[rule] = state.factors["attn"]
    np.testing.assert_allclose(factors["paper"].pop("q_down"), TAU, rtol=1e-12)
    np.testing.assert_allclose(factors["normalized_min"].pop("q_down"), TAU / 50, rtol=1e-12)
    chex.assert_trees_all_close(factors["paper"], factors["normalized_min"], rtol=1e-12)


# Rescaling that the logits do not see


def attention_logits(params, x):
    """`[heads, i, j]` of one block, queries and keys from x `[i, in]`."""
    block = params["attn"]
    q, k = (
        jnp.einsum("ti,ihf->htf", x, block[name]["kernel"]) + block[name]["bias"][:, None]
        for name in ("query", "key")
    )
    k = jnp.repeat(k, len(q) // len(k), axis=0)
    return jnp.einsum("hif,hjf->hij", q, k) / np.sqrt(FEATURES)


def latent_logits(params, x, normalized):
    """`[nope or rope, heads, i, j]`, whose sum over the first axis are MLA's logits."""
    block = params["attn"]

    def norm(latent, name):
        if not normalized:
            return latent
        return latent / jnp.sqrt(jnp.mean(latent**2, -1, keepdims=True)) * block[name]["scale"]

    c_q = norm(x @ block["wq_a"]["kernel"] + block["wq_a"]["bias"], "q_norm")
    down = x @ block["wkv_a"]["kernel"] + block["wkv_a"]["bias"]
    c_kv, k_rope = norm(down[:, :KV_RANK], "kv_norm"), down[:, KV_RANK:]
    q = jnp.einsum("tr,rhf->htf", c_q, block["wq_b"]["kernel"])
    k_nope = jnp.einsum("tr,rhf->htf", c_kv, block["wkv_b"]["kernel"][..., :NOPE])
    nope = jnp.einsum("hif,hjf->hij", q[..., :NOPE], k_nope)
    rope = jnp.einsum("hif,jf->hij", q[..., NOPE:], k_rope)
    return jnp.stack([nope, rope]) / np.sqrt(NOPE + ROPE)


@functools.partial(jax.jit, static_argnames=("logits", "normalized"))
def first_order_change(logits, params, updates, x, **options):
    return jax.jvp(lambda p: logits(p, x, **options), (params,), (updates,))[1]


@pytest.mark.parametrize("layout, make", [(MHA, attention), (GQA, shared_keys)])
def test_shifting_scale_from_queries_to_keys_changes_no_step_of_the_logits(layout, make):
    init, update = compiled(layout)
    rng = np.random.default_rng(1)
    first, params, raw = (as_jax(make(rng)) for _ in range(3))
    x = rng.normal(size=(5, WIDTH))
    state = init(first)

    def change(a):
        query, key = params["attn"]["query"], params["attn"]["key"]
        shifted = {
            "query": jax.tree.map(lambda w: a * w, query),
            "key": jax.tree.map(lambda w: w / a, key),
        }
        shifted = params | {"attn": params["attn"] | shifted}
        scaled, _ = update(raw, state, shifted)
        return first_order_change(attention_logits, shifted, scaled, x)

    for a in (0.1, 7.0):
        np.testing.assert_allclose(change(a), change(1.0), **EXACT)


GAINS = {"q_norm", "kv_norm"}
EVERYTHING = {module for module, _ in LATENT.values()}
KERNELS = EVERYTHING - GAINS
QUACK = {"paper": MLA, "normalized_min": MLA, "latent_norm": MLA_WITH_GAINS}


def change_of_mla(rule, growth, moving, normalized):
    """First-order changes `[nope or rope, heads, i, j]` of the logits by a step of the `moving`
    modules, all kernels being as at initialisation times `growth`."""
    init, update = compiled(QUACK[rule], rule=rule)
    rng = np.random.default_rng(3)
    first, raw = as_jax(latent(rng)), as_jax(latent(rng))
    x = rng.normal(size=(5, WIDTH))
    now = {
        module: jax.tree.map(lambda w: growth * w, leaves) if module in KERNELS else leaves
        for module, leaves in first["attn"].items()
    }
    scaled, _ = update(raw, init(first), {"attn": now})
    steps = {
        module: leaves if module in moving else jax.tree.map(jnp.zeros_like, leaves)
        for module, leaves in scaled["attn"].items()
    }
    return np.asarray(
        first_order_change(latent_logits, {"attn": now}, {"attn": steps}, x, normalized=normalized)
    )


@pytest.mark.parametrize("rule", ["paper", "normalized_min"])
def test_growth_of_all_weights_of_mla_leaves_the_change_as_it_began(rule):
    before, after = (
        change_of_mla(rule, growth, KERNELS - {"wq_a"}, normalized=False) for growth in (1.0, 3.0)
    )
    np.testing.assert_allclose(after, before, **EXACT)

    # The query latent feeds two paths, of which one, nope, has grown by another factor of 3.
    before, after = (
        change_of_mla(rule, growth, {"wq_a"}, normalized=False) for growth in (1.0, 3.0)
    )
    np.testing.assert_allclose(after[0], before[0], **EXACT)
    np.testing.assert_allclose(after[1], before[1] / 3, **EXACT)


def test_behind_latent_norms_only_the_rule_for_them_leaves_the_change_as_it_began():
    def changes(rule, moving):
        return (change_of_mla(rule, growth, moving, normalized=True) for growth in (1.0, 3.0))

    before, after = changes("latent_norm", EVERYTHING)
    np.testing.assert_allclose(after, before, **EXACT)

    # The paper's rule takes growth of the down-projections for growth of the logits, which the
    # norms undo: steps are 9 times too small along nope, 3 times along rope (of wq_a always 9).
    before, after = changes("paper", KERNELS)
    assert 1 / 9 < np.linalg.norm(after) / np.linalg.norm(before) < 1 / 3
    # And the gains' steps, at which it does not look, change the logits ever more.
    before, after = changes("paper", GAINS)
    assert np.linalg.norm(after) / np.linalg.norm(before) > 3


# Bounds

ETA = 0.03


def as_params(queries, keys):
    """An attention block from one matrix a head, `[in + 1, features]`, whose last row is a bias."""
    params = attention(np.random.default_rng(0))
    for name, heads in (("query", queries), ("key", keys)):
        stacked = np.stack(heads, axis=1)
        params["attn"][name] = {"kernel": stacked[:-1], "bias": stacked[-1]}
    return as_jax(params)


def largest_changes(rule, first, now, raw):
    """For each head the largest change of a logit by one step, over all pairs of inputs with
    ‖(x, 1)‖ = 1: to first order, in full, and how far the two can be apart."""
    init, update = compiled(MHA, rule=rule)
    scaled, _ = update(raw, init(first), now)
    w, d = matrices(ATTENTION, now), matrices(ATTENTION, scaled)
    changes = []
    for q, k, dq, dk in zip(w["q"], w["k"], d["q"], d["k"], strict=True):
        dq, dk = ETA * dq, ETA * dk
        linear = dq @ k.T + q @ dk.T
        changes.append(
            [
                np.linalg.norm(linear, 2),
                np.linalg.norm(linear + dq @ dk.T, 2),
                np.linalg.norm(dq) * np.linalg.norm(dk),
            ]
        )
    return np.transpose(changes) / np.sqrt(FEATURES)


def lemma_bounds(first, raw):
    """η τ (‖K₀‖‖O_Q‖ + ‖Q₀‖‖O_K‖) / sqrt(head features) for each head."""
    w, o = matrices(ATTENTION, first), matrices(ATTENTION, raw)
    q, k, oq, ok = (
        np.linalg.norm(tree[role], axis=(-2, -1)) for tree in (w, o) for role in ("q", "k")
    )
    return ETA * TAU * (k * oq + q * ok) / np.sqrt(FEATURES)


@given(
    seed=st.integers(0, 2**16),
    growth=st.tuples(*2 * [st.floats(0, 2).map(lambda power: 10**power)]),
    aligned=st.booleans(),
)
@settings(max_examples=200)
def test_lemma_1(seed, growth, aligned):
    """The bound holds however far the weights have grown; a constant learning rate breaks it."""
    rng = np.random.default_rng(seed)
    q, k, oq, ok, q_now, k_now = (rng.normal(size=(HEADS, WIDTH + 1, FEATURES)) for _ in range(6))
    if aligned:  # everything along one line, so that the logits change as much as they can
        line = rng.normal(size=FEATURES)
        oq = q = q_now = np.multiply.outer(rng.normal(size=(HEADS, WIDTH + 1)), line)
        ok = k = k_now = np.multiply.outer(rng.normal(size=(HEADS, WIDTH + 1)), line)

    def grown(now, first, by):
        before, after = (np.linalg.norm(w, axis=(-2, -1), keepdims=True) for w in (first, now))
        return by * before / after * now

    first, raw = as_params(q, k), as_params(oq, ok)
    now = as_params(grown(q_now, q, growth[0]), grown(k_now, k, growth[1]))
    bounds = lemma_bounds(first, raw)
    linear, full, apart = largest_changes("paper", first, now, raw)
    assert (linear <= bounds * (1 + 1e-12)).all()  # float64 rounding
    assert (full <= (bounds + apart) * (1 + 1e-12)).all()
    if aligned:
        np.testing.assert_allclose(linear, bounds, rtol=1e-12)  # the bound is tight
        linear, _, _ = largest_changes("fixed", first, now, raw)
        assert (linear > bounds * (1 + 1e-12)).all() or max(growth) < 1.001


def mla_bounds(rule, first, raw):
    """For each head τ Σ s₀(W) ‖O_W‖ / sqrt(nope + rope) over the paths of the six matrices: the
    larger s₀ of W_dq counts for both of its paths, or each its own."""
    w, o = matrices(LATENT, first), matrices(LATENT, raw)
    table = quack_reference.algorithm_2_table(w)
    reach = {
        role: [np.linalg.norm(m) for m in o[role]] / np.array(entries)
        for role, entries in table.items()
    }
    down = reach["q_down"].sum() if rule == "normalized_min" else 2 * reach["q_down"].max()
    own = reach["q_nope"] + reach["k_nope"] + reach["q_rope"]
    return TAU * (own + down + reach["kv_down"] + reach["k_rope"]) / np.sqrt(NOPE + ROPE)


@pytest.mark.parametrize("rule", ["paper", "normalized_min"])
def test_the_bound_for_mla(rule):
    """To first order no logit changes by more than ‖x‖‖x'‖ times the bound of its head."""
    init, update = compiled(MLA, rule=rule)
    rng = np.random.default_rng(5)
    first = as_jax(latent(rng))
    state = init(first)
    broken_without = 0
    for _ in range(50):
        raw, x = as_jax(latent(rng)), rng.normal(size=(5, WIDTH))
        now = as_jax(jax.tree.map(lambda w: w * 100 ** rng.uniform(), latent(rng)))
        scaled, _ = update(raw, state, now)
        constant = jax.tree.map(lambda u: TAU * u, raw)
        change, constant_change = (
            np.abs(first_order_change(latent_logits, now, steps, x, normalized=False).sum(0))
            for steps in (scaled, constant)
        )
        lengths = np.sqrt((x**2).sum(-1) + 1)  # with the 1 that meets the biases
        bounds = mla_bounds(rule, first, raw)[:, None, None] * np.outer(lengths, lengths)
        assert (change <= bounds).all()
        broken_without += (constant_change > bounds).any()
    assert broken_without > 25
