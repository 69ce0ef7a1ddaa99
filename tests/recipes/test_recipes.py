"""Recipes: every option is a hyper-parameter where Optax can make it one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc

KEYS = jax.random.split(jax.random.key(0), 5)
ATTENTION = {"query": (8, 2, 4), "key": (8, 2, 4), "value": (8, 2, 4), "out": (2, 4, 8)}
PARAMS = {
    "attn": {
        name: {"kernel": jax.random.normal(key, shape)}
        for key, (name, shape) in zip(KEYS, ATTENTION.items(), strict=False)
    },
    "mlp": {"kernel": jax.random.normal(KEYS[4], (8, 16))},
}
GRADS = jax.tree.map(jnp.sin, PARAMS)
SOWN = {("attn",): jnp.array([40.0, 1.0])}
LAYOUT = mc.layouts.mha()
HOW = mc.NewtonSchulz(mc.schedules.polar_express(steps=2), dtype="float32")
NUMBERS = {
    "learning_rate": 0.1,
    "threshold": 100.0,
    "weight_decay": 0.3,
    "momentum": 0.9,
    "alpha": 0.5,
}


def step_of(tx, state):
    return jax.jit(lambda state: tx.update(GRADS, state, PARAMS, max_logits=SOWN))(state)


def test_inject_hyperparams_makes_numbers_of_muonclip_changeable():
    make = optax.inject_hyperparams(mc.muonclip)
    tx = make(0.1, layout=LAYOUT, threshold=100.0, weight_decay=0.3, newton_schulz=HOW)
    _, state = step_of(tx, tx.init(PARAMS))
    assert set(NUMBERS) <= set(state.hyperparams)
    assert int(mc.qk_clip_state(state).heads_clipped) == 0
    changed = {
        "learning_rate": 0.2,
        "threshold": 10.0,
        "weight_decay": 0.0,
        "momentum": 0.5,
        "alpha": 1.0,
    }
    state.hyperparams.update({name: jnp.asarray(x) for name, x in changed.items()})
    updates, after = step_of(tx, state)
    plain = mc.muonclip(layout=LAYOUT, newton_schulz=HOW, **changed)
    expected, _ = step_of(plain, state.inner_state)
    assert int(mc.qk_clip_state(after).heads_clipped) == 1
    for ours, theirs in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        # Constants are folded where traced numbers are not: float32 rounding, of two
        # Newton–Schulz steps.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_mask_that_is_a_function_is_named_static_or_raises():
    def mask(params):
        return jax.tree.map(lambda p: jnp.ndim(p) > 2, params)

    options = {"layout": LAYOUT, "newton_schulz": HOW, "weight_decay_mask": mask}
    with pytest.raises(ValueError, match='static_args="weight_decay_mask"'):
        optax.inject_hyperparams(mc.muonclip)(0.1, **options).init(PARAMS)
    make = optax.inject_hyperparams(mc.muonclip, static_args="weight_decay_mask")
    tx = make(1.0, weight_decay=0.5, **options)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(PARAMS), PARAMS, max_logits=SOWN)
    assert not updates["mlp"]["kernel"].any()
    np.testing.assert_allclose(
        updates["attn"]["out"]["kernel"], -0.5 * PARAMS["attn"]["out"]["kernel"], rtol=1e-6
    )


def test_a_direction_that_descends_raises():
    with pytest.raises(ValueError, match="direction must come without a learning rate"):
        mc.quack(1e-3, layout=LAYOUT, direction=optax.adam(1e-3))
    with pytest.raises(ValueError, match="other must come without a learning rate"):
        mc.muon_direction(other=optax.sgd(1e-3))
