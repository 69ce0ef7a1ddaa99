"""`family`: what its methods are, and its tables, on records made up."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from studies.common.model import attention_layout, init_params
from studies.family.__main__ import METHODS, TINY, settings
from studies.family.report import report, share_of_tokens

SMOKE = settings(TINY, (0.01, 0.02), steps=20, warmup=0)


def params_and_grads():
    params = jax.jit(init_params, static_argnums=(0, 1))(TINY, 0)
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype)  # noqa: E731
    return params, [jax.tree.map(draw, params) for _ in range(3)]


def trained(tx):
    """What three steps change."""
    first, grads = params_and_grads()
    params, state = first, tx.init(first)
    for grad in grads:
        updates, state = jax.jit(tx.update)(grad, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda new, old: np.asarray(new - old), params, first)


def member(method, **options):
    """A method at a constant rate."""
    config, optimizer = SMOKE[f"{method}, 0.02"]
    return replace(optimizer, decay_steps=None, **options).chain(config)


@pytest.fixture(scope="module")
def changes():
    return {method: trained(member(method)) for method in METHODS}


def test_methods_differ_in_hidden_matrices_and_in_nothing_else(changes):
    muon = changes["Muon"]
    for method, change in changes.items():
        for part in ("embed", "norm"):
            chex_equal(change[part], muon[part])
        same = np.array_equal(
            change["layers"]["mlp"]["up"]["kernel"], muon["layers"]["mlp"]["up"]["kernel"]
        )
        # How attention is cut says nothing about the MLP.
        assert same == method.startswith("Muon, ") or method == "Muon"


def chex_equal(first, second):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), first, second)


def test_heads_are_cut_as_the_method_says(changes):
    queries = [
        changes[method]["layers"]["attn"]
        for method in ("Muon", "Muon, each head", "Muon, two heads")
    ]
    first = [np.concatenate([x.ravel() for x in jax.tree.leaves(q)]) for q in queries]
    for i in range(3):
        for j in range(i):
            assert np.abs(first[i] - first[j]).max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_updates_have_adams_size(method):
    """So that a learning rate means the same: 0.2 η, less what five steps leave undone. Adam's own
    is η at the first step, of which the 0.2 is what is left later."""
    config, _ = SMOKE["Muon, 0.02"]
    tx = member(method, weight_decay=0.0)
    params, grads = params_and_grads()
    updates, _ = jax.jit(tx.update)(grads[0], tx.init(params), params)
    kernel = updates["layers"]["mlp"]["up"]["kernel"]
    rms = float(jnp.sqrt(jnp.mean(kernel**2)))
    if method == "Hyperball":  # η of the weights' own RMS
        weights = params["layers"]["mlp"]["up"]["kernel"]
        assert rms == pytest.approx(0.02 * float(jnp.sqrt(jnp.mean(weights**2))), rel=0.02)
    else:
        wanted = 1 if method == "AdamW" else 0.2
        assert rms == pytest.approx(0.02 * wanted, rel=0.05)
    assert config.layers == kernel.shape[0]


def test_muon_is_the_packages_recipe():
    config, _ = SMOKE["Muon, 0.02"]
    recipe = mc.muon(
        0.02,
        other_learning_rate=0.01,
        layout=attention_layout(config),
        granularity=mc.Granularity.kimi_k2(),
    )
    chex_equal(trained(member("Muon")), trained(recipe))


def record(method, rate, seed, losses):
    return {
        "seed": seed,
        "optimizer": {"learning_rate": rate, "warmup": 1},
        "curves": {"max_logits": np.ones((4, 1, 1)).tolist()},
        "measurements": [{"valid_loss": loss} for loss in losses],
    }


def test_tokens_to_a_loss():
    one = record("", 0.1, 0, [6.0, 4.0, 3.0])
    assert share_of_tokens(one, 3.0) == 1.0
    assert share_of_tokens(one, 3.5) == 0.75
    assert share_of_tokens(one, 5.0) == 0.25
    assert share_of_tokens(one, 2.9) is None and share_of_tokens(one, None) is None


def test_the_report_is_that_of_the_records(tmp_path):
    losses = {"AdamW": [6.0, 4.0, 3.0], "Muon": [6.0, 3.0, 2.5], "MuonEq": [6.0, 5.0, 3.5]}
    runs = {
        f"{method}, {rate:g}": [
            record(method, rate, seed, [loss + 0.1 * seed + 10 * (rate - 0.02) for loss in each])
            for seed in (0, 1)
        ]
        for method, each in losses.items()
        for rate in (0.02, 0.04)
    }
    text = report(runs, None, tmp_path)
    assert "| AdamW | 0.02 | 3.050 ± 0.071 | +0.500 [+0.500, +0.500] (2 seeds) |" in text
    assert "| Muon | 0.02 | 0.50 ± 0.00 | 2 of 2 |" in text
    assert "| AdamW | 0.02 | 1.00 ± 0.00 | 2 of 2 |" in text
    assert "| MuonEq | 0.02 |  | 0 of 2 |" in text
    assert (tmp_path / "rates.png").exists()
