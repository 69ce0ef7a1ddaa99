"""QK-Clip: wirings that undo it, factors out of a dtype's range, clips too mild for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from muonclip_jax._transforms.clip import INEFFECTIVE, clip_factor, ineffective

HEADS, KEY_HEADS, IN, F = 4, 2, 8, 3
LAYOUT = mc.layouts.gqa(value=None, out=None)
THRESHOLD = 2.0


def params_of(dtype=jnp.float32, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    kernel = lambda heads: {"kernel": jnp.asarray(scale * rng.normal(size=(IN, heads, F)), dtype)}  # noqa: E731
    return {"attn": {"query": kernel(HEADS), "key": kernel(KEY_HEADS)}}


def sown_by(params):
    """The largest of each head's logits on the unit vectors as tokens; float64 outside of jit."""
    traced = isinstance(params["attn"]["query"]["kernel"], jax.core.Tracer)
    query, key = (params["attn"][name]["kernel"] for name in ("query", "key"))
    xp = jnp
    if not traced:
        xp, query, key = np, np.asarray(query, np.float64), np.asarray(key, np.float64)
    key = key.repeat(HEADS // KEY_HEADS, axis=1)
    return {("attn",): xp.einsum("ihf,jhf->hij", query, key).max((1, 2))}


def train(tx, steps, params=None, model=lambda params: params, growth=0.3):
    """The clip's states of a few steps of gradients that enlarge all logits.

    Args:
      model: From the parameters to those that make the logits.
    """
    params = params_of(scale=2.0) if params is None else params

    @jax.jit
    def step(params, state):
        sown = sown_by(model(params))
        grads = jax.tree.map(lambda p: -growth * p, params)
        updates, state = tx.update(grads, state, params, max_logits=sown)
        return optax.apply_updates(params, updates), state

    state, states = tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        states.append(mc.qk_clip_state(state))
    return params, state, states


def most(states):
    return [int(state.ineffective_clips["attn"].max()) for state in states]


OTHER = functools.partial(jax.tree.map, lambda p: 0 * p + 2)
ONE_STEP = mc.NewtonSchulz(mc.schedules.polar_express(1))
CLIP = functools.partial(mc.qk_clip, LAYOUT, THRESHOLD)


@pytest.mark.parametrize(
    ("wiring", "model"),
    [
        (lambda: optax.chain(CLIP(), optax.adamw(1e-3)), lambda params: params),
        (lambda: optax.chain(CLIP(), optax.sgd(1e-2)), lambda params: params),
        (lambda: optax.chain(optax.adam(1e-3), CLIP(), optax.set_to_zero()), lambda params: params),
        # The logits are made with other weights.
        (lambda: optax.chain(optax.adam(1e-3), CLIP()), OTHER),
    ],
    ids=["before adamw", "before sgd", "frozen behind", "other weights"],
)
def test_a_clip_that_does_nothing_is_flagged_within_five_steps(wiring, model):
    params, state, states = train(wiring(), 5, model=model)
    assert most(states[:1]) == [0] and most(states)[-1] >= INEFFECTIVE
    report = mc.attention_report(params, state, None, LAYOUT, threshold=THRESHOLD)
    found = report.blocks["attn"].ineffective
    assert found.any() and report.blocks["attn"]._asdict()["ineffective"] is found
    assert report.scalars()["ineffective/attn"] == found.sum()
    for told in ("clips without effect", "last link", "make the logits", "frozen"):
        assert told in str(report).replace("\n", " ")


@pytest.mark.parametrize(
    "before",
    [
        lambda: optax.adamw(3e-2),
        lambda: optax.sgd(0.1),
        lambda: mc.muon(0.03, layout=LAYOUT, newton_schulz=ONE_STEP),
    ],
    ids=["adamw", "sgd", "muon"],
)
def test_a_clip_at_the_end_is_not(before):
    """Whatever stands before it, and although the logits outgrow the threshold at every step."""
    params, state, states = train(optax.chain(before(), CLIP()), 10)
    assert sum(int(s.heads_clipped) for s in states) > 10  # it clipped
    assert max(most(states)) < INEFFECTIVE
    report = mc.attention_report(params, state, None, LAYOUT, threshold=THRESHOLD)
    assert not report.blocks["attn"].ineffective.any()
    assert "last link" not in str(report)


def test_the_rule_that_counts():
    """log(S'/S) > ½ log γ after γ < 0.9; what is not finite tells nothing."""
    rows = [
        # count, S, γ, S', new count
        (0, 100.0, 0.5, 90.0, 1),
        (2, 100.0, 0.5, 71.0, 3),  # √½ = 0.7071
        (2, 100.0, 0.5, 70.0, 0),
        (2, 100.0, 0.5, 50.0, 0),
        (2, 100.0, 0.95, 300.0, 0),  # a mild clip is none
        (2, 100.0, 1.0, 300.0, 0),
        (2, 100.0, 0.5, -3.0, 0),
        (2, 100.0, 0.5, np.nan, 2),
        (2, 100.0, 0.5, np.inf, 2),
        (2, 100.0, 0.5, -np.inf, 2),
        (0, -np.inf, 1.0, 5.0, 0),  # the first step
        (2, np.nan, 1.0, 5.0, 0),
        (1, 3e38, 1e-6, 3e38, 2),
    ]
    count, *numbers, expected = map(jnp.asarray, zip(*rows, strict=True))
    before, gamma, maxima = (x.astype(jnp.float32) for x in numbers)
    found = jax.jit(ineffective)(count, before, gamma, maxima)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("wrap", ["accumulate", "scan", "apply_if_finite"])
def test_the_count_under_wrappers(wrap):
    tx = optax.chain(CLIP(), optax.sgd(1e-2))
    params, steps = params_of(scale=2.0), 4
    sown = {("attn",): jnp.full(HEADS, 20.0)}
    if wrap == "accumulate":
        tx, steps = mc.accumulate(tx, 2), 8
    if wrap == "apply_if_finite":
        tx = optax.apply_if_finite(tx, 3)

    def step(state, _):
        _, state = tx.update(params, state, params, max_logits=sown)
        return state, None

    if wrap == "scan":
        state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=steps))(tx.init(params))
    else:
        state = tx.init(params)
        for _ in range(steps):
            state, _ = jax.jit(step)(state, None)
    np.testing.assert_array_equal(mc.qk_clip_state(state).ineffective_clips["attn"], 3)


def test_each_layer_of_a_stack_has_its_own_count():
    params = jax.tree.map(lambda x: jnp.stack([x, x]), params_of())
    tx, frozen = CLIP(), jnp.array([40.0, 1.0, 40.0, 40.0])
    state, update = tx.init(params), jax.jit(tx.update)
    for falls in (1.0, 0.5, 0.25, 0.125):
        sown = {("attn",): jnp.stack([frozen, 40 * jnp.array([falls, 1, falls, 1])])}
        _, state = update(params, state, params, max_logits=sown)
    found = state.ineffective_clips["attn"]
    assert found.dtype == jnp.int32 and found.shape == (2, HEADS)
    # γ = 0.05, 0.1, 0.2, 0.4: halving does not do.
    np.testing.assert_array_equal(found, [[3, 0, 3, 3], [3, 3, 3, 3]])


# --- γ in (0, 1]
# How a group's γ is shared: what its key takes, which depends on alpha only where it is split.
SHARES = pytest.mark.parametrize(
    "shares",
    [
        {"shared_keys": "untouched"},
        {"shared_keys": "split", "alpha": 0.0},
        {"shared_keys": "split", "alpha": 0.5},
        {"shared_keys": "split", "alpha": 1.0},
    ],
    ids=["untouched", "keys", "halves", "queries"],
)
DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32]
LARGEST = float(jnp.finfo(jnp.float32).max)


@SHARES
@pytest.mark.parametrize("dtype", DTYPES, ids=["f16", "bf16", "f32"])
def test_no_maximum_makes_a_weight_zero_or_not_finite(dtype, shares):
    """One head of a group at 1e20 and more: the shared key and the other query live on."""
    params = params_of(dtype, scale=0.02)
    tx = mc.qk_clip(LAYOUT, 100.0, **shares)
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def both(maxima):
        sown = {("attn",): maxima}
        updates, state = tx.update(zeros, tx.init(params), params, max_logits=sown)
        applied = mc.apply_qk_clip(params, sown, LAYOUT, 100.0, **shares)
        return optax.apply_updates(params, updates), state.gamma["attn"], applied

    for largest in (1e5, 1e20, LARGEST):
        maxima = jnp.array([largest, 50.0, 150.0, largest], jnp.float32)
        after, gamma, applied = both(maxima)
        np.testing.assert_array_equal(gamma > 0, True)
        np.testing.assert_array_equal(gamma <= 1, True)
        np.testing.assert_allclose(gamma[1:3], [1, 100 / 150], rtol=1e-6)
        for tree in (after, applied):
            for name in ("query", "key"):
                found = tree["attn"][name]["kernel"]
                assert jnp.isfinite(found).all()
                assert (found != 0).mean() > 0.9, (name, largest)
        # The other head of each group keeps its logits: at the floor the update, which is as large
        # as the key, rounds to a sixteenth of what is left of it.
        old, new = (sown_by(tree)["attn",] for tree in (params, after))
        np.testing.assert_allclose(new[1:3] / old[1:3], gamma[1:3], rtol=1 / 8)


@SHARES
@pytest.mark.parametrize(
    ("dtype", "scale"), [(jnp.float16, 1e4), (jnp.bfloat16, 1e9), (jnp.float32, 1e15)]
)
def test_what_is_far_above_is_clipped_over_several_steps(dtype, scale, shares):
    params = params_of(dtype, scale)
    tx = mc.qk_clip(LAYOUT, 100.0, **shares)
    state = tx.init(params)

    @jax.jit
    def step(params, state, sown):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(zeros, state, params, max_logits=sown)
        return optax.apply_updates(params, updates), state

    steps, sown = 0, sown_by(params)
    while max(sown["attn",]) > 110 and steps < 20:
        sown = {path: jnp.asarray(x, jnp.float32) for path, x in sown.items()}
        params, state = step(params, state, sown)
        assert (state.gamma["attn"] > 0).all()
        steps, sown = steps + 1, sown_by(params)
    # bfloat16 keeps 1/256 of each weight.
    assert steps > 1 and min(sown["attn",]) > 90 and max(sown["attn",]) < 110
    assert int(state.ineffective_clips["attn"].max()) == 0


@pytest.mark.parametrize("floor", [0.25, 1e-3, 2.0**-63])
def test_the_factor_has_a_floor(floor):
    maxima = jnp.array([50.0, 1e3, 1e30, LARGEST, jnp.inf, jnp.nan])
    gamma = clip_factor(maxima, 1e-3, floor=floor)
    expected = np.maximum(1e-3 / np.array([50.0, 1e3, 1e30, LARGEST]), floor)
    np.testing.assert_allclose(gamma[:4], expected, rtol=1e-6)
    np.testing.assert_array_equal(gamma[4:], 1)


# --- clips too mild for the dtype
@SHARES
@pytest.mark.parametrize(
    ("dtype", "maximum", "lost"),
    [
        (jnp.float16, 100.01, True),
        (jnp.float16, 130.0, False),
        (jnp.bfloat16, 100.1, True),
        (jnp.bfloat16, 130.0, False),
        (jnp.float32, 100.01, False),
    ],
)
def test_clips_too_mild_for_the_dtype_are_counted_in_groups_too(dtype, maximum, lost, shares):
    params = params_of(dtype)
    tx = mc.qk_clip(LAYOUT, 100.0, **shares)
    zeros = jax.tree.map(jnp.zeros_like, params)
    sown = {("attn",): jnp.full(HEADS, maximum)}
    update = jax.jit(tx.update)
    state = tx.init(params)
    for steps in (1, 2):
        updates, state = update(zeros, state, params, max_logits=sown)
        assert int(state.lost_heads) == (steps * HEADS if lost else 0)
    after = optax.apply_updates(params, updates)
    kept = jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), params, after))
    assert all(kept) == lost
